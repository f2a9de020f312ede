"""A tree of image files as a source: ids are paths relative to its root."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from anomalymatch.data import _tree
from anomalymatch.data._encoded import EncodedSource
from anomalymatch.data._remote import is_remote, local_path
from anomalymatch.data.labels_csv import labels_or_truth
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS, BaseSource
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif"})
LABELS_FILE = "labels.csv"

Classes = Literal["auto", "folders", "none"]


class FolderSource(EncodedSource):
    """The images below a folder; an id is the POSIX path relative to it. None is opened before it is read.

    Hidden files and folders are skipped, and so, with a warning, are links that leave the folder.

    Args:
        root: the folder.
        labels_file: a CSV `filename,label`; None takes `labels.csv` in the root where there is one. If all its labels
            are among anomaly, normal, unsure and artefact, they are what a person has said so far, and become `labels`.
            Any others are the classes of a benchmark and become `truth`; then no image may be missing.
        classes: whether the first folder of the path is the class of an image: "folders" yes, "none" no, "auto" if
            every image lies in a sub-folder and there are at least two of them. A benchmark's labels file comes first.
        channels: channels of the decoded images.
        scanned: what is in the folder, where that is known already.
        rendering: how pixels become 8-bit channels.

    Attributes:
        labels: labels by a person, by id; empty without a labels file.

    Raises:
        DataError: if the folder is missing or has no images.
        LabelError: if the labels file is missing, wrong, or an incomplete benchmark.
    """

    def __init__(
        self,
        root: Path,
        *,
        labels_file: Path | None = None,
        classes: Classes = "auto",
        channels: int = 3,
        scanned: _tree.Scan | None = None,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        self.root = root
        entries, skipped = scanned or _scan(root)
        if not entries:
            raise DataError(
                f"{root}: there are no images in it{_tree.describe(skipped)}, "
                f"expected files that end in {', '.join(sorted(SUFFIXES))}"
            )
        if skipped:
            logger.warning("%s: skipped what was found beside the images%s", root, _tree.describe(skipped))
        ids = [entry[0] for entry in entries]
        self.labels, truth = read_labels(root, labels_file, ids)
        super().__init__(
            name=root.resolve().name,
            ids=ids,
            bands=band_names(None, channels),
            rendering=rendering,
            fingerprint=_tree.fingerprint(f"folder {channels}", entries),
            truth=truth if truth is not None else folder_classes(root, ids, classes),
        )

    def _encoded(self, position: int) -> bytes:
        try:
            return (self.root / self.ids[position]).read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"cannot be opened: {error.strerror}") from None


def folder_source(
    root: str | Path | None,
    *,
    labels_file: str | Path | None = None,
    classes: str = "auto",
    channels: int = 3,
    storage_options: Mapping[str, Any] | None = None,
    scanned: _tree.Scan | None = None,
    rendering: Rendering = EIGHT_BITS,
) -> BaseSource:
    """Build a `FolderSource` from configuration values, or a `RemoteFolderSource` if `root` is a URL; see there.

    Raises:
        DataError: if `root` is None, too.
        ConfigError: if `classes` is none of "auto", "folders" and "none".
    """
    if classes not in get_args(Classes):
        raise ConfigError(f"dataset.source.classes must be one of {', '.join(get_args(Classes))}, got {classes}")
    if root is None:
        raise DataError("dataset=folder needs data.root=PATH, the folder that holds the images")
    labels = None if labels_file is None else Path(labels_file).expanduser()
    options: dict[str, Any] = {"labels_file": labels, "classes": classes, "channels": channels, "rendering": rendering}
    if is_remote(root):
        from anomalymatch.data.remote import RemoteFolderSource  # which needs this module

        return RemoteFolderSource(str(root), storage_options=storage_options, **options)
    return FolderSource(local_path(root, None, ()), scanned=scanned, **options)


def _scan(root: Path) -> _tree.Scan:
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise DataError(f"{root}: expected a folder with images, found {found}; set data.root to an existing folder")
    return _tree.scan(root, tuple(SUFFIXES))


def read_labels(
    root: Path, labels_file: Path | None, ids: Sequence[str]
) -> tuple[dict[str, str], dict[str, str] | None]:
    """Return the labels by a person and the classes of a benchmark; one of the two is empty or None.

    Without a `labels_file` it is `labels.csv` in the folder `root`, where there is one.

    Raises:
        LabelError: if the file is missing, wrong, or an incomplete benchmark.
    """
    path = root / LABELS_FILE if labels_file is None else labels_file
    if labels_file is None and not path.is_file():
        return {}, None
    return labels_or_truth(path, ids)


def folder_classes(root: Path | str, ids: Sequence[str], classes: Classes) -> dict[str, str] | None:
    """Return the first folder of each path as its class, or None; see `FolderSource` for `classes`.

    Raises:
        DataError: if `classes` is "folders" and images lie in no folder.
    """
    if classes == "none":
        return None
    loose = [id_ for id_ in ids if "/" not in id_]
    if classes == "folders" and loose:
        raise DataError(
            f"{root}: classes=folders needs every image in a sub-folder named by its class, but {len(loose):,} lie in "
            f"the folder itself, the first is {loose[0]}"
        )
    truth = {id_: id_[: id_.index("/")] for id_ in ids} if not loose else {}
    return truth if classes == "folders" or len(set(truth.values())) > 1 else None
