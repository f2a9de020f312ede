"""Labels of images: their spelling, the ids to train on, and the labels file `filename,label`."""

import csv
import io
import logging
import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from anomalymatch.errors import LabelError
from anomalymatch.text import from_csv_cell
from anomalymatch.types import Label

logger = logging.getLogger(__name__)

COLUMNS = ("filename", "label")
LABELS_FILE = "labels.csv"
"""Labels file that a source takes from the folder of its images."""
QUOTED = 5
"""Number of wrong lines that a message quotes."""


_BY_NAME = {str(label): label for label in Label}


def find_label(text: object) -> Label | None:
    """Return the label that a text means, in any case and between blanks; None if it is no label.

    Whatever reads a label, from a file, a program or the configuration, uses this function or `as_labels`.
    """
    return _BY_NAME.get(str(text).strip().lower())


def as_labels(labels: Mapping[str, str]) -> dict[str, Label]:
    """Convert the labels of images, each as `find_label` does.

    Raises:
        LabelError: if a text is no label; the message has the first such image.
    """
    meant = {text: find_label(text) for text in set(map(str, labels.values()))}
    wrong = [id_ for id_, text in labels.items() if meant[str(text)] is None]
    if wrong:
        more = f" ({len(wrong):,} images have unknown labels)" if len(wrong) > 1 else ""
        raise LabelError(
            f"image {wrong[0]} has the unknown label {labels[wrong[0]]!r}{more}: a label is one of {', '.join(Label)}"
        )
    return {id_: label for id_, text in labels.items() if (label := meant[str(text)])}


def given_labels(given: Mapping[Any, str] | Sequence[str | None] | None, ids: Sequence[str]) -> dict[str, Label]:
    """Convert labels as a program gives them: by id, or one for each of `ids` with None for no label.

    Raises:
        LabelError: if an id or a label is unknown, or a sequence has another length.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        if len(given) != len(ids):
            raise LabelError(f"there are {len(given):,} labels for {len(ids):,} images: give one for each, or None")
        given = {id_: label for id_, label in zip(ids, given, strict=True) if label is not None}
    known = frozenset(ids)
    labels = {}
    for key, label in given.items():
        id_ = os.fspath(key) if isinstance(key, os.PathLike) else key
        if id_ not in known:
            hint = f"ids are texts, say {str(id_)!r}" if str(id_) in known else f"ids look like {ids[0]!r}"
            raise LabelError(f"there is no image {id_!r} to label {label}: {hint}")
        labels[id_] = label
    return as_labels(labels)


def training_ids(labels: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the ids labelled anomaly and the ids labelled normal, each sorted.

    Raises:
        LabelError: if either is empty, or a label is not in `Label`.
    """
    anomalies, normals = (ids_labelled(labels, label) for label in (Label.ANOMALY, Label.NORMAL))
    for name, ids in (("anomaly", anomalies), ("normal", normals)):
        if not ids:
            raise LabelError(
                f"none of the {len(labels)} labels is {name!r}: training needs at least one anomaly and one normal"
            )
    return anomalies, normals


def ids_labelled(labels: Mapping[str, str], wanted: Label) -> list[str]:
    """Return the ids with the label `wanted`, sorted.

    Raises:
        LabelError: if a label is not in `Label`, or an id is no text.
    """
    found = [id_ for id_, label in as_labels(labels).items() if label == wanted]
    number = next((id_ for id_ in found if not isinstance(id_, str)), None)
    if number is not None:
        raise LabelError(f"the label of image {number!r}: ids are texts, say {str(number)!r}")
    return sorted(found)


def have_both_classes(labels: Mapping[str, str]) -> bool:
    """Return True if there is at least one anomaly and one normal image, as most algorithms need.

    Raises:
        LabelError: if a label is not in `Label`.
    """
    return {Label.ANOMALY, Label.NORMAL} <= set(as_labels(labels).values())


def read_labels(
    labels_file: str | Path | None, ids: Sequence[str], folder: Path | None = None, *, archive: bool = False
) -> tuple[dict[str, Label], dict[str, str] | None]:
    """Read the CSV `filename,label` of a source with `ids`; None takes `labels.csv` in `folder` where there is one.

    See `labels_or_truth` for what is returned. A `labels.csv` that lies beside an `archive` and names none of its
    images is not used, with a warning.

    Raises:
        LabelError: if the file is missing, wrong, or an incomplete benchmark.
    """
    if labels_file is not None:
        path = Path(labels_file).expanduser()
    elif folder is not None and (folder / LABELS_FILE).is_file():
        path = folder / LABELS_FILE
        if archive and not _names_any(path, ids):
            return {}, None
    else:
        return {}, None
    return labels_or_truth(read_labels_csv(path, frozenset(ids)), ids, str(path))


def _names_any(path: Path, ids: Sequence[str]) -> bool:
    """Tell whether a labels file names any image; warn if it does not."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            column = _columns(str(path), next(rows, []))[0]
            known = frozenset(ids)
            if any(len(row) > column and row[column] in known for row in rows):
                return True
        why = f"it names none of the {len(ids):,} images, whose ids are like {next(iter(ids), '')!r}"
    except (OSError, UnicodeDecodeError, csv.Error, LabelError) as error:
        why = str(error)
    logger.warning("%s is not used: %s; correct it, or name another file by dataset.source.labels_file", path, why)
    return False


def labels_or_truth(
    labels: dict[str, str], ids: Sequence[str], name: str
) -> tuple[dict[str, Label], dict[str, str] | None]:
    """Distinguish labels by a person from the classes of a benchmark.

    Labels by a person are those of `Label`, and may be partial. Any others are classes, and then no image may be
    missing.

    Args:
        labels: label by id.
        ids: all ids of the source.
        name: name of the labels file, for messages.

    Returns:
        The labels and None, or an empty dictionary and the class of every image.

    Raises:
        LabelError: if there are classes, but not for every image.
    """
    try:
        return as_labels(labels), None
    except LabelError as error:
        missing = [id_ for id_ in ids if id_ not in labels]
        if missing:
            raise LabelError(
                f"{name}: {error}. Or, if it is a class of a benchmark, name every image: {len(missing):,} of "
                f"{len(ids):,} are missing, the first is {missing[0]}"
            ) from None
        return {}, labels


def read_labels_csv(path: Path, known_ids: Container[str]) -> dict[str, str]:
    """Read a labels file; see `parse_labels_csv`.

    Raises:
        LabelError: if it cannot be read or is wrong.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(str(path), error) from None
    return parse_labels_csv(data, str(path), known_ids)


def parse_labels_csv(data: bytes, name: str, known_ids: Container[str]) -> dict[str, str]:
    """Parse a CSV with the header `filename,label` into a label for each id; further columns are ignored.

    Args:
        data: the file, UTF-8 with or without a byte order mark.
        name: name of the file, for messages.
        known_ids: ids that `filename` may name.

    Raises:
        LabelError: if it cannot be parsed, has other columns or no rows, or if lines have no label, name an unknown id
            or one named before; the message quotes the first five such lines with their numbers.
    """
    labels: dict[str, str] = {}
    lines: dict[str, int] = {}
    faults = []
    try:
        rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        columns = _columns(name, next(rows, []))
        for row in rows:
            if len(row) > columns[0]:
                row[columns[0]] = _id(row[columns[0]], known_ids)
            if fault := _fault(row, columns, known_ids, lines):
                faults.append(f"line {rows.line_num} {_quote(row)} ({fault})")
            elif any(map(str.strip, row)):
                labels[row[columns[0]]] = row[columns[1]].strip()
                lines[row[columns[0]]] = rows.line_num
    except (UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(name, error) from None
    if faults:
        more = f" and {len(faults) - QUOTED:,} more" if len(faults) > QUOTED else ""
        raise LabelError(
            f"{name}: {len(faults):,} of its lines cannot be used, correct or remove them: "
            f"{'; '.join(faults[:QUOTED])}{more}"
        )
    if not labels:
        raise LabelError(f"{name}: there are no rows below the header, expected one line filename,label per image")
    return labels


def _unreadable(name: str, error: Exception) -> LabelError:
    return LabelError(f"{name}: cannot be read as a CSV file in UTF-8 with the header {','.join(COLUMNS)}: {error}")


def _id(text: str, known_ids: Container[str]) -> str:
    """Return the id that a cell means: this package writes an apostrophe before ids that look like formulas."""
    plain = from_csv_cell(text)
    return plain if plain in known_ids or text not in known_ids else text


def _columns(name: str, header: list[str]) -> tuple[int, int]:
    names = [column.strip().lower() for column in header]
    if any(names.count(column) != 1 for column in COLUMNS):
        raise LabelError(f"{name}: the first line must be {','.join(COLUMNS)}, got {_quote(header)}")
    return names.index(COLUMNS[0]), names.index(COLUMNS[1])


def _fault(row: list[str], columns: tuple[int, int], known_ids: Container[str], lines: dict[str, int]) -> str:
    """Describe what is wrong with a line; empty for a sound or a blank one."""
    if not any(map(str.strip, row)):
        return ""
    if len(row) <= max(columns):
        return "a field is missing"
    id_, label = (row[column] for column in columns)
    if not label.strip():
        return "the label is empty"
    if id_ not in known_ids:
        return "there is no such image"
    return f"line {lines[id_]} names it too" if id_ in lines else ""


def _quote(row: list[str]) -> str:
    text = ",".join(row)
    return repr(text if len(text) <= 80 else text[:79] + "…")
