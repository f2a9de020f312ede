"""Which labels teach."""

import csv
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

from anomalymatch.errors import LabelError
from anomalymatch.types import Label


def training_ids(labels: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Ids labelled anomaly and ids labelled normal, each sorted; unsure and artefact teach nothing.

    Raises:
        LabelError: if either is empty, or a label is none of `Label`.
    """
    anomalies, normals = (ids_labelled(labels, label) for label in (Label.ANOMALY, Label.NORMAL))
    for name, ids in (("anomaly", anomalies), ("normal", normals)):
        if not ids:
            raise LabelError(
                f"none of the {len(labels)} labels is {name!r}: training needs at least one anomaly and one normal"
            )
    return anomalies, normals


def ids_labelled(labels: Mapping[str, str], wanted: Label) -> list[str]:
    """Ids with the label `wanted`, sorted.

    Raises:
        LabelError: if a label is none of `Label`.
    """
    unknown = sorted(set(labels.values()) - set(Label))
    if unknown:
        raise LabelError(f"unknown label {unknown[0]!r}: a label is one of {', '.join(Label)}")
    return sorted(id_ for id_, label in labels.items() if label == wanted)


def have_both_classes(labels: Mapping[str, str]) -> bool:
    """Whether there is at least one anomaly and one normal, as most algorithms need."""
    return {Label.ANOMALY, Label.NORMAL} <= set(labels.values())


COLUMNS = ("filename", "label")
QUOTED = 5
"""How many offending lines a message quotes."""


def read_labels_csv(path: Path, known_ids: Container[str]) -> dict[str, str]:
    """Read a CSV with the header `filename,label` (further columns are ignored) into a label per image id.

    Args:
        path: the file, UTF-8 with or without a byte order mark.
        known_ids: the ids that `filename` may name.

    Raises:
        LabelError: if the file cannot be read, has other columns or no rows, or if lines of it have no label, name an
            unknown id or one named before; the message quotes the first five such lines with their numbers.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            columns = _columns(path, next(rows, []))
            labels, faults = _collect(rows, columns, known_ids)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabelError(
            f"{path}: cannot be read as a CSV file in UTF-8 with the header {','.join(COLUMNS)}: {error}"
        ) from None
    if faults:
        more = f" and {len(faults) - QUOTED:,} more" if len(faults) > QUOTED else ""
        raise LabelError(
            f"{path}: {len(faults):,} of its lines cannot be used, correct or remove them: "
            f"{'; '.join(faults[:QUOTED])}{more}"
        )
    if not labels:
        raise LabelError(f"{path}: there are no rows below the header, expected one line filename,label per image")
    return labels


def _columns(path: Path, header: list[str]) -> tuple[int, int]:
    names = [name.strip().lower() for name in header]
    if any(names.count(column) != 1 for column in COLUMNS):
        raise LabelError(f"{path}: the first line must be {','.join(COLUMNS)}, got {_quote(header)}")
    return names.index(COLUMNS[0]), names.index(COLUMNS[1])


def _collect(
    rows: Iterator[list[str]], columns: tuple[int, int], known_ids: Container[str]
) -> tuple[dict[str, str], list[str]]:
    """Return the labels of the sound lines, and a description of each of the others."""
    labels: dict[str, str] = {}
    lines: dict[str, int] = {}
    faults = []
    for number, row in _numbered(rows):
        fault = _fault(row, columns, known_ids, lines)
        if fault:
            faults.append(f"line {number} {_quote(row)} ({fault})")
        else:
            labels[row[columns[0]]] = row[columns[1]].strip()
            lines[row[columns[0]]] = number
    return labels, faults


def _numbered(rows: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV reader that are not blank, each with the number of its (last) line."""
    for row in rows:
        if any(field.strip() for field in row):
            yield rows.line_num, row  # type: ignore[attr-defined]


def _fault(row: list[str], columns: tuple[int, int], known_ids: Container[str], lines: dict[str, int]) -> str:
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


def labels_or_truth(path: Path, ids: Sequence[str]) -> tuple[dict[str, str], dict[str, str] | None]:
    """Read a labels file of a source with `ids`, and tell labels by a person from the classes of a benchmark.

    If all labels are among anomaly, normal, unsure and artefact, they are what a person has said so far; any others
    are classes, and then no image may be missing.

    Returns:
        The labels and None, or an empty dictionary and the class of every image.

    Raises:
        LabelError: if the file is missing, wrong, or an incomplete benchmark.
    """
    labels = read_labels_csv(path, frozenset(ids))
    if set(labels.values()) <= set(Label):
        return labels, None
    missing = [id_ for id_ in ids if id_ not in labels]
    if missing:
        meant = {id_: label.strip().lower() for id_, label in labels.items()}
        if set(meant.values()) <= set(Label):  # written by hand: Anomaly
            return meant, None
        odd, label = next((id_, labels[id_]) for id_ in labels if meant[id_] not in set(Label))
        raise LabelError(
            f"{path}: {odd} has the label {label!r}, which is none of {', '.join(Label)}: correct it; or, if it is a "
            f"class of a benchmark, name every image: {len(missing):,} of {len(ids):,} are missing, the first is "
            f"{missing[0]}"
        )
    return {}, labels
