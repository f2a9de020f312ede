"""Base class of sources of encoded image files; labels and classes are attached here."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from anomalymatch.checks import Number, check_choice, check_range
from anomalymatch.data.codecs import MODES, Colour, decode
from anomalymatch.data.find import missing_root
from anomalymatch.data.labels import read_labels
from anomalymatch.data.remote import is_remote, local_path
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS, ImageSource, hash_rows
from anomalymatch.data.tiff import tiff_bands
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.types import Image, Label, Pixels, Reject

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif"})
CLASSES = ("auto", "folders", "subfolders", "none")
MAX_BYTES = 2**28
"""Largest image file; larger ones are refused before they are read."""
MARGIN = 2
"""Images that are decoded at a reduced scale keep this multiple of the size that they are resized to."""
TIFF_SUFFIXES = (".tif", ".tiff")
TRIED = 8
"""First images in which bands are looked for, until one can be read."""


class Listing(NamedTuple):
    """Images that were found at a place; see `ImageSource` for the fields."""

    ids: Sequence[str]
    fingerprint: str
    classes: Mapping[str, str] | None = None
    holdout: frozenset[str] = frozenset()
    name: str | None = None
    folder: Path | None = None


class EncodedSource(ImageSource):
    """Images that are whole files, JPEG or PNG for example; subclasses implement `list_images` and `read_bytes`.

    Args:
        root: a file of the format, a folder that is searched for them at any depth, or a URL of either.
        labels_file: a CSV `filename,label`, see `labels_or_truth`; None takes `labels.csv` beside the images where
            there is one. Its classes replace those in the archive.
        channels: channels of the decoded images: 1 (grey), 3 (RGB) or 4 (RGBA).
        bands: names of all bands of TIFF files that are no pictures; None takes them from the OME or GDAL metadata of
            the first image, or numbers them, if that is such a file. A file that names the same bands in another order
            is reordered, and one with another number of bands is a reject.
        channels_background: colour behind transparent parts of images, a grey level or [red, green, blue] from 0 to
            255; with `channels=4` the opacity is kept instead.
        max_pixels: limit of the pixels (height times width) of an image, which is a reject beyond it; None takes a
            limit by the memory of the machine, see `codecs.default_max_pixels`.
        cache_dir: folder for copies of archives at a URL.
        storage_options: arguments of the URL's file system, {"anon": True} for a public bucket of S3.
        rendering: conversion of the bands to 8-bit channels.

    Raises:
        DataError: if `root` is None, missing or damaged, or has no images.
        ConfigError: if an option has no such value.
        LabelError: if the labels file is missing, wrong, or an incomplete benchmark.
    """

    encoded = True
    dataset: ClassVar[str]
    expected: ClassVar[str]
    """What `root` has to be, for messages."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Endings of the archives that are copied from a URL; () reads single images there."""

    def __init__(
        self,
        root: str | Path | None,
        *,
        labels_file: str | Path | None = None,
        channels: int = 3,
        bands: Sequence[str] | None = None,
        channels_background: Colour = 0,
        max_pixels: int | None = None,
        cache_dir: str | Path | None = None,
        storage_options: Mapping[str, Any] | None = None,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        check_choice("dataset.source.channels", channels, MODES)
        check_range("dataset.source.max_pixels", max_pixels, low=1, null=True)
        self._background, self._max_pixels = _colour(channels_background), max_pixels
        if root is None:
            raise missing_root(self.dataset, self.expected)
        in_place = is_remote(root) and not self.suffixes
        place = root if in_place else local_path(root, cache_dir, self.suffixes, storage_options)
        listing = self.list_images(place, None if cache_dir is None else Path(cache_dir).expanduser())
        self.folder = listing.folder
        labels, truth = self.read_labels(labels_file, listing.ids, place)
        names = self._find_bands(listing.ids) if bands is None else band_names(bands, len(bands))
        self._named = names is not None
        super().__init__(
            name=listing.name or Path(place).resolve().stem,
            ids=listing.ids,
            fingerprint=hash_rows(listing.fingerprint, [(names or channels, self._background, max_pixels)]),
            bands=names or band_names(None, channels),
            rendering=rendering,
            labels=labels,
            truth=listing.classes if truth is None else truth,
            holdout=listing.holdout,
            folder=listing.folder,
        )

    @abstractmethod
    def list_images(self, place: Any, cache_dir: Path | None) -> Listing:
        """Look up the images at a path, or at a URL without `suffixes`; reads no image."""

    @abstractmethod
    def read_bytes(self, position: int) -> bytes:
        """Return the file of the image at `position` of `ids`.

        Raises:
            UnreadableImageError: with the reason, if it cannot be read.
        """

    def read_labels(
        self, labels_file: str | Path | None, ids: Sequence[str], place: str | Path
    ) -> tuple[dict[str, Label], dict[str, str] | None]:
        """Read the labels file, or the one beside the images; see `labels_or_truth` for what is returned."""
        beside = None if isinstance(place, str) else place if place.is_dir() else place.parent
        return read_labels(labels_file, ids, beside, archive=self.folder is None)

    def raw_bytes(self, id_: str) -> bytes:
        """See `ImageSource.raw_bytes`."""
        return self.read_bytes(self._position[id_])

    def load(self, position: int) -> Pixels:
        """See `ImageSource.load`."""
        return self.decode(self.read_bytes(position))

    def read_for(self, ids: Sequence[str], size: int) -> list[Image | Reject]:
        """See `ImageSource.read_for`: large JPEGs without a stretch are decoded at 1/2, 1/4 or 1/8 of their size."""
        if not self.rendering.keeps_eight_bits:
            return self.read(ids)
        load = partial(self._load_reduced, at_least=MARGIN * size)
        return self._map(partial(self._read, load=load), ids)

    def _load_reduced(self, position: int, at_least: int) -> Pixels:
        return self.decode(self.read_bytes(position), at_least)

    def decode(self, data: bytes, at_least: int | None = None) -> Pixels:
        """Decode an image file as this source does, see `codecs.decode`.

        Raises:
            UnreadableImageError: with the reason, if it cannot be decoded.
        """
        check_bytes(len(data))
        return decode(
            data,
            len(self.bands),
            bands=self.bands if self._named else None,
            background=self._background,
            max_pixels=self._max_pixels,
            at_least=at_least,
        )

    def is_tiff(self, id_: str, position: int) -> bool:
        """Tell whether an image is a TIFF file, by the suffix of its id; reads no image."""
        return id_.lower().endswith(TIFF_SUFFIXES)

    def _find_bands(self, ids: Sequence[str]) -> tuple[str, ...] | None:
        """Return the names of the bands of the first image that can be read; None if it is a picture."""
        for position in range(min(TRIED, len(ids))):
            try:
                if not self.is_tiff(ids[position], position):
                    return None
                return tiff_bands(self.read_bytes(position))
            except UnreadableImageError:
                continue
        return None


def check_bytes(n_bytes: int) -> None:
    """Refuse an image file of more than `MAX_BYTES`, before it is read.

    Raises:
        UnreadableImageError: if it is larger.
    """
    if n_bytes > MAX_BYTES:
        raise UnreadableImageError(f"it has {n_bytes:,} bytes, which is more than {MAX_BYTES:,}")


def _colour(given: Any) -> tuple[float, ...]:
    values = [given] if isinstance(given, Number) else list(given)
    if len(values) not in (1, 3):
        raise ConfigError(f"dataset.source.channels_background is {given}: it must be one number or three")
    for value in values:
        check_range("dataset.source.channels_background", value, low=0, high=255)
    return tuple(map(float, values))


def folder_classes(root: Path | str, paths: Sequence[str], classes: str) -> dict[str, str] | None:
    """Return the first folder of each path as its class; None without classes.

    "auto" takes folders as classes if every image lies in one and there are at least two; "folders" insists on it, and
    "subfolders" takes the second folder of each path: train/good.
    """
    if classes == "subfolders":
        shallow = [path for path in paths if path.count("/") < 2]
        if shallow:
            raise DataError(
                f"{root}: classes=subfolders needs paths such as train/CLASS/1.png, but {len(shallow):,} images lie "
                f"higher, the first is {shallow[0]}"
            )
        return {path: path.split("/")[1] for path in paths}
    if classes == "none":
        return None
    loose = [path for path in paths if "/" not in path]
    if classes == "folders" and loose:
        raise DataError(
            f"{root}: classes=folders needs every image in a sub-folder named by its class, but {len(loose):,} lie in "
            f"the folder itself, the first is {loose[0]}"
        )
    truth = {path: path[: path.index("/")] for path in paths} if not loose else {}
    return truth if classes == "folders" or len(set(truth.values())) > 1 else None


def check_complete(root: Path, classes: Mapping[str, str], ids: Sequence[str], option: str) -> None:
    """Check that every image has a class."""
    if len(classes) < len(ids):
        missing = next(id_ for id_ in ids if id_ not in classes)
        raise DataError(
            f"{root}: {len(ids) - len(classes):,} of {len(ids):,} images have no label, the first is {missing}; "
            f"correct dataset.source.{option}, or set it to null to read the images without classes"
        )


def no_images(root: object, wanted: str) -> DataError:
    """Return the error about an archive without images, in which `wanted` ("members", "files") were looked for."""
    return DataError(f"{root}: there are no images in it, expected {wanted} that end in {', '.join(sorted(SUFFIXES))}")
