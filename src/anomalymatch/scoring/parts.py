"""Parts of a scored archive: each is written by one rename, and a continued job finds the finished ones."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32

from anomalymatch.cache import Cache
from anomalymatch.data.stream import Collected
from anomalymatch.errors import ConfigError, StorageError
from anomalymatch.files import atomic_file, write_text

MANIFEST, INT8, CASCADE = "manifest.json", "int8", "cascade.safetensors"
FORMAT = 1
SCHEMA = pa.schema([("id", pa.string()), ("logit", pa.float32()), ("full_look", pa.bool_()), ("reason", pa.string())])


@dataclass(frozen=True)
class Manifest:
    """Identity of a scoring job; every continuation and every share of it must agree.

    Attributes:
        run_id: run, cycle and hash of the weights.
        fingerprint: hash of the archive's ids, pixels and rendering.
        precision: fp32, bf16 or int8.
        agreement: that of int8 with the network itself, see `Agreement`; None in any other precision.
        cascade: the decision about a cascade, see `Decision`; None if none was measured.
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
    agreement: dict[str, float] | None = None
    cascade: dict[str, Any] | None = None
    format: int = FORMAT

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.images // self.part_images)

    @property
    def has_first_looks(self) -> bool:
        """True if some scores are those of the first look of a cascade."""
        return self.cascade is not None and bool(self.cascade["used"])

    @property
    def scorer_options(self) -> dict[str, Any]:
        """Options of `make_scorer`."""
        return {
            "backend": self.backend,
            "count": self.images,
            "batch_size": self.batch_size,
            "features": self.features,
        }

    def rows(self, part: int) -> tuple[int, int]:
        """Return the range of positions, start and stop, of a part."""
        return part * self.part_images, min(self.images, (part + 1) * self.part_images)

    def batches(self, part: int) -> list[tuple[int, int]]:
        """Return the range of positions, start and stop, of each batch of a part."""
        start, stop = self.rows(part)
        return [(at, min(stop, at + self.batch_size)) for at in range(start, stop, self.batch_size)]


class PartFolder:
    """Finished parts in the folder of a job: `parts/000000.parquet`, `features/000000.npy`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @property
    def int8(self) -> Cache | None:
        """Cache with the int8 network that all processes share; None in any other precision."""
        return Cache(self.path / INT8) if self.manifest.precision == "int8" else None

    def file(self, part: int) -> Path:
        """Return the path of the scores of a part."""
        return self.path / "parts" / f"{part:06d}.parquet"

    def missing(self, parts: Iterable[int]) -> list[int]:
        """Return the parts that are not finished."""
        folder = self.path / "parts"
        done = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        return [part for part in parts if self.file(part).name not in done]

    def write(self, part: int, found: Collected, full: Bool[np.ndarray, " n"] | None = None) -> None:
        """Write a part; its scores come last, by one rename.

        Args:
            part: number of the part.
            found: rows with the logit in the first column and the features to keep in the others.
            full: which logits are those of a full look; all without a cascade.
        """
        if self.manifest.features:
            features = found.rows[:, 1:]
            norms = np.linalg.norm(features, axis=1, keepdims=True)
            path = self.path / "features" / f"{part:06d}.npy"
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, (features / np.maximum(norms, 1e-12)).astype(np.float16))
        n, m = len(found.ids), len(found.rejects)
        columns = {
            "id": [*found.ids, *(reject.id for reject in found.rejects)],
            "logit": pa.array([*found.rows[:, 0].tolist(), *[None] * m], pa.float32()),
            "full_look": pa.array([*([True] * n if full is None else full.tolist()), *[None] * m], pa.bool_()),
            "reason": pa.array([*[None] * n, *(reject.reason for reject in found.rejects)], pa.string()),
        }
        with atomic_file(self.file(part)) as temporary:
            pq.write_table(pa.table(columns, schema=SCHEMA), temporary)

    def read(self, part: int, columns: Sequence[str] = ("id", "logit", "full_look", "reason")) -> pa.Table:
        """Read the table of a part.

        Raises:
            StorageError: if it is corrupt.
        """
        try:
            return pq.read_table(self.file(part), columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise StorageError(f"{self.file(part)} is corrupt: delete it and start the same command again") from error

    def logits(self, part: int) -> tuple[list[str], Float32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Read ids and logits of the readable images of a part, and which of them had the full look."""
        table = self.read(part, ["id", "logit", "full_look"]).drop_null()
        return table["id"].to_pylist(), table["logit"].to_numpy(), table["full_look"].to_numpy()


def share_of(parts: int, share: str) -> range:
    """Return the parts of share `i/n` of a job array, i from 1 to n: consecutive, so that few jobs read the same file.

    Raises:
        ConfigError: if `share` is no such fraction.
    """
    first, _, count = share.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ConfigError(f"scoring.shard is {share!r}: it must be i/n with i from 1 to n, 3/8 for example")
    i, n = int(first), int(count)
    return range(parts * (i - 1) // n, parts * i // n)


def open_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of a new job, or check that the folder has the same one.

    Raises:
        StorageError: if the manifest in the folder is corrupt.
        ConfigError: if it is that of another job; the message has the first difference.
    """
    saved = read_manifest(path)
    if saved is None:
        write_text(path / MANIFEST, json.dumps(asdict(manifest), indent=2))
        return
    for field in fields(Manifest):
        before, now = getattr(saved, field.name), getattr(manifest, field.name)
        if before != now:
            raise ConfigError(
                f"{path} holds scores with {field.name}={before}, not {now}: choose another output folder"
            )


def read_manifest(path: Path) -> Manifest | None:
    """Read the manifest in a folder; None if there is none.

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
