"""A tree of image files as a source: ids are paths relative to its root."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, get_args

from anomalymatch.data.labels import labels_or_truth
from anomalymatch.data.remote import Entry as RemoteEntry
from anomalymatch.data.remote import Remote, digest, is_remote, local_path, reason, with_retries
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS, ImageSource
from anomalymatch.data.sources.encoded import MAX_BYTES, SUFFIXES, Classes, EncodedSource, folder_classes, read_labels
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError
from anomalymatch.types import Image, Reject

logger = logging.getLogger(__name__)

Entry = tuple[str, int, int]
"""A file: its POSIX path relative to the root, its size in bytes and the time of its last change in nanoseconds."""
_TO_FOLDERS = "links to folders"
_CHUNK = 4096


class Folder(NamedTuple):
    """What lies in one folder below a root.

    Attributes:
        path: relative to the root; ends in a slash, unless it is the root's, which is empty.
        folders: names of the folders in it, without hidden ones and links; those taken away are not entered.
        files: everything else, sorted by name.
    """

    path: str
    folders: list[str]
    files: list[os.DirEntry[str]]


class Scan(NamedTuple):
    """The files below a root, sorted by path, and how many were skipped for each reason."""

    entries: list[Entry]
    skipped: Counter[str]

    @property
    def named(self) -> int:
        """How many have the name of what was looked for, whether they are files or not."""
        return len(self.entries) + self.skipped.total() - self.skipped[_TO_FOLDERS]


def walk(root: Path) -> Iterator[Folder]:
    """Yield `root` and the folders below it.

    Raises:
        DataError: if `root` or a folder in it cannot be listed.
    """
    waiting = [""]
    while waiting:
        folder = _list(os.path.realpath(root), waiting.pop())
        yield folder
        waiting += [f"{folder.path}{name}/" for name in reversed(folder.folders)]


def _list(top: str, path: str) -> Folder:
    try:
        with os.scandir(os.path.join(top, path)) as listing:
            children = sorted(listing, key=attrgetter("name"))
    except OSError as error:
        raise DataError(f"{os.path.join(top, path)}: cannot list this folder: {error.strerror}") from None
    folders = [child.name for child in children if child.is_dir(follow_symlinks=False) and child.name[0] != "."]
    return Folder(path, folders, [child for child in children if not child.is_dir(follow_symlinks=False)])


def scan(root: Path, suffixes: tuple[str, ...], folders: Iterable[Folder] | None = None) -> Scan:
    """List the files below `root` whose lower-case names end in `suffixes`; `folders` are those of `walk`.

    Of a file that is no link, the listing itself knows all but size and time: a million files take a million calls.

    Raises:
        DataError: if `root` or a folder in it cannot be listed.
    """
    top = os.path.realpath(root)
    entries: list[Entry] = []
    skipped: Counter[str] = Counter()
    for path, _, files in walk(root) if folders is None else folders:
        for child in files:
            id_ = path + child.name
            if child.is_file(follow_symlinks=False) and id_.isascii():  # as nearly all are
                wanted = child.name.lower().endswith(suffixes) and child.name[0] != "."
            else:
                wanted = _is_wanted(top, id_, child, suffixes, skipped)
            if wanted:
                stat = child.stat()
                entries.append((id_, stat.st_size, stat.st_mtime_ns))
    entries.sort()  # which is quick, because each folder is sorted
    return Scan(entries, skipped)


def describe(skipped: Counter[str]) -> str:
    """What was skipped, in brackets for a message; empty if nothing was."""
    return " (" + ", ".join(f"{reason}: {n:,}" for reason, n in skipped.items()) + ")" if skipped else ""


def fingerprint(salt: str, entries: Sequence[Entry]) -> str:
    """A hash that changes with the names, sizes and times of the files, and with `salt`."""
    digest = hashlib.sha256(salt.encode())
    for at in range(0, len(entries), _CHUNK):
        lines = [f"\n{id_}\0{size}\0{mtime_ns}" for id_, size, mtime_ns in entries[at : at + _CHUNK]]
        digest.update("".join(lines).encode())
    return digest.hexdigest()


def _is_wanted(top: str, id_: str, child: os.DirEntry[str], suffixes: tuple[str, ...], skipped: Counter[str]) -> bool:
    """Whether a file or link may be read; count why not."""
    if child.name.startswith("."):
        return False
    link = child.is_symlink()
    if link and os.path.isdir(child.path):
        skipped[_TO_FOLDERS] += 1
    elif not child.name.lower().endswith(suffixes):
        pass
    elif link and not os.path.realpath(child.path).startswith(os.path.join(top, "")):
        skipped["links that leave the folder"] += 1
    elif not (os.path.isfile(child.path) if link else child.is_file()):
        skipped["links and names of images that are no files"] += 1
    elif not _is_utf8(id_):
        skipped["files whose names are not UTF-8"] += 1
    else:
        return True
    return False


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


class FolderSource(EncodedSource):
    """The images below a folder; an id is the POSIX path relative to it. None is opened before it is read.

    Hidden files and folders are skipped, and so, with a warning, are links that leave the folder.

    Args:
        root: the folder.
        labels_file: a CSV `filename,label`; None takes `labels.csv` in the root where there is one. If all its labels
            are among anomaly, normal, unsure and artefact, they are what a person has said so far, and become `labels`.
            Any others are the classes of a benchmark and become `truth`; then no image may be missing.
        classes: whether the first folder of the path is the class of an image: "folders" yes, "none" no, "auto" if
            every image lies in a sub-folder and there are at least two of them. A benchmark's labels file comes first.
        channels: channels of the decoded images.
        scanned: what is in the folder, where that is known already.
        rendering: how pixels become 8-bit channels.

    Attributes:
        labels: labels by a person, by id; empty without a labels file.

    Raises:
        DataError: if the folder is missing or has no images.
        LabelError: if the labels file is missing, wrong, or an incomplete benchmark.
    """

    def __init__(
        self,
        root: Path,
        *,
        labels_file: Path | None = None,
        classes: Classes = "auto",
        channels: int = 3,
        scanned: Scan | None = None,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        self._root = root
        entries, skipped = scanned or _scan(root)
        if not entries:
            raise DataError(
                f"{root}: there are no images in it{describe(skipped)}, "
                f"expected files that end in {', '.join(sorted(SUFFIXES))}"
            )
        if skipped:
            logger.warning("%s: skipped what was found beside the images%s", root, describe(skipped))
        ids = [entry[0] for entry in entries]
        labels, truth = read_labels(root, labels_file, ids)
        super().__init__(
            name=root.resolve().name,
            ids=ids,
            bands=band_names(None, channels),
            rendering=rendering,
            fingerprint=fingerprint(f"folder {channels}", entries),
            labels=labels,
            folder=root,
            truth=truth if truth is not None else folder_classes(root, ids, classes),
        )

    def _encoded(self, position: int) -> bytes:
        try:
            return self._root.joinpath(self.ids[position]).read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"cannot be opened: {error.strerror}") from None


def folder_source(
    root: str | Path | None,
    *,
    labels_file: str | Path | None = None,
    classes: str = "auto",
    channels: int = 3,
    storage_options: Mapping[str, Any] | None = None,
    scanned: Scan | None = None,
    rendering: Rendering = EIGHT_BITS,
) -> ImageSource:
    """Build a `FolderSource` from configuration values, or a `RemoteFolderSource` if `root` is a URL; see there.

    Raises:
        DataError: if `root` is None, too.
        ConfigError: if `classes` is none of "auto", "folders" and "none".
    """
    if classes not in get_args(Classes):
        raise ConfigError(f"dataset.source.classes must be one of {', '.join(get_args(Classes))}, got {classes}")
    if root is None:
        raise DataError("dataset=folder needs data.root=PATH, the folder that holds the images")
    labels = None if labels_file is None else Path(labels_file).expanduser()
    options: dict[str, Any] = {"labels_file": labels, "classes": classes, "channels": channels, "rendering": rendering}
    if is_remote(root):
        return RemoteFolderSource(str(root), storage_options=storage_options, **options)
    return FolderSource(local_path(root, None, ()), scanned=scanned, **options)


def _scan(root: Path) -> Scan:
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataError(f"{root}: expected a folder with images, found {found}; set data.root to an existing folder")
    return scan(root, tuple(SUFFIXES))


CONNECTIONS = 16


class RemoteFolderSource(EncodedSource):
    """The image files below a URL; an id is the path relative to it, as for `FolderSource`.

    Setting up lists the files and reads none. Each image is fetched whole, in up to three attempts. Over HTTP the
    server must list its folders as pages with links; such a list has no sizes and dates, so that a change of a file
    that keeps its name goes unnoticed.

    Args:
        url: the folder, `s3://bucket/folder` for example.
        labels_file: a CSV `filename,label` on this machine; see `FolderSource`.
        classes: whether the first folder of the path is the class of an image; see `FolderSource`.
        channels: channels of the decoded images.
        connections: how many images a call of `read` fetches at once.
        storage_options: what the file system is opened with, {"anon": True} for a public bucket of S3.
        rendering: how pixels become 8-bit channels.

    Attributes:
        labels: labels by a person, by id; empty without a labels file.

    Raises:
        DataError: if the URL cannot be listed, has no images, or needs a package that is not installed.
        LabelError: if the labels file is missing, wrong, or an incomplete benchmark.
    """

    def __init__(
        self,
        url: str,
        *,
        labels_file: Path | None = None,
        classes: Classes = "auto",
        channels: int = 3,
        connections: int = CONNECTIONS,
        storage_options: Mapping[str, Any] | None = None,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        self._remote = Remote(url, storage_options)
        self._entries = self._remote.list(sorted(SUFFIXES))
        if not self._entries:
            raise DataError(
                f"{url}: there are no images in it, expected files that end in {', '.join(sorted(SUFFIXES))}"
            )
        ids = [entry.id for entry in self._entries]
        self._connections = max(1, connections)
        labels, truth = ({}, None) if labels_file is None else labels_or_truth(labels_file, ids)
        super().__init__(
            name=PurePosixPath(self._remote.url).name,
            ids=ids,
            bands=band_names(None, channels),
            rendering=rendering,
            fingerprint=digest(f"remote {channels}", self._entries),
            labels=labels,
            truth=truth if truth is not None else folder_classes(url, ids, classes),
        )

    def read(self, ids: Sequence[str]) -> list[Image | Reject]:
        """See `ImageSource.read`; many requests are under way at once, because most of their time is waiting."""
        if min(len(ids), self._connections) < 2:
            return super().read(ids)
        with ThreadPoolExecutor(min(self._connections, len(ids)), thread_name_prefix="fetch") as pool:
            return list(pool.map(self._read, ids))

    def _encoded(self, position: int) -> bytes:
        entry = self._entries[position]
        if (entry.size or 0) > MAX_BYTES:
            raise UnreadableImageError(f"it has {entry.size:,} bytes, which is more than {MAX_BYTES:,}")
        try:
            return with_retries(lambda: self._fetch(entry), entry.path)
        except Exception as error:  # each file system has errors of its own
            raise UnreadableImageError(f"cannot be fetched: {reason(error)}") from None

    def _fetch(self, entry: RemoteEntry) -> bytes:
        data = self._remote.filesystem.cat_file(entry.path)
        if entry.size not in (None, len(data)):
            raise OSError(f"got {len(data):,} bytes where {entry.size:,} were listed")
        return data
