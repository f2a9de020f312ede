"""Zip archives of image files as a source; nothing is unpacked to disk."""

import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

from anomalymatch.checks import check_choice
from anomalymatch.data.find import FoundFile, damaged_file, find_files, is_hidden
from anomalymatch.data.labels import LABELS_FILE, labels_or_truth, parse_labels_csv
from anomalymatch.data.source import hash_rows
from anomalymatch.data.sources.encoded import (
    CLASSES,
    SUFFIXES,
    EncodedSource,
    Listing,
    check_bytes,
    folder_classes,
    no_images,
)
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.lru import LRU
from anomalymatch.progress import progress
from anomalymatch.text import reason
from anomalymatch.types import Label

OPEN_FILES = 64
_ENCRYPTED = 1


class ZipSource(EncodedSource):
    """Images in one zip archive, or in all archives of a folder; see `EncodedSource` for the other arguments.

    An id is the path in the archive, behind the archive's name without suffix where there are several. Opening reads
    the tables of contents and no image. Hidden entries and `__MACOSX` are skipped. An image that is encrypted, fails
    its checksum or claims more than 256 MiB is a reject. A `labels.csv` inside an archive names paths below its own
    folder, and is used instead of one beside the archive.

    Args:
        root: an archive, a folder that is searched for *.zip at any depth, or a URL of either.
        classes: whether the first folder inside the archive is the class of the image, see `folder_classes`; a folder
            around all others, as file managers make it, does not count.
        **options: arguments of `EncodedSource`.
    """

    dataset = "zip"
    expected = "a zip archive or the folder that holds such files"
    suffixes = (".zip",)

    def __init__(self, root: str | Path | None, *, classes: str = "auto", **options: Any) -> None:
        check_choice("dataset.source.classes", classes, CLASSES)
        self._classes = classes
        super().__init__(root, **options)

    def list_images(self, place: Path, cache_dir: Path | None) -> Listing:
        """See `EncodedSource.list_images`."""
        archives = _list_all(find_files(place, lambda file: file.name.lower().endswith(".zip"), "a zip archive"))
        paths = [name for archive in archives for name in archive.names]
        if not paths:
            raise no_images(place, "members")
        ids = [archive.prefix + name for archive in archives for name in archive.names]
        top = paths[0].split("/")[0] + "/"
        around = len(top) if all(path.startswith(top) and path.count("/") > 1 for path in paths) else 0
        classes = folder_classes(place, [path[around:] for path in paths], self._classes)
        checks = (check for archive in archives for check in archive.checks)
        self._archives = archives
        self._starts = np.cumsum([0] + [len(archive.names) for archive in archives])
        self._opened: LRU[Path, zipfile.ZipFile] = LRU(OPEN_FILES, close=methodcaller("close"))
        return Listing(
            ids=ids,
            fingerprint=hash_rows("zip", ((id_, *check) for id_, check in zip(ids, checks, strict=True))),
            classes=classes and {id_: classes[path[around:]] for id_, path in zip(ids, paths, strict=True)},
        )

    def read_labels(
        self, labels_file: str | Path | None, ids: Sequence[str], place: str | Path
    ) -> tuple[dict[str, Label], dict[str, str] | None]:
        """Read the given labels file, else those inside the archives, else the one beside them."""
        inside: dict[str, str] = {}
        for archive in self._archives if labels_file is None else ():
            for path, data in archive.labels.items():
                folder = path.removesuffix(LABELS_FILE)
                below = {name.removeprefix(folder): name for name in archive.names if name.startswith(folder)}
                paths = {name: name for name in archive.names} | below
                found = parse_labels_csv(data, f"{path} in {archive.file}", paths)
                inside |= {archive.prefix + paths[name]: label for name, label in found.items()}
        if inside:
            return labels_or_truth(inside, ids, f"{LABELS_FILE} in {place}")
        return super().read_labels(labels_file, ids, place)

    def read_bytes(self, position: int) -> bytes:
        """See `EncodedSource.read_bytes`."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        archive = self._archives[number]
        try:
            with self._opened.use(archive.file, partial(zipfile.ZipFile, archive.file)) as opened:
                return _read(opened, archive.members[position - int(self._starts[number])])
        except UnreadableImageError:
            raise
        except Exception as error:  # damage can make a decompressor raise anything
            raise UnreadableImageError(f"cannot be read from {archive.file.name}: {reason(error)}") from None


@dataclass(frozen=True, slots=True)
class _Archive:
    """Table of contents of one archive: its images with sizes and checksums, and its labels files by path.

    `prefix` is the beginning of its ids; `names` are paths with slashes, also where the `members` have backslashes.
    """

    file: Path
    prefix: str
    members: list[str]
    names: list[str]
    checks: list[tuple[int, int]]
    labels: dict[str, bytes]


def _list_all(files: Sequence[FoundFile]) -> list[_Archive]:
    archives = []
    with progress("Listing archives", len(files), "archives") as advance:
        for file in files:
            archives.append(_list(file.path, f"{file.stem}/" if len(files) > 1 else ""))
            advance()
    return archives


def _list(file: Path, prefix: str) -> _Archive:
    try:
        with zipfile.ZipFile(file) as opened:
            infos = {info.filename.replace("\\", "/"): info for info in opened.infolist() if not info.is_dir()}
            visible = sorted(name for name in infos if not is_hidden(name))
            labels = {n: _read(opened, infos[n].filename) for n in visible if n.split("/")[-1] == LABELS_FILE}
            _check_unique(file, opened)
    except DataError:
        raise
    except Exception as error:  # damage can make the table of contents raise anything
        raise damaged_file(file, "a zip archive", error) from None
    names = [name for name in visible if Path(name).suffix.lower() in SUFFIXES]
    members = [infos[name].filename for name in names]
    return _Archive(file, prefix, members, names, [(infos[n].file_size, infos[n].CRC) for n in names], labels)


def _check_unique(file: Path, opened: zipfile.ZipFile) -> None:
    """Refuse an archive with two images of one path, of which only the last could be read."""
    counts = Counter(info.filename.replace("\\", "/") for info in opened.infolist())
    twice = [name for name, count in counts.items() if count > 1 and Path(name).suffix.lower() in SUFFIXES]
    if twice:
        raise DataError(f"{file}: paths must be unique, but {twice[0]!r} occurs more than once")


def _read(opened: zipfile.ZipFile, name: str) -> bytes:
    info = opened.getinfo(name)
    if info.flag_bits & _ENCRYPTED:
        raise UnreadableImageError("it is encrypted: unpack the archive with its password")
    check_bytes(info.file_size)
    with opened.open(info) as file:
        # Without a limit the decompressor would go on beyond the claimed size.
        data = file.read(info.file_size + 1)
    if len(data) != info.file_size:
        raise UnreadableImageError(f"it has {len(data):,} bytes instead of {info.file_size:,}")
    return data
