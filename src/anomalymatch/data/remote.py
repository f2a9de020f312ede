"""A tree of image files behind a URL as a source: each image is fetched when it is read."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from anomalymatch.data._encoded import MAX_BYTES, EncodedSource
from anomalymatch.data._remote import Entry, Remote, digest, reason, with_retries
from anomalymatch.data.folder import SUFFIXES, Classes, folder_classes
from anomalymatch.data.labels_csv import labels_or_truth
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Image, Reject

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
        self.labels, truth = ({}, None) if labels_file is None else labels_or_truth(labels_file, ids)
        super().__init__(
            name=PurePosixPath(self._remote.url).name,
            ids=ids,
            bands=band_names(None, channels),
            rendering=rendering,
            fingerprint=digest(f"remote {channels}", self._entries),
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

    def _fetch(self, entry: Entry) -> bytes:
        data = self._remote.filesystem.cat_file(entry.path)
        if entry.size not in (None, len(data)):
            raise OSError(f"got {len(data):,} bytes where {entry.size:,} were listed")
        return data
