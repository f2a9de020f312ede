"""Base class of sources whose images are rows of arrays: axes, bands, ids, classes and blockwise reading."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from anomalymatch.checks import check_choice
from anomalymatch.data.codecs import MAX_PIXELS, MODES, decode, with_channels
from anomalymatch.data.find import FoundFile, damaged_file, find_files, hash_sample, held_out, missing_root, stamp
from anomalymatch.data.labels import read_labels
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS, ImageSource, hash_rows
from anomalymatch.data.sources.array_file import AUTO, ArrayFile, Columns
from anomalymatch.data.sources.tables import parquet_table
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.lru import LRU
from anomalymatch.text import listed, reason
from anomalymatch.types import Pixels

LAYOUTS = (AUTO, "nhw", "nhwc", "nchw")
MAX_BANDS = 64
"""Length up to which `layout=auto` takes an axis for the bands."""
NARROW = 8
"""Side below which the last axis of three is taken for bands, not for pixels."""
MAX_ROWS, MAX_PACKING = 100_000, 100_000
"""More rows than this are refused if they claim more than `MAX_PACKING` times the bytes of their file."""
MAX_BLOCK = 2**31
"""Largest block of rows that is decoded together, in bytes."""
CACHE_BYTES = 2**28
OPEN_FILES = 64
SAMPLED_FILES = 1000
"""Largest number of files whose content is sampled for the fingerprint; of more, size and time must tell."""
ENCODED_CHANNELS = 3

Root = str | Path | Sequence[str | Path]
PixelRows = Shaped[np.ndarray, "n *image"]


class Opened(NamedTuple):
    """Open file: `rows` gives an array of images for a slice of rows."""

    rows: Any
    close: Callable[[], object]


class ArraySource(ImageSource):
    """Images that are rows of the arrays in one or several files, ordered by file and row.

    Arrays have the shape (n, h, w), (n, h, w, bands) or (n, bands, h, w), with integers, floats or booleans, which
    become 0 and 1. Ids come from the files, else they are `{file stem}/{row:06d}`. Opening reads no image. Reading
    follows the order of the rows, decodes each block of rows once, and keeps the blocks used last. Subclasses implement
    `describe` and `open_rows` for a format.

    Args:
        root: a file, a folder that is searched for files at any depth, or a list of both.
        name: short name for logs and folders; None takes that of the format.
        images: name of the array with the images.
        ids: name of the array or column with a unique id for each image; "auto" takes a usual name where there is
            one, "none" takes file and row.
        labels: name of the array or column with a class for each image; "auto" takes a usual name where there is one,
            "none" reads no classes.
        class_names: names of the classes 0, 1, …; None takes the numbers themselves.
        layout: order of the axes: "nhw", "nhwc" (bands last), "nchw" (bands first), or "auto", which takes the
            shorter of the two for the bands, and refuses images (n, h, w) of a width below 8.
        bands: names of the bands, or of the `channels`; None takes those in the files, else the usual ones.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA) converts photographs; None keeps the bands, and decodes JPEG and PNG
            to RGB.
        labels_file: a CSV `filename,label`, see `read_labels`; its classes replace those in the files. None takes
            `labels.csv` beside the files, where there is one.
        holdout_files: patterns of file names, "test*" for example, whose images are the official test split.
        cache_bytes: bytes of decoded rows that each process keeps; at least one block is kept.
        rendering: conversion of the bands to 8-bit channels.

    Attributes:
        files: description of each file.

    Raises:
        DataError: if a file is missing, damaged or lacks an array, an array does not hold images or its axes are
            ambiguous, the files differ in bands or classes, ids are not unique, or a pattern matches no file.
        ConfigError: if an option has no such value, or the number of `bands` is wrong.
        LabelError: if the labels file is missing, wrong, or an incomplete benchmark.
    """

    dataset: ClassVar[str]
    kind: ClassVar[str]
    """Name of a file of the format in messages, "an HDF5 file" for example."""
    suffixes: ClassVar[frozenset[str]]
    usual_ids: ClassVar[Sequence[str]] = ("filenames", "ids")
    usual_labels: ClassVar[Sequence[str]] = ("labels", "label")
    stores: ClassVar[bool] = False
    """True if a folder can be a file of the format."""

    def __init__(
        self,
        root: Root | None,
        *,
        name: str | None = None,
        images: str = "images",
        ids: str = AUTO,
        labels: str = AUTO,
        class_names: Sequence[str] | None = None,
        layout: str = AUTO,
        bands: Sequence[str] | None = None,
        channels: int | None = None,
        labels_file: str | Path | None = None,
        holdout_files: Sequence[str] = (),
        cache_bytes: int = CACHE_BYTES,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        check_choice("dataset.source.layout", layout, LAYOUTS)
        check_choice("dataset.source.channels", channels, MODES, null=True)
        if root is None:
            raise missing_root(self.dataset, f"{self.kind}, a folder with such files, or a list of them")
        self.images, self.layout, self._channels = images, layout, channels
        self._columns = Columns(ids, labels, class_names, self.usual_ids, self.usual_labels)
        found = find_files(root, self.matches, self.kind, folders=self.stores)
        self.check_found(found)
        self.files = files = [self._described(file) for file in found]
        self._layouts = [_layout(file, layout) for file in files]
        self._starts = np.cumsum([0] + [file.shape[0] for file in files])
        self._opened: LRU[int, Opened] = LRU(OPEN_FILES, close=methodcaller("close"))
        self._blocks: LRU[tuple[int, int], PixelRows] = LRU(cache_bytes, cost=attrgetter("nbytes"))
        all_ids = list(chain.from_iterable(file.all_ids() for file in files))
        name = name or self.dataset
        _check_unique(name, files, all_ids)
        given, classes = read_labels(labels_file, all_ids, _folder(root), archive=True)
        super().__init__(
            name=name,
            ids=all_ids,
            bands=_bands(files, self._layouts, bands, channels),
            units=_agreed("units", [(file.path, file.units) for file in files]),
            rendering=rendering,
            fingerprint=_fingerprint(files, f"arrays {channels} {self._layouts}"),
            labels=given,
            truth=_truth(files, all_ids) if classes is None else classes,
            holdout=held_out([(file.path, file.all_ids()) for file in files], holdout_files),
        )

    def matches(self, path: Path) -> bool:
        """Tell whether a path is a file of the format, by default by its suffix."""
        return path.suffix.lower() in self.suffixes

    def check_found(self, found: Sequence[FoundFile]) -> None:
        """Refuse options that do not fit the files; by default all do."""

    @abstractmethod
    def describe(self, file: FoundFile) -> ArrayFile:
        """Read everything but the images of a file; any exception means that the file is damaged."""

    @abstractmethod
    def open_rows(self, path: Path) -> Opened:
        """Open a file for reading its images."""

    def load(self, position: int) -> Pixels:
        """See `ImageSource.load`."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        file, row = self.files[number], position - int(self._starts[number])
        try:
            value = self._row(number, row)
        except Exception as error:  # a damaged file can make a codec raise anything
            raise UnreadableImageError(f"row {row} of {file.path} cannot be read: {reason(error)}") from None
        if file.encoded:
            return decode(value.tobytes() if isinstance(value, np.ndarray | np.generic) else value, len(self.bands))
        pixels = _bands_last(np.asarray(value), self._layouts[number])
        return pixels if self._channels is None else with_channels(pixels, self._channels)

    def metadata(self) -> pa.Table | None:
        """Return the columns of the Parquet files beside the arrays; see `ImageSource.metadata`."""
        return parquet_table([(self.metadata_file(file.path), file.shape[0]) for file in self.files])

    def metadata_file(self, path: Path) -> Path | None:
        """Return the Parquet file with a row for each image of a file; None if there is none."""
        return None

    def _described(self, file: FoundFile) -> ArrayFile:
        try:
            described = self.describe(file)
            _check_size(described)
            return described
        except DataError:
            raise
        except Exception as error:  # a damaged file can make a parser raise anything
            raise damaged_file(file.path, self.kind, error) from None

    def _row(self, number: int, row: int) -> Any:
        file = self.files[number]
        if file.block == 1:
            return self._rows(number, row, row + 1)[0]
        block = row // file.block

        def decoded() -> PixelRows:
            return self._rows(number, block * file.block, min((block + 1) * file.block, file.shape[0]))

        with self._blocks.use((number, block), decoded) as rows:
            return rows[row % file.block].copy()  # callers may write into it

    def _rows(self, number: int, start: int, stop: int) -> PixelRows:
        file = self.files[number]

        def opened() -> Opened:
            if stamp(file.witness or file.path) != file.stamp:
                raise UnreadableImageError("the file has changed since the set was opened")
            return self.open_rows(file.path)

        with self._opened.use(number, opened) as open_file:
            rows = open_file.rows
            rows = np.asarray(rows[...])[None] if file.single else np.asarray(rows[start:stop])
        if rows.shape != (stop - start, *file.shape[1:]):
            raise UnreadableImageError("the file has changed since the set was opened")
        return rows


def _folder(root: Root) -> Path | None:
    """Return the folder in which, or beside which, the files lie; None if there are several."""
    if not isinstance(root, str | Path):
        return None
    path = Path(root).expanduser()
    return path if path.is_dir() and path.suffix != ".zarr" else path.parent


def _bands_last(image: Shaped[np.ndarray, "*image"], layout: str) -> Pixels:
    """Move the bands to the last axis, in new memory and the machine's byte order; False and True become 0 and 1."""
    if image.dtype == bool:
        image = image.view(np.int8)  # signed, so that 1 is not rendered as 1 of 255
    if layout == "nhw":
        image = image[..., None]
    elif layout == "nchw":
        image = np.moveaxis(image, 0, 2)
    return np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("="))


def _layout(file: ArrayFile, layout: str) -> str:
    """Return the axes of an array: nhw, nhwc, nchw, or n where each image is an encoded file."""
    if file.encoded:
        return "n"
    shape = file.shape
    if len(shape) not in (3, 4) or file.dtype is None or file.dtype.kind not in "iufb":
        hint = "; set dataset.source.each=true if each file is one image" if file.path.suffix == ".npy" else ""
        raise DataError(
            f"{file.path}: expected images of the shape (n, h, w), (n, h, w, bands) or (n, bands, h, w) of integers, "
            f"floats or booleans in {file.array}, found {shape} and {file.dtype}{hint}"
        )
    if layout == AUTO and not file.single and is_narrow(shape):
        raise DataError(
            f"{file.path}: the shape {shape} of {file.array} is that of one image with {shape[2]} bands, or of "
            f"{shape[0]:,} images that are {shape[2]} pixels wide: store one image as {(1, *shape)}, or set "
            "dataset.source.layout=nhw for many"
        )
    if len(shape) == 4 and layout == AUTO:
        layout = "nhwc" if shape[3] < shape[1] else "nchw"
        if shape[1] == shape[3] or min(shape[1], shape[3]) > MAX_BANDS:
            raise DataError(
                f"{file.path}: the shape {shape} of {file.array} does not tell which axis holds the bands; "
                "set dataset.source.layout to nhwc or nchw"
            )
    pixels = int(np.prod(shape[1:], dtype=object))
    if not pixels or pixels > MAX_PIXELS * len(MODES):
        raise DataError(f"{file.path}: expected images in {file.array}, but they cannot have the shape {shape}")
    return "nhw" if len(shape) == 3 else layout


def is_narrow(shape: Sequence[int]) -> bool:
    """Tell whether an array of three axes has so short a last one that it holds bands: (h, w, bands)."""
    return len(shape) == 3 and 0 < shape[2] < NARROW <= min(shape[:2])


def _check_size(file: ArrayFile) -> None:
    """Refuse arrays that claim far more than their file can hold, before ids are made for each row."""
    if not file.shape or file.dtype is None or file.encoded:
        return
    row = int(np.prod(file.shape[1:], dtype=object)) * file.dtype.itemsize
    if file.block < file.shape[0] and file.block * row > MAX_BLOCK:
        raise DataError(
            f"{file.path}: its chunks of {file.block * row:,} bytes are too large to read one image, at most "
            f"{MAX_BLOCK:,} are possible; store fewer rows in each"
        )
    if file.shape[0] <= MAX_ROWS:
        return
    path = file.path
    have = sum(child.stat().st_size for child in path.rglob("*")) if path.is_dir() else path.stat().st_size
    if file.shape[0] * row > MAX_PACKING * have:
        raise DataError(f"{path}: it claims {file.shape[0]:,} images of {row:,} bytes, but has {have:,} bytes in all")


def _count_bands(file: ArrayFile, layout: str) -> int:
    return {"n": ENCODED_CHANNELS, "nhw": 1, "nhwc": file.shape[-1], "nchw": file.shape[min(1, len(file.shape) - 1)]}[
        layout
    ]


def _bands(
    files: Sequence[ArrayFile], layouts: Sequence[str], given: Sequence[str] | None, channels: int | None
) -> tuple[str, ...]:
    counts = [(file.path, _count_bands(file, layout)) for file, layout in zip(files, layouts, strict=True)]
    if channels is None:
        count = _agreed("number of bands", counts) or 0
    else:
        count = channels
        for path, have in counts:
            if have != channels and have not in MODES:
                raise DataError(
                    f"{path}: dataset.source.channels={channels} is for grey, RGB and RGBA images, and these have "
                    f"{have} bands; set it to null, and combine the bands by stretch.combine"
                )
    if given is not None:
        return band_names(given, count)
    for file, (_, have) in zip(files, counts, strict=True):
        if file.bands is not None and (len(file.bands) != have or len(set(file.bands)) < have):
            raise DataError(
                f"{file.path}: its attribute bands names {listed(file.bands)}, but there are {have} "
                "bands; correct it, or name them all by dataset.source.bands"
            )
    named = _agreed("names of bands", [(file.path, file.bands) for file in files if file.bands])
    return named if named and len(named) == count else band_names(None, count)


def _agreed(what: str, values: Sequence[tuple[Path, Any]]) -> Any:
    """Return the value that all files share; None without files."""
    for path, value in values:
        if value != values[0][1]:
            raise DataError(
                f"the files must agree on the {what}, but {values[0][0]} has {values[0][1]} and {path} has {value}; "
                "open them as separate sets"
            )
    return values[0][1] if values else None


def _check_unique(name: str, files: Sequence[ArrayFile], ids: Sequence[str]) -> None:
    if any(file.ids is not None for file in files) and len(set(ids)) < len(ids):
        id_, n = Counter(ids).most_common(1)[0]
        raise DataError(
            f"{name}: ids must be unique, but {id_!r} occurs {n:,} times; set dataset.source.ids=none to use file and "
            "row as ids"
        )


def _truth(files: Sequence[ArrayFile], ids: Sequence[str]) -> dict[str, str] | None:
    without = [file for file in files if file.classes is None]
    if len(without) == len(files):
        return None
    if without:
        raise DataError(
            f"{without[0].path}: there are no labels in it, but there are in other files; add them, or set "
            "dataset.source.labels=none"
        )
    return dict(zip(ids, chain.from_iterable(file.classes or () for file in files), strict=True))


def _fingerprint(files: Sequence[ArrayFile], salt: str) -> str:
    def content(file: ArrayFile) -> str:
        sample = hash_sample(file.path) if len(files) <= SAMPLED_FILES and file.path.is_file() else ""
        return f"{file.signature or file.stamp} {sample}"

    return hash_rows(salt, ((f.stem, f.array, f.shape, f.dtype, content(f), *(f.ids or ())) for f in files))
