"""Folder of image files as a source, on this machine or behind a URL."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from anomalymatch.checks import check_choice
from anomalymatch.data.download import with_retries
from anomalymatch.data.find import Scan, missing_root, scan_for
from anomalymatch.data.labels import read_labels
from anomalymatch.data.remote import Remote, RemoteFile, hash_entries, is_remote, local_path, transfer_reason
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import EIGHT_BITS, hash_rows
from anomalymatch.data.sources.encoded import CLASSES, MAX_BYTES, SUFFIXES, EncodedSource, folder_classes, no_images
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
        labels_file: a CSV `filename,label` on this machine; None takes `labels.csv` in a local folder where there is
            one. See `labels_or_truth`.
        classes: whether the first folder of a path is the class of the image, see `folder_classes`; classes in the
            labels file come first.
        channels: channels of the decoded images.
        storage_options: arguments of the URL's file system, {"anon": True} for a public bucket of S3.
        scanned: result of a scan of the folder, where there is one already.
        rendering: conversion of the bands to 8-bit channels.

    Raises:
        DataError: if `root` is None or missing, cannot be listed, or has no images.
        ConfigError: if `classes` is none of "auto", "folders" and "none".
        LabelError: if the labels file is missing, wrong, or an incomplete benchmark.
    """

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
        if root is None:
            raise missing_root("folder", "the folder that holds the images")
        files: _RemoteFiles | _LocalFiles = (
            _RemoteFiles(str(root), storage_options)
            if is_remote(root)
            else _LocalFiles(local_path(root, None, ()), scanned)
        )
        self._files = files
        super().__init__(
            name=files.name,
            ids=files.ids,
            channels=channels,
            rendering=rendering,
            fingerprint=files.fingerprint(channels),
            labels=read_labels(labels_file, files.ids, files.folder),
            classes=folder_classes(root, files.ids, classes),
            folder=files.folder,
        )

    def read(self, ids: Sequence[str]) -> list[Image | Reject]:
        """See `ImageSource.read`; images behind a URL are fetched in parallel."""
        if self.folder is not None or len(ids) < 2:
            return super().read(ids)
        with ThreadPoolExecutor(min(CONNECTIONS, len(ids)), thread_name_prefix="fetch") as pool:
            return list(pool.map(self._read, ids))

    def read_bytes(self, position: int) -> bytes:
        """See `EncodedSource.read_bytes`."""
        return self._files.read(position)


class _LocalFiles:
    """Image files below a folder."""

    def __init__(self, root: Path, scanned: Scan | None) -> None:
        self.folder, self.name = root, root.resolve().name
        self._entries = scan_for("images", root, tuple(sorted(SUFFIXES)), scanned)
        self.ids = [entry[0] for entry in self._entries]

    def fingerprint(self, channels: int) -> str:
        return hash_rows(f"folder {channels}", self._entries)

    def read(self, position: int) -> bytes:
        try:
            return (self.folder / self.ids[position]).read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"cannot be opened: {error.strerror}") from None


class _RemoteFiles:
    """Image files below a URL."""

    folder = None

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None) -> None:
        self._remote = Remote(url, storage_options)
        self.name = PurePosixPath(self._remote.url).name
        self._entries = self._remote.list(sorted(SUFFIXES))
        if not self._entries:
            raise no_images(url, "files")
        self.ids = [entry.id for entry in self._entries]

    def fingerprint(self, channels: int) -> str:
        return hash_entries(f"remote {channels}", self._entries)

    def read(self, position: int) -> bytes:
        entry = self._entries[position]
        if (entry.size or 0) > MAX_BYTES:
            raise UnreadableImageError(f"it has {entry.size:,} bytes, which is more than {MAX_BYTES:,}")
        try:
            return with_retries(lambda: self._fetch(entry), entry.path)
        except Exception as error:  # each file system has errors of its own
            raise UnreadableImageError(f"cannot be fetched: {transfer_reason(error)}") from None

    def _fetch(self, entry: RemoteFile) -> bytes:
        data = self._remote.filesystem.cat_file(entry.path)
        if entry.size not in (None, len(data)):
            raise OSError(f"got {len(data):,} bytes where {entry.size:,} were listed")
        return data
