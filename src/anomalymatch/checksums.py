"""Checksums of the files of a folder, so that changed bits are noticed."""

import json
import zlib
from pathlib import Path

from anomalymatch.errors import StorageError
from anomalymatch.files import write_text

CHECKSUMS = "checksums.json"
_CHUNK = 2**24


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files of a folder into its `checksums.json`."""
    sums = {file.name: checksum(file) for file in sorted(folder.iterdir()) if file.name != CHECKSUMS}
    write_text(folder / CHECKSUMS, json.dumps(sums, indent=2))


def damaged_files(folder: Path, *only: str) -> list[str]:
    """Return the files of a folder that are missing or differ from its checksums, among `only` or all.

    A folder without checksums has none; if the checksums are unreadable, they are the damaged file.
    """
    try:
        sums = dict(json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError):
        return [CHECKSUMS]
    return [name for name in only or sums if name in sums and not _matches(folder / name, sums[name])]


def check_file(path: Path) -> None:
    """Check a file against the checksums beside it.

    Raises:
        StorageError: if its content has changed.
    """
    if damaged_files(path.parent, path.name):
        raise StorageError(
            f"{path} is damaged, its checksum is wrong: continue the run with resume= to compute it again"
        )


def checksum(path: Path) -> int:
    """Compute the CRC-32 of a file."""
    # Read, not mapped: pages of a map count as memory of the process.
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total = zlib.crc32(chunk, total)
    return total


def _matches(path: Path, expected: object) -> bool:
    return path.is_file() and checksum(path) == expected
