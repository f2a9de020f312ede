"""Names of groups in groups.csv, and their conversion to labels of images."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from anomalymatch.errors import LabelError, StorageError
from anomalymatch.files import write_text
from anomalymatch.types import Label

CLUSTERS, GROUPS, LABELS = "clusters.parquet", "groups.csv", "labels_by_group.csv"
COLUMNS = ("cluster", "name")


def write_groups(path: Path, sizes: Sequence[int], medoids: Sequence[str]) -> None:
    """Write the CSV file `cluster,name,size,medoid` with empty names for the user to fill in."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "size", "medoid"])
    writer.writerows([k, "", size, medoid] for k, (size, medoid) in enumerate(zip(sizes, medoids, strict=True)))
    write_text(path, text.getvalue())


def read_names(path: Path) -> dict[int, str]:
    """Read the names by group; groups without a name are left out.

    Raises:
        LabelError: if the file cannot be read, or a group is not a whole number or is repeated.
    """
    names: dict[int, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            if not set(COLUMNS) <= set(rows.fieldnames or ()):
                raise LabelError(f"{path}: the first line must have the columns {','.join(COLUMNS)}")
            seen = set()
            for row in rows:
                group = (row["cluster"] or "").strip()
                if not group.isdecimal() or group in seen:
                    raise LabelError(f"{path}, line {rows.line_num}: {group!r} is not the number of a group, or twice")
                seen.add(group)
                if (row["name"] or "").strip():
                    names[int(group)] = row["name"].strip()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabelError(f"names={path} cannot be read as a CSV file with {','.join(COLUMNS)}: {error}") from None
    return names


def label_groups(path: Path) -> Path:
    """Convert the names in a `groups.csv` to labels of the images in the `clusters.parquet` beside it.

    Groups named normal, unsure or artefact get that label; all other names are kinds of anomaly.

    Returns:
        The CSV `filename,label,group`, as the labelling page and `labels_file` read it.

    Raises:
        LabelError: if there are no names, or a group does not exist.
        StorageError: if the groups are missing or corrupt.
    """
    names = read_names(path)
    if not names:
        raise LabelError(f"{path}: no group has a name yet, fill in the column name")
    table = path.parent / CLUSTERS
    try:
        columns: Mapping[str, list] = pq.read_table(table, columns=["id", "cluster"]).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"names={path}: the groups in {table} are missing or corrupt") from error
    unknown = sorted(set(names) - set(columns["cluster"]))
    if unknown:
        raise LabelError(f"{path}: there is no group {unknown[0]} in {table}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["filename", "label", "group"])
    for id_, group in zip(columns["id"], columns["cluster"], strict=True):
        if group in names:
            writer.writerow([id_, _label(names[group]), names[group]])
    write_text(path.parent / LABELS, text.getvalue())
    return path.parent / LABELS


def _label(name: str) -> Label:
    return Label(name.lower()) if name.lower() in list(Label) else Label.ANOMALY
