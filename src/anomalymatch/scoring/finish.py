"""When every part is there: quantiles over the whole archive, the final tables, and the pictures."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from jaxtyping import Float32, Float64
from scipy.special import expit

from anomalymatch.data.source import ImageSource
from anomalymatch.errors import StorageError
from anomalymatch.evaluation.contact_sheet import contact_sheet
from anomalymatch.evaluation.plots import histogram_figure, save
from anomalymatch.files import atomic_file, write_text
from anomalymatch.ranking import write_rejects
from anomalymatch.scoring.parts import PartFolder, TopK, read_manifest
from anomalymatch.scoring.trained import Trained
from anomalymatch.types import Reject

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
ROWS_PER_FILE = 262_144
SHEET = 64
HISTOGRAM_IMAGES = 1_000_000
"""Scores in the histogram at most; of more, every n-th of them in their order."""
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("score", pa.float32()),
        ("quantile", pa.float64()),
        ("logit", pa.float32()),
        ("feature_row", pa.int64()),
        ("run", pa.dictionary(pa.int32(), pa.string())),
    ]
)


def is_finished(path: Path, trained: Trained, source: ImageSource) -> bool:
    """Whether `path` holds the finished scores of this very archive by this very run."""
    if not (path / SUMMARY).is_file():
        return False
    manifest = read_manifest(path)
    return manifest is not None and (manifest.run_id, manifest.fingerprint) == (trained.run_id, source.fingerprint)


def finish(folder: PartFolder, source: ImageSource, top: int) -> bool:
    """Make the tables and pictures of a job whose parts are all there.

    Everything is made from the parts, which are removed last: a kill costs only the time.

    Args:
        folder: the parts.
        source: the archive, for pictures and coordinates.
        top: rows of top.csv.

    Returns:
        Whether all parts were there.
    """
    with FileLock(folder.path / ".lock-finish"):
        missing = folder.missing(range(folder.manifest.parts))
        if (folder.path / SUMMARY).is_file():
            return True
        if missing:
            logger.info(
                "%d of %d parts are missing: the last share to finish makes the tables",
                len(missing),
                folder.manifest.parts,
            )
            return False
        ordered = np.sort(np.concatenate([logits for _, logits in folder.logits()]))
        best, rejects = _write_tables(folder, ordered, top)
        write_rejects(rejects, folder.path / "rejects.parquet")
        best.write(folder.path / "top.csv")
        _write_votable(folder.path / "top.vot", best, source)
        _write_pictures(folder.path, ordered, best, source)
        counts = {"images": folder.manifest.images, "scored": len(ordered), "rejects": len(rejects)}
        write_text(folder.path / SUMMARY, json.dumps({"run": folder.manifest.run_id, **counts}, indent=2))
    _clear(folder.path)
    return True


def quantiles(logits: Float32[np.ndarray, " n"], ordered: Float32[np.ndarray, " m"]) -> Float64[np.ndarray, " n"]:
    """Share of the archive below each logit, ties counted by half: in (0, 1), the highest for the most anomalous."""
    below = np.searchsorted(ordered, logits, side="left")
    upto = np.searchsorted(ordered, logits, side="right")
    return (below + upto) / (2.0 * len(ordered))


def _write_tables(folder: PartFolder, ordered: Float32[np.ndarray, " m"], top: int) -> tuple[TopK, list[Reject]]:
    """Write scores/00000.parquet and so on, several parts a file, in the order of the archive."""
    best, rejects, row = TopK(top), list[Reject](), 0
    manifest = folder.manifest
    parts_per_file = max(1, ROWS_PER_FILE // manifest.part_images)
    for number, first in enumerate(range(0, manifest.parts, parts_per_file)):
        tables = [folder.read(part) for part in range(first, min(manifest.parts, first + parts_per_file))]
        table = pa.concat_tables(tables)
        readable = table.filter(table["reason"].is_null())
        bad = table.filter(table["reason"].is_valid())
        rejects += [Reject(r["id"], r["reason"]) for r in bad.select(["id", "reason"]).to_pylist()]
        logits = readable["logit"].to_numpy()
        best.add(readable["id"].to_pylist(), logits)
        columns = {
            "id": readable["id"],
            "score": expit(logits.astype(np.float64)).astype(np.float32),
            "quantile": quantiles(logits, ordered),
            "logit": logits,
            "feature_row": pa.array(
                np.arange(row, row + len(logits)) if manifest.features else [None] * len(logits), pa.int64()
            ),
            "run": pa.DictionaryArray.from_arrays(np.zeros(len(logits), np.int32), [manifest.run_id]),
        }
        row += len(logits)
        with atomic_file(folder.path / "scores" / f"{number:05d}.parquet") as temporary:
            pq.write_table(pa.table(columns, schema=SCHEMA), temporary)
    return best, rejects


def _write_votable(path: Path, best: TopK, source: ImageSource) -> None:
    """The top of the list with its coordinates, for TOPCAT, Aladin and ESASky; only where images have any."""
    found = [(id_, logit, source.coordinates(id_)) for id_, logit in best.best()]
    rows = [(id_, *place, float(expit(logit)), logit) for id_, logit, place in found if place is not None]
    if not rows:
        return
    from astropy import units
    from astropy.table import Table

    table = Table(rows=rows, names=("id", "ra", "dec", "score", "logit"))
    table["ra"].unit = table["dec"].unit = units.deg
    with atomic_file(path) as temporary:
        table.write(temporary, format="votable", overwrite=True)


def _write_pictures(path: Path, ordered: Float32[np.ndarray, " m"], best: TopK, source: ImageSource) -> None:
    step = max(1, len(ordered) // HISTOGRAM_IMAGES)
    if len(ordered):
        name = "archive" if step == 1 else f"archive, 1 image of {step}"
        save(histogram_figure(expit(ordered[::step].astype(np.float64)), name=name), path / "histogram.png")
    shown = best.best()[:SHEET]
    images = source.read([id_ for id_, _ in shown])
    pairs = [(image, item) for image, item in zip(images, shown, strict=True) if not isinstance(image, Reject)]
    captions = [f"{id_}\n{expit(logit):.3f}" for _, (id_, logit) in pairs]
    with atomic_file(path / "top.png") as temporary:
        contact_sheet([image for image, _ in pairs], captions).save(temporary, "PNG")


def _clear(path: Path) -> None:
    """Remove what the finished tables hold as well."""
    shutil.rmtree(path / "parts", ignore_errors=True)
    for file in path.glob("top-*.csv"):
        file.unlink(missing_ok=True)


def read_scores(path: Path, columns: Sequence[str] = ("id", "score", "quantile", "logit")) -> pa.Table:
    """The final scores of an archive, all files as one table.

    Raises:
        StorageError: if the job is not finished, or a file corrupt.
    """
    if not (path / SUMMARY).is_file():
        raise StorageError(f"{path} holds no finished scores: start the same scoring command again")
    try:
        return pq.read_table(path / "scores", columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"the scores in {path} are missing or corrupt ({error})") from error
