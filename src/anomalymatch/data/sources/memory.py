"""Tasks from objects of Python: arrays, paths, data sets of torchvision and Hugging Face, and data frames."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from anomalymatch.data.codecs import MODES, with_channels
from anomalymatch.data.find import stamp
from anomalymatch.data.labels import given_labels
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS, ImageSource, hash_rows
from anomalymatch.data.sources.encoded import EncodedSource, Listing, check_bytes
from anomalymatch.data.task import Task, make_task
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.text import reason
from anomalymatch.types import Label, Pixels

LabelsGiven = Mapping[Any, str] | Sequence[str | None] | None
Classes = Sequence[str] | Mapping[str, str] | None
EMPTY = "there are no images: the list or data set is empty"
HASHED_IMAGES = 64
"""Number of images of a data set whose pixels enter its fingerprint."""


def from_arrays(
    images: Any,
    *,
    ids: Sequence[str] | None = None,
    labels: LabelsGiven = None,
    classes: Classes = None,
    anomaly: str | Sequence[str] | None = None,
    bands: Sequence[str] | None = None,
    rendering: Rendering = EIGHT_BITS,
    name: str = "arrays",
) -> Task:
    """Open images that are arrays in memory, of NumPy or PyTorch.

    Args:
        images: an array (n, h, w), (n, h, w, bands) or (n, bands, h, w), or a list of arrays (h, w) or (h, w, bands) of
            any sizes. The shortest of the three axes of an image is that of the bands. Integers or floats.
        ids: a unique text for each image; None takes the numbers "0", "1" and so on.
        labels: labels by a person (anomaly, normal, unsure, artefact), by id, or one for each image, with None for
            images without a label.
        classes: class of each image of a benchmark, in order or by id.
        anomaly: class or classes that are the anomalies of a benchmark.
        bands: names of the bands; None takes the usual ones.
        rendering: conversion of the bands to 8-bit channels.
        name: short name for logs and folders.

    Raises:
        DataError: if `images` is a single image or has no images, or a length differs.
        LabelError: if a label or its id is unknown.

    Example:
        >>> images = np.zeros((20, 32, 32, 3), np.uint8)
        >>> am.from_arrays(images, labels={"17": "anomaly", "3": "normal"})
        <Task arrays: 20 images in the pool, 2 labels>
    """
    stack = isinstance(images, np.ndarray) or hasattr(images, "detach")
    if stack and (images.ndim not in (3, 4) or (images.ndim == 3 and images.shape[2] in MODES)):
        raise DataError(
            f"the array has the shape {tuple(images.shape)}: expected (n, h, w), (n, h, w, bands) or (n, bands, h, w); "
            "for a single image, put it into a list"
        )
    arrays = [as_pixels(image) for image in images]
    if not arrays:
        raise DataError(EMPTY)
    fingerprint = hash_rows("memory", ((a.shape, a.dtype, hash_bytes(a)) for a in arrays))
    source = MemorySource(arrays.__getitem__, len(arrays), ids=ids, labels=labels, classes=classes,
                          bands=band_names(bands, arrays[0].shape[2]),
                          rendering=rendering, name=name, fingerprint=fingerprint)  # fmt: skip
    return make_task(source, anomaly=anomaly)


def from_paths(
    paths: Iterable[str | os.PathLike[str]],
    *,
    labels: LabelsGiven = None,
    classes: Classes = None,
    anomaly: str | Sequence[str] | None = None,
    name: str = "paths",
    **options: Any,
) -> Task:
    """Open image files by their paths; the id of an image is its path, as it is given.

    A folder of images needs no list: `open_task("folder", "data.root=photos")`.

    Args:
        paths: the files.
        labels: see `from_arrays`.
        classes: see `from_arrays`.
        anomaly: see `from_arrays`.
        name: short name for logs and folders.
        **options: `channels`, `bands`, `channels_background`, `max_pixels` and `rendering`, as for a folder of images.

    Raises:
        DataError: if a file is missing.
        LabelError: if a label or its id is unknown.

    Example:
        >>> paths = sorted(Path("photos").glob("*.png"))
        >>> am.from_paths(paths, labels={paths[0]: "anomaly", paths[1]: "normal"})
        <Task paths: 20 images in the pool, 2 labels>
    """
    if isinstance(paths, str | os.PathLike):
        raise DataError(
            f"expected a list of paths, got {str(paths)!r}: for a folder, open_task('folder', 'data.root=…')"
        )
    source = PathSource(list(paths), labels=labels, classes=classes, name=name, **options)
    return make_task(source, anomaly=anomaly)


def from_dataframe(
    frame: Any,
    path: str = "path",
    *,
    label: str | None = None,
    classes: str | None = None,
    root: str | os.PathLike[str] | None = None,
    anomaly: str | Sequence[str] | None = None,
    **options: Any,
) -> Task:
    """Open the image files that a data frame of pandas or polars lists.

    Args:
        frame: a table with a row for each image.
        path: name of the column with the paths.
        label: name of the column with labels by a person; empty cells are images without a label.
        classes: name of the column with the class of each image of a benchmark.
        root: folder that the paths are relative to; ids are the paths as they stand in the column.
        anomaly: class or classes that are the anomalies of a benchmark.
        **options: further arguments of `from_paths`.

    Raises:
        DataError: if a column or a file is missing.
        LabelError: if a label is unknown.

    Example:
        >>> table = pd.DataFrame({"file": ["000.png", "001.png"], "label": ["anomaly", None]})
        >>> am.from_dataframe(table, path="file", label="label", root="photos")
        <Task table: 2 images in the pool, 1 labels>
    """
    for column in (path, label, classes):
        if column is not None and column not in list(frame.columns):
            raise DataError(f"there is no column {column!r}, but {', '.join(map(str, list(frame.columns)[:20]))}")
    cells = {column: list(frame[column]) for column in (path, label, classes) if column is not None}
    source = PathSource(
        cells[path],
        root=root,
        labels=None if label is None else [_cell(value) for value in cells[label]],
        classes=None if classes is None else [str(value) for value in cells[classes]],
        **{"name": "table"} | options,
    )
    return make_task(source, anomaly=anomaly)


def from_dataset(
    dataset: Any,
    *,
    image: str | int | None = None,
    label: str | None = None,
    labels: LabelsGiven = None,
    anomaly: str | Sequence[str] | None = None,
    rendering: Rendering = EIGHT_BITS,
    name: str = "dataset",
) -> Task:
    """Open a map-style data set of torchvision or Hugging Face; ids are "0", "1" and so on.

    The classes of the data set become those of the task. Float tensors between 0 and 1, as `ToTensor` makes them, are
    taken as 8-bit images. Leave out random transforms: an image is read more than once.

    Args:
        dataset: an object with a length, whose items are pairs of image and class, or dictionaries.
        image: name of the column with the images, or their place in a tuple; None takes the usual one.
        label: name of the column of a Hugging Face data set with the classes; None takes the usual one.
        labels: labels by a person, see `from_arrays`.
        anomaly: class or classes that are the anomalies of a benchmark.
        rendering: conversion of the bands to 8-bit channels.
        name: short name for logs and folders.

    Raises:
        DataError: if there is no such column, or the data set has no length.
        LabelError: if a label or its id is unknown.

    Example:
        >>> from torchvision.datasets import FakeData
        >>> dataset = FakeData(size=20, image_size=(3, 32, 32), num_classes=2)
        >>> dataset.classes, dataset.targets = ["cat", "dog"], [number % 2 for number in range(20)]
        >>> am.from_dataset(dataset, anomaly="dog")
        <Task dataset: 16 images in the pool, 4 held out, 10 true anomalies>
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError("the data set has no length or no numbered items: expected a map-style one, no stream")
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        image = _column(columns, image, ("image", "img", "picture"), "image=")
        label = label or next((column for column in ("label", "labels", "class") if column in columns), None)
    raw = partial(_item, dataset, 0 if image is None else image)
    places = np.unique(np.linspace(0, len(dataset) - 1, HASHED_IMAGES).astype(int)).tolist() if len(dataset) else []
    sample: dict[int, Any] = {}
    for place in places:
        try:
            sample[place] = raw(place)
        except Exception as error:  # a reject, later
            fault = reason(error)
    if not sample:
        raise DataError(f"none of the {len(places)} images that were tried can be read: {fault}" if places else EMPTY)
    unit = all(map(_is_unit, sample.values()))
    hashes = [(place, hash_bytes(as_pixels(value))) for place, value in sample.items()]
    source = MemorySource(
        partial(_eight_bits, raw) if unit else raw,
        len(dataset),
        bands=band_names(None, as_pixels(next(iter(sample.values()))).shape[2]),
        labels=labels,
        classes=_classes(dataset, label),
        rendering=rendering,
        name=name,
        fingerprint=hash_rows(f"dataset {len(dataset)} {getattr(dataset, '_fingerprint', '')}", hashes),
    )
    return make_task(source, anomaly=anomaly)


def from_images(images: Any, labels: LabelsGiven | str = None) -> Task:
    """Open images of any kind that a program holds: arrays, paths, a data frame of paths, or a data set.

    Args:
        images: what `from_arrays`, `from_paths`, `from_dataframe` or `from_dataset` takes; the paths of a data frame
            are in its first column that is named path, file, filename or image.
        labels: see `from_arrays`; of a data frame also the name of the column.

    Raises:
        DataError: if it is none of these, or an image is missing.
        LabelError: if a label or its id is unknown.
    """
    if hasattr(images, "columns") and hasattr(images, "shape"):
        column = _column(list(map(str, images.columns)), None, ("path", "file", "filename", "image"), "column ")
        if isinstance(labels, str):
            return from_dataframe(images, column, label=labels)
        return from_paths(list(images[column]), labels=labels, name="table")
    if isinstance(labels, str):
        raise DataError(f"labels is {labels!r}, the name of a column, but the images are no data frame")
    if isinstance(images, np.ndarray) or hasattr(images, "detach"):
        return from_arrays(images, labels=labels)
    if not isinstance(images, list | tuple):
        return from_dataset(images, labels=labels)
    paths = bool(images) and all(isinstance(image, str | os.PathLike) for image in images)
    return from_paths(images, labels=labels) if paths else from_arrays(images, labels=labels)


class MemorySource(ImageSource):
    """Images that a function gives by number.

    Args:
        item: function from the number of an image to its pixels; many threads may call it at once.
        count: number of images.
        ids: a unique text for each image; None takes the numbers.
        labels: see `from_arrays`.
        classes: see `from_arrays`.
        **options: further arguments of `ImageSource`.
    """

    def __init__(
        self,
        item: Callable[[int], Any],
        count: int,
        *,
        ids: Sequence[str] | None = None,
        labels: LabelsGiven = None,
        classes: Classes = None,
        **options: Any,
    ) -> None:
        names = [str(i) for i in range(count)] if ids is None else _of_length(list(map(str, ids)), count, "ids")
        self._item = item
        super().__init__(
            ids=names,
            labels=given_labels(labels, names),
            truth=_truth(classes, names),
            **options,
        )

    def load(self, position: int) -> Pixels:
        """See `ImageSource.load`; grey images of a colour data set become colour ones."""
        try:
            pixels = as_pixels(self._item(position))
        except Exception as error:  # a foreign data set may raise anything
            raise UnreadableImageError(reason(error)) from None
        same = pixels.shape[2] == len(self.bands) or len(self.bands) not in MODES
        return pixels if same else with_channels(pixels, len(self.bands))


class PathSource(EncodedSource):
    """Image files anywhere, by their paths.

    Args:
        paths: the files; the ids are the paths as they are given.
        root: folder that the paths are relative to.
        labels: see `from_arrays`.
        classes: see `from_arrays`.
        name: short name for logs and folders.
        **options: further arguments of `EncodedSource`.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        root: str | os.PathLike[str] | None = None,
        labels: LabelsGiven = None,
        classes: Classes = None,
        name: str = "paths",
        **options: Any,
    ) -> None:
        ids = [os.fspath(path) for path in paths]
        self._files = [(Path(root or "") / id_).expanduser() for id_ in ids]
        missing = [file for file in self._files if not file.is_file()]
        if missing:
            raise DataError(f"{len(missing):,} of {len(ids):,} image files are missing, the first is {missing[0]}")
        self._given = given_labels(labels, ids)
        self._listing = Listing(
            ids, hash_rows(f"paths {ids}", map(stamp, self._files)), _truth(classes, ids), name=name
        )
        super().__init__(Path(root or ""), **options)

    def list_images(self, place: Path, cache_dir: Path | None) -> Listing:
        """Return the listing of the given files."""
        return self._listing

    def read_labels(
        self, labels_file: str | Path | None, ids: Sequence[str], place: str | Path
    ) -> tuple[dict[str, Label], dict[str, str] | None]:
        """Return the given labels."""
        return dict(self._given), None

    def read_bytes(self, position: int) -> bytes:
        """See `EncodedSource.read_bytes`."""
        try:
            check_bytes(self._files[position].stat().st_size)
            return self._files[position].read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"cannot be opened: {error.strerror}") from None

    def file(self, id_: str) -> Path:
        """See `ImageSource.file`."""
        return self._files[self.position(id_)]


def as_pixels(value: Any) -> Pixels:
    """Convert an array, a tensor or a Pillow image to (h, w, bands).

    Raises:
        DataError: if it is none, or has not two or three axes.
    """
    if hasattr(value, "getbands"):  # a Pillow image
        plain = value.mode in ("L", "RGB", "RGBA", "F", "I") or value.mode.startswith("I;16")
        if not plain:
            value = value.convert("RGBA" if "A" in value.getbands() or "transparency" in value.info else "RGB")
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.dtype.kind not in "biuf":
        raise DataError(
            f"expected an image of the shape (h, w) or (h, w, bands), got {type(value).__name__} {array.shape}"
        )
    if array.shape[0] < min(array.shape[1:]):
        array = np.moveaxis(array, 0, 2)
    return array


def hash_bytes(array: Shaped[np.ndarray, "..."]) -> str:
    """Hash the values of an array."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _item(dataset: Any, image: str | int, position: int) -> Any:
    return dataset[position][image]


def _is_unit(value: Any) -> bool:
    """Tell whether a value is a float tensor between 0 and 1."""
    tensor = hasattr(value, "detach") and value.is_floating_point()
    return tensor and float(value.min()) >= 0 and float(value.max()) <= 1


def _eight_bits(raw: Callable[[int], Any], position: int) -> Any:
    """Return a tensor between 0 and 1 as 8 bits."""
    return np.rint(np.clip(raw(position).detach().cpu().numpy(), 0, 1) * 255).astype(np.uint8)


def _column(columns: Sequence[str], wanted: str | int | None, usual: Sequence[str], option: str) -> str:
    found = [str(wanted)] if wanted is not None else [column for column in usual if column in columns]
    if not found or found[0] not in columns:
        raise DataError(f"the data set has the columns {', '.join(columns)}: say which has the images, {option}NAME")
    return found[0]


def _classes(dataset: Any, label: str | None) -> list[str] | None:
    """Return the class of each item of a data set; None if they are unknown without reading all images."""
    if label is not None:
        numbers: list[Any] | None = list(dataset[label])
        names = getattr(getattr(dataset, "features", {}).get(label), "names", None)
    elif hasattr(dataset, "indices") and hasattr(dataset, "dataset"):  # a subset of PyTorch
        whole = _classes(dataset.dataset, None)
        return None if whole is None else [whole[i] for i in dataset.indices]
    else:
        found = [getattr(dataset, name) for name in ("targets", "labels", "_labels") if hasattr(dataset, name)]
        numbers = list(found[0]) if found else None
        names = getattr(dataset, "classes", None)
    if numbers is None:
        return None
    return [str(names[int(n)]) if names is not None else str(n) for n in numbers]


def _truth(classes: Classes, ids: Sequence[str]) -> dict[str, str] | None:
    if classes is None or isinstance(classes, Mapping):
        return None if classes is None else {id_: str(classes[id_]) for id_ in ids if id_ in classes}
    return dict(zip(ids, map(str, _of_length(classes, len(ids), "classes")), strict=True))


def _of_length(values: Sequence[Any], count: int, name: str) -> Any:
    if len(values) != count:
        raise DataError(f"there are {len(values):,} {name} for {count:,} images: give one for each")
    return values


def _cell(value: Any) -> str | None:
    """Return the label in a cell of a table; None for an empty one."""
    return None if value is None or value != value or not str(value).strip() else str(value)
