"""HDF5 files as a source: arrays of pixels, or encoded images of variable length."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import EIGHT_BITS
from anomalymatch.data.sources.array_parts import (
    AUTO,
    Part,
    Root,
    band_list,
    choose,
    classes,
    find,
    reason,
    stamp,
    texts,
    unit_text,
)
from anomalymatch.data.sources.arrays import CACHE_BYTES, ArraySource, Opened
from anomalymatch.errors import DataError

SUFFIXES = frozenset({".h5", ".hdf5"})
IDS = ("filenames", "ids")
LABELS = ("labels", "label")


def hdf5_source(
    root: Root | None,
    *,
    name: str = "hdf5",
    images: str = "images",
    ids: str = AUTO,
    labels: str = AUTO,
    class_names: Sequence[str] | None = None,
    labels_file: str | Path | None = None,
    layout: str = "auto",
    bands: Sequence[str] | None = None,
    channels: int | None = None,
    holdout_files: Sequence[str] = (),
    cache_bytes: int = CACHE_BYTES,
    rendering: Rendering = EIGHT_BITS,
) -> ArraySource:
    """Open HDF5 files with a dataset of images.

    Images are rows of integers or floats, (n, h, w), (n, h, w, bands) or (n, bands, h, w), or JPEG, PNG and the like,
    each as bytes (a dataset (n,) of variable-length uint8, of opaque bytes or of byte strings). The attributes `bands`
    and `units` (or `BUNIT`) of the dataset, or else of the file, name the bands and what they measure.

    Args:
        root: a file, a folder in which all files `*.h5` and `*.hdf5`, at any depth, are read in the order of their
            paths, or a list of both.
        name: short name for logs and folders.
        images: name of the dataset with the images.
        ids: name of the dataset with a unique id for each image; "auto" takes `filenames` or `ids` where there is one,
            "none" takes `{file stem}/{row:06d}`.
        labels: name of the dataset with a class for each image: numbers or strings; "auto" takes `labels` or `label`
            where there is one, "none" reads no classes.
        class_names: names of the classes 0, 1, …; None takes the numbers themselves.
        labels_file: see `ArraySource`, as for what follows.
        layout: order of the axes.
        bands: names of the bands.
        channels: 1, 3 or 4 for photographs.
        holdout_files: patterns of the files of an official test split.
        cache_bytes: decoded chunks kept in memory.
        rendering: how pixels become 8-bit channels.

    Raises:
        DataError: if `root` is None, a file is missing, is no HDF5, or lacks a dataset; further see `ArraySource`.
    """
    if root is None:
        raise DataError("dataset=hdf5 needs data.root=PATH, an HDF5 file, a folder of such files, or a list of them")
    parts = []
    for path, stem, _ in find(root, _wanted, "an HDF5 file"):
        try:
            with _open(path) as file:
                parts.append(_describe(file, path, stem, (images, ids, labels), class_names))
        except DataError:
            raise
        except Exception as error:  # damaged files make the library raise anything
            raise DataError(
                f"{path}: expected an HDF5 file, but it cannot be read ({reason(error)}); get it again"
            ) from None
    return ArraySource(
        parts,
        partial(_rows, images=images),
        name=name,
        layout=layout,
        bands=bands,
        channels=channels,
        labels_file=labels_file,
        holdout_files=holdout_files,
        cache_bytes=cache_bytes,
        rendering=rendering,
    )


def _wanted(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _open(path: Path) -> h5py.File:
    # Unlocked, because a lock is refused on read-only and on some network file systems.
    return h5py.File(path, "r", locking=False)


def _rows(path: Path, images: str) -> Opened:
    file = _open(path)
    return Opened(file[images], file.close)


def _describe(
    file: h5py.File, path: Path, stem: str, names: tuple[str, str, str], class_names: Sequence[str] | None
) -> Part:
    table = _dataset(file, path, names[0])
    encoded = _is_encoded(table)
    if not encoded and table.dtype.kind not in "iuf":
        raise DataError(
            f"{path}: expected integers, floats, or encoded images as bytes in {names[0]}, found {table.dtype}"
        )
    n = table.shape[0] if table.shape else 0
    id_name = choose("ids", names[1], IDS, file, path)
    label_name = choose("labels", names[2], LABELS, file, path)
    own, common = table.attrs, file.attrs
    size, mtime = stamp(path)
    return Part(
        path=path,
        stem=stem,
        array=names[0],
        shape=table.shape,
        dtype=table.dtype,
        stamp=(size, mtime),
        signature=f"{size} {mtime}",
        encoded=encoded,
        block=table.chunks[0] if table.chunks and not encoded else 1,
        ids=None if id_name is None else texts(_dataset(file, path, id_name)[()], id_name, "ids", n, path),
        classes=None
        if label_name is None
        else classes(_dataset(file, path, label_name)[()], label_name, class_names, n, path),
        bands=band_list(own.get("bands", common.get("bands"))),
        units=unit_text(*(attributes.get(key) for attributes in (own, common) for key in ("units", "BUNIT"))),
    )


def _dataset(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
    found: Any = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise DataError(f"{path}: there is no dataset {name}, found {', '.join(file) or 'nothing'}")
    return found


def _is_encoded(table: h5py.Dataset) -> bool:
    """Whether each row is the bytes of a file; no array of numbers has the shape (n,)."""
    pieces = h5py.check_vlen_dtype(table.dtype)
    whole = h5py.check_string_dtype(table.dtype) is not None or table.dtype.kind in "SV"
    return table.ndim == 1 and table.dtype.names is None and (whole or pieces == np.uint8)
