"""Features in fewer bytes: computed once, in constant memory, and kept on disk beside the features themselves."""

import hashlib
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from jaxtyping import Float32, Shaped

from anomalymatch.files import atomic_folder, make_folder, storage_errors, write_text
from anomalymatch.progress import progress
from anomalymatch.ui.feature_rows import HalfRows, Rows, single
from anomalymatch.ui.pca import principal_components
from anomalymatch.ui.product_quantiser import ProductQuantiser, QuantisedRows

logger = logging.getLogger(__name__)
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
