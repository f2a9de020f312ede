"""The files below a folder that may be read as images: no hidden ones, no links that leave the folder."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from anomalymatch.errors import DataError

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
