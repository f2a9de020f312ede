"""Scan of a folder for image files: paths, sizes and times, without links that leave the folder."""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from anomalymatch.data.find import Folder, walk
from anomalymatch.errors import DataError

logger = logging.getLogger(__name__)

Stamp = tuple[int, int]
"""Size of a file in bytes and time of its last change in nanoseconds."""
Entry = tuple[str, int, int]
"""File: POSIX path below the root, size in bytes, time of the last change in nanoseconds."""
_TO_FOLDERS = "links to folders"


class Scan(NamedTuple):
    """Files below a root, sorted by path, and the number of files skipped for each reason."""

    entries: list[Entry]
    skipped: Counter[str]

    @property
    def named(self) -> int:
        """Number of entries with a matching name, whether they are files or not."""
        return len(self.entries) + self.skipped.total() - self.skipped[_TO_FOLDERS]


def scan(root: Path, suffixes: tuple[str, ...], folders: Iterable[Folder] | None = None) -> Scan:
    """List the files below `root` whose lower-case names end in `suffixes`.

    Args:
        root: the folder.
        suffixes: endings of the names, in lower case.
        folders: folders to look into; None takes all that `walk` yields.

    Raises:
        DataError: if `root` or a folder in it cannot be listed.
    """
    top = os.path.realpath(root)
    entries: list[Entry] = []
    skipped: Counter[str] = Counter()
    for path, _, files in walk(root) if folders is None else folders:
        for child in files:
            id_ = path + child.name
            # True of nearly all files, and needs no system call.
            if child.is_file(follow_symlinks=False) and id_.isascii():
                wanted = child.name.lower().endswith(suffixes) and child.name[0] != "."
            else:
                wanted = _is_wanted(top, id_, child, suffixes, skipped)
            if wanted:
                entries.append((id_, *stamp(child)))
    entries.sort()
    return Scan(entries, skipped)


def scan_for(what: str, root: Path, suffixes: tuple[str, ...], scanned: Scan | None = None) -> list[Entry]:
    """List the files below `root` with given suffixes, and log how many were skipped.

    Args:
        what: kind of the files, for messages: "images".
        root: the folder.
        suffixes: endings of the names, in lower case.
        scanned: result of `scan`, where there is one already.

    Raises:
        DataError: if `root` is no folder, cannot be listed, or has no such files.
    """
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataError(f"{root}: expected a folder with {what}, found {found}; set data.root to an existing folder")
    entries, skipped = scanned or scan(root, suffixes)
    counts = " (" + ", ".join(f"{reason}: {n:,}" for reason, n in skipped.items()) + ")" if skipped else ""
    if not entries:
        raise DataError(f"{root}: there are no {what} in it{counts}, expected files that end in {', '.join(suffixes)}")
    if skipped:
        logger.warning("%s: skipped entries beside the %s%s", root, what, counts)
    return entries


def stamp(path: Path | os.DirEntry[str]) -> Stamp:
    """Return the size (bytes) and the time of the last change (ns) of a file."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _is_wanted(top: str, id_: str, child: os.DirEntry[str], suffixes: tuple[str, ...], skipped: Counter[str]) -> bool:
    """Tell whether a file or link may be read; count the reason in `skipped` if not."""
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
    elif not is_utf8(id_):
        skipped["files whose names are not UTF-8"] += 1
    else:
        return True
    return False


def is_utf8(path: str) -> bool:
    """Tell whether a path can be encoded as UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
