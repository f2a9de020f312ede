"""What sources of encoded image files share: the bytes of one image as they lie in the archive, and its decoding."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from anomalymatch.data.codecs import decode
from anomalymatch.data.labels import labels_or_truth
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import DataError
from anomalymatch.types import Pixels

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif"})


LABELS_FILE = "labels.csv"


Classes = Literal["auto", "folders", "none"]


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


MAX_BYTES = 2**28
"""Files that claim to be larger than this are no single images, and are refused before they are read."""


class EncodedSource(ImageSource):
    """Source whose images are whole files, JPEG or PNG for example; subclasses implement `_encoded`."""

    encoded = True

    def raw_bytes(self, id_: str) -> bytes:
        """See `ImageSource.raw_bytes`."""
        return self._encoded(self._position[id_])

    def load(self, position: int) -> Pixels:
        """See `ImageSource.load`."""
        return decode(self._encoded(position), len(self.bands))

    @abstractmethod
    def _encoded(self, position: int) -> bytes:
        """Bytes of the image at `position` of `ids`; raise `UnreadableImageError` with the reason if that fails."""


def find_archives(root: Path, suffix: str, kind: str) -> dict[str, Path]:
    """List the archives at or below `root` by their names without `suffix`, sorted by path; hidden ones are left out.

    Where two have the same name the paths below the root stand for all.

    Raises:
        DataError: if there are none.
    """
    if root.is_file():
        return {root.name.removesuffix(suffix): root}
    if not root.is_dir():
        raise DataError(f"{root}: expected a {kind} or a folder with such files, found nothing")
    files = sorted(
        file
        for file in root.rglob("*")
        if file.name.lower().endswith(suffix)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    if not files:
        raise DataError(f"{root}: expected files that end in {suffix}, found none")
    stems = [file.name[: -len(suffix)] for file in files]
    if len(set(stems)) < len(stems):
        stems = [file.relative_to(root).as_posix()[: -len(suffix)] for file in files]
    return dict(zip(stems, files, strict=True))


def is_hidden(path: str) -> bool:
    """Whether a member of an archive is of no interest: a dot file, or what a Mac adds for itself."""
    return any(part == "__MACOSX" or part.startswith(".") for part in path.split("/"))
