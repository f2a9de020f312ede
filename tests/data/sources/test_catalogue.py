import csv
import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from astropy.io import fits
from astropy.nddata import Cutout2D
from astropy.table import MaskedColumn, Table
from astropy.wcs import WCS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import damaged, wcs
from PIL import Image as PillowImage

from anomalymatch.checks import trusting
from anomalymatch.data.sources import sky as sky_module
from anomalymatch.data.sources import tiles as tiles_module
from anomalymatch.data.sources.catalogue import CatalogueSource
from anomalymatch.data.sources.sky import Sky, assign
from anomalymatch.errors import ConfigError, DataError, LabelError
from anomalymatch.types import Reject

HEIGHT, WIDTH = 30, 40
TILE = (np.arange(HEIGHT)[:, None] * 100 + np.arange(WIDTH)).astype(np.float32)
"""A pixel says where it is: 100 * y + x."""


def tile(path: Path, pixels: np.ndarray = TILE, at: WCS | None = None, **cards: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {**at.to_header()} if at else {}
    fits.PrimaryHDU(pixels, fits.Header(header | cards)).writeto(path, overwrite=True)
    return path


def table(path: Path, /, **columns: Any) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def reasons(source: CatalogueSource) -> list[str]:
    return [result.reason if isinstance(result, Reject) else "" for result in source.read(source.ids)]


XY: dict[str, Any] = {"x_column": "x", "y_column": "y"}


@pytest.fixture
def simple(tmp_path: Path) -> Path:
    """Four rows in two tiles, by pixels."""
    tile(tmp_path / "a.fits")
    tile(tmp_path / "sub/b.fits", TILE + 5000)
    return table(
        tmp_path / "cat.csv",
        id=["p", "q", "r", "s"],
        x=[10, 20, 10, 0],
        y=[5, 6, 5, 0],
        tile=["a.fits", "a.fits", "sub/b.fits", "a.fits"],
    )


def test_cutouts_by_pixels(simple: Path) -> None:
    source = CatalogueSource(str(simple), size=4, **XY)
    assert (list(source.ids), source.name, source.bands) == (["p", "q", "r", "s"], "cat", ("grey",))
    assert (source.ids[1:3], source.ids[-1]) == (["q", "r"], "s")
    assert source.load(0)[..., 0].tolist() == TILE[3:7, 8:12].tolist()
    assert source.load(2)[..., 0].tolist() == (TILE[3:7, 8:12] + 5000).tolist()
    assert source.load(0).dtype == np.float32
    assert source.read(["s"])[0][0, 0, 0] == 0  # outside of the tile


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(x=st.floats(-30, 70), y=st.floats(-30, 60), side=st.integers(1, 50))
def test_cutouts_match_astropy(tmp_path: Path, x: float, y: float, side: int) -> None:
    opened = tiles_module.open_tile(tile(tmp_path / "a.fits"), None)
    try:
        theirs = Cutout2D(TILE, (x, y), side, mode="partial", fill_value=np.nan).data
    except ValueError:
        with pytest.raises(DataError, match=r"it lies outside of its tile a\.fits: x = .* of 40 x 30 pixels"):
            opened.cut(x, y, side)
    else:
        assert np.array_equal(opened.cut(x, y, side)[..., 0], theirs, equal_nan=True)


@pytest.mark.parametrize("kind", ["RA/DEC", "DEC/RA", "GLON/GLAT"])
def test_cutouts_by_position(tmp_path: Path, kind: str) -> None:
    there = wcs(123.0, 45.0, kind=kind)
    tile(tmp_path / "a.fits", at=there, BUNIT="nJy")
    where = there.pixel_to_world([10.0, 25.3], [5.0, 8.8]).icrs
    file = table(tmp_path / "cat.csv", RA=where.ra.deg, Dec=where.dec.deg, tile=["a.fits"] * 2)
    source = CatalogueSource(file, size=2)
    assert list(source.ids) == ["cat/0000000", "cat/0000001"]
    assert source.units == "nJy"
    assert source.load(0)[..., 0].tolist() == TILE[4:6, 9:11].tolist()
    assert source.load(1)[..., 0].tolist() == TILE[8:10, 25:27].tolist()
    assert source.coordinates("cat/0000001") == pytest.approx((where.ra.deg[1], where.dec.deg[1]), abs=1e-9)
    by_pixels = CatalogueSource(
        table(tmp_path / "xy.csv", x=[10.0], y=[5.0], tile=["a.fits"]), x_column="x", y_column="y"
    )
    assert by_pixels.coordinates("xy/0000000") == pytest.approx((where.ra.deg[0], where.dec.deg[0]), abs=1e-9)


def test_sizes(tmp_path: Path) -> None:
    tile(tmp_path / "a.fits", at=wcs(arcsec=0.5))
    file = table(tmp_path / "cat.csv", ra=[10.0] * 4, dec=[20.0] * 4, side=[3, 5.4, "", 1e9], tile=["a.fits"] * 4)
    assert CatalogueSource(file).load(0).shape == (64, 64, 1)
    assert CatalogueSource(file, size=7).load(0).shape == (7, 7, 1)
    assert CatalogueSource(file, size_arcsec=5).load(0).shape == (10, 10, 1)
    sized = CatalogueSource(file, size_column="side")
    assert [sized.load(i).shape for i in (0, 1)] == [(3, 3, 1), (5, 5, 1)]
    assert reasons(sized)[2:] == [
        "its size of nan pixels is no number from 1 to 10000",
        "its size of 1e+09 pixels is no number from 1 to 10000",
    ]
    sources = [CatalogueSource(file, **option) for option in ({}, {"size": 7}, {"size_arcsec": 5})]
    assert len({source.fingerprint for source in [*sources, sized]}) == 4


def test_tiles_of_several_bands(tmp_path: Path) -> None:
    for i, band in enumerate("gri"):
        tile(tmp_path / f"{band}.fits", TILE + 10000 * i)
    tile(tmp_path / "small.fits", TILE[:20])
    tile(tmp_path / "cube.fits", np.stack([TILE, TILE]))
    columns = {"x": [10] * 4, "y": [5] * 4, "tile_g": ["g.fits"] * 4, "tile_r": ["r.fits"] * 4}
    names = ["i.fits", "", "small.fits", "cube.fits"]
    file = table(tmp_path / "cat.csv", **columns, tile_i=names)
    source = CatalogueSource(file, size=2, tile_columns=["tile_g", "tile_r", "tile_i"], **XY)
    assert source.bands == ("g", "r", "i")
    assert source.load(0)[1, 1].tolist() == [510, 10510, 20510]
    assert reasons(source) == [
        "",
        "it lies in no tile, or the catalogue names none",
        "the tiles of its bands differ in size, or in the size of their pixels",
        "it has 2 bands instead of 1: g",
    ]
    other = CatalogueSource(file, size=2, tile_columns=["tile_i", "tile_g"], bands=["x", "y"], **XY)
    assert other.bands == ("x", "y")
    assert other.load(0)[1, 1].tolist() == [20510, 510]
    assert CatalogueSource(file, size=2, tile_column="tile_r", **XY).bands == ("grey",)
    with pytest.raises(DataError, match=r"tile_columns needs tiles of one band, cube\.fits has 2"):
        CatalogueSource(
            table(tmp_path / "c.csv", x=[1], y=[1], a=["cube.fits"], b=["g.fits"]), tile_columns=["a", "b"], **XY
        )


def test_bands_of_one_tile(tmp_path: Path) -> None:
    units = [fits.PrimaryHDU(), fits.ImageHDU(TILE, name="G"), fits.ImageHDU(TILE + 1, name="R")]
    fits.HDUList(units).writeto(tmp_path / "a.fits")
    fits.HDUList([units[0], units[2], units[1]]).writeto(tmp_path / "b.fits")
    file = table(tmp_path / "cat.csv", x=[10, 10], y=[5, 5], tile=["a.fits", "b.fits"])
    source = CatalogueSource(file, size=2, extensions=[1, 2], **XY)
    assert source.bands == ("G", "R")
    assert source.load(0)[1, 1].tolist() == [510, 511]
    assert "its bands are R, G instead of G, R" in reasons(source)[1]
    assert CatalogueSource(file, size=2, extensions=["G", "R"], **XY).load(1)[1, 1].tolist() == [510, 511]
    assert CatalogueSource(file, size=2, **XY).load(1)[1, 1].tolist() == [511]


def test_kinds_of_tiles(tmp_path: Path) -> None:
    grey, colour = TILE.astype(np.uint16), np.stack([TILE % 100, TILE // 100, TILE * 0], axis=2).astype(np.uint8)
    np.save(tmp_path / "a.npy", np.asfortranarray(grey.astype(">u2")))
    np.save(tmp_path / "c.npy", colour)
    PillowImage.fromarray(colour).save(tmp_path / "c.png")
    PillowImage.fromarray(colour).save(tmp_path / "c.tif")
    PillowImage.fromarray(TILE).save(tmp_path / "f.tif")
    tile(tmp_path / "i.fits", grey)
    tile(tmp_path / "s.fits", grey.astype(np.int16))
    with fits.open(tmp_path / "s.fits", mode="update", do_not_scale_image_data=True) as file:
        file[0].header["BSCALE"], file[0].header["BZERO"] = 2.0, 1.0
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(grey, tile_shape=(7, 9))]).writeto(tmp_path / "z.fits.fz")
    (tmp_path / "g.fits.gz").write_bytes(gzip.compress((tmp_path / "i.fits").read_bytes()))

    def cut(name: str) -> np.ndarray:
        file = table(tmp_path / "cat.csv", x=[10, 39], y=[5, 29], tile=[name] * 2)
        source = CatalogueSource(file, size=2, **XY)
        assert source.load(1).shape[:2] == (2, 2)
        assert source.load(0).dtype.isnative
        return source.load(0)

    for name in ("a.npy", "i.fits", "z.fits.fz", "g.fits.gz"):
        assert cut(name).dtype == np.uint16
        assert cut(name)[..., 0].tolist() == TILE[4:6, 9:11].tolist()
    for name in ("c.npy", "c.png", "c.tif"):
        assert cut(name).dtype == np.uint8
        assert cut(name)[1, 1].tolist() == [10, 5, 0]
    assert cut("f.tif")[..., 0].tolist() == TILE[4:6, 9:11].tolist()
    assert cut("s.fits")[1, 1, 0] == 1 + 2 * 510
    bands = np.stack([TILE + n for n in range(5)], axis=2).astype(np.uint16)
    tifffile.imwrite(tmp_path / "b.tif", bands, photometric="minisblack", planarconfig="contig")
    assert cut("b.tif").tolist() == bands[4:6, 9:11].tolist()


@pytest.mark.parametrize(("kind", "padded"), [("u1", "u1"), ("i2", "f4"), ("u4", "f8"), ("f8", "f8")])
def test_padding(tmp_path: Path, kind: str, padded: str) -> None:
    np.save(tmp_path / "a.npy", np.full((4, 4), 7, dtype=kind))
    source = CatalogueSource(table(tmp_path / "cat.csv", x=[0], y=[1], tile=["a.npy"]), size=2, **XY)
    cut = source.load(0)[..., 0]
    assert cut.dtype == np.dtype(padded)
    assert cut[:, 1].tolist() == [7, 7]
    assert np.array_equal(cut[:, 0], [0, 0] if kind == "u1" else [np.nan, np.nan], equal_nan=True)


def test_tiles_found_by_position(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiles = tmp_path / "tiles"
    tile(tiles / "a.fits", at=wcs(0.0, 0.0))
    tile(tiles / "b.fits", TILE + 5000, at=wcs(30 / 3600, 0.0))  # overlaps a by 10 pixels
    tile(tiles / "n.fits")
    ra = [0.0, 30 / 3600, 14 / 3600, 16 / 3600, -14 / 3600, 180.0, ""]
    source = CatalogueSource(table(tmp_path / "cat.csv", ra=ra, dec=[0.0] * 7), tiles=tiles, size=2)
    assert [source.paths[code][0] if code >= 0 else "" for code in source._codes[0]] == [*"ababa", "", ""]
    assert "skipped 1 FITS files whose place on the sky is unknown" in caplog.text
    assert reasons(source)[4:] == ["", *["it lies in no tile, or the catalogue names none"] * 2]
    assert source.coordinates(source.ids[5]) == (180.0, 0.0)
    assert source.coordinates(source.ids[6]) is None


def test_assignment_matches_a_search_of_all_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centres = [(float(rng.uniform(0, 2) - 1) % 360, float(rng.uniform(88.5, 90))) for _ in range(40)]
    skies = [None, *(Sky(wcs(ra, dec, 36.0), (30, 40)) for ra, dec in centres)]
    ra, dec = rng.uniform(0, 360, 500), rng.uniform(88, 90, 500)
    monkeypatch.setattr(sky_module, "CHUNK", 77)
    done: list[int] = []
    found = assign(skies, ra, dec, on_chunk=done.append)
    assert sum(done) == 500
    places = sky_module.unit_vectors(ra, dec)
    nearest, expected = np.full(500, np.inf), np.full(500, -1)
    for i, sky in enumerate(skies[1:], start=1):
        assert sky is not None
        middle = sky.centre()
        assert middle is not None
        distance = np.linalg.norm(
            places - sky_module.unit_vectors(np.array([middle[0]]), np.array([middle[1]])), axis=1
        )
        better = sky.contains(ra, dec) & (distance < nearest)
        expected[better], nearest[better] = i, distance[better]
    assert (found == expected).all()
    assert 20 < (found >= 0).sum() < 480


def test_positions_on_the_far_side_have_no_pixel() -> None:
    x, y = Sky(wcs(10.0, 20.0), (30, 40)).to_pixels(np.array([10.0, 190.0, 130.0, np.nan]), np.array([20.0, -20, 0, 0]))
    assert x[0] == pytest.approx(19.5)
    assert y[0] == pytest.approx(14.5)
    assert np.isnan(x[1:]).all()
    assert np.isnan(y[1:]).all()


def test_bad_rows_are_rejected(tmp_path: Path) -> None:
    tile(tmp_path / "a.fits", at=wcs())
    tile(tmp_path / "n.fits")
    sound = tile(tmp_path / "t.fits").read_bytes()
    (tmp_path / "t.fits").write_bytes(sound[:-2880])
    tile(tmp_path / "c.fits", np.stack([TILE] * 3), at=wcs())
    rows = {
        (10.0, 20.0, "a.fits"): "",
        (11.0, 20.0, "a.fits"): "it lies outside of its tile a.fits: x = ",
        ("", 20.0, "a.fits"): "its position is no number, or has no place in its tile a.fits",
        (190.0, -20.0, "a.fits"): "its position is no number, or has no place in its tile a.fits",
        (10.0, 95.0, "a.fits"): "it",
        (10.0, 20.0, "none.fits"): "its tile none.fits: cannot be opened: No such file or directory",
        (10.0, 20.0, "n.fits"): "its tile n.fits has no celestial coordinates",
        (10.0, 20.0, "t.fits"): "its tile t.fits: the file is truncated: 1,920 of 4,800 bytes of data are missing",
        (10.0, 20.0, "c.fits"): "it has 3 bands instead of 1: grey",
        (10.0, 20.0, ""): "it lies in no tile, or the catalogue names none",
    }
    ra, dec, names = zip(*rows, strict=True)
    found = reasons(CatalogueSource(table(tmp_path / "cat.csv", ra=ra, dec=dec, tile=names), size=8))
    assert [bool(reason) for reason in found] == [False] + [True] * 9
    assert all(map(str.startswith, found, rows.values()))


def test_truncated_tiles_are_rejected(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", TILE)
    tile(tmp_path / "b.fits", np.tile(TILE, (10, 1)))
    source = CatalogueSource(table(tmp_path / "c.csv", x=[9, 9], y=[9, 9], tile=["a.npy", "b.fits"]), size=2, **XY)
    assert reasons(source) == ["", ""]
    for name in ("a.npy", "b.fits"):
        with (tmp_path / name).open("r+b") as file:
            file.truncate(100)
    assert all("has become shorter since it was opened" in reason for reason in reasons(source))


def test_formats_of_catalogues(tmp_path: Path) -> None:
    tile(tmp_path / "a.fits", at=wcs())
    there = wcs().pixel_to_world([10.0, 20.0], [5.0, 6.0])
    columns = {
        "SOURCE_ID": np.array([2**62 + 1, 7]),
        "ALPHA_J2000": there.ra.deg,
        "DELTA_J2000": there.dec.deg,
        "side": np.array([2, 4], dtype=np.int16),
        "Tile": ["a.fits", "a.fits"],
        "kind": ["star", "galaxy"],
    }
    table(tmp_path / "c1.csv", **columns)
    (tmp_path / "c2.csv.gz").write_bytes(gzip.compress((tmp_path / "c1.csv").read_bytes()))
    pq.write_table(pa.table(columns), tmp_path / "c3.parquet")
    Table(columns).write(tmp_path / "c4.fits")
    Table(columns).write(tmp_path / "c5.vot", format="votable")
    for file in sorted(tmp_path.glob("c*")):
        source = CatalogueSource(file, size_column="side", label_column="kind")
        assert list(source.ids) == [str(2**62 + 1), "7"]
        assert source.load(0)[..., 0].tolist() == TILE[4:6, 9:11].tolist()
        assert source.load(1)[..., 0].tolist() == TILE[4:8, 18:22].tolist()
        assert source.truth == {str(2**62 + 1): "star", "7": "galaxy"}


def test_spaces_in_the_header(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", TILE)
    (tmp_path / "cat.csv").write_text("id, x,  y , tile\np, 10,  5 , a.npy\n")
    source = CatalogueSource(tmp_path / "cat.csv", size=2, **XY)
    assert (list(source.ids), source.load(0)[1, 1, 0]) == (["p"], 510)


def test_masked_values(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", TILE)
    masked = Table(
        {
            "id": ["p", "q"],
            "x": MaskedColumn([5, 6], mask=[False, True]),
            "y": [5.0, 6.0],
            "tile": MaskedColumn(["a.npy", "a.npy"], mask=[False, False]),
        }
    )
    for name in ("cat.fits", "cat.vot"):
        masked.write(tmp_path / name, format="votable" if name.endswith("vot") else "fits")
        found = reasons(CatalogueSource(tmp_path / name, size=2, **XY))
        assert found == ["", "its position is no number, or has no place in its tile a.npy"]


def test_columns_by_name(tmp_path: Path) -> None:
    tile(tmp_path / "a.fits", at=wcs())
    there = wcs().pixel_to_world([10.0, 20.0], [5.0, 6.0])
    file = table(
        tmp_path / "cat.csv",
        ra=[10.0, 10.0],
        dec=[20.0, 20.0],
        my_ra=there.ra.deg,
        my_dec=there.dec.deg,
        id=["p", "q"],
        name=["007", "008"],
        path=["a.fits"] * 2,
    )
    source = CatalogueSource(file, size=2, ra_column="my_ra", dec_column="my_dec", id_column="name", tile_column="path")
    assert list(source.ids) == ["007", "008"]
    assert source.load(0)[1, 1, 0] == 510
    assert CatalogueSource(file, size=2).load(0)[1, 1, 0] == 100 * 15 + 20


def test_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", TILE)
    rows = {"id": ["p", "q", "r"], "x": [5] * 3, "y": [5] * 3, "tile": ["a.npy"] * 3}
    file = table(tmp_path / "l.csv", **rows, said=["anomaly", "", "normal"], kind=["b", "a", "b"], some=["b", "", "a"])
    assert CatalogueSource(file, **XY).labels == {}
    said = CatalogueSource(file, label_column="said", **XY)
    assert said.fingerprint == CatalogueSource(file, **XY).fingerprint
    assert (said.labels, said.truth) == ({"p": "anomaly", "r": "normal"}, None)
    kind = CatalogueSource(file, label_column="kind", **XY)
    assert (kind.labels, dict(kind.truth or {})) == ({}, {"p": "b", "q": "a", "r": "b"})
    assert (kind.truth or {}).get("z") is None
    assert dict(pickle.loads(pickle.dumps(kind)).truth) == {"p": "b", "q": "a", "r": "b"}
    with pytest.raises(LabelError, match=r"p has the unknown label 'b'.* 1 of 3 are missing, the first is q"):
        CatalogueSource(file, label_column="some", **XY)
    with pytest.raises(ConfigError, match="label_column and labels_file: give only one"):
        CatalogueSource(file, label_column="said", labels_file=tmp_path / "labels.csv", **XY)


def test_folder_of_tiles(simple: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    tile(elsewhere / "a.fits", TILE + 7)
    tile(elsewhere / "sub/b.fits")
    assert CatalogueSource(simple, size=2, tiles=elsewhere, **XY).load(0)[1, 1, 0] == 517


def test_tiles_outside_of_their_folder_need_trust(tmp_path: Path) -> None:
    np.save(tmp_path / "secret.npy", TILE)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link.npy").symlink_to(tmp_path / "secret.npy")
    np.save(tmp_path / "in/own.npy", TILE)
    for name in ("../secret.npy", str(tmp_path / "secret.npy")):
        file = table(tmp_path / "in/cat.csv", x=[10, 10], y=[5, 5], tile=["own.npy", name])
        with pytest.raises(DataError, match=r"its tile .*secret\.npy lies outside of .*trust=true"):
            CatalogueSource(file, size=2, **XY)
        with trusting(True):
            assert reasons(CatalogueSource(file, size=2, **XY)) == ["", ""]
    file = table(tmp_path / "in/cat.csv", x=[10, 10], y=[5, 5], tile=["own.npy", "link.npy"])
    refused = reasons(CatalogueSource(file, size=2, **XY))
    assert refused == ["", "its tile link.npy: it lies outside of the folder of the tiles: set trust=true to read it"]
    with trusting(True):
        assert reasons(CatalogueSource(file, size=2, **XY)) == ["", ""]


def test_each_tile_is_opened_once_in_a_read(simple: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = tiles_module.open_tile

    def spy(path: Path, extensions: Any) -> Any:
        opened.append(path.name)
        return original(path, extensions)

    monkeypatch.setattr("anomalymatch.data.sources.tiles.open_tile", spy)
    source = CatalogueSource(simple, size=2, **XY)
    source._mapped.limit = 1
    opened.clear()
    source.read(["r", "p", "r", "q", "r", "s"])
    assert len(opened) <= 2


@pytest.mark.parametrize("suffix", ["csv", "parquet", "fits", "vot"])
def test_damaged_catalogue_raises_or_opens(tmp_path: Path, suffix: str) -> None:
    np.save(tmp_path / "a.npy", TILE)
    columns = {"id": [f"n{i}" for i in range(9)], "x": np.arange(9.0), "y": np.arange(9.0), "tile": ["a.npy"] * 9}
    path = tmp_path / f"cat.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table(columns), path)
    else:
        Table(columns).write(path, format={"csv": "csv", "vot": "votable"}.get(suffix, suffix))
    sound = path.read_bytes()
    for broken, _ in damaged(sound, 40):
        path.write_bytes(broken)
        try:
            source = CatalogueSource(path, size=2, **XY)
        except DataError:
            continue
        assert all(isinstance(result, Reject | np.ndarray) for result in source.read(list(source.ids)))


def test_pickled_tiles_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    np.save(tmp_path / "c.npy", np.zeros((4, 4), dtype=complex))
    np.savez(tmp_path / "z.npz", TILE)
    (tmp_path / "z.npz").rename(tmp_path / "z.npy")
    for name, message in {"o": "cannot be read as .npy", "c": "found complex128", "z": "found an archive"}.items():
        with pytest.raises(DataError, match=message):
            CatalogueSource(table(tmp_path / "cat.csv", x=[1], y=[1], tile=[f"{name}.npy"]), **XY)


def test_messages(tmp_path: Path, simple: Path) -> None:
    def refused(message: str, kind: type[Exception] = DataError, file: Path = simple, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            CatalogueSource(file, **options)

    np.save(tmp_path / "a", TILE)
    refused(r"a catalogue must end in one of \.csv", file=tmp_path / "a.npy")
    refused("no column has a usual name of a position, ra and dec for example, among id, x, y, tile")
    refused(
        "there is no column z, which dataset.source.x_column names, only id, x, y, tile", x_column="z", y_column="y"
    )
    refused("there is no column z, which dataset.source.tile_columns names", tile_columns=["z"], **XY)
    refused("x_column and y_column: give both or none", ConfigError, x_column="x")
    refused("ra_column and dec_column: give both or none", ConfigError, dec_column="x")
    refused("tile_column and tile_columns: give only one", ConfigError, tile_column="tile", tile_columns=["tile"], **XY)
    refused("size_column and size_arcsec: give only one", ConfigError, size_column="x", size_arcsec=1, **XY)
    refused(r"dataset\.source\.size is 0", ConfigError, size=0, **XY)
    refused("expected 1 different names", ConfigError, bands=["a", "b"], **XY)
    refused("the column tile must hold numbers, found|conversion error", x_column="tile", y_column="y")
    refused("has no celestial coordinates, which positions in degrees", ra_column="x", dec_column="y")
    refused("has no celestial coordinates, which positions in degrees", size_arcsec=3, **XY)
    xy = {"x": [1, 1], "y": [1, 1]}
    refused("the catalogue has no rows", file=table(tmp_path / "1.csv", x=[], y=[], tile=[]), **XY)
    same = table(tmp_path / "2.csv", id=["a", "a"], tile=["a.fits"] * 2, **xy)
    refused("ids must be unique, but 'a' occurs more than once", file=same, **XY)
    refused(
        "the id column id is empty in 1 of 2 rows",
        file=table(tmp_path / "3.csv", id=["a", ""], tile=["a.fits"] * 2, **xy),
        **XY,
    )
    (tmp_path / "4.csv").write_text("x,x,y\n1,2,3\n")
    refused("names of columns must be unique, but x occurs", file=tmp_path / "4.csv", **XY)
    gone = table(tmp_path / "5.csv", tile=["gone.fits", "a.fits"], **xy)
    refused(r"its tile gone\.fits: cannot be opened: No such file", file=gone, **XY)
    refused("no column names the tile of each row", file=table(tmp_path / "6.csv", **xy), **XY)
    sky = table(tmp_path / "7.csv", ra=[1, 1], dec=[1, 1])
    refused("no FITS file in this folder has world coordinates", file=sky)
    refused("expected a folder with FITS tiles, found nothing", file=sky, tiles=tmp_path / "none")
    tile(tmp_path / "w.fits", at=wcs())
    refused("none of its 2 rows lies in one of the 3 tiles", file=sky)
    refused("none of its 2 rows lies in one of the 0 tiles", file=table(tmp_path / "8.csv", tile=["", ""], **xy), **XY)
