"""Folder of image files as a source, on this machine or behind a URL."""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from anomalymatch.checks import check_choice
from anomalymatch.data.codecs import Colour
from anomalymatch.data.download import with_retries
from anomalymatch.data.find import Scan, scan_for
from anomalymatch.data.remote import Remote, RemoteFile, hash_entries, transfer_reason
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import EIGHT_BITS, hash_rows
from anomalymatch.data.sources.encoded import (
    CLASSES,
    SUFFIXES,
    EncodedSource,
    Listing,
    check_bytes,
    folder_classes,
    no_images,
)
from anomalymatch.errors import UnreadableImageError
from anomalymatch.text import listed
from anomalymatch.types import Image, Reject

logger = logging.getLogger(__name__)

_SPLIT = re.compile("(train|val|test)(ing|id|idation|set)?(19|20)?[0-9]{0,2}|dev|holdout|unlabell?ed", re.IGNORECASE)
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
        classes: whether the first folder of a path is the class of the image, see `folder_classes`; "auto" takes no
            folders such as train and test as classes, and says how to read their layout.
        leave_out: folders in the root whose images are left out, "ground_truth" for example.
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
        leave_out: Sequence[str] = (),
        channels: int = 3,
        bands: Sequence[str] | None = None,
        channels_background: Colour = 0,
        max_pixels: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        scanned: Scan | None = None,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        check_choice("dataset.source.classes", classes, CLASSES)
        self._leave_out = frozenset(leave_out)
        self._classes, self._storage_options, self._scanned = classes, storage_options, scanned
        super().__init__(
            root,
            labels_file=labels_file,
            channels=channels,
            bands=bands,
            channels_background=channels_background,
            max_pixels=max_pixels,
            rendering=rendering,
        )
        self._scanned = None

    def list_images(self, place: str | Path, cache_dir: Path | None) -> Listing:
        """See `EncodedSource.list_images`."""
        if isinstance(place, str):
            self._remote: Remote | None = Remote(place, self._storage_options)
            listing = self._remote.list(sorted(SUFFIXES))
            self._entries = [entry for entry in listing if entry.id.split("/")[0] not in self._leave_out]
            if not self._entries:
                raise no_images(place, "files")
            ids = [entry.id for entry in self._entries]
            name, fingerprint = PurePosixPath(self._remote.url).name, hash_entries("remote", self._entries)
        else:
            self._remote = None
            entries = scan_for("images", place, tuple(sorted(SUFFIXES)), self._scanned)
            entries = [entry for entry in entries if entry[0].split("/")[0] not in self._leave_out]
            if not entries:
                raise no_images(place, f"files outside of {listed(self._leave_out)}")
            ids = [entry[0] for entry in entries]
            name, fingerprint = place.resolve().name, hash_rows("folder", entries)
        folder = self._folder = None if isinstance(place, str) else place
        self._ids = ids
        layout = describe_layout(folder, ids) if self._classes == "auto" else None
        if layout:
            logger.warning("%s: %s", place, layout)
        classes = None if layout else folder_classes(place, ids, self._classes)
        return Listing(ids, fingerprint, classes, name=name, folder=folder)

    def _map(self, read: Callable[[str], Image | Reject], ids: Sequence[str]) -> list[Image | Reject]:
        if self._remote is None or len(ids) < 2:
            return super()._map(read, ids)
        with ThreadPoolExecutor(min(CONNECTIONS, len(ids)), thread_name_prefix="fetch") as pool:
            return list(pool.map(read, ids))

    def read_bytes(self, position: int) -> bytes:
        """See `EncodedSource.read_bytes`."""
        if self._remote is not None:
            return _fetch(self._remote, self._entries[position])
        assert self._folder is not None
        try:
            with (self._folder / self._ids[position]).open("rb") as file:
                check_bytes(os.fstat(file.fileno()).st_size)
                return file.read()
        except OSError as error:
            raise UnreadableImageError(f"cannot be opened: {error.strerror}") from None


def describe_layout(root: Path | None, ids: Sequence[str]) -> str | None:
    """Name the layout of a data set whose first folders are no classes, and say how to read it; None for others."""
    folders = {id_.split("/")[0] if "/" in id_ else "" for id_ in ids}

    def has(folder: str, ending: str) -> bool:
        return root is not None and (root / folder).is_dir() and any((root / folder).rglob(f"*{ending}"))

    by_hand = "for classes, name a CSV filename,label by dataset.source.labels_file"
    if has("annotations", ".json"):
        return f"this is the layout of COCO, whose annotations are not read: the images have no classes; {by_hand}"
    if any(has(f"{folder}/labels", ".txt") for folder in (".", *sorted(folders)[:9])):
        return f"this is the layout of YOLO, whose boxes are not read: the images have no classes; {by_hand}"
    if "ground_truth" in folders and folders <= {"ground_truth", "train", "test"}:
        return "this is the layout of MVTec AD: set dataset=mvtec, which reads its classes and leaves out ground_truth"
    if folders and all(_SPLIT.fullmatch(folder) for folder in folders):
        parts = listed(sorted(folders))
        if all(id_.count("/") > 1 for id_ in ids):
            return f"its folders {parts} are splits, not classes: set dataset.source.classes=subfolders for train/CLASS"
        return f"its folders {parts} are taken for splits: set dataset.source.classes=folders if they are classes"
    return None


def _fetch(remote: Remote, entry: RemoteFile) -> bytes:
    def attempt() -> bytes:
        data = remote.filesystem.cat_file(entry.path)
        if entry.size not in (None, len(data)):
            raise OSError(f"got {len(data):,} bytes where {entry.size:,} were listed")
        return data

    check_bytes(entry.size or 0)
    try:
        return with_retries(attempt, entry.path)
    except Exception as error:  # each file system has errors of its own
        raise UnreadableImageError(f"cannot be fetched: {transfer_reason(error)}", temporary=True) from None
