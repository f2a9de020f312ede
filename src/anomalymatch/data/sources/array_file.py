"""Description of a file of arrays: shape, ids, classes, bands and units, read from arrays and attributes."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anomalymatch.data.find import Stamp
from anomalymatch.errors import DataError
from anomalymatch.text import listed

AUTO, NONE = "auto", "none"

Attributes = Any
"""Attributes of an HDF5 or Zarr object, a mapping in all but its type."""


class Columns(NamedTuple):
    """Options that name the arrays or columns beside the images, see `ArraySource`, and the names "auto" looks for."""

    ids: str
    labels: str
    class_names: Sequence[str] | None
    usual_ids: Sequence[str]
    usual_labels: Sequence[str]

    def read(
        self, names: Collection[str], read: Callable[[str], Any], count: int, path: Path
    ) -> tuple[list[str] | None, list[str] | None]:
        """Read the ids and classes of `count` images; None where there are none.

        `names` are those of the arrays or columns in the file, and `read` reads one of them.

        Raises:
            DataError: if one is missing or has another length, an id is empty, or a number has no class name.
        """
        id_name = _choose("ids", self.ids, self.usual_ids, names, path)
        label_name = _choose("labels", self.labels, self.usual_labels, names, path)
        return (
            None if id_name is None else _texts(read(id_name), id_name, "ids", count, path),
            None if label_name is None else self._classes(read(label_name), label_name, count, path),
        )

    def _classes(self, values: Any, name: str, count: int, path: Path) -> list[str]:
        labels = _texts(values, name, "labels", count, path)
        numbers = np.asarray(values)
        if self.class_names is None or numbers.dtype.kind not in "iu":
            return labels
        if count and (numbers.min() < 0 or numbers.max() >= len(self.class_names)):
            raise DataError(
                f"{path}: expected labels from 0 to {len(self.class_names) - 1} in {name} for the classes "
                f"{listed(self.class_names)}, found {numbers.min()} to {numbers.max()}"
            )
        return [str(self.class_names[number]) for number in numbers.tolist()]


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """One file, or folder of a store, with an array of images.

    Attributes:
        stem: name of the file in ids.
        array: name of the array, for messages.
        shape: shape of the array, images first; (n,) where each image is an encoded file.
        stamp: size and time of the last change of the file, or of `witness`.
        signature: text that changes whenever the pixels change; empty if `stamp` tells.
        encoded: whether each image is a JPEG, PNG or similar file.
        single: whether the whole array is one image; then `shape` begins with 1.
        block: number of rows that are decoded together.
        ids: id of each image; None takes file and row.
        witness: file whose stamp stands for a store; None takes `path`.
    """

    path: Path
    stem: str
    array: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    stamp: Stamp
    signature: str = ""
    encoded: bool = False
    single: bool = False
    block: int = 1
    ids: Sequence[str] | None = None
    classes: Sequence[str] | None = None
    bands: tuple[str, ...] | None = None
    units: str | None = None
    witness: Path | None = None

    def all_ids(self) -> Iterable[str]:
        """Return the ids of the images, in order."""
        return self.ids if self.ids is not None else (f"{self.stem}/{row:06d}" for row in range(self.shape[0]))


def bands_and_units(own: Attributes, common: Attributes) -> tuple[tuple[str, ...] | None, str | None]:
    """Return the names of the bands and the unit in the array's `own` attributes, else in those of its file."""
    units = (_unit(attributes.get(key)) for attributes in (own, common) for key in ("units", "BUNIT"))
    return _names(own.get("bands", common.get("bands"))), next(filter(None, units), None)


def _choose(option: str, name: str, usual: Sequence[str], names: Collection[str], path: Path) -> str | None:
    if name == NONE:
        return None
    if name == AUTO:
        return next((candidate for candidate in usual if candidate in names), None)
    if name not in names:
        raise DataError(f"{path}: there is no {name}, set dataset.source.{option} to one of {listed(names)}")
    return name


def _texts(values: Any, name: str, option: str, count: int, path: Path) -> list[str]:
    values = np.asarray(values)
    hint = f"correct it, or set dataset.source.{option}=none"
    if values.shape != (count,):
        raise DataError(
            f"{path}: expected {count:,} values in {name}, one per image, found the shape {values.shape}; {hint}"
        )
    try:
        result = [_text(value) for value in values.tolist()]
    except (UnicodeDecodeError, TypeError):
        raise DataError(f"{path}: expected strings or numbers in {name}, found {values.dtype}; {hint}") from None
    if empty := result.count(""):
        raise DataError(f"{path}: {empty:,} of {count:,} values in {name} are empty; {hint}")
    return result


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise TypeError
    str(value).encode()  # text that is not UTF-8 cannot be stored
    return str(value)


def _names(value: Any) -> tuple[str, ...] | None:
    """Split an attribute into names: a list of strings or bytes, or one string with commas."""
    if value is None:
        return None
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        value = value.split(",")
    items = np.asarray(value).ravel().tolist()
    return tuple((item.decode(errors="replace") if isinstance(item, bytes) else str(item)).strip() for item in items)


def _unit(value: Any) -> str:
    return ",".join(_names(value) or ()) if isinstance(value, str | bytes | np.ndarray) else ""
