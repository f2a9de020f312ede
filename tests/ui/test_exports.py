import base64
import csv
import io
import json
import zipfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits, votable
from astropy.table import Table
from pictures import png
from PIL import Image as PillowImage

from anomalymatch.data.label_log import LabelEvent, LabelLog
from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.data.sources.parquet import ParquetSource
from anomalymatch.errors import ConfigError, DataError, LabelError, StorageError
from anomalymatch.ranking import Ranking
from anomalymatch.text import from_csv_cell
from anomalymatch.types import Label
from anomalymatch.ui import exports
from anomalymatch.ui.exports import KINDS, LABEL_STUDIO_CONFIG, export, import_labels, refusal
from anomalymatch.ui.groups import Groups
from anomalymatch.ui.notes import Notes
from anomalymatch.ui.pictures import Pictures
from anomalymatch.ui.views import Tile

A, N = Label.ANOMALY, Label.NORMAL


@dataclass
class Search:
    """Exportable search with labels at known times."""

    source: Any
    pictures: Pictures
    labels: dict[str, Label] = field(default_factory=dict)
    events: list[LabelEvent] = field(default_factory=list)
    ranking: Ranking | None = None
    novelty: np.ndarray | None = None
    groups: Any = None
    notes: Any = None

    def neighbours(self, id_: str, count: int) -> list[Tile]:
        first = self.source.position(id_) + 1
        return [Tile(i, 0.5, 1, None, None, False) for i in self.source.ids[first : first + count]]

    def add(self, id_: str, label: Label, annotator: str = "ada") -> None:
        at = datetime(2030, 1, 2, 3, 4, len(self.events), tzinfo=UTC)
        self.events.append(LabelEvent(len(self.events) + 1, id_, label, annotator, at, 0, None))
        self.labels[id_] = label


@pytest.fixture
def search(tmp_path: Path, make_source: Any) -> Any:
    made = []

    def make(source: Any = None) -> Search:
        source = source or make_source(20, unreadable={"im000013"})
        made.append(Search(source, Pictures(source, tmp_path / "cache", workers=1)))
        one = made[-1]
        divide = lambda ids, normals, count: [ids]  # noqa: E731
        one.notes = Notes(tmp_path / f"notes{len(made)}.json", lambda _: None)
        one.groups = Groups(tmp_path / f"groups{len(made)}.json", divide, lambda: (one.labels, one.ranking), list)
        return made[-1]

    yield make
    for one in made:
        one.pictures.close()


@pytest.fixture
def ranked(search: Any) -> Search:
    """Search with labels of two people; scores fall with the position, and one image has none."""
    one = search()
    ids = [id_ for id_ in one.source.ids if id_ != "im000013"]
    one.ranking = Ranking(ids, np.linspace(2, -2, len(ids)))
    one.add("im000003", N)
    one.add("im000007", A, "bob")
    one.add("im000003", A, "bob")
    one.add("im000013", A)
    one.add("im000005", Label.UNSURE)
    return one


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: Any) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def sky(tmp_path: Path, ids: list[str], ra: list[Any]) -> Any:
    (tmp_path / "p").mkdir()
    columns = {"image": [png(i) for i in range(len(ids))], "name": ids, "ra": ra, "dec": [-1.5] * len(ids)}
    pq.write_table(pa.table(columns), tmp_path / "p/a.parquet")
    return ParquetSource(tmp_path / "p", id_column="name")


def test_kinds(ranked: Search, temporary: Path) -> None:
    assert KINDS == ("csv", "parquet", "votable", "zip", "dossier", "labelstudio", "labelstudio-config")
    ranked.source.name = '../a "b"\r\nSet-Cookie: x/ü'
    for kind in set(KINDS) - {"votable"}:
        found = export(kind, ranked)
        assert found.filename.isascii()
        assert found.filename.replace("-", "").replace(".", "").replace("_", "").isalnum()
        assert found.path.parent == temporary
        assert found.path.stat().st_size > 0
        assert found.path.stat().st_mode & 0o077 in (0, 0o44)
        found.path.unlink()
    assert list(temporary.iterdir()) == []
    with pytest.raises(ConfigError, match="'exe'"):
        export("exe", ranked)


def test_csv_can_be_imported(ranked: Search) -> None:
    found = export("csv", ranked)
    assert found.filename == "array-labels.csv"
    text = found.path.read_text()
    assert text.splitlines()[:2] == ["filename,label", "im000003,anomaly"]
    assert import_labels(text, frozenset(ranked.source.ids)) == ranked.labels


def test_parquet_has_every_image_with_its_group_and_novelty(ranked: Search) -> None:
    ranked.groups.make("anomalies", None)
    ranked.groups.rename(0, "rings")
    ranked.notes.write("im000003", "two nuclei")
    ranked.notes.toggle_star("im000000")
    ranked.novelty = np.linspace(-2, 2, 20).astype(np.float32)
    ranked.novelty[13] = np.nan
    table = pq.read_table(export("parquet", ranked).path)
    assert table.column_names == ["id", "label", "annotator", "at", "score", "rank", "group", "novelty", "star", "note"]
    assert table["id"].to_pylist() == list(ranked.source.ids)
    rows = {row["id"]: row for row in table.to_pylist()}
    assert rows["im000003"] == {
        "id": "im000003",
        "label": "anomaly",
        "annotator": "bob",
        "at": datetime(2030, 1, 2, 3, 4, 2, tzinfo=UTC),
        "score": pytest.approx(1 / (1 + np.exp(-2 + 3 * 4 / 18))),
        "rank": 4,
        "group": "rings",
        "novelty": pytest.approx(1 / (1 + np.exp(2 - 3 * 4 / 19))),
        "star": False,
        "note": "two nuclei",
    }
    unreadable = {"label": "anomaly", "annotator": "ada", "score": None, "rank": None, "novelty": None}
    assert unreadable.items() <= rows["im000013"].items()
    assert {"label": None, "rank": 1, "group": None, "star": True, "note": None}.items() <= rows["im000000"].items()
    assert {id_ for id_ in rows if rows[id_]["group"]} == {id_ for id_ in rows if ranked.labels.get(id_) == A}


def test_exports_without_labels(search: Any, temporary: Path) -> None:
    one = search()
    assert export("csv", one).path.read_text() == "filename,label\n"
    table = pq.read_table(export("parquet", one).path)
    assert table.num_rows == 20
    assert table["rank"].null_count == table["label"].null_count == 20
    messages = {
        "votable": "nothing to export",
        "labelstudio": "nothing to export",
        "zip": "anomaly",
        "dossier": "anomaly",
    }
    for kind, message in messages.items():
        with pytest.raises(DataError, match=message) as refused:
            export(kind, one)
        assert refusal(kind, one) == str(refused.value)
    assert not any(refusal(kind, one) for kind in KINDS if kind not in messages)
    assert len(list(temporary.iterdir())) == 2, "a failed export leaves no file"


def test_undone_events(tmp_path: Path, ranked: Search) -> None:
    log = LabelLog(tmp_path / "labels.sqlite")
    log.append({"im000001": N}, annotator="ada", cycle=0)
    log.append({"im000001": A, "im000002": A}, annotator="bob", cycle=0)
    log.undo(annotator="bob")
    log.append({"im000004": A}, annotator="ada", cycle=0)
    log.append({"im000004": None}, annotator="bob", cycle=0)
    ranked.events, ranked.labels = log.events(), log.current()
    log.close()
    rows = {row["id"]: row for row in pq.read_table(export("parquet", ranked).path).to_pylist()}
    assert (rows["im000001"]["label"], rows["im000001"]["annotator"]) == ("normal", "ada")
    assert rows["im000002"]["label"] is rows["im000004"]["annotator"] is None


def test_votable(tmp_path: Path, search: Any) -> None:
    ids = ["a", 'b"<&>', "c\x07\x1b", "d", "e"]
    one = search(sky(tmp_path, ids, [10.0, 20.0, 30.0, None, 50.0]))
    one.ranking = Ranking(["a", "d", "e"], np.array([1.0, 3.0, 2.0]))
    one.add(ids[1], A, "<ada>")
    one.add(ids[2], N)
    found = export("votable", one)
    assert found.filename == "parquet-sky.vot"
    ElementTree.parse(found.path)
    assert refusal("votable", one) == ""
    tree = votable.parse(found.path, verify="exception")
    fields = {one.name: one for one in tree.get_first_table().fields}
    (system,) = tree.resources[0].coordinate_systems
    assert system.system == "ICRS"
    assert fields["ra"].ref == fields["dec"].ref == system.ID
    assert (fields["ra"].ucd, fields["dec"].ucd) == ("pos.eq.ra;meta.main", "pos.eq.dec;meta.main")
    assert all(one.description for one in fields.values())
    for one_field in fields.values():
        assert one_field.ucd is None or votable.ucd.check_ucd(one_field.ucd, check_controlled_vocabulary=True)
    table = Table.read(found.path)
    assert list(table["id"]) == ['b"<&>', "c??", "e", "a"], (
        "labelled images first, then the top; only those with coordinates"
    )
    assert table["ra"].tolist() == [20.0, 30.0, 50.0, 10.0]
    assert str(table["dec"].unit) == "deg"
    assert list(table["label"]) == ["anomaly", "normal", "", ""]
    assert table["annotator"][0] == "<ada>"
    assert table["rank"].tolist() == [None, None, 2, 3]
    assert np.ma.getmaskarray(table["score"]).tolist() == [True, True, False, False]


def test_votable_of_the_top(tmp_path: Path, search: Any, ranked: Search, monkeypatch: Any) -> None:
    with pytest.raises(DataError, match="coordinates") as refused:
        export("votable", ranked)
    assert refusal("votable", ranked) == str(refused.value)
    one = search(sky(tmp_path, list("abcde"), [1.0] * 5))
    one.ranking = Ranking(list("abcde"), np.arange(5.0))
    monkeypatch.setattr(exports, "TOP", 2)
    assert list(Table.read(export("votable", one).path)["id"]) == ["e", "d"]


def test_zip_of_the_anomalies(ranked: Search) -> None:
    ranked.notes.write("im000003", "=two nuclei")
    ranked.notes.toggle_star("im000003")
    found = export("zip", ranked)
    assert found.filename == "array-anomalies.zip"
    with zipfile.ZipFile(found.path) as archive:
        assert archive.testzip() is None
        images = ["images/0001-im000003.png", "images/0002-im000007.png"]
        assert archive.namelist() == [*images, "images.csv", "labels.csv"]
        image = np.asarray(PillowImage.open(io.BytesIO(archive.read("images/0001-im000003.png"))))
        assert np.array_equal(image, ranked.source.read(["im000003"])[0])
        assert import_labels(archive.read("labels.csv").decode(), frozenset(ranked.source.ids)) == ranked.labels
        rows = list(csv.DictReader(io.StringIO(archive.read("images.csv").decode())))
    assert [(row["file"], row["id"], row["rank"], row["fault"]) for row in rows] == [
        (images[0], "im000003", "4", ""),
        (images[1], "im000007", "8", ""),
        ("", "im000013", "", "unreadable: the file is truncated"),
    ]
    assert [(row["star"], row["note"]) for row in rows] == [("yes", "'=two nuclei"), ("", ""), ("", "")]


def test_zip_has_the_original_bytes(tmp_path: Path, search: Any) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("one.tar.png", "b/one.tar.png"):
        (tmp_path / "a" / name).write_bytes(png(9))
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(1))
    one = search(FolderSource(tmp_path / "a"))
    one.add("one.tar.png", A)
    one.add("b/one.tar.png", A)
    with zipfile.ZipFile(export("zip", one).path) as archive:
        names = archive.namelist()[:2]
        assert names == ["images/0001-one-tar.png", "images/0002-one-tar.png"]
        assert archive.read(names[0]) == png(9)
    (tmp_path / "a/one.tar.png").unlink()
    (tmp_path / "a/one.tar.png").symlink_to(secret)
    with zipfile.ZipFile(export("zip", one).path) as archive:
        assert archive.namelist()[0] == "images/0002-one-tar.png"
        assert "leaves the folder" in archive.read("images.csv").decode()


@pytest.mark.parametrize(
    "name", ["../../x.png", "/etc/passwd", "C:\\x.exe", "a\0b", "..", ".bashrc", "CON", "\n", "ü" * 300, "=1+1"]
)
def test_names_in_a_zip_are_safe(tmp_path: Path, search: Any, name: str) -> None:
    one = search(sky(tmp_path, [name], [1.0]))
    one.add(name, A)
    with zipfile.ZipFile(export("zip", one).path) as archive:
        first, *rest = archive.namelist()
        assert rest == ["images.csv", "labels.csv"]
        assert first.startswith("images/0001-")
        assert first.endswith(".png")
        assert ".." not in first
        assert len(first) < 100
        archive.extractall(tmp_path / "out")
        rows = list(csv.DictReader(io.StringIO(archive.read("images.csv").decode(), newline="")))
    assert from_csv_cell(rows[0]["id"]) == name
    assert not any(cell.startswith(("=", "+", "@", "\n")) for cell in rows[0].values())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"images", "images.csv", "labels.csv"}


def test_fits_files_are_exported_as_they_are(tmp_path: Path, search: Any) -> None:
    from anomalymatch.data.sources.fits import FitsSource

    (tmp_path / "f").mkdir()
    fits.PrimaryHDU(np.arange(64.0).reshape(8, 8)).writeto(tmp_path / "f/a.fits")
    one = search(FitsSource(tmp_path / "f"))
    one.add("a.fits", A)
    with zipfile.ZipFile(export("zip", one).path) as archive:
        assert archive.read("images/0001-a.fits") == (tmp_path / "f/a.fits").read_bytes()


def test_label_studio_tasks(ranked: Search, monkeypatch: Any) -> None:
    monkeypatch.setattr(exports, "UNLABELLED", 14)
    tasks = json.loads(export("labelstudio", ranked).path.read_text())
    by_id = {task["data"]["filename"]: task for task in tasks}
    assert list(by_id)[:6] == ["im000003", "im000007", "im000013", "im000005", "im000000", "im000001"]
    assert (len(by_id), list(by_id)[-1]) == (15, "im000014")
    choice = {"from_name": "label", "to_name": "image", "type": "choices", "value": {"choices": ["anomaly"]}}
    assert by_id["im000007"]["annotations"] == [{"result": [choice]}]
    assert by_id["im000007"]["predictions"][0] == {
        "model_version": "anomalymatch",
        "score": by_id["im000007"]["data"]["score"],
        "result": [choice],
    }
    votes = [vote["result"][0]["value"]["choices"][0] for vote in by_id["im000003"]["annotations"]]
    assert votes == ["normal", "anomaly"]
    assert by_id["im000003"]["data"]["annotators"] == "ada, bob"
    assert "annotations" not in by_id["im000000"]
    assert "predictions" not in by_id["im000013"]
    assert by_id["im000000"]["data"]["rank"] == 1
    for task in tasks:
        for prediction in task.get("predictions", ()):
            assert prediction["score"] == task["data"]["score"]
            assert prediction["result"] == [choice], "the score is the probability of an anomaly"
        assert ("predictions" in task) == (task["data"].get("score", 0) >= 0.5)
        kind, data = task["data"]["image"].split(",")
        assert kind in ("data:image/jpeg;base64", "data:image/gif;base64")
        assert max(PillowImage.open(io.BytesIO(base64.b64decode(data))).size) in (1, 512)


def test_label_studio_interface(search: Any) -> None:
    assert export("labelstudio-config", search()).path.read_text() == LABEL_STUDIO_CONFIG
    root = ElementTree.fromstring(LABEL_STUDIO_CONFIG)
    image, choices = root
    assert image.attrib["name"] == choices.attrib["toName"] == "image"
    assert choices.attrib["name"] == "label"
    assert [choice.attrib["value"] for choice in choices] == list(Label)


def test_a_full_disk(ranked: Search, temporary: Path, monkeypatch: Any) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(StorageError, match="disk is full"):
        export("parquet", ranked)
    assert list(temporary.iterdir()) == []


# Import

KNOWN = frozenset({"a.png", "b, c\r\n.png", 'd"e.png'})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("PK\x03\x04\0\0\0", r"^the CSV file: .*filename,label"),
        ("filename,label\n../../etc/passwd,anomaly\n", r"^the CSV file: 1 .*passwd"),
        ("filename,label\na.png,weird\n", r"^the CSV file: .*a.png .*'weird'"),
        ("\ud800", r"CSV file"),
    ],
)
def test_imports_that_are_refused(text: str, message: str, temporary: Path) -> None:
    with pytest.raises(LabelError, match=message) as caught:
        import_labels(text, KNOWN)
    assert str(temporary) not in str(caught.value)
    assert list(temporary.iterdir()) == []


def test_imports_of_any_size(monkeypatch: Any) -> None:
    monkeypatch.setattr(exports, "MAX_IMPORT", 10)
    with pytest.raises(LabelError, match="more than 10"):
        import_labels("filename,label\na.png,normal\n", KNOWN)


def test_import_of_windows_files() -> None:
    text = '\ufefffilename,label\r\na.png,anomaly\r\n"b, c\r\n.png",unsure\r\n"d""e.png",artefact\r\n'
    assert import_labels(text, KNOWN) == {"a.png": A, "b, c\r\n.png": Label.UNSURE, 'd"e.png': Label.ARTEFACT}


def test_dossier_shows_the_anomalies_best_first(ranked: Search) -> None:
    ranked.notes.write("im000007", "two nuclei")
    text = export("dossier", ranked).path.read_text(encoding="utf-8")
    page = ElementTree.fromstring(f"<body>{text.split('<body>')[1].split('</body>')[0]}</body>")
    finds = page.findall(".//article")
    assert [find.find("h2").text for find in finds] == ["1. im000003", "2. im000007", "3. im000013"]
    facts = dict(zip(*([one.text for one in finds[1].find(".//dl").findall(tag)] for tag in ("dt", "dd")), strict=True))
    assert facts == {
        "label": "anomaly",
        "score": f"{ranked.ranking.scores[7]:.4f}",
        "rank": "8 of 20",
        "note": "two nuclei",
    }
    history = [one.text for one in finds[0].findall(".//dl")[1].findall("dd")]
    assert history == ["normal by ada", "anomaly by bob"]
    pictures = finds[0].findall(".//img")
    assert len(pictures) == 2 + exports.NEAR
    assert len({picture.get("src") for picture in pictures[:2]}) == 2, "two stretches"
    for picture in pictures:
        data = base64.b64decode(picture.get("src").removeprefix("data:image/jpeg;base64,"))
        assert max(PillowImage.open(io.BytesIO(data)).size) == exports.DOSSIER_SIDE
    assert not finds[2].findall(".//div[@class='row large']//img"), "unreadable"
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_dossier_escapes_ids_and_names_no_folder(tmp_path: Path, search: Any) -> None:
    root = tmp_path / "secret place"
    root.mkdir()
    (root / "<b>&.png").write_bytes(png(3, 16, 16))
    one = search(FolderSource(root))
    one.add("<b>&.png", A)
    text = export("dossier", one).path.read_text(encoding="utf-8")
    assert "<h2>1. &lt;b&gt;&amp;.png</h2>" in text
    assert "secret" not in text.split("</header>")[1]


def test_dossier_is_limited_and_needs_an_anomaly(ranked: Search, search: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(exports, "MAX_FINDS", 1)
    text = export("dossier", ranked).path.read_text(encoding="utf-8")
    assert text.count("<article") == 1
    assert "3 anomalies among 20 images, of which the 1 with" in text
    with pytest.raises(DataError, match="anomaly"):
        export("dossier", search())
