"""An archive in parts: the unit that is scored, written by one rename, and found again by a continued job."""

import csv
import io
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float16, Float32
from scipy.special import expit

from anomalymatch.errors import ConfigError, StorageError
from anomalymatch.files import atomic_file, write_text
from anomalymatch.types import Reject

MANIFEST = "manifest.json"
FORMAT = 1
SCHEMA = pa.schema([("id", pa.string()), ("logit", pa.float32()), ("reason", pa.string())])


@dataclass(frozen=True)
class Manifest:
    """What a scoring job is; every continuation and every share of it must agree.

    Attributes:
        run_id: run, cycle and hash of the weights.
        archive: name of the archive.
        fingerprint: of the archive: its ids, pixels and rendering.
        images: how many images the archive has.
        part_images: images in a part.
        batch_size: images in a batch.
        backend: what computes.
        precision: fp32 or bf16.
        decode: cpu or gpu.
        features: whether the pooled features are kept.
        format: version of the folder's layout.
    """

    run_id: str
    archive: str
    fingerprint: str
    images: int
    part_images: int
    batch_size: int
    backend: str
    precision: str
    decode: str
    features: bool
    format: int = FORMAT

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.images // self.part_images)

    def rows(self, part: int) -> tuple[int, int]:
        """First position of `part` in the archive, and the one behind its last."""
        return part * self.part_images, min(self.images, (part + 1) * self.part_images)


@dataclass(frozen=True)
class Part:
    """The scores of one part.

    Attributes:
        ids: the readable images, in the order of the archive.
        logits: log-odds of being an anomaly.
        rejects: the others.
        features: pooled features of the readable images, if they are kept.
    """

    ids: Sequence[str]
    logits: Float32[np.ndarray, " n"]
    rejects: Sequence[Reject]
    features: Float16[np.ndarray, "n d"] | None


class PartFolder:
    """The finished parts of a job: `parts/000000.parquet`, `features/000000.npy`.

    Args:
        path: folder of the job.
        manifest: what the job is.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    def file(self, part: int) -> Path:
        """File of the scores of `part`."""
        return self.path / "parts" / f"{part:06d}.parquet"

    def feature_file(self, part: int) -> Path:
        """File of the features of `part`."""
        return self.path / "features" / f"{part:06d}.npy"

    def missing(self, parts: Iterable[int]) -> list[int]:
        """Those of `parts` that are not finished."""
        folder = self.path / "parts"
        done = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        return [part for part in parts if self.file(part).name not in done]

    def write(self, number: int, part: Part) -> None:
        """Write a part; its scores come last, and by one rename."""
        if part.features is not None:
            with atomic_file(self.feature_file(number)) as temporary, temporary.open("wb") as file:
                np.save(file, part.features)
        n, m = len(part.ids), len(part.rejects)
        columns = {
            "id": [*part.ids, *(reject.id for reject in part.rejects)],
            "logit": pa.array([*part.logits.tolist(), *[None] * m], pa.float32()),
            "reason": pa.array([*[None] * n, *(reject.reason for reject in part.rejects)], pa.string()),
        }
        with atomic_file(self.file(number)) as temporary:
            pq.write_table(pa.table(columns, schema=SCHEMA), temporary)

    def read(self, number: int, columns: Sequence[str] = ("id", "logit", "reason")) -> pa.Table:
        """Read the table of a part.

        Raises:
            StorageError: if it is corrupt.
        """
        try:
            return pq.read_table(self.file(number), columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"{self.file(number)} is corrupt: delete it and start the same command again") from error

    def logits(self) -> Iterator[tuple[int, Float32[np.ndarray, " n"]]]:
        """Logits of every finished part, in their order, rejects left out."""
        for number in range(self.manifest.parts):
            if self.file(number).exists():
                yield number, self.read(number, ["logit"])["logit"].drop_null().to_numpy()


def share_of(parts: int, share: str) -> range:
    """The parts of share `i/n` of a job array, i from 1 to n: neighbours, so that each file is read by few.

    Raises:
        ConfigError: if `share` is no such fraction.
    """
    first, _, count = share.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ConfigError(f"scoring.shard is {share!r}: it must be i/n with i from 1 to n, 3/8 for example")
    i, n = int(first), int(count)
    return range(parts * (i - 1) // n, parts * i // n)


def open_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of a new job, or check that the folder holds parts of this very one.

    Raises:
        StorageError: if the manifest is corrupt.
        ConfigError: if it is of another job, with the first difference.
    """
    file = path / MANIFEST
    saved = read_manifest(path)
    if saved is None:
        write_text(file, json.dumps(asdict(manifest), indent=2))
        return
    for field in fields(Manifest):
        before, now = getattr(saved, field.name), getattr(manifest, field.name)
        if before != now:
            raise ConfigError(
                f"{path} holds scores with {field.name}={before}, not {now}: choose another output folder"
            )


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in `path`, None if there is none.

    Raises:
        StorageError: if it is corrupt.
    """
    file = path / MANIFEST
    if not file.is_file():
        return None
    try:
        return Manifest(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"{file} is corrupt ({error}): choose another output folder") from error


INTERVAL_S = 30.0


class TopK:
    """Keeps the `k` highest logits of all that it is shown; ties go to the smaller id, so the order does not matter."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._best: list[tuple[float, str]] = []  # (-logit, id), sorted

    def add(self, ids: Sequence[str], logits: Float32[np.ndarray, " n"]) -> None:
        """Show it some more."""
        if not self.k or not len(ids):
            return
        bar = -self._best[-1][0] if len(self._best) == self.k else -np.inf
        candidates = np.flatnonzero(logits >= bar)
        if len(candidates) > self.k:  # of many, only those that can be among the best, ties included
            worst = np.partition(logits[candidates], -self.k)[-self.k]
            candidates = candidates[logits[candidates] >= worst]
        if len(candidates):
            new = [(-float(logits[i]), ids[int(i)]) for i in candidates]
            self._best = sorted(self._best + new)[: self.k]

    def best(self) -> list[tuple[str, float]]:
        """Ids and logits, best first."""
        return [(id_, -negative) for negative, id_ in self._best]

    def write(self, path: Path) -> None:
        """Write `rank, id, score, logit` as CSV, atomically."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["rank", "id", "score", "logit"])
        for rank, (id_, logit) in enumerate(self.best(), 1):
            writer.writerow([rank, id_, f"{expit(logit):.6g}", f"{logit:.6g}"])
        write_text(path, text.getvalue())


class RunningTop(TopK):
    """A `TopK` that is on disk while the archive is being scored, at most half a minute old.

    Args:
        k: how many to keep.
        path: the CSV.
    """

    def __init__(self, k: int, path: Path) -> None:
        super().__init__(k)
        self.path = path
        self._written = time.monotonic()

    def add(self, ids: Sequence[str], logits: Float32[np.ndarray, " n"]) -> None:
        """Show it some more."""
        super().add(ids, logits)
        if time.monotonic() - self._written > INTERVAL_S:
            self.write(self.path)
            self._written = time.monotonic()
