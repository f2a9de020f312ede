"""The files below a folder that may be read as images: no hidden ones, no links that leave the folder."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from anomalymatch.errors import DataError


class Entry(NamedTuple):
    """A file: its POSIX path relative to the root, its size in bytes and the time of its last change."""

    id: str
    size: int
    mtime_ns: int


def scan(root: Path, suffixes: tuple[str, ...]) -> tuple[list[Entry], Counter[str]]:
    """List the files below `root` whose lower-case names end in `suffixes`, and count what was skipped, by reason.

    Raises:
        DataError: if `root` or a folder in it cannot be listed.
    """
    skipped: Counter[str] = Counter()
    return sorted(_walk(os.path.realpath(root), "", suffixes, skipped)), skipped


def describe(skipped: Counter[str]) -> str:
    """What was skipped, in brackets for a message; empty if nothing was."""
    return " (" + ", ".join(f"{reason}: {n:,}" for reason, n in skipped.items()) + ")" if skipped else ""


def fingerprint(salt: str, entries: Sequence[Entry]) -> str:
    """A hash that changes with the names, sizes and times of the files, and with `salt`."""
    digest = hashlib.sha256(salt.encode())
    for entry in entries:
        digest.update(f"\n{entry.id}\0{entry.size}\0{entry.mtime_ns}".encode())
    return digest.hexdigest()


def _walk(top: str, relative: str, suffixes: tuple[str, ...], skipped: Counter[str]) -> list[Entry]:
    found: list[Entry] = []
    try:
        with os.scandir(os.path.join(top, relative)) as listing:
            children = list(listing)
    except OSError as error:
        raise DataError(f"{os.path.join(top, relative)}: cannot list this folder: {error.strerror}") from None
    for child in children:
        path = f"{relative}/{child.name}" if relative else child.name
        if child.name.startswith("."):
            continue
        if child.is_dir(follow_symlinks=False):
            found += _walk(top, path, suffixes, skipped)
        elif entry := _entry(top, path, child, suffixes, skipped):
            found.append(entry)
    return found


def _entry(
    top: str, path: str, child: os.DirEntry[str], suffixes: tuple[str, ...], skipped: Counter[str]
) -> Entry | None:
    """Describe a file or link if it may be read, else count why not.

    Of a file that is no link, the listing itself knows all but size and time: a million files take a million calls.
    """
    link = child.is_symlink()
    if link and os.path.isdir(child.path):
        skipped["links to folders"] += 1
    elif not child.name.lower().endswith(suffixes):
        pass
    elif link and not os.path.realpath(child.path).startswith(os.path.join(top, "")):
        skipped["links that leave the folder"] += 1
    elif not (os.path.isfile(child.path) if link else child.is_file()):
        skipped["links and names of images that are no files"] += 1
    elif not (path.isascii() or _is_utf8(path)):
        skipped["files whose names are not UTF-8"] += 1
    else:
        stat = child.stat()
        return Entry(path, stat.st_size, stat.st_mtime_ns)
    return None


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
