from pathlib import Path

import pytest

from anomalymatch.data.labels import read_labels, read_labels_csv, training_ids
from anomalymatch.errors import LabelError
from anomalymatch.types import Label

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


@pytest.mark.parametrize("ids", [["a.png", "b.png"], sorted(IDS)])
def test_labels_may_be_in_capitals_whether_or_not_every_image_has_one(tmp_path: Path, ids: list[str]) -> None:
    path = write(tmp_path, "filename,label\na.png,Anomaly\nb.png, NORMAL\n")
    assert read_labels(path, ids) == ({"a.png": "anomaly", "b.png": "normal"}, None)


def test_classes_of_a_benchmark_keep_their_case(tmp_path: Path) -> None:
    path = write(tmp_path, "filename,label\na.png,Crack\nb.png,Normal\n")
    assert read_labels(path, ["a.png", "b.png"]) == ({}, {"a.png": "Crack", "b.png": "Normal"})


def test_a_misspelt_label_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "filename,label\na.png,Anomaly\nb.png,anomoly\n")
    with pytest.raises(LabelError, match=r"b\.png has the label 'anomoly', which is none of .*2 of 4 are missing"):
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
