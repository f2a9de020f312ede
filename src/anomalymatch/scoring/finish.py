"""Tables and pictures of a scoring job: the top while it runs, and all of them when all parts are there."""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from jaxtyping import Bool, Float32, Float64
from pyarrow.csv import CSVWriter
from scipy.special import expit

from anomalymatch.backbones.evidence import write_evidence_sheet
from anomalymatch.backbones.network import Network
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import read_images
from anomalymatch.evaluation.contact_sheet import contact_sheet, save_sheet
from anomalymatch.evaluation.plots import histogram_figure, save
from anomalymatch.files import atomic_file, write_csv, write_text
from anomalymatch.ranking import write_rejects
from anomalymatch.scoring.model import TrainedModel
from anomalymatch.scoring.parts import CASCADE, INT8, PartFolder, read_manifest
from anomalymatch.text import csv_cell, printable
from anomalymatch.types import Reject
from anomalymatch.votable import write_votable

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
INTERVAL_S = 30.0
ROWS_PER_FILE = 262_144
SHEET_IMAGES = 64
HISTOGRAM_IMAGES = 1_000_000
"""Largest number of scores in the histogram; a larger archive is thinned out evenly."""
FULL_LOOK = pa.field("full_look", pa.bool_())
"""Column of the tables of a cascade: whether the full network has seen the image."""
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


class TopK:
    """The `k` highest logits that were added; equal logits are ordered by id, so the order of adding does not matter.

    Args:
        k: number of images to keep.
        path: CSV that is written during the scoring, every half minute; None for none.
        has_first_looks: also write whether the logit is that of a full look.
    """

    def __init__(self, k: int, path: Path | None = None, *, has_first_looks: bool = False) -> None:
        self.k, self.path, self.has_first_looks = k, path, has_first_looks
        self._best: list[tuple[float, str, bool]] = []  # (-logit, id, full look), sorted
        self._written = time.monotonic()

    def add(
        self, ids: Sequence[str], logits: Float32[np.ndarray, " n"], full: Bool[np.ndarray, " n"] | None = None
    ) -> None:
        """Add images with their logits; `full` tells which are those of a full look, all without it."""
        if self.k and len(ids):
            self._merge(ids, logits, np.ones(len(ids), bool) if full is None else full)
        if self.path is not None and time.monotonic() - self._written > INTERVAL_S:
            self.write(self.path)
            self._written = time.monotonic()

    def _merge(self, ids: Sequence[str], logits: Float32[np.ndarray, " n"], full: Bool[np.ndarray, " n"]) -> None:
        threshold = -self._best[-1][0] if len(self._best) == self.k else -np.inf
        candidates = np.flatnonzero(logits >= threshold)
        if len(candidates) > self.k:  # of many, only those that can be among the best, ties included
            worst = np.partition(logits[candidates], -self.k)[-self.k]
            candidates = candidates[logits[candidates] >= worst]
        if len(candidates):
            new = [(-float(logits[i]), ids[int(i)], bool(full[i])) for i in candidates]
            self._best = sorted(self._best + new)[: self.k]

    def best(self) -> list[tuple[str, float]]:
        """Return ids and logits, best first."""
        return [(id_, -negative) for negative, id_, _ in self._best]

    def write(self, path: Path) -> None:
        """Write `rank, id, score, logit` as CSV, atomically, and `full_look` with a cascade."""
        marks = [(str(full).lower(),) * self.has_first_looks for *_, full in self._best]
        rows = (
            (rank, id_, f"{expit(z):.6g}", f"{z:.6g}", *mark)
            for rank, ((id_, z), mark) in enumerate(zip(self.best(), marks, strict=True), 1)
        )
        write_csv(path, ["rank", "id", "score", "logit", *[FULL_LOOK.name] * self.has_first_looks], rows)


def is_finished(path: Path, model: TrainedModel, source: ImageSource) -> bool:
    """Return True if `path` holds the finished scores of this archive by this model."""
    if not (path / SUMMARY).is_file():
        return False
    manifest = read_manifest(path)
    return manifest is not None and (manifest.run_id, manifest.fingerprint) == (model.run_id, source.fingerprint)


def finish(
    folder: PartFolder, source: ImageSource, model: TrainedModel, *, device: torch.device, top: int, csv: bool
) -> bool:
    """Make the tables and pictures of a job if all its parts are there.

    All are made from the parts, which are removed last: a kill costs time only.

    Args:
        folder: the parts.
        source: the archive, for pictures and coordinates.
        model: the trained model, for the evidence in the top-ranked images.
        device: device of its forward passes.
        top: number of rows of top.csv.
        csv: also write scores.csv.

    Returns:
        True if all parts were there.
    """
    path, manifest = folder.path, folder.manifest
    with FileLock(path / ".lock-finish"):
        if (path / SUMMARY).is_file():
            return True
        missing = folder.missing(range(manifest.parts))
        if missing:
            logger.info(
                "%d of %d parts are missing: the last share to finish makes the tables", len(missing), manifest.parts
            )
            return False
        logits = [folder.read(part, ["logit"])["logit"].drop_null().to_numpy() for part in range(manifest.parts)]
        ordered = np.sort(np.concatenate(logits))
        best, rejects = _write_tables(folder, ordered, top)
        if csv:
            write_scores_csv(path)
        write_rejects(rejects, path / "rejects.parquet")
        best.write(path / "top.csv")
        write_top_votable(path / "top.vot", best, source)
        _write_pictures(path, ordered, best, source, model.network().to(device))
        counts = {"images": manifest.images, "scored": len(ordered), "rejects": len(rejects)}
        cascade = {} if manifest.cascade is None else {"cascade": manifest.cascade}
        write_text(path / SUMMARY, json.dumps({"run": manifest.run_id, **counts, **cascade}, indent=2))
    (path / CASCADE).unlink(missing_ok=True)
    for finished in ("parts", INT8):
        shutil.rmtree(path / finished, ignore_errors=True)
    for file in path.glob("top-*.csv"):
        file.unlink(missing_ok=True)
    return True


def quantiles(logits: Float32[np.ndarray, " n"], ordered: Float32[np.ndarray, " m"]) -> Float64[np.ndarray, " n"]:
    """Compute the share of the archive below each logit, in (0, 1); ties count by half."""
    below = np.searchsorted(ordered, logits, side="left")
    upto = np.searchsorted(ordered, logits, side="right")
    return (below + upto) / (2.0 * len(ordered))


def _write_tables(folder: PartFolder, ordered: Float32[np.ndarray, " m"], top: int) -> tuple[TopK, list[Reject]]:
    """Write scores/00000.parquet and so on, several parts in a file, in the order of the archive."""
    manifest = folder.manifest
    best, rejects, row = TopK(top, has_first_looks=manifest.has_first_looks), list[Reject](), 0
    schema = SCHEMA.append(FULL_LOOK) if manifest.has_first_looks else SCHEMA
    parts_per_file = max(1, ROWS_PER_FILE // manifest.part_images)
    for number, first in enumerate(range(0, manifest.parts, parts_per_file)):
        table = pa.concat_tables(
            folder.read(part) for part in range(first, min(manifest.parts, first + parts_per_file))
        )
        readable = table.filter(table["reason"].is_null())
        bad = table.filter(table["reason"].is_valid())
        rejects += [Reject(r["id"], r["reason"]) for r in bad.select(["id", "reason"]).to_pylist()]
        logits = readable["logit"].to_numpy()
        best.add(readable["id"].to_pylist(), logits, readable["full_look"].to_numpy())
        columns = {
            "id": readable["id"],
            "score": expit(logits.astype(np.float64)).astype(np.float32),
            "quantile": quantiles(logits, ordered),
            "logit": logits,
            "feature_row": pa.array(
                np.arange(row, row + len(logits)) if manifest.features else [None] * len(logits), pa.int64()
            ),
            "run": pa.DictionaryArray.from_arrays(np.zeros(len(logits), np.int32), [manifest.run_id]),
            "full_look": readable["full_look"],
        }
        row += len(logits)
        with atomic_file(folder.path / "scores" / f"{number:05d}.parquet") as temporary:
            pq.write_table(pa.table({name: columns[name] for name in schema.names}, schema=schema), temporary)
    return best, rejects


def write_scores_csv(path: Path) -> None:
    """Write scores/*.parquet of a folder as one scores.csv, rounded to six digits after the point."""
    numbers = ("score", "quantile", "logit")
    files = sorted((path / "scores").glob("*.parquet"))
    marks = [FULL_LOOK] if files and FULL_LOOK.name in pq.read_schema(files[0]).names else []
    schema = pa.schema([("id", pa.string()), *((name, pa.float64()) for name in numbers), *marks])
    with atomic_file(path / "scores.csv") as temporary, CSVWriter(temporary, schema) as writer:
        for file in files:
            table = pq.read_table(file, columns=schema.names)
            columns = {name: np.round(table[name].to_numpy().astype(np.float64), 6) for name in numbers}
            columns |= {"id": list(map(csv_cell, table["id"].to_pylist())), **{m.name: table[m.name] for m in marks}}
            writer.write_table(pa.table({name: columns[name] for name in schema.names}, schema=schema))


def write_top_votable(path: Path, best: TopK, source: ImageSource) -> None:
    """Write the most anomalous images with their coordinates; no file if none has coordinates."""
    found = [(id_, logit, source.coordinates(id_)) for id_, logit in best.best()]
    rows = [(id_, *place, float(expit(logit)), logit) for id_, logit, place in found if place is not None]
    if rows:
        write_votable(path, {"id": str, "ra": float, "dec": float, "score": float, "logit": float}, rows)


def _write_pictures(
    path: Path, ordered: Float32[np.ndarray, " m"], best: TopK, source: ImageSource, network: Network
) -> None:
    step = max(1, len(ordered) // HISTOGRAM_IMAGES)
    if len(ordered):
        name = "archive" if step == 1 else f"archive, 1 image of {step}"
        save(histogram_figure(expit(ordered[::step].astype(np.float64)), name=name), path / "histogram.png")
    logits = dict(best.best()[:SHEET_IMAGES])
    shown = read_images(source, list(logits))
    captions = [f"{printable(id_)}\n{expit(logits[id_]):.3f}" for id_ in shown.ids]
    save_sheet(contact_sheet(shown.images, captions), path / "top.png")
    write_evidence_sheet(path / "top_evidence.png", network, shown.images, captions, source.rendering.fit)
