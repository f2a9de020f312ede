"""Folder of image files as a source, on this machine or behind a URL."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from anomalymatch.checks import check_choice
from anomalymatch.data.download import with_retries
from anomalymatch.data.find import Scan, scan_for
from anomalymatch.data.remote import Remote, RemoteFile, hash_entries, transfer_reason
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import EIGHT_BITS, hash_rows
from anomalymatch.data.sources.encoded import (
    CLASSES,
    MAX_BYTES,
    SUFFIXES,
    EncodedSource,
    Listing,
    folder_classes,
    no_images,
)
from anomalymatch.errors import UnreadableImageError
from anomalymatch.types import Image, Reject

CONNECTIONS = 16
"""Images that one call of `read` fetches at once from a URL."""


class FolderSource(EncodedSource):
    """Images below a folder or URL; an id is the POSIX path below it. Opening reads no image.

    Hidden files and folders are skipped, and so, with a warning, are links that leave the folder. An image behind a
    URL is fetched whole, in up to three attempts. An HTTP server must list its folders as pages with links; such a
    list has no sizes and dates, so a changed file of the same name goes unnoticed.

    Args:
        root: the folder, or its URL, `s3://bucket/folder` for example.
        labels_file: as in `EncodedSource`, like all others; one beside images at a URL has to be named.
        classes: whether the first folder of a path is the class of the image, see `folder_classes`.
        scanned: result of a scan of the folder, where there is one already.
    """

    dataset = "folder"
    expected = "the folder that holds the images"

    def __init__(
        self,
        root: str | Path | None,
        *,
        labels_file: str | Path | None = None,
        classes: str = "auto",
        channels: int = 3,
        storage_options: Mapping[str, Any] | None = None,
        scanned: Scan | None = None,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        check_choice("dataset.source.classes", classes, CLASSES)
        self._classes, self._storage_options, self._scanned = classes, storage_options, scanned
        super().__init__(root, labels_file=labels_file, channels=channels, rendering=rendering)
        self._scanned = None

    def list_images(self, place: str | Path, cache_dir: Path | None) -> Listing:
        """See `EncodedSource.list_images`."""
        if isinstance(place, str):
            self._remote: Remote | None = Remote(place, self._storage_options)
            self._entries = self._remote.list(sorted(SUFFIXES))
            if not self._entries:
                raise no_images(place, "files")
            ids = [entry.id for entry in self._entries]
            name, fingerprint = PurePosixPath(self._remote.url).name, hash_entries("remote", self._entries)
        else:
            self._remote = None
            entries = scan_for("images", place, tuple(sorted(SUFFIXES)), self._scanned)
            ids = [entry[0] for entry in entries]
            name, fingerprint = place.resolve().name, hash_rows("folder", entries)
        folder = None if isinstance(place, str) else place
        return Listing(ids, fingerprint, folder_classes(place, ids, self._classes), name=name, folder=folder)

    def read(self, ids: Sequence[str]) -> list[Image | Reject]:
        """See `ImageSource.read`; images behind a URL are fetched in parallel."""
        if self._remote is None or len(ids) < 2:
            return super().read(ids)
        with ThreadPoolExecutor(min(CONNECTIONS, len(ids)), thread_name_prefix="fetch") as pool:
            return list(pool.map(self._read, ids))

    def read_bytes(self, position: int) -> bytes:
        """See `EncodedSource.read_bytes`."""
        if self._remote is not None:
            return _fetch(self._remote, self._entries[position])
        assert self.folder is not None
        try:
            with (self.folder / self.ids[position]).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > MAX_BYTES:
                    raise UnreadableImageError(f"it has {size:,} bytes, which is more than {MAX_BYTES:,}")
                return file.read()
        except OSError as error:
            raise UnreadableImageError(f"cannot be opened: {error.strerror}") from None


def _fetch(remote: Remote, entry: RemoteFile) -> bytes:
    def attempt() -> bytes:
        data = remote.filesystem.cat_file(entry.path)
        if entry.size not in (None, len(data)):
            raise OSError(f"got {len(data):,} bytes where {entry.size:,} were listed")
        return data

    if (entry.size or 0) > MAX_BYTES:
        raise UnreadableImageError(f"it has {entry.size:,} bytes, which is more than {MAX_BYTES:,}")
    try:
        return with_retries(attempt, entry.path)
    except Exception as error:  # each file system has errors of its own
        raise UnreadableImageError(f"cannot be fetched: {transfer_reason(error)}") from None
