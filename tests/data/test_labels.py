import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import png

from anomalymatch.data.convert import convert
from anomalymatch.data.label_log import LabelLog, import_csv
from anomalymatch.data.labels import ids_labelled, read_labels, read_labels_csv, training_ids
from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.data.sources.memory import from_arrays
from anomalymatch.data.sources.parquet import ParquetSource
from anomalymatch.data.sources.zip import ZipSource
from anomalymatch.errors import LabelError
from anomalymatch.types import Label
from anomalymatch.ui.exports import import_labels

IDS = frozenset({"a.png", "b.png", "dir/c d.png", 'q"uote,comma.png'})


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_dialects_of_spreadsheets(tmp_path: Path) -> None:
    text = (
        '\ufeffLabel,"filename",note\r\n anomaly ,a.png,x\r\n\r\nnormal,dir/c d.png,\r\ncat,"q""uote,comma.png",y\r\n'
    )
    labels = read_labels_csv(write(tmp_path, text), IDS)
    assert labels == {"a.png": "anomaly", "dir/c d.png": "normal", 'q"uote,comma.png': "cat"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"filename,label, got ''"),
        ("file,class\na.png,x\n", "file,class"),
        ("filename;label\na.png;x\n", "filename;label"),
        ("filename,label,label\na.png,x,y\n", "filename,label,label"),
        ("filename,label\n", r"labels\.csv.* no rows"),
        ("filename,label\n\n\n", r"labels\.csv.* no rows"),
        ("filename,label\na.png,normal\nb.png,\n", r"1 of .* line 3 'b\.png,' \(.*empty"),
        ("filename,label\na.png\n", r"line 2 'a\.png' \(.*missing"),
        ("filename,label\nz.png,normal\n", r"line 2 'z\.png,normal' \(.*no such image"),
        ("filename,label\na.png,x\nb.png,x\na.png,x\n", r"line 4 'a\.png,x' \(line 2 "),
        ('filename,label\n"a.png,x\n', r"labels\.csv.*CSV"),
        ("filename,label\na.png,x\0\nb.png,", "line 3"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        read_labels_csv(write(tmp_path, text), IDS)


def test_message_quotes_five_lines_and_counts_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, "filename,label\na.png,x\n" + "".join(f"z{i}.png,x\n" for i in range(1200)))
    with pytest.raises(LabelError) as caught:
        read_labels_csv(path, IDS)
    message = str(caught.value)
    assert "1,200" in message
    assert [f"line {n} " in message for n in range(2, 9)] == [False] + [True] * 5 + [False]
    assert "1,195 more" in message


def test_binary_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="UTF-8"):
        read_labels_csv(write(tmp_path, "filename,label\na.png,x\n", "utf-16"), IDS)
    with pytest.raises(LabelError, match="No such file"):
        read_labels_csv(tmp_path / "none.csv", IDS)


Given = dict[str, str]
NAMES = ["a.png", "b.png", "c.png"]


def csv_text(given: Given) -> str:
    return "filename,label\n" + "".join(f"{id_},{label}\n" for id_, label in given.items())


def photos(folder: Path, given: Given) -> Path:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (folder / name).write_bytes(png())
    write(folder, csv_text(given))
    return folder


def by_log(folder: Path, given: Given) -> Any:
    log = LabelLog(folder / "labels.sqlite")
    try:
        log.append(given, annotator="me", cycle=0)
        return log.current()
    finally:
        log.close()


def by_zip(folder: Path, given: Given) -> Any:
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for file in sorted(photos(folder, given).iterdir())[:-1]:
            archive.write(file, file.name)
    return ZipSource(folder / "photos.zip").labels


class Own(ImageSource):
    """Source of a user, with labels as a user writes them."""

    def __init__(self, given: Given) -> None:
        super().__init__(name="own", ids=NAMES, fingerprint="1", labels=given)

    def load(self, position: int) -> Any:
        raise NotImplementedError


WAYS_IN: dict[str, Callable[[Path, Given], Any]] = {
    "labels.csv in a folder": lambda folder, given: FolderSource(photos(folder, given)).labels,
    "labels.csv in a zip archive": by_zip,
    "convert": lambda folder, given: (
        ParquetSource(convert(FolderSource(photos(folder, given)), folder / "packed")).labels
    ),
    "import on the page": lambda _, given: import_labels(csv_text(given), IDS | {"c.png"}),
    "import into the log": lambda folder, given: import_csv(write(folder, csv_text(given)), IDS | {"c.png"}),
    "log": by_log,
    "arrays": lambda _, given: from_arrays(np.zeros((3, 4, 4, 3)), ids=NAMES, labels=given).labels,
    "source of a user": lambda _, given: Own(given).labels,
    "training": lambda _, given: {id_: label for label in Label for id_ in ids_labelled(given, label)},
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_every_way_in_reads_a_label_in_any_case(tmp_path: Path, way: str) -> None:
    read = WAYS_IN[way]
    found = read(tmp_path, {"a.png": "Anomaly", "b.png": "NORMAL", "c.png": " unsure "})
    assert found == {"a.png": Label.ANOMALY, "b.png": Label.NORMAL, "c.png": Label.UNSURE}
    assert all(isinstance(label, Label) for label in found.values())


@pytest.mark.parametrize("way", WAYS_IN)
def test_every_way_in_refuses_what_is_no_label_by_the_same_sentence(tmp_path: Path, way: str) -> None:
    sentence = "image b.png has the unknown label 'anomoly': a label is one of anomaly, normal, unsure, artefact"
    with pytest.raises(LabelError, match=sentence):
        WAYS_IN[way](tmp_path, {"a.png": "Anomaly", "b.png": "anomoly"})


@pytest.mark.parametrize("ids", [["a.png", "b.png"], sorted(IDS)])
def test_labels_may_be_in_capitals_whether_or_not_every_image_has_one(tmp_path: Path, ids: list[str]) -> None:
    path = write(tmp_path, "filename,label\na.png,Anomaly\nb.png, NORMAL\n")
    assert read_labels(path, ids) == ({"a.png": "anomaly", "b.png": "normal"}, None)


def test_classes_of_a_benchmark_keep_their_case(tmp_path: Path) -> None:
    path = write(tmp_path, "filename,label\na.png,Crack\nb.png,Normal\n")
    assert read_labels(path, ["a.png", "b.png"]) == ({}, {"a.png": "Crack", "b.png": "Normal"})


def test_a_misspelt_label_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "filename,label\na.png,Anomaly\nb.png,anomoly\n")
    with pytest.raises(LabelError, match=r"b\.png has the unknown label 'anomoly': .*2 of 4 are missing"):
        read_labels(path, sorted(IDS))


def test_training_uses_anomaly_and_normal_only():
    labels = {"d": "Normal", "a": "anomaly", "c": "unsure", "b": Label.NORMAL, "e": Label.ARTEFACT, "0": Label.ANOMALY}
    assert training_ids(labels) == (["0", "a"], ["b", "d"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({}, "0 labels.*'anomaly'"),
        ({"a": "normal", "b": "unsure"}, "2 labels.*'anomaly'"),
        ({"a": "anomaly"}, "1 labels.*'normal'"),
        ({"a": "anomaly", "b": "normal", "c": "Odd"}, "'Odd'.* anomaly, normal"),
        ({"a": "anomaly", 7: "Normal"}, "7.*'7'"),
    ],
)
def test_labels_that_cannot_be_trained_on(labels, message):
    with pytest.raises(LabelError, match=message):
        training_ids(labels)
