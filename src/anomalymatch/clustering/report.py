"""Output folder of a clustering: tables, plots, sheets, report, and the names of groups that become labels."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from anomalymatch.clustering import figures
from anomalymatch.clustering.analysis import Clusters
from anomalymatch.clustering.groups import UNGROUPED, clustering_metrics
from anomalymatch.data.labels import find_label
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import read_images
from anomalymatch.errors import LabelError, StorageError
from anomalymatch.evaluation import plots
from anomalymatch.evaluation.contact_sheet import save_sheet
from anomalymatch.evaluation.report import Report, ReportFigure, write_report
from anomalymatch.files import atomic_file, make_folder, write_csv
from anomalymatch.ranking import write_rejects
from anomalymatch.text import from_csv_cell, printable
from anomalymatch.types import Label, Row

CLUSTERS, GROUPS, LABELS = "clusters.parquet", "groups.csv", "labels_by_group.csv"
COLUMNS = ("cluster", "name")
SHOWN = 24
"""Number of images on the contact sheet of a group."""


def write_clusters(
    folder: Path, clusters: Clusters, source: ImageSource, *, map_method: str, seed: int, facts: Mapping[str, str],
    config: str, command: str,
) -> list[Row]:  # fmt: skip
    """Write the groups as tables, plots, contact sheets and a report.

    Args:
        folder: output folder: clusters.parquet, groups.csv, rejects.parquet, plots/, sheets/ and report.html.
        clusters: the groups.
        source: source of the images.
        map_method: `pca` or `umap`.
        seed: seed of UMAP.
        facts: further facts for the head of the report.
        config: configuration as YAML.
        command: command that repeats this clustering.

    Returns:
        One row for each group.
    """
    make_folder(folder)
    write_parquet(clusters, folder / CLUSTERS)
    write_rejects(clusters.rejects, folder / "rejects.parquet")
    truth = {id_: source.truth[id_] for id_ in clusters.ids if id_ in source.truth} if source.truth else {}
    known = len(truth) == len(clusters.ids) > 0
    rows = group_rows(clusters, truth if known else {})
    numbered = [row for row in rows if row["group"] != UNGROUPED]
    write_groups(folder / GROUPS, [int(row["images"]) for row in numbered], [str(row["medoid"]) for row in numbered])
    drawn = [*_plots(folder, clusters, map_method, seed), *_sheets(folder, clusters, source, rows)]
    measured = clustering_metrics([truth[id_] for id_ in clusters.ids], clusters.grouping.labels) if known else {}
    report = Report(
        title=f"{folder.name}, {len(numbered)} groups",
        subtitle=clusters.grouping.choice.sentence if clusters.grouping.choice else "",
        facts={
            **facts,
            "Images": f"{len(clusters.ids):,}",
            "Unreadable images": f"{len(clusters.rejects):,}",
            **{name.upper() if name != "purity" else "Purity": f"{value:.3f}" for name, value in measured.items()},
        },
        metrics=rows,
        figures=drawn,
        notes=_notes(clusters, known),
        config=config,
        command=command,
        cycles=False,
    )
    write_report(folder / "report.html", report)
    return rows


def write_parquet(clusters: Clusters, path: Path) -> None:
    """Write `id, cluster, distance, best_weight`: distance to the group's medoid, largest weight of a patch."""
    columns = {
        "id": pa.array(clusters.ids, pa.string()),
        "cluster": clusters.grouping.labels,
        "distance": clusters.distances,
        "best_weight": clusters.weights.max(axis=1),
    }
    with atomic_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def group_rows(clusters: Clusters, truth: Mapping[str, str]) -> list[Row]:
    """Summarise each group: number, size, medoid, mean distance and largest weight; purity if truth is known."""
    rows: list[Row] = []
    for k in [*range(len(clusters.medoids)), *([UNGROUPED] if (clusters.grouping.labels == UNGROUPED).any() else [])]:
        members = clusters.members(k)
        row: Row = {
            "group": k,
            "images": len(members),
            "medoid": clusters.ids[members[0]] if k != UNGROUPED else "",
            "mean_distance": float(clusters.distances[members].mean()),
            "mean_best_weight": float(clusters.weights[members].max(axis=1).mean()),
        }
        if truth:
            name, count = min(Counter(truth[clusters.ids[i]] for i in members).items(), key=lambda c: (-c[1], c[0]))
            row["commonest_class"], row["purity"] = name, count / len(members)
        rows.append(row)
    return rows


def pictures(folder: Path) -> list[Path]:
    """List the plots and sheets that `write_clusters` wrote."""
    return [*sorted((folder / "plots").glob("*.png")), *sorted((folder / "sheets").glob("*.png"))]


def _plots(folder: Path, clusters: Clusters, map_method: str, seed: int) -> list[ReportFigure]:
    places = figures.flat_map(clusters.embeddings, map_method, seed=seed)
    drawn = {
        "map": (
            figures.map_figure(places, clusters.grouping.labels, clusters.medoids),
            "Map",
            f"The embeddings in two dimensions ({map_method.upper()}), with group numbers at the medoids.",
        )
    }
    if clusters.grouping.tree is not None:
        figure = figures.dendrogram_figure(clusters.grouping.tree, clusters.grouping.labels)
        drawn["dendrogram"] = (figure, "Dendrogram", "Ward's merges; each branch below the dashed line is a group.")
    if (choice := clusters.grouping.choice) is not None:
        figure, axes = plots.make_figure("groups", "criterion")
        axes.plot(list(choice.curve), list(choice.curve.values()), color=plots.INK, marker="o", markersize=4)
        axes.axvline(choice.count, color=plots.ANOMALY, linestyle="--", linewidth=1.3)
        drawn["choice"] = (figure, "Number of groups", choice.sentence)
    for old in pictures(folder):  # an earlier clustering may have had more groups
        old.unlink()
    for name, (figure, _, _) in drawn.items():
        plots.save(figure, make_folder(folder / "plots") / f"{name}.png")
    return [ReportFigure(t, c, folder / "plots" / f"{name}.png", kind="plot") for name, (_, t, c) in drawn.items()]


def _sheets(folder: Path, clusters: Clusters, source: ImageSource, rows: list[Row]) -> list[ReportFigure]:
    sheets = []
    for row in rows:
        k = int(row["group"])
        members = clusters.members(k)[:SHOWN]
        row_of = {clusters.ids[i]: i for i in members}
        shown = read_images(source, list(row_of))
        truth = source.truth or {}
        captions = [f"{printable(id_)}\n{printable(truth.get(id_, ''))}".rstrip() for id_ in shown.ids]
        weights = clusters.weights[np.array([row_of[id_] for id_ in shown.ids], dtype=np.int64)]
        name = "ungrouped" if k == UNGROUPED else f"group-{k:03d}"
        path = make_folder(folder / "sheets") / f"{name}.png"
        save_sheet(figures.group_sheet(shown.images, weights, captions, source.rendering.fit), path)
        purity = f", {row['purity']:.0%} {row['commonest_class']}" if "purity" in row else ""
        title = "In no group" if k == UNGROUPED else f"Group {k}"
        caption = f"{row['images']:,} images{purity}. The medoid comes first; heat maps show the patch weights."
        sheets.append(ReportFigure(title, caption, path))
    return sheets


def _notes(clusters: Clusters, known: bool) -> list[str]:
    notes = [f"To label images by group, fill in the column name of {GROUPS} and run this command with names=PATH."]
    if not known:
        notes.append("The truth is not known, so nothing is measured: check the sheets by eye.")
    if clusters.rejects:
        notes.append("Some images could not be read: rejects.parquet lists them with the reasons.")
    return notes


def write_groups(path: Path, sizes: Sequence[int], medoids: Sequence[str]) -> None:
    """Write the CSV file `cluster,name,size,medoid` with empty names for the user to fill in."""
    rows = [(k, "", size, medoid) for k, (size, medoid) in enumerate(zip(sizes, medoids, strict=True))]
    write_csv(path, [*COLUMNS, "size", "medoid"], rows)


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
                if name := from_csv_cell((row["name"] or "").strip()):
                    names[int(group)] = name
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
    named = [(id_, names[k]) for id_, k in zip(columns["id"], columns["cluster"], strict=True) if k in names]
    rows = [(id_, find_label(name) or Label.ANOMALY, name) for id_, name in named]
    write_csv(path.parent / LABELS, ["filename", "label", "group"], rows)
    return path.parent / LABELS
