"""Sources whose images are rows of arrays: their axes, bands, ids and classes, and reading them block by block.

What a file format adds is small: it describes each file as a `Part` and opens it.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from anomalymatch.data.codecs import MAX_PIXELS, MODES, decode, with_channels
from anomalymatch.data.labels import labels_or_truth
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS, ImageSource
from anomalymatch.data.sources.array_parts import Part, check_unique, fingerprint, holdout, reason, stamp, truth
from anomalymatch.data.sources.handles import Handles
from anomalymatch.data.sources.tables import parquet_table
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.types import Image, Pixels, Reject

LAYOUTS = ("auto", "nhwc", "nchw")
MAX_BANDS = 64
"""An axis longer than this is taken for bands only if that is said."""
CACHE_BYTES = 2**28
ENCODED_CHANNELS = 3

Rows = Shaped[np.ndarray, "n *image"]


class Opened(NamedTuple):
    """An open file.

    Attributes:
        rows: anything that gives an array of images for a slice of rows.
        close: closes the file.
    """

    rows: Any
    close: Callable[[], object]


class ArraySource(ImageSource):
    """Images that are rows of the arrays of several files, which follow one another.

    Ids are those that the files give, else `{file stem}/{row:06d}`. Setting up reads no image. Reading goes through
    the rows in their order, decodes each block of rows once, and keeps the blocks used last.

    Args:
        parts: what the files say of themselves.
        open_: opens one of them; must be picklable.
        name: short name for logs and folders.
        layout: order of the axes of an array of four: "nhwc" (bands last), "nchw" (bands first), or "auto", which takes
            the shorter of the two.
        bands: names of the bands, or of the `channels`; None takes those that the files give, or the usual ones.
        channels: 1 grey, 3 RGB or 4 RGBA, to which photographs are converted; None keeps the bands as they are, and
            decodes images in JPEG or PNG to RGB.
        labels_file: a CSV `filename,label`, as for `FolderSource`; its classes come before those in the files.
        holdout_files: patterns of file names, "test*" for example, whose images are the official test split.
        cache_bytes: how many bytes of decoded rows each process keeps; the block in use is kept whatever its size.
        rendering: how pixels become 8-bit channels.

    Attributes:
        labels: labels by a person, by id; empty without a labels file.
        shapes: of the array of each file.
        beside: a Parquet file with a row for each image of a file, where there is one.

    Raises:
        DataError: if arrays have other shapes or types than images do, if their axes are not clear, files disagree
            about their bands, some but not all have classes, ids are not unique, or a pattern matches no file.
        ConfigError: if an option has no such value, or `bands` are not as many as there are.
        LabelError: if the labels file is missing, wrong, or an incomplete benchmark.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        open_: Callable[[Path], Opened],
        *,
        name: str,
        layout: str = "auto",
        bands: Sequence[str] | None = None,
        channels: int | None = None,
        labels_file: str | Path | None = None,
        holdout_files: Sequence[str] = (),
        cache_bytes: int = CACHE_BYTES,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        if layout not in LAYOUTS:
            raise ConfigError(f"dataset.source.layout is {layout!r}: choose one of {', '.join(LAYOUTS)}")
        if channels is not None and channels not in MODES:
            raise ConfigError(
                f"dataset.source.channels is {channels}: choose one of {', '.join(map(str, MODES))}, "
                "or null to keep the bands as they are"
            )
        self._parts = list(parts)
        self._layouts = [_layout(part, layout) for part in parts]
        self._channels = channels
        self.beside: Sequence[Path | None] = [None] * len(parts)
        self._starts = np.cumsum([0] + [part.shape[0] for part in parts])
        self._blocks = _Blocks(self._parts, open_, cache_bytes)
        ids = list(chain.from_iterable(part.all_ids() for part in parts))
        check_unique(name, parts, ids)
        given, classes = _labels(labels_file, ids)
        super().__init__(
            name=name,
            ids=ids,
            bands=_bands(parts, self._layouts, bands, channels),
            units=_agreed("units", [(part.path, part.units) for part in parts]),
            rendering=rendering,
            labels=given,
            fingerprint=fingerprint(parts, f"arrays {channels} {self._layouts}"),
            truth=truth(parts, ids) if classes is None else classes,
            holdout=holdout(parts, holdout_files),
        )

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of the array of each file, images first."""
        return [part.shape for part in self._parts]

    def read(self, ids: Sequence[str]) -> list[Image | Reject]:
        """See `ImageSource.read`; rows are fetched in the order in which they lie in the files."""
        order = sorted(range(len(ids)), key=lambda i: self._position[ids[i]])
        images = {i: self._read(ids[i]) for i in order}
        return [images[i] for i in range(len(ids))]

    def metadata(self) -> pa.Table | None:
        """What the Parquet files beside the arrays hold, as text, a row for each image; None without any."""
        return parquet_table([(path, part.shape[0]) for path, part in zip(self.beside, self._parts, strict=True)])

    def load(self, position: int) -> Pixels:
        """See `ImageSource.load`."""
        file = int(np.searchsorted(self._starts, position, side="right")) - 1
        row = position - int(self._starts[file])
        try:
            value = self._blocks.row(file, row)
        except Exception as error:  # a damaged file can make a codec raise anything, and must not end a long run
            raise UnreadableImageError(
                f"row {row} of {self._parts[file].path} cannot be read: {reason(error)}"
            ) from None
        if self._parts[file].encoded:
            return decode(_encoded(value), len(self.bands))
        pixels = _bands_last(np.asarray(value), self._layouts[file])
        return pixels if self._channels is None else with_channels(pixels, self._channels)


class _Blocks:
    """Rows of the files, decoded a block at a time; the blocks used last stay, up to a number of bytes."""

    def __init__(self, parts: Sequence[Part], open_: Callable[[Path], Opened], cache_bytes: int) -> None:
        self.parts, self.open = parts, open_
        largest = max((part.block_bytes for part in parts), default=0)
        self.files: Handles[int, Opened] = Handles(self._open, _close)
        self.blocks: Handles[tuple[int, int], Rows] = Handles(
            self._decode, _forget, limit=max(1, cache_bytes // max(1, largest))
        )

    def row(self, file: int, row: int) -> Any:
        size = self.parts[file].block
        if size == 1:
            return self._rows(file, row, row + 1)[0]
        with self.blocks.use((file, row // size)) as rows:
            return rows[row % size].copy()  # what a caller does to an image must not show in the next reading of it

    def _open(self, file: int) -> Opened:
        part = self.parts[file]
        if stamp(part.witness or part.path) != part.stamp:
            raise UnreadableImageError("the file has changed since the set was opened")
        return self.open(part.path)

    def _decode(self, key: tuple[int, int]) -> Rows:
        file, block = key
        part = self.parts[file]
        return self._rows(file, block * part.block, min((block + 1) * part.block, part.shape[0]))

    def _rows(self, file: int, start: int, stop: int) -> Rows:
        part = self.parts[file]
        with self.files.use(file) as opened:
            rows = np.asarray(opened.rows[start:stop])
        if rows.shape != (stop - start, *part.shape[1:]):
            raise UnreadableImageError("the file has changed since the set was opened")
        return rows


def _labels(file: str | Path | None, ids: Sequence[str]) -> tuple[dict[str, str], dict[str, str] | None]:
    return ({}, None) if file is None else labels_or_truth(Path(file).expanduser(), ids)


def _close(opened: Opened) -> None:
    opened.close()


def _forget(rows: Rows) -> None:
    """Rows need no closing."""


def _encoded(value: Any) -> bytes:
    return value.tobytes() if isinstance(value, np.ndarray | np.generic) else bytes(value)


def _bands_last(image: Shaped[np.ndarray, "*image"], layout: str) -> Pixels:
    """Put the bands last, in memory of its own and in the machine's byte order."""
    if layout == "nhw":
        image = image[..., None]
    elif layout == "nchw":
        image = np.moveaxis(image, 0, 2)
    return np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("="))


def _layout(part: Part, layout: str) -> str:
    """Tell the axes of an array: nhw, nhwc, nchw, or n where each image is an encoded file.

    Raises:
        DataError: if they are not clear, or those of no images.
    """
    if part.encoded:
        return "n"
    shape = part.shape
    if len(shape) not in (3, 4) or part.dtype is None or part.dtype.kind not in "iuf":
        raise DataError(
            f"{part.path}: expected images of the shape (n, h, w), (n, h, w, bands) or (n, bands, h, w) of integers or "
            f"floats in {part.array}, found {shape} and {part.dtype}"
        )
    if len(shape) == 4 and layout == "auto":
        layout = "nhwc" if shape[3] < shape[1] else "nchw"
        if shape[1] == shape[3] or min(shape[1], shape[3]) > MAX_BANDS:
            raise DataError(
                f"{part.path}: which axis of {part.array} holds the bands is not clear from its shape {shape}; "
                "set dataset.source.layout to nhwc or nchw"
            )
    pixels = int(np.prod(shape[1:], dtype=object))
    if not pixels or pixels > MAX_PIXELS * len(MODES):
        raise DataError(f"{part.path}: expected images in {part.array}, but its shape {shape} is none of images")
    return "nhw" if len(shape) == 3 else layout


def _count(part: Part, layout: str) -> int:
    if layout in ("n", "nhw"):
        return ENCODED_CHANNELS if layout == "n" else 1
    return part.shape[3] if layout == "nhwc" else part.shape[1]


def _bands(
    parts: Sequence[Part], layouts: Sequence[str], given: Sequence[str] | None, channels: int | None
) -> tuple[str, ...]:
    counts = [(part.path, _count(part, layout)) for part, layout in zip(parts, layouts, strict=True)]
    if channels is None:
        count = _agreed("number of bands", counts) or 0
    else:
        count = channels
        for path, have in counts:
            if have != channels and have not in (1, 3, 4):
                raise DataError(
                    f"{path}: dataset.source.channels={channels} is for grey, RGB and RGBA images, and these have "
                    f"{have} bands; set it to null, and combine the bands by stretch.combine"
                )
    if given is not None:
        return band_names(given, count)
    for part, (_, have) in zip(parts, counts, strict=True):
        if part.bands is not None and (len(part.bands) != have or len(set(part.bands)) < have):
            raise DataError(
                f"{part.path}: its attribute bands names {', '.join(part.bands) or 'nothing'}, but there are {have} "
                "bands; correct it, or name them all by dataset.source.bands"
            )
    named = _agreed("names of bands", [(part.path, part.bands) for part in parts if part.bands])
    return named if named and len(named) == count else band_names(None, count)


def _agreed(what: str, values: Sequence[tuple[Path, Any]]) -> Any:
    """What all files say; None where there are none.

    Raises:
        DataError: if two of them say different things.
    """
    for path, value in values:
        if value != values[0][1]:
            raise DataError(
                f"the files must agree on the {what}, but {values[0][0]} has {values[0][1]} and {path} has {value}; "
                "read them as sets of their own"
            )
    return values[0][1] if values else None
