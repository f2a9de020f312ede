import csv
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomalymatch.data.labels import read_labels, read_labels_csv
from anomalymatch.errors import LabelError

IDS = frozenset({"a.png", "b.png", "dir/c d.png", 'q"uote,comma.png'})


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_reads_labels_in_any_dialect_a_spreadsheet_writes(tmp_path: Path) -> None:
    text = (
        '\ufeffLabel,"filename",note\r\n anomaly ,a.png,x\r\n\r\nnormal,dir/c d.png,\r\ncat,"q""uote,comma.png",y\r\n'
    )
    labels = read_labels_csv(write(tmp_path, text), IDS)
    assert labels == {"a.png": "anomaly", "dir/c d.png": "normal", 'q"uote,comma.png': "cat"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line must be filename,label, got ''"),
        ("file,class\na.png,x\n", "first line must be filename,label, got 'file,class'"),
        ("filename;label\na.png;x\n", "got 'filename;label'"),
        ("filename,label,label\na.png,x,y\n", "first line must be"),
        ("filename,label\n", "no rows below the header"),
        ("filename,label\n\n\n", "no rows below the header"),
        ("filename,label\na.png,normal\nb.png,\n", r"1 of its lines .* line 3 'b.png,' \(the label is empty\)"),
        ("filename,label\na.png\n", r"line 2 'a.png' \(a field is missing\)"),
        ("filename,label\nz.png,normal\n", r"line 2 'z.png,normal' \(there is no such image\)"),
        ("filename,label\na.png,x\nb.png,x\na.png,x\n", r"line 4 'a.png,x' \(line 2 names it too\)"),
        ('filename,label\n"a.png,x\n', "cannot be read as a CSV file"),
        ("filename,label\na.png,x\0\nb.png,", "line 3"),
    ],
)
def test_refuses_a_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LabelError, match=message):
        read_labels_csv(write(tmp_path, text), IDS)


def test_quotes_five_lines_and_counts_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, "filename,label\na.png,x\n" + "".join(f"z{i}.png,x\n" for i in range(1200)))
    with pytest.raises(LabelError) as caught:
        read_labels_csv(path, IDS)
    message = str(caught.value)
    assert "1,200 of its lines" in message
    assert [f"line {n} " in message for n in range(2, 9)] == [False] + [True] * 5 + [False]
    assert message.endswith("and 1,195 more")


def test_refuses_what_is_no_text_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="UTF-8"):
        read_labels_csv(write(tmp_path, "filename,label\na.png,x\n", "utf-16"), IDS)
    with pytest.raises(LabelError, match="No such file"):
        read_labels_csv(tmp_path / "none.csv", IDS)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), st.sampled_from("xyz")))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_csv_writes_is_read_back(tmp_path: Path, labels: dict[str, str]) -> None:
    path = tmp_path / "labels.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "label"])
        writer.writerows(labels.items())
    if labels:
        assert read_labels_csv(path, labels.keys()) == labels


def test_labels_by_hand_may_begin_with_a_capital(tmp_path: Path) -> None:
    path = write(tmp_path, "filename,label\na.png,Anomaly\nb.png, NORMAL\n")
    assert read_labels(path, sorted(IDS)) == ({"a.png": "anomaly", "b.png": "normal"}, None)


def test_classes_of_a_benchmark_keep_their_case(tmp_path: Path) -> None:
    path = write(tmp_path, "filename,label\na.png,Anomaly\nb.png,Normal\n")
    assert read_labels(path, ["a.png", "b.png"]) == ({}, {"a.png": "Anomaly", "b.png": "Normal"})


def test_a_misspelt_label_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "filename,label\na.png,Anomaly\nb.png,anomoly\n")
    with pytest.raises(LabelError, match=r"b\.png has the label 'anomoly', which is none of .*2 of 4 are missing"):
        read_labels(path, sorted(IDS))
