"""Cross-match with hand-made answers in the form of astroquery, which need not be installed; no network is used."""

import csv
import math
import sys
import threading
from functools import partial
from types import ModuleType

import numpy as np
import pytest
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.table import MaskedColumn, Table
from hypothesis import given
from hypothesis import strategies as st

from anomalymatch import terminal
from anomalymatch.errors import ConfigError, DataError, DownloadError
from anomalymatch.scoring import crossmatch as module
from anomalymatch.scoring.crossmatch import Candidate, Position, crossmatch, nearest_objects, read_positions

ARCSEC = 1 / 3600
TOP = [("a.fits", 10.0, 20.0, 0.9), ("b, c.fits", 359.9999, 0.0, 0.8), ("ü.fits", 50.0, 90.0, 0.7)]


class RemoteServiceError(Exception):
    """Error of the name that astroquery uses."""


class Simbad:
    """Fake of astroquery.simbad.Simbad, which finds all its objects (name, type, ra, dec) at every position."""

    def __init__(self):
        self.objects, self.asked, self.fails = [], [], None

    def query_tap(self, query, *, maxrec=10000, **uploads):
        (wanted,) = uploads.values()
        assert list(uploads) == ["wanted"]
        assert wanted.colnames == ["place", "ra", "dec"]
        assert all(0 <= ra < 360 for ra in wanted["ra"])
        self.asked.append((query, len(wanted), maxrec))
        if self.fails is not None:
            return self.fails()
        rows = [(row["place"], *known) for row in wanted for known in self.objects]
        columns = [list(column) for column in zip(*rows, strict=True)] or [[]] * 5
        table = Table({"place": columns[0], "main_id": columns[1], "otype": columns[2]})
        for name, values in (("ra", columns[3]), ("dec", columns[4])):
            numbers = [0.0 if value is None else value for value in values]
            table[name] = MaskedColumn(numbers, mask=[value is None for value in values], dtype=float)
        return table


class Ned(Simbad):
    """Fake of astroquery.ipac.ned.Ned."""

    columns = ("Object Name", "RA", "DEC", "Type")

    def query_region(self, coordinates, *, radius):
        self.asked.append((coordinates.ra.deg, coordinates.dec.deg, radius.to_value(units.arcsec)))
        if self.fails is not None:
            return self.fails()
        if not self.objects:
            raise RemoteServiceError(
                "The remote service returned the following error message.\nERROR:  No object found."
            )
        name, kind, ra, dec = map(list, zip(*self.objects, strict=True))
        return Table([name, ra, dec, kind], names=self.columns)


def apart(*degrees):
    ra, dec, other_ra, other_dec = degrees
    return SkyCoord(ra, dec, unit="deg").separation(SkyCoord(other_ra, other_dec, unit="deg")).arcsec


@pytest.fixture
def simbad(monkeypatch):
    return _inject(monkeypatch, "astroquery.simbad", Simbad=Simbad())


@pytest.fixture
def ned(monkeypatch):
    return _inject(monkeypatch, "astroquery.ipac.ned", Ned=Ned())


def _inject(monkeypatch, name, **contents):
    parts = name.split(".")
    for k in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:k]), ModuleType(".".join(parts[:k])))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)
    return next(iter(contents.values()))


@pytest.fixture
def output(tmp_path):
    write_top(tmp_path, TOP)
    return tmp_path


def write_top(folder, rows):
    table = Table(rows=[(*row, 2.0) for row in rows], names=("id", "ra", "dec", "score", "logit"))
    table["ra"].unit = table["dec"].unit = units.deg
    table.write(folder / "top.vot", format="votable", overwrite=True)


def read_csv(folder):
    with (folder / "crossmatch.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("service", ["simbad", "ned"])
def test_nearest_object_within_the_radius(service, request, output):
    """Two candidates for the first position, one beyond 0° for the second, none for the third."""
    client = request.getfixturevalue(service)
    client.objects = [
        ("M  31", "G", 10.0, 20.0 + 3 * ARCSEC),
        ("NGC 1", "AGN", 10.0 + 1 * ARCSEC / math.cos(math.radians(20)), 20.0),
        ("far", "*", 10.0, 20.0 - 5.5 * ARCSEC),
        ("beyond zero", "QSO", 0.0001, 0.0),
    ]
    matches = crossmatch(output, radius=5.0, service=service)
    assert [place.id for place, _ in matches] == [row[0] for row in TOP]
    first, second, third = (known for _, known in matches)
    assert (first.name, first.type) == ("NGC 1", "AGN")
    assert first.separation == pytest.approx(1, abs=1e-4)
    assert second.name == "beyond zero"
    assert second.separation == pytest.approx(0.72, abs=1e-4)
    assert third is None
    rows = read_csv(output)
    assert list(rows[0]) == ["id", "ra", "dec", "score", "name", "type", "separation"]
    assert list(rows[1].values()) == ["b, c.fits", "359.9999", "0.0", "0.8", "beyond zero", "QSO", "0.720"]
    assert list(rows[2].values()) == ["ü.fits", "50.0", "90.0", "0.7", "", "", ""]
    table = Table.read(output / "crossmatch.vot", format="votable")
    assert table.colnames == list(module.COLUMNS)
    assert table["separation"].mask.tolist() == [False, False, True]


def test_pole_is_one_position(simbad, output):
    """At 90° every right ascension is the same."""
    simbad.objects = [("Polaris", "*", 230.0, 90 - 2 * ARCSEC)]
    known = crossmatch(output)[2][1]
    assert known.name == "Polaris"
    assert known.separation == pytest.approx(2, abs=1e-6)


def test_radius_limits_the_distance(simbad, output):
    simbad.objects = [("near", "G", 10.0, 20.0 + 4 * ARCSEC)]
    assert crossmatch(output, radius=3.9)[0][1] is None
    assert crossmatch(output, radius=4.1)[0][1].name == "near"
    assert simbad.asked[0][0].endswith("CIRCLE('ICRS', wanted.ra, wanted.dec, 0.001083333)) = 1")


def test_only_the_top_is_queried(ned, output):
    assert len(crossmatch(output, service="ned", top=2)) == 2
    assert ned.asked == [(10.0, 20.0, 5.0), (pytest.approx(359.9999), 0.0, 5.0)]
    assert len(read_csv(output)) == 2


def test_older_column_names_of_ned(ned, output):
    ned.columns = ("Object Name", "RA(deg)", "DEC(deg)", "Type")
    ned.objects = [("MESSIER 031", "G", 10.0, 20.0)]
    assert crossmatch(output, service="ned")[0][1].name == "MESSIER 031"


def test_positions_are_queried_in_batches(simbad, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SIMBAD_POSITIONS", 4)
    write_top(tmp_path, [(f"{k}", 10.0 * k, 1.0, 0.5) for k in range(10)])
    simbad.objects = [(f"object {k}", "G", 10.0 * k, 1.0) for k in range(0, 10, 2)]
    matches = crossmatch(tmp_path)
    assert [count for _, count, _ in simbad.asked] == [4, 4, 2]
    assert [known and known.name for _, known in matches] == [f"object {k}" if k % 2 == 0 else None for k in range(10)]


def test_empty_list_needs_no_query(simbad, tmp_path):
    write_top(tmp_path, [("a", 1.0, 1.0, 0.5)])
    Table.read(tmp_path / "top.vot")[:0].write(tmp_path / "top.vot", format="votable", overwrite=True)
    assert crossmatch(tmp_path) == []
    assert simbad.asked == []
    assert read_csv(tmp_path) == []


def test_objects_without_coordinates_or_type(simbad, output):
    simbad.objects = [("nowhere", "G", None, None), ("somewhere", "", 10.0, 20.0)]
    name, kind, apart_ = crossmatch(output)[0][1]
    assert (name, kind, apart_) == ("somewhere", "", 0.0)


@pytest.mark.parametrize("answer", [None, Table(names=["place", "main_id", "otype", "ra", "dec"])])
def test_empty_answers(simbad, output, answer):
    simbad.fails = lambda: answer
    assert [known for _, known in crossmatch(output)] == [None] * 3


@pytest.mark.parametrize("service", ["simbad", "ned"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Name or service not known\nsecond line"), "ConnectionError: Name or service not known"),
        (TimeoutError(), "TimeoutError"),
        (OSError("404: no host\nwas found"), "OSError: 404: no host was found"),
        (RemoteServiceError("too many requests"), "RemoteServiceError: too many requests"),
        (ValueError("x" * 5000), "ValueError: x{150}[)]"),
    ],
)
def test_network_error_is_one_line(request, service, error, message, output):
    def fails():
        raise error

    request.getfixturevalue(service).fails = fails
    with pytest.raises(DownloadError, match=rf"^{service.upper()} .*\({message}"):
        crossmatch(output, service=service)
    assert [path.name for path in output.iterdir()] == ["top.vot"]


@pytest.mark.parametrize("service", ["simbad", "ned"])
def test_timeout(request, service, output):
    release = threading.Event()
    request.getfixturevalue(service).fails = lambda: release.wait(30)
    message = rf"^{service.upper()} .*0\.05 s.*--timeout"
    with pytest.raises(DownloadError, match=message):
        crossmatch(output, service=service, timeout=0.05)
    release.set()


def test_answer_with_other_columns(simbad, output):
    simbad.fails = lambda: Table({"MAIN_ID": ["M 31"], "ra": [1.0]})
    with pytest.raises(DownloadError, match=r"^SIMBAD .*dec, main_id, otype, place.*MAIN_ID, ra"):
        crossmatch(output)


def test_answer_that_was_cut_off(simbad, output, monkeypatch):
    monkeypatch.setattr(module, "SIMBAD_ROWS", 2)
    simbad.objects = [("a", "G", 10.0, 20.0), ("b", "G", 10.0, 20.0)]
    with pytest.raises(ConfigError, match=r"^--radius is 5\.0"):
        crossmatch(output)
    assert simbad.asked[0][2] == 2


@pytest.mark.parametrize("service", ["simbad", "ned"])
def test_missing_astroquery_is_an_error_with_the_package(service, output, monkeypatch):
    monkeypatch.setitem(sys.modules, "astroquery", None)
    for name in ("astroquery.simbad", "astroquery.ipac", "astroquery.ipac.ned"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(DataError, match=r'^the cross-match needs: pip install "anomalymatch\[astroquery\]"$'):
        crossmatch(output, service=service)


@pytest.mark.parametrize(
    ("option", "value"),
    [("service", "vizier"), ("radius", 0.0), ("radius", float("nan")), ("top", 0), ("timeout", float("inf"))],
)
def test_options_out_of_range(option, value, output):
    with pytest.raises(ConfigError, match=f"^--{option} is {value!r}: "):
        crossmatch(output, **{option: value})


def test_unreadable_lists(tmp_path):
    path = tmp_path / "top.vot"
    with pytest.raises(DataError, match=r"top\.vot is missing"):
        read_positions(path)
    Table({"id": ["a"], "ra": [1.0]}).write(path, format="votable")
    with pytest.raises(DataError, match=r"top.vot is no VOTable with id, ra, dec and score \(KeyError: 'dec'\)$"):
        read_positions(path)
    for place in ((float("inf"), 0.0), (0.0, 91.0), (0.0, float("-inf"))):
        write_top(tmp_path, [("a", *place, 0.5)])
        with pytest.raises(DataError, match=r"top\.vot: a "):
            read_positions(path)


def test_truncated_list_is_an_error(output):
    whole = (output / "top.vot").read_bytes()
    for length in range(0, len(whole) - 20, 97):
        (output / "top.vot").write_bytes(whole[:length])
        with pytest.raises(DataError, match="is no VOTable"):
            read_positions(output / "top.vot")


def test_votable_of_a_scoring_job_is_read(tmp_path, make_source):
    from anomalymatch.scoring.finish import TopK, write_top_votable

    source = make_source(3)
    source.coordinates = lambda id_: None if id_ == "im000001" else (float(id_[-1]), -45.0)
    top = TopK(3)
    top.add(list(source.ids), np.array([0.0, 1.0, 2.0], dtype=np.float32))
    write_top_votable(tmp_path / "top.vot", top, source)
    places = read_positions(tmp_path / "top.vot")
    assert [place[:3] for place in places] == [("im000002", 2.0, -45.0), ("im000000", 0.0, -45.0)]
    assert places[1].score == 0.5


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(-10, 10), st.floats(-10, 10)), max_size=20))
def test_nearest_objects_are_those_of_a_slow_search(offsets):
    places = [
        Position(str(k), ra, dec, 0.5) for k, (ra, dec) in enumerate([(0.0, 0.0), (120.0, 60.0), (200.0, -89.99)])
    ]
    candidates = [
        Candidate(k, f"{n:02d}", "G", places[k].ra + x * ARCSEC, places[k].dec + y * ARCSEC)
        for n, (k, x, y) in enumerate(offsets)
    ]
    for k, known in enumerate(nearest_objects(places, candidates, 6.0)):
        near = [(apart(*places[k][1:3], c.ra, c.dec), c.name) for c in candidates if c.position == k]
        assert (known is None) == (min(near, default=(7.0, ""))[0] > 6.0)
        assert known is None or (known.separation, known.name) == (pytest.approx(min(near)[0], abs=1e-6), min(near)[1])


@pytest.fixture
def command(call_main):
    return partial(call_main, module.main)


def test_command_shows_images_without_known_object_first(command, simbad, output, monkeypatch):
    monkeypatch.setattr(terminal.console, "_width", 120, raising=False)
    simbad.objects = [("M [31]", "G", 10.0, 20.0)]
    code, out, err = command(output, "--radius", 3, "--service", "simbad", "--top", 3)
    assert (code, out) == (0, ""), err
    lines = [line for line in err.splitlines() if ".fits" in line]
    assert [line.split(".fits")[0].strip() for line in lines] == ["b, c", "ü", "a"]
    assert "M [31]" in lines[2]
    assert "2 of 3" in err
    assert "crossmatch.csv" in err


def test_command_fails_in_one_line(command, simbad, tmp_path):
    assert "top.vot is missing" in command(tmp_path).error_line


def test_command_can_be_stopped(command, simbad, output, monkeypatch):
    monkeypatch.setattr(module, "read_positions", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = command(output)
    assert code == 130
    assert err == "Stopped. Nothing was written.\n"
