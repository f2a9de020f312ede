"""Zip archives of image files as a source; nothing is unpacked."""

import csv
import hashlib
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from anomalymatch.data.labels import COLUMNS, labels_or_truth, read_labels_csv
from anomalymatch.data.remote import local_path
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS
from anomalymatch.data.sources.encoded import (
    LABELS_FILE,
    MAX_BYTES,
    SUFFIXES,
    Classes,
    EncodedSource,
    find_archives,
    folder_classes,
    is_hidden,
    read_labels,
)
from anomalymatch.data.sources.handles import Handles
from anomalymatch.errors import ConfigError, DataError, LabelError, UnreadableImageError
from anomalymatch.progress import progress

_ENCRYPTED = 1


class ZipSource(EncodedSource):
    """The images in one zip archive, or in all archives of a folder.

    An id is the path inside of the archive, behind the archive's name without suffix where there are several. Setting
    up reads the tables of contents and no image. Hidden entries and `__MACOSX` are skipped. An image that is
    encrypted, fails its checksum or claims more than 256 MiB is a reject.

    Args:
        root: an archive, or a folder in which all files `*.zip`, at any depth, are read in the order of their paths.
        labels_file: a CSV `filename,label`, with the meaning it has for `FolderSource`; None takes `labels.csv` inside
            of the archives (there it names paths inside of the same archive), else beside them, where there is one.
        classes: whether the first folder inside of the archive is the class of an image; see `FolderSource`.
        channels: channels of the decoded images.
        rendering: how pixels become 8-bit channels.

    Attributes:
        labels: labels by a person, by id; empty without a labels file.

    Raises:
        DataError: if there is no archive, one cannot be read, or there are no images in them.
        LabelError: if the labels file is missing, wrong, or an incomplete benchmark.
    """

    def __init__(
        self,
        root: Path,
        *,
        labels_file: Path | None = None,
        classes: Classes = "auto",
        channels: int = 3,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        files = find_archives(root, ".zip", "zip archive")
        contents = _scan_all(files)
        inner = [name for archive in contents for name in archive.names]
        if not inner:
            raise DataError(
                f"{root}: there are no images in it, expected members that end in {', '.join(sorted(SUFFIXES))}"
            )
        ids = [archive.prefix + name for archive in contents for name in archive.names]
        self._files = [archive.file for archive in contents]
        self._prefixes = [archive.prefix for archive in contents]
        self._starts = np.cumsum([0] + [len(archive.names) for archive in contents])
        self._handles: Handles[Path, zipfile.ZipFile] = Handles(zipfile.ZipFile, zipfile.ZipFile.close)
        labels, truth = _labels(root, contents, labels_file, ids)
        super().__init__(
            name=root.resolve().stem,
            ids=ids,
            bands=band_names(None, channels),
            rendering=rendering,
            labels=labels,
            fingerprint=_fingerprint(contents, channels),
            truth=truth if truth is not None else _classes(root, ids, inner, classes),
        )

    def _encoded(self, position: int) -> bytes:
        archive = int(np.searchsorted(self._starts, position, side="right")) - 1
        file, name = self._files[archive], self.ids[position].removeprefix(self._prefixes[archive])
        try:
            with self._handles.use(file) as opened:
                return _member(opened, name)
        except UnreadableImageError:
            raise
        except Exception as error:  # damage can make a decompressor raise anything
            raise UnreadableImageError(f"cannot be read from {file.name}: {error or type(error).__name__}") from None


def zip_source(
    root: str | Path | None,
    *,
    labels_file: str | Path | None = None,
    classes: str = "auto",
    channels: int = 3,
    cache_dir: str | Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
    rendering: Rendering = EIGHT_BITS,
) -> ZipSource:
    """Build a `ZipSource` from configuration values; see there. Archives at a URL are copied to `cache_dir` first.

    Raises:
        DataError: if `root` is None, too.
        ConfigError: if `classes` is none of "auto", "folders" and "none".
    """
    if classes not in get_args(Classes):
        raise ConfigError(f"dataset.source.classes must be one of {', '.join(get_args(Classes))}, got {classes}")
    if root is None:
        raise DataError("dataset=zip needs data.root=PATH, a zip archive or the folder that holds such files")
    return ZipSource(
        local_path(root, cache_dir, (".zip",), storage_options),
        labels_file=None if labels_file is None else Path(labels_file).expanduser(),
        classes=cast(Classes, classes),
        channels=channels,
        rendering=rendering,
    )


@dataclass(frozen=True, slots=True)
class _Contents:
    """Table of contents of one archive; `labels` is the labels file in it."""

    prefix: str
    file: Path
    names: list[str]
    checks: list[tuple[int, int]]
    labels: bytes | None


def _scan_all(files: Mapping[str, Path]) -> list[_Contents]:
    with progress("Listing archives", len(files), "archives") as advance:
        contents = []
        for stem, file in files.items():
            contents.append(_scan(file, f"{stem}/" if len(files) > 1 else ""))
            advance()
    return contents


def _scan(file: Path, prefix: str) -> _Contents:
    try:
        with zipfile.ZipFile(file) as opened:
            infos = [info for info in opened.infolist() if _is_image(info)]
            labels = _member(opened, LABELS_FILE) if LABELS_FILE in opened.namelist() else None
    except Exception as error:  # damage can make the table of contents raise anything
        raise DataError(
            f"{file}: expected a zip archive, but it cannot be read ({error or type(error).__name__}); get it again"
        ) from None
    infos.sort(key=lambda info: info.filename)
    return _Contents(prefix, file, [i.filename for i in infos], [(i.file_size, i.CRC) for i in infos], labels)


def _is_image(info: zipfile.ZipInfo) -> bool:
    return Path(info.filename).suffix.lower() in SUFFIXES and not info.is_dir() and not is_hidden(info.filename)


def _member(opened: zipfile.ZipFile, name: str) -> bytes:
    info = opened.getinfo(name)
    if info.flag_bits & _ENCRYPTED:
        raise UnreadableImageError("it is encrypted: unpack the archive with its password")
    if info.file_size > MAX_BYTES:
        raise UnreadableImageError(f"it claims {info.file_size:,} bytes, which is more than {MAX_BYTES:,}")
    with opened.open(info) as file:
        # Without a number the decompressor would go on beyond the size that was claimed.
        data = file.read(info.file_size + 1)
    if len(data) != info.file_size:
        raise UnreadableImageError(f"it has {len(data):,} bytes instead of {info.file_size:,}")
    return data


def _fingerprint(contents: Sequence[_Contents], channels: int) -> str:
    digest = hashlib.sha256(f"zip {channels}".encode())
    for archive in contents:
        for name, (size, checksum) in zip(archive.names, archive.checks, strict=True):
            digest.update(f"\n{archive.prefix}{name}\0{size}\0{checksum}".encode())
    return digest.hexdigest()


def _classes(root: Path, ids: Sequence[str], inner: Sequence[str], classes: Classes) -> dict[str, str] | None:
    """The first folder inside of the archives; the name of an archive is no class."""
    found = folder_classes(root, inner, classes)
    return None if found is None else {id_: found[name] for id_, name in zip(ids, inner, strict=True)}


def _labels(
    root: Path, contents: Sequence[_Contents], labels_file: Path | None, ids: Sequence[str]
) -> tuple[dict[str, str], dict[str, str] | None]:
    inside = [archive for archive in contents if archive.labels is not None]
    if labels_file is not None or not inside:
        return read_labels(root if root.is_dir() else root.parent, labels_file, ids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / LABELS_FILE
        rows = chain.from_iterable(_rows(path, archive) for archive in inside)
        lines = [COLUMNS, *rows]
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(lines)
        try:
            return labels_or_truth(path, ids)
        except LabelError as error:
            raise LabelError(str(error).replace(str(path), f"{LABELS_FILE} in {root}")) from None


def _rows(path: Path, archive: _Contents) -> list[tuple[str, str]]:
    """Check the labels file in an archive, by way of the temporary file `path`, and return its lines."""
    path.write_bytes(archive.labels or b"")
    try:
        labels = read_labels_csv(path, frozenset(archive.names))
    except LabelError as error:
        raise LabelError(str(error).replace(str(path), f"{LABELS_FILE} in {archive.file}")) from None
    return [(archive.prefix + name, label) for name, label in labels.items()]
