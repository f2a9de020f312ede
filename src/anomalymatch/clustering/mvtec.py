"""Benchmark of Anomaly Clustering on MVTec AD: the paper's table over categories."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from anomalymatch.clustering.analysis import ClusterSpec, embed, group, weigh
from anomalymatch.clustering.groups import clustering_metrics
from anomalymatch.clustering.patches import Bags, PatchEmbedding
from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.folder import FolderSource
from anomalymatch.errors import ConfigError, DataError
from anomalymatch.evaluation.report import Report, write_report
from anomalymatch.files import write_csv
from anomalymatch.types import Row

OBJECTS = ("bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush", "transistor", "zipper")
TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
COMBINED = "combined"
"""Folder of images with several kinds of defect, which the paper leaves out."""


def write_benchmark(
    folder: Path,
    root: str | None,
    patches_of: Callable[[ImageSource], PatchEmbedding],
    spec: ClusterSpec,
    *,
    seed: int,
) -> list[Row]:
    """Measure all categories in a folder and write mvtec.csv and report.html.

    Args:
        folder: output folder.
        root: folder with MVTec AD in its published layout: category/test/type/000.png and category/train/good.
        patches_of: function that makes the patch extractor of a source.
        spec: settings of the weights and the groups.
        seed: seed of samples and initial values.

    Returns:
        One row for each category and method, then the means over objects and over textures.

    Raises:
        ConfigError: if no root is given.
        DataError: if the folder contains no category.
    """
    if root is None:
        raise ConfigError("benchmark=mvtec needs data.root=PATH: the folder with bottle/, cable/ and so on")
    path, categories = Path(root).expanduser(), (*OBJECTS, *TEXTURES)
    present = [name for name in categories if (path / name / "test").is_dir()]
    if not present:
        raise DataError(f"{root}: expected categories of MVTec AD, folders such as bottle/test/good")
    rows = [row for name in present for row in _category(path / name, patches_of, spec, seed)]
    missing = [name for name in categories if name not in present]
    rows += [*_means("objects", OBJECTS, rows), *_means("textures", TEXTURES, rows)]
    write_csv(folder / "mvtec.csv", list(rows[0]), [list(row.values()) for row in rows])
    note = f"Missing categories: {', '.join(missing)}." if missing else "All 15 categories are present."
    report = Report(
        title="Anomaly Clustering on MVTec AD",
        subtitle="Means over the categories that are present, objects and textures apart, as the paper gives them",
        metrics=rows,
        notes=[note],
        cycles=False,
    )
    write_report(folder / "report.html", report)
    return rows


def _category(
    root: Path, patches_of: Callable[[ImageSource], PatchEmbedding], spec: ClusterSpec, seed: int
) -> list[Row]:
    """Measure the three kinds of weights on one category, with the true number of groups."""
    test, normals = (FolderSource(root / part, classes="none") for part in ("test", "train"))
    truth = {id_: id_.split("/")[0] for id_ in test.ids if not id_.startswith(f"{COMBINED}/")}
    tests, trains = patches_of(test), patches_of(normals)
    bags, known = tests.bags(sorted(truth)), trains.bags(sorted(normals.ids))
    project = tests.fit_projection(bags, seed=seed)
    bags, known = project(bags), project(known)
    # Training and test images have the same names.
    known = Bags([f"train/{id_}" for id_ in known.ids], known.patches, known.rejects)
    classes = [truth[id_] for id_ in bags.ids]
    uniform = torch.full(bags.patches.shape[:2], 1.0 / bags.patches.shape[1])
    weights = {
        "average": uniform,
        "unsupervised": weigh(bags, None, spec, seed=seed),
        "normals": weigh(bags, known, spec, seed=seed),
    }
    rows: list[Row] = []
    for method, alpha in weights.items():
        groups = group(embed(bags, alpha), spec, clusters=len(set(classes)), seed=seed)
        measured = clustering_metrics(classes, groups.labels)
        row: Row = {"category": root.name, "method": method, "images": len(classes), "types": len(set(classes))}
        rows.append(row | {name: round(value, 4) for name, value in measured.items()})
    return rows


def _means(kind: str, names: tuple[str, ...], rows: list[Row]) -> list[Row]:
    means: list[Row] = []
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        own = [row for row in rows if row["category"] in names and row["method"] == method]
        if own:
            mean: Row = {"category": f"mean of {len(own)} {kind}", "method": method}
            mean |= {key: sum(int(row[key]) for row in own) for key in ("images", "types")}
            means.append(
                mean | {k: round(float(np.mean([row[k] for row in own])), 4) for k in ("nmi", "ari", "f1", "purity")}
            )
    return means
