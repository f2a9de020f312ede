"""Where the members of a tar archive lie: found from its headers alone, and kept for the next time."""

import hashlib
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64

from anomalymatch.data._encoded import is_hidden
from anomalymatch.data.folder import SUFFIXES
from anomalymatch.errors import DataError
from anomalymatch.files import atomic_file

logger = logging.getLogger(__name__)
VERSION = 1
"""Of the cached tables; another one and they are made anew."""
MAX_TEXT = 2**16
"""Labels are short; a longer member is none."""
_PACKED = {b"\x1f\x8b": ".gz", b"BZ": ".bz2", b"\xfd7": ".xz", b"\x28\xb5": ".zst"}
_BLOCK = 512


@dataclass
class TarTable:
    """The images in one archive, in its order.

    Attributes:
        names: their paths in the archive, without a leading "./".
        offsets: where their bytes begin, in bytes from the start of the file.
        sizes: their sizes in bytes.
        texts: contents of the short members that were asked for, by name.
        damage: why the headers could not be followed to the end; empty if they could.
    """

    names: list[str] = field(default_factory=list)
    offsets: Int64[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0, np.int64))
    sizes: Int64[np.ndarray, " n"] = field(default_factory=lambda: np.empty(0, np.int64))
    texts: dict[str, str] = field(default_factory=dict)
    damage: str = ""


def tar_table(file: Path, text_suffix: str | None, cache_dir: Path | None, advance: Callable[[int], None]) -> TarTable:
    """Follow the headers of `file`, or take what an earlier call found, if the file is still the same.

    Args:
        file: the archive, not compressed.
        text_suffix: members that end so are read, ".cls" for example; None reads none.
        cache_dir: where tables are kept; None keeps none.
        advance: told how many bytes of the archive have been passed.

    Raises:
        DataError: if it is missing, compressed, or no tar archive.
        StorageError: if the cache cannot be written.
    """
    stat = file.stat()
    key = f"{VERSION}\n{file.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}\n{text_suffix}"
    cached = None if cache_dir is None else cache_dir / "tar" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    table = None if cached is None else _load(cached)
    if table is None:
        table = _follow(file, stat.st_size, text_suffix, advance)
        if cached is not None:
            _save(cached, table)
    else:
        advance(stat.st_size)
    return table


def _load(cached: Path) -> TarTable | None:
    try:
        with cached.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            words = json.loads(arrays["words"].tobytes())
            return TarTable(words["names"], arrays["offsets"], arrays["sizes"], words["texts"], words["damage"])
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with it, it can be made anew
        logger.warning("%s: cannot be read (%s), made anew", cached, error)
        return None


def _save(cached: Path, table: TarTable) -> None:
    words = json.dumps({"names": table.names, "texts": table.texts, "damage": table.damage}).encode()
    with atomic_file(cached) as temporary, temporary.open("wb") as opened:
        np.savez(opened, words=np.frombuffer(words, np.uint8), offsets=table.offsets, sizes=table.sizes)


def _follow(file: Path, size: int, text_suffix: str | None, advance: Callable[[int], None]) -> TarTable:
    table, skipped = TarTable(), Counter[str]()
    places: list[tuple[int, int]] = []
    with file.open("rb") as opened:
        _refuse_packed(file, opened)
        for member in _members(file, opened, size, table, advance):
            name = member.name.removeprefix("./")
            is_text = text_suffix is not None and name.endswith(text_suffix)
            if is_hidden(name) or not (is_text or PurePosixPath(name).suffix.lower() in SUFFIXES):
                continue
            if why := _unfit(member):
                skipped[why] += 1
            elif not is_text:
                table.names.append(name)
                places.append((member.offset_data, member.size))
            elif member.size <= MAX_TEXT:
                opened.seek(member.offset_data)
                text = opened.read(member.size)
                if len(text) == member.size:
                    table.texts[name] = text.decode(errors="replace")
    if skipped:
        logger.warning("%s: skipped %s", file, ", ".join(f"{n:,} {why}" for why, n in skipped.items()))
    table.offsets, table.sizes = np.array(places, dtype=np.int64).reshape(-1, 2).T.copy()
    return table


def _refuse_packed(file: Path, opened: BinaryIO) -> None:
    suffix = _PACKED.get(opened.read(2))
    if suffix:
        raise DataError(
            f"{file}: expected a plain tar archive, found a compressed one ({suffix}), in which no image can be looked "
            "up: unpack it, or pack it again without compression"
        )
    opened.seek(0)


def _members(
    file: Path, opened: BinaryIO, size: int, table: TarTable, advance: Callable[[int], None]
) -> Iterator[tarfile.TarInfo]:
    """Yield all members up to the end or the first damaged header, which is then told in `table.damage`."""
    try:
        tar = tarfile.open(fileobj=opened, mode="r:")  # noqa: SIM115 (the file is the caller's to close)
    except Exception as error:  # a damaged header can make the reader raise anything
        raise DataError(f"{file}: expected a tar archive, but it cannot be read ({error}); get it again") from None
    at = -1
    while True:
        try:
            member = tar.next()
        except Exception as error:
            table.damage = f"the archive breaks off at byte {min(tar.offset, size):,} ({error})"
            return
        if member is None:
            break
        if tar.offset <= max(at, member.offset) or member.size < 0:  # a negative size would lead round in circles
            table.damage = f"the header at byte {member.offset:,} is damaged"
            return
        advance(min(tar.offset, size) - max(at, 0))
        at = tar.offset
        tar.members = []  # type: ignore[attr-defined]  # or all of them would be kept in memory
        yield member
    advance(size - max(at, 0))
    table.damage = _end(opened, tar.offset, size)


def _end(opened: BinaryIO, at: int, size: int) -> str:
    """What is wrong with the end: tarfile takes a damaged header for it."""
    opened.seek(at)
    block = opened.read(_BLOCK)
    if at >= size:
        return "the archive breaks off without an end mark" if at else ""
    return f"the header at byte {at:,} is damaged" if any(block) else ""


def _unfit(member: tarfile.TarInfo) -> str:
    """Why a member that has the name of an image cannot be read as one; empty if it can."""
    if not member.isreg() or member.issparse():
        return "folders, links and sparse files with names of images"
    try:
        member.name.encode()
    except UnicodeEncodeError:
        return "names that are not UTF-8"
    return ""
