"""What files of arrays say of themselves: where they are, and which ids and classes stand beside the images."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anomalymatch.errors import DataError

AUTO, NONE = "auto", "none"

Root = str | Path | Sequence[str | Path]
Stamp = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """One file with an array of images.

    Attributes:
        path: the file, or the folder of a store.
        stem: its name in ids.
        array: name of the array, for messages.
        shape: of the array, images first; only their number where each is an encoded file.
        dtype: of its pixels.
        stamp: size and time of the `witness`, by which a file is known again.
        signature: changes whenever the pixels do.
        encoded: whether each image is a JPEG, PNG or the like.
        block: rows that are decoded together.
        ids: id of each image, None for file and row.
        classes: class of each image.
        bands: names of the bands.
        units: what the pixels measure.
        witness: file by which a store is known again; None takes the path itself.
    """

    path: Path
    stem: str
    array: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    stamp: Stamp
    signature: str
    encoded: bool = False
    block: int = 1
    ids: Sequence[str] | None = None
    classes: Sequence[str] | None = None
    bands: tuple[str, ...] | None = None
    units: str | None = None
    witness: Path | None = None

    def all_ids(self) -> Iterable[str]:
        """Ids of the images in their order."""
        return self.ids if self.ids is not None else (f"{self.stem}/{row:06d}" for row in range(self.shape[0]))

    @property
    def block_bytes(self) -> int:
        """Bytes of a whole block, decoded."""
        size = 0 if self.dtype is None else self.dtype.itemsize
        for n in (min(self.block, self.shape[0]), *self.shape[1:]):
            size *= n
        return size if self.block > 1 else 0


class Found(NamedTuple):
    """A file, its name in ids, and its POSIX path below the root."""

    path: Path
    stem: str
    relative: str


def stamp(path: Path) -> Stamp:
    """Size and time of the last change of a file, in bytes and nanoseconds."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def find(root: Root, wanted: Callable[[Path], bool], kind: str) -> list[Found]:
    """Find files and the stems of their ids; folders are searched at any depth, hidden files left out.

    Args:
        root: a file, a folder, or several of both.
        wanted: whether a path is such a file; inside of one that is, nothing is searched.
        kind: of file, for messages: "an HDF5 file".

    Raises:
        DataError: if there is nothing, or two have the same name.
    """
    tops = [Path(top).expanduser() for top in ([root] if isinstance(root, str | Path) else root)]
    found = [(file, top) for top in tops for file in _files(top, wanted, kind)]
    if not found:
        raise DataError(f"expected {kind}, but the list is empty")
    stems = [_stem(file) for file, _ in found]
    if len(set(stems)) < len(stems):
        stems = [Path(_below(file, top)).with_name(_stem(file)).as_posix() for file, top in found]
    if len(set(stems)) < len(stems):
        raise DataError(f"two of the files {', '.join(str(file) for file, _ in found)} have the same name, rename one")
    return [Found(file, stem, _below(file, top)) for (file, top), stem in zip(found, stems, strict=True)]


def _files(top: Path, wanted: Callable[[Path], bool], kind: str) -> list[Path]:
    if top.is_file() or wanted(top):
        return [top]
    files = list(_walk(top, wanted)) if top.is_dir() else []
    if not files:
        raise DataError(
            f"{top}: expected {kind} or a folder with such files, found {'none' if top.is_dir() else 'nothing'}"
        )
    return files


def _walk(folder: Path, wanted: Callable[[Path], bool]) -> Iterator[Path]:
    for child in sorted(folder.iterdir()):
        if child.name.startswith("."):
            continue
        if wanted(child):
            yield child
        elif child.is_dir() and not child.is_symlink():  # a link can lead in a circle
            yield from _walk(child, wanted)


def _below(file: Path, top: Path) -> str:
    return file.name if file == top else file.relative_to(top).as_posix()


def _stem(file: Path) -> str:
    return file.name.removesuffix(".zip").removesuffix(".zarr") if file.suffix == ".zip" else file.stem


def choose(option: str, name: str, usual: Sequence[str], there: Collection[str], path: Path) -> str | None:
    """Return the array or column that an option names: itself, "auto" for the first of the usual, "none" for none.

    Raises:
        DataError: if it is not there.
    """
    if name == NONE:
        return None
    if name == AUTO:
        return next((candidate for candidate in usual if candidate in there), None)
    if name not in there:
        raise DataError(
            f"{path}: there is no {name}, set dataset.source.{option} to one of {', '.join(there) or 'nothing'}"
        )
    return name


def texts(values: Any, name: str, option: str, count: int, path: Path) -> list[str]:
    """Turn an array of strings, bytes in UTF-8 or numbers into strings, one for each of `count` images.

    Raises:
        DataError: if there are others than `count`, or they are no such values.
    """
    values = np.asarray(values)
    off = f"correct it, or set dataset.source.{option}=none"
    if values.shape != (count,):
        raise DataError(
            f"{path}: expected {count:,} values in {name}, one per image, found the shape {values.shape}; {off}"
        )
    try:
        result = [_text(value) for value in values.tolist()]
    except (UnicodeDecodeError, TypeError):
        raise DataError(f"{path}: expected strings or numbers in {name}, found {values.dtype}; {off}") from None
    if empty := result.count(""):
        raise DataError(f"{path}: {empty:,} of {count:,} values in {name} are empty; {off}")
    return result


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise TypeError
    str(value).encode()  # what is no UTF-8 could be stored nowhere
    return str(value)


def classes(values: Any, name: str, class_names: Sequence[str] | None, count: int, path: Path) -> list[str]:
    """Turn labels into classes, whole numbers by `class_names` where these are given.

    Raises:
        DataError: if there are others than `count`, or numbers without a name.
    """
    labels = texts(values, name, "labels", count, path)
    numbers = np.asarray(values)
    if class_names is None or numbers.dtype.kind not in "iu":
        return labels
    if count and (numbers.min() < 0 or numbers.max() >= len(class_names)):
        raise DataError(
            f"{path}: expected labels from 0 to {len(class_names) - 1} in {name} for the classes "
            f"{', '.join(class_names)}, found {numbers.min()} to {numbers.max()}"
        )
    return [str(class_names[number]) for number in numbers.tolist()]


def band_list(value: Any) -> tuple[str, ...] | None:
    """Names of bands from an attribute: a list of strings or bytes, or one string with commas."""
    if value is None:
        return None
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        value = value.split(",")
    items = np.asarray(value).ravel().tolist()
    return tuple((item.decode(errors="replace") if isinstance(item, bytes) else str(item)).strip() for item in items)


def unit_text(*values: Any) -> str | None:
    """The first of the attributes that says something, as a string."""
    for value in values:
        names = band_list(value) if isinstance(value, str | bytes | np.ndarray) else None
        if names and ",".join(names):
            return ",".join(names)
    return None


def reason(error: Exception) -> str:
    """The first line of what an error says, or the operating system's words for it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().split("\n", 1)[0].rstrip(". ") or type(error).__name__


def check_unique(name: str, parts: Sequence[Part], ids: Sequence[str]) -> None:
    """See that no id occurs twice; those made of files and rows never do.

    Raises:
        DataError: if one does.
    """
    if any(part.ids is not None for part in parts) and len(set(ids)) < len(ids):
        id_, n = Counter(ids).most_common(1)[0]
        raise DataError(
            f"{name}: ids must be unique, but {id_!r} occurs {n:,} times; set dataset.source.ids=none to take files "
            "and rows for ids"
        )


def truth(parts: Sequence[Part], ids: Sequence[str]) -> dict[str, str] | None:
    """Class of each image; None if no file has classes.

    Raises:
        DataError: if some have them and others do not.
    """
    without = [part for part in parts if part.classes is None]
    if len(without) == len(parts):
        return None
    if without:
        raise DataError(
            f"{without[0].path}: there are no labels in it, but there are in other files; add them, or set "
            "dataset.source.labels=none"
        )
    return dict(zip(ids, chain.from_iterable(part.classes or () for part in parts), strict=True))


def holdout(parts: Sequence[Part], patterns: Sequence[str]) -> frozenset[str]:
    """Ids of the images in the files whose names match one of `patterns`.

    Raises:
        DataError: if a pattern matches no file.
    """
    for pattern in patterns:
        if not any(fnmatch(part.path.name, pattern) for part in parts):
            raise DataError(f"no file matches {pattern}, correct dataset.source.holdout_files")
    held = [part for part in parts if any(fnmatch(part.path.name, pattern) for pattern in patterns)]
    return frozenset(id_ for part in held for id_ in part.all_ids())


def fingerprint(parts: Sequence[Part], salt: str) -> str:
    """Hash what changes whenever ids or pixels do."""
    digest = hashlib.sha256(salt.encode())
    for part in parts:
        digest.update(f"\n{part.stem}\0{part.array}\0{part.shape}\0{part.dtype}\0{part.signature}".encode())
        for id_ in part.ids or ():
            digest.update(f"\0{id_}".encode(errors="surrogatepass"))
    return digest.hexdigest()
