"""Index of a tar archive: where the images lie in it, found by following the headers, and kept in a cache."""

import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64

from anomalymatch.cache import Cache, Contents, cache_key
from anomalymatch.data.find import is_hidden
from anomalymatch.data.sources.encoded import SUFFIXES
from anomalymatch.errors import DataError

logger = logging.getLogger(__name__)

MAX_TEXT = 2**16
"""Longest member that is read as a label."""
_PACKED = {b"\x1f\x8b": ".gz", b"BZ": ".bz2", b"\xfd7": ".xz", b"\x28\xb5": ".zst"}
_BLOCK = 512


@dataclass
class TarIndex:
    """Images in one archive, in its order.

    Attributes:
        names: paths in the archive, without a leading "./".
        offsets: first bytes of the images in the file.
        sizes: sizes of the images in bytes.
        texts: contents of the short members that were asked for, by name.
        damage: reason why the headers could not be followed to the end; empty if they could.
    """

    names: list[str] = field(default_factory=list)
    offsets: Int64[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0, np.int64))
    sizes: Int64[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0, np.int64))
    texts: dict[str, str] = field(default_factory=dict)
    damage: str = ""


def tar_index(file: Path, text_suffix: str | None, cache_dir: Path | None, advance: Callable[[int], None]) -> TarIndex:
    """Index an archive, or read the index from the cache if the file has not changed.

    Args:
        file: the archive, not compressed.
        text_suffix: ending of the members whose text is read, ".cls" for example; None reads none.
        cache_dir: folder of the cache; None keeps nothing.
        advance: called with the number of bytes that have been passed.

    Raises:
        DataError: if the archive is missing, compressed, or no tar archive.
        StorageError: if the cache cannot be written.
    """
    stat = file.stat()
    if cache_dir is None:
        return _follow(file, stat.st_size, text_suffix, advance)

    def compute() -> Contents:
        index = _follow(file, stat.st_size, text_suffix, advance)
        info = {"names": index.names, "texts": index.texts, "damage": index.damage}
        return {"offsets": index.offsets, "sizes": index.sizes}, info

    place = [str(file.resolve()), stat.st_size, stat.st_mtime_ns]
    arrays, info = Cache(cache_dir / "tar").get(cache_key({"file": place, "text_suffix": text_suffix}), compute)
    # Copied, because a process has a limited number of memory maps.
    offsets, sizes = np.array(arrays["offsets"]), np.array(arrays["sizes"])
    return TarIndex(info["names"], offsets, sizes, info["texts"], info["damage"])


def _follow(file: Path, size: int, text_suffix: str | None, advance: Callable[[int], None]) -> TarIndex:
    index, skipped = TarIndex(), Counter[str]()
    places: list[tuple[int, int]] = []
    with file.open("rb") as opened:
        _refuse_packed(file, opened)
        for member in _members(file, opened, size, index, advance):
            name = member.name.removeprefix("./")
            is_text = text_suffix is not None and name.endswith(text_suffix)
            if is_hidden(name) or not (is_text or PurePosixPath(name).suffix.lower() in SUFFIXES):
                continue
            if why := _unfit(member):
                skipped[why] += 1
            elif not is_text:
                index.names.append(name)
                places.append((member.offset_data, member.size))
            elif member.size <= MAX_TEXT:
                opened.seek(member.offset_data)
                text = opened.read(member.size)
                if len(text) == member.size:
                    index.texts[name] = text.decode(errors="replace")
    if skipped:
        logger.warning("%s: skipped %s", file, ", ".join(f"{n:,} {why}" for why, n in skipped.items()))
    index.offsets, index.sizes = np.array(places, dtype=np.int64).reshape(-1, 2).T.copy()
    return index


def _refuse_packed(file: Path, opened: BinaryIO) -> None:
    suffix = _PACKED.get(opened.read(2))
    if suffix:
        raise DataError(
            f"{file}: expected a plain tar archive, found a compressed one ({suffix}), in which no image can be looked "
            "up: unpack it, or pack it again without compression"
        )
    opened.seek(0)


def _members(
    file: Path, opened: BinaryIO, size: int, index: TarIndex, advance: Callable[[int], None]
) -> Iterator[tarfile.TarInfo]:
    """Yield all members up to the end or the first damaged header, which is noted in `index.damage`."""
    try:
        tar = tarfile.open(fileobj=opened, mode="r:")  # noqa: SIM115 (the caller closes the file)
    except Exception as error:  # a damaged header can make the reader raise anything
        raise DataError(f"{file}: expected a tar archive, but it cannot be read ({error}); get it again") from None
    at = -1
    while True:
        try:
            member = tar.next()
        except Exception as error:
            index.damage = f"the archive breaks off at byte {min(tar.offset, size):,} ({error})"
            return
        if member is None:
            break
        if tar.offset <= max(at, member.offset) or member.size < 0:  # a negative size would never end
            index.damage = f"the header at byte {member.offset:,} is damaged"
            return
        advance(min(tar.offset, size) - max(at, 0))
        at = tar.offset
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member in memory
        yield member
    advance(size - max(at, 0))
    index.damage = _check_end(opened, tar.offset, size)


def _check_end(opened: BinaryIO, at: int, size: int) -> str:
    """Return what is wrong where tarfile stopped: it takes a damaged header for the end."""
    opened.seek(at)
    block = opened.read(_BLOCK)
    if at >= size:
        return "the archive breaks off without an end mark" if at else ""
    return f"the header at byte {at:,} is damaged" if any(block) else ""


def _unfit(member: tarfile.TarInfo) -> str:
    """Return the reason why a member with the name of an image is none; empty if it may be one."""
    if not member.isreg() or member.issparse():
        return "folders, links and sparse files with names of images"
    try:
        member.name.encode()
    except UnicodeEncodeError:
        return "names that are not UTF-8"
    return ""
