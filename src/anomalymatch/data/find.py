"""Search of folders for the files of a dataset: image files, archives, shards and stores."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from anomalymatch.checks import check_inside, is_trusted
from anomalymatch.errors import DataError
from anomalymatch.text import listed, reason

logger = logging.getLogger(__name__)

Stamp = tuple[int, int]
"""Size of a file in bytes and time of its last change in nanoseconds."""
FileStamp = tuple[str, int, int]
"""File: POSIX path below the root, size in bytes, time of the last change in nanoseconds."""
SAMPLES, SAMPLE_BYTES = 16, 2**12
"""Places of a file, and bytes at each, that `hash_sample` reads."""
_TO_FOLDERS = "links to folders"


class Folder(NamedTuple):
    """Contents of one folder below a root."""

    path: str
    """Path below the root with a slash at its end; empty for the root itself."""
    folders: list[str]
    """Folders in it, without hidden ones and links; names that are removed are not entered."""
    files: list[os.DirEntry[str]]
    """Everything else, sorted by name."""


class FoundFile(NamedTuple):
    """Found file, its name in ids, and its POSIX path below the root."""

    path: Path
    stem: str
    relative: str


def walk(root: Path) -> Iterator[Folder]:
    """Yield `root` and the folders below it.

    Raises:
        DataError: if `root` or a folder in it cannot be listed.
    """
    top = os.path.realpath(root)
    waiting = [""]
    while waiting:
        folder = _list(top, waiting.pop())
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


def find_files(
    root: str | Path | Sequence[str | Path], wanted: Callable[[Path], bool], kind: str, *, folders: bool = False
) -> list[FoundFile]:
    """Find files at or below `root`, sorted by path; hidden files are left out, links to folders not followed.

    Args:
        root: a file, a folder, or several of both.
        wanted: tells whether a path is such a file; not asked about a file that is a root itself.
        kind: kind of file, for messages: "a zip archive".
        folders: whether a folder can be such a file (a Zarr store); nothing in it is searched.

    Returns:
        Files with stems: names without suffix, or paths below the root where two names are equal.

    Raises:
        DataError: if there is nothing, a folder cannot be listed, or two files have the same stem.
    """
    tops = [Path(top).expanduser() for top in ([root] if isinstance(root, str | Path) else root)]
    found = [(file, top) for top in tops for file in _files(top, wanted, kind, folders)]
    if not found:
        raise DataError(f"expected {kind}, but the list is empty")
    stems = [_stem(file) for file, _ in found]
    if len(set(stems)) < len(stems):
        stems = [Path(_below(file, top)).with_name(_stem(file)).as_posix() for file, top in found]
    if len(set(stems)) < len(stems):
        name = Counter(stems).most_common(1)[0][0]
        same = listed(file for (file, _), stem in zip(found, stems, strict=True) if stem == name)
        raise DataError(f"the files {same} have the same name, rename one")
    return [FoundFile(file, stem, _below(file, top)) for (file, top), stem in zip(found, stems, strict=True)]


def _files(top: Path, wanted: Callable[[Path], bool], kind: str, folders: bool) -> list[Path]:
    if top.is_file() or (folders and top.is_dir() and wanted(top)):
        return [top]
    if not top.is_dir():
        raise DataError(f"{top}: expected {kind} or a folder with such files, found nothing")
    files = sorted(_search(top, wanted, folders))
    if not files:
        raise DataError(f"{top}: expected {kind} or a folder with such files, found none")
    return files


def _search(top: Path, wanted: Callable[[Path], bool], folders: bool) -> Iterator[Path]:
    for folder in walk(top):
        for name in list(folder.folders) if folders else ():
            if wanted(top / folder.path / name):
                folder.folders.remove(name)
                yield top / folder.path / name
        for child in folder.files:
            path = top / folder.path / child.name
            if child.is_symlink() and not child.name.startswith(".") and path.exists() and wanted(path):
                check_inside(path, "it is a link out of the folder", leaves(path, top))
            if not child.name.startswith(".") and (path.is_file() or (folders and path.is_dir())) and wanted(path):
                yield path


def _below(file: Path, top: Path) -> str:
    return file.name if file == top else file.relative_to(top).as_posix()


def _stem(file: Path) -> str:
    return file.name[:-4].removesuffix(".zarr") if file.suffix.lower() == ".zip" else file.stem


class Scan(NamedTuple):
    """Files below a root, sorted by path, and the number of files skipped for each reason."""

    entries: list[FileStamp]
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
    entries: list[FileStamp] = []
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


def scan_for(what: str, root: Path, suffixes: tuple[str, ...], scanned: Scan | None = None) -> list[FileStamp]:
    """List files as `scan` does, or take the result `scanned`, and log how many were skipped; `what` names the files.

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


def hash_sample(path: Path) -> str:
    """Hash up to 64 KiB of a file, evenly spread: other content is mostly told where size and time are the same."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for number in range(SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _is_wanted(top: str, id_: str, child: os.DirEntry[str], suffixes: tuple[str, ...], skipped: Counter[str]) -> bool:
    """Tell whether a file or link may be read; count the reason in `skipped` if not."""
    if child.name.startswith("."):
        return False
    link = child.is_symlink()
    if link and os.path.isdir(child.path):
        skipped[_TO_FOLDERS] += 1
    elif not child.name.lower().endswith(suffixes):
        pass
    elif link and leaves(child.path, top) and not is_trusted():
        skipped["links that leave the folder"] += 1
    elif not (os.path.isfile(child.path) if link else child.is_file()):
        skipped["links and names of images that are no files"] += 1
    elif not is_utf8(id_):
        skipped["files whose names are not UTF-8"] += 1
    else:
        return True
    return False


def leaves(path: str | Path, top: str | Path) -> bool:
    """Tell whether a path leads out of a folder, by links or by dots."""
    return not os.path.realpath(path).startswith(os.path.join(os.path.realpath(top), ""))


def is_hidden(path: str) -> bool:
    """Tell whether a member of an archive is hidden: a dot file, or metadata of macOS."""
    return any(part == "__MACOSX" or part.startswith(".") for part in path.split("/"))


def is_utf8(path: str) -> bool:
    """Tell whether a path can be encoded as UTF-8: Python maps other bytes of a name to surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in path)


def missing_root(dataset: str, expected: str) -> DataError:
    """Return the error about a source without `data.root`, which says what is `expected`."""
    return DataError(f"dataset={dataset} needs data.root=PATH, {expected}")


def damaged_file(path: Path, expected: str, error: Exception) -> DataError:
    """Return the error about a file that cannot be read as what is `expected`, "a zip archive" for example."""
    return DataError(f"{path}: expected {expected}, but it cannot be read ({reason(error)}); get it again")


def held_out(ids_by_file: Iterable[tuple[Path, Iterable[str]]], patterns: Sequence[str]) -> frozenset[str]:
    """Return the ids of the images in files whose names match one of `patterns`.

    Raises:
        DataError: if a pattern matches no file.
    """
    files = [(path.name, ids) for path, ids in ids_by_file]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name, _ in files):
            raise DataError(f"no file matches {pattern}, correct dataset.source.holdout_files")
    return frozenset(id_ for name, ids in files if any(fnmatch(name, p) for p in patterns) for id_ in ids)
