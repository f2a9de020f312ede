"""Features in fewer bytes: computed once, in constant memory, and kept on disk beside the features themselves."""

import hashlib
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float16, Float32, Int64, Shaped

from anomalymatch.files import atomic_folder, make_folder, storage_errors, write_text
from anomalymatch.progress import progress
from anomalymatch.ui.one_thread import one_thread
from anomalymatch.ui.product_quantiser import ProductQuantiser, QuantisedRows

logger = logging.getLogger(__name__)

BLOCK_ROWS = 2048


@runtime_checkable
class Rows(Protocol):
    """Feature vectors of all readable images, however they are stored."""

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        ...

    def __len__(self) -> int:
        """How many there are."""
        ...

    def take(self, index: Int64[np.ndarray, " k"]) -> Float32[np.ndarray, "k d"]:
        """The vectors of these rows."""
        ...

    def inner(self, direction: Float32[np.ndarray, " d"]) -> Float32[np.ndarray, " m"]:
        """Inner product of every vector with `direction`."""
        ...


class HalfRows:
    """Vectors in half precision, mapped from disk or in memory.

    Args:
        blocks: the vectors one below the other, at least one block, all of the same length.
    """

    def __init__(self, blocks: Sequence[Float16[np.ndarray, "_ d"]]) -> None:
        self.dimensions = int(blocks[0].shape[1])
        # What fits into the processor's cache is converted and multiplied in a tenth of the time of the whole.
        self.blocks = [block[i : i + BLOCK_ROWS] for block in blocks for i in range(0, len(block), BLOCK_ROWS)]
        self._starts = np.cumsum([0] + [len(block) for block in self.blocks])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, index: Int64[np.ndarray, " k"]) -> Float32[np.ndarray, "k d"]:
        """See `Rows`."""
        rows = np.empty((len(index), self.dimensions), dtype=np.float32)
        owner = np.searchsorted(self._starts, index, side="right") - 1
        for k in np.unique(owner):
            mine = owner == k
            rows[mine] = self.blocks[k][index[mine] - self._starts[k]]
        return rows

    def inner(self, direction: Float32[np.ndarray, " d"]) -> Float32[np.ndarray, " m"]:
        """See `Rows`."""
        products = torch.empty(len(self))
        weights = torch.from_numpy(np.array(direction))
        with one_thread():
            for block, start in zip(self.blocks, self._starts, strict=False):
                torch.mv(torch.from_numpy(single(block)), weights, out=products[start : start + len(block)])
        return products.numpy()


def single(block: Float16[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """`block` in single precision; PyTorch converts ten times as fast as NumPy does."""
    return torch.from_numpy(np.array(block)).float().numpy()


_CHUNK = 2048


def principal_components(sample: Float32[np.ndarray, "n D"], dimensions: int) -> Float32[np.ndarray, "D d"]:
    """Orthonormal columns that keep as much of the sample's inner products as `dimensions` numbers can, most first.

    The mean is not taken away. Similarity of two images is the inner product of their features, and with a mean that
    was subtracted it would be another one: neighbours and probe would change even if every component were kept.

    Args:
        sample: feature vectors.
        dimensions: components that are wanted; all `D` if it is larger.
    """
    moments = np.zeros((sample.shape[1], sample.shape[1]))
    for start in range(0, len(sample), _CHUNK):
        part = sample[start : start + _CHUNK].astype(np.float64)
        moments += part.T @ part
    vectors = np.linalg.eigh(moments)[1][:, ::-1][:, :dimensions]
    # The sign of an eigenvector is a matter of the library; a stored bank must not depend on it.
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    return np.ascontiguousarray(vectors * np.sign(largest), dtype=np.float32)


FORMAT = 1
SAMPLE = 20_000
"""Vectors from which components and codebooks are learned."""
_SEED = 0
_CHECKED = 1 << 24

Block = Shaped[np.ndarray, "_ _"]


class Compressed(NamedTuple):
    """The compressed vectors, and what maps a feature vector to theirs: its product with `components`."""

    rows: Rows
    components: Float32[np.ndarray, "D d"]


def compressed(
    rows: HalfRows,
    kind: str,
    dimensions: int,
    folder: Path,
    stamp: str,
    scale: Float32[np.ndarray, " D"] | None = None,
) -> Compressed:
    """Compress `rows`, or read what was compressed before.

    Args:
        rows: at least one feature vector.
        kind: `pca` or `pq`.
        dimensions: principal components that are kept.
        folder: where the result is kept.
        stamp: tells these rows from others of the same number and length.
        scale: of each column, by which it is multiplied before; None for one.

    Raises:
        StorageError: if the disk is full or `folder` cannot be written to.
    """
    parts = [FORMAT, kind, min(dimensions, rows.dimensions), rows.dimensions, len(rows), SAMPLE, stamp]
    path = folder / f"{kind}-{hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()}"
    with storage_errors(make_folder(folder)), FileLock(folder / "bank.lock"):
        found = _read(path)
        if found is None:
            _compute(path, rows, kind, dimensions, np.ones(rows.dimensions, np.float32) if scale is None else scale)
            found = _read(path)
    if found is None:
        raise RuntimeError(f"{path} is damaged right after it was written")
    return found


def _compute(path: Path, rows: HalfRows, kind: str, dimensions: int, scale: Float32[np.ndarray, " D"]) -> None:
    rng = np.random.default_rng(_SEED)
    sample = rows.take(np.sort(rng.choice(len(rows), min(SAMPLE, len(rows)), replace=False)))
    components = scale[:, None] * principal_components(sample * scale, dimensions)
    convert: Callable[[Float32[np.ndarray, "n d"]], Block] = _to_half
    width, dtype = components.shape[1], "float16"
    arrays: dict[str, np.ndarray] = {"components": components}
    if kind == "pq":
        quantiser = ProductQuantiser.fit(sample @ components, seed=_SEED)
        arrays |= {"groups": quantiser.groups, "centroids": quantiser.centroids}
        width, dtype, convert = len(quantiser.groups), "uint8", quantiser.encode
    del sample
    with atomic_folder(path) as temporary:
        for name, array in arrays.items():
            buffer = io.BytesIO()  # on its way to a real file NumPy would lose the reason why a disk refuses it
            np.save(buffer, array, allow_pickle=False)
            (temporary / f"{name}.npy").write_bytes(buffer.getbuffer())
        _write_rows(temporary / "rows.npy", _converted(rows, components, convert), (len(rows), width), dtype)
        sums = {file.name: _checksum(file) for file in temporary.glob("*.npy")}
        write_text(temporary / "description.json", json.dumps(sums))


def _to_half(rows: Float32[np.ndarray, "n d"]) -> Block:
    return rows.astype(np.float16)


def _converted(
    rows: HalfRows, components: Float32[np.ndarray, "D d"], convert: Callable[[Float32[np.ndarray, "n d"]], Block]
) -> Iterator[Block]:
    with progress("Compressing features", len(rows)) as advance:
        for block in rows.blocks:
            yield convert(single(block) @ components)
            advance(len(block))


def _write_rows(path: Path, blocks: Iterator[Block], shape: tuple[int, int], dtype: str) -> None:
    """An .npy file written piece by piece; a full disk is an error here, and a crash in a mapped file."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)


def _read(path: Path) -> Compressed | None:
    """What `_compute` wrote to `path`; None if there is nothing or it is damaged."""
    if not (path / "description.json").exists():
        return None
    try:
        sums = json.loads((path / "description.json").read_text(encoding="utf-8"))
        if any(_checksum(path / name) != expected for name, expected in sums.items()):
            raise ValueError("a checksum is wrong")
        components = np.load(path / "components.npy", allow_pickle=False)
        rows = np.load(path / "rows.npy", mmap_mode="r", allow_pickle=False)
        if "centroids.npy" not in sums:
            return Compressed(HalfRows([rows]), components)
        groups, centroids = (np.load(path / f"{name}.npy", allow_pickle=False) for name in ("groups", "centroids"))
        return Compressed(QuantisedRows(rows, ProductQuantiser(components.shape[1], groups, centroids)), components)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("Compressed features in %s are corrupt (%s): computing them again", path, error)
        return None


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHECKED):
            total = zlib.crc32(chunk, total)
    return total
