"""Base class of sources of encoded image files; labels and classes are attached here."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomalymatch.checks import check_choice
from anomalymatch.data.codecs import decode
from anomalymatch.data.rendering import band_names
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import DataError
from anomalymatch.types import Pixels

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif"})
CLASSES = ("auto", "folders", "none")
MAX_BYTES = 2**28
"""Largest image file; larger ones are refused before they are read."""


class EncodedSource(ImageSource):
    """Images that are whole files, JPEG or PNG for example; subclasses implement `read_bytes`.

    Args:
        channels: channels of the decoded images: 1 (grey), 3 (RGB) or 4 (RGBA).
        labels: labels by a person, and classes of a benchmark or None, as `read_labels` returns them.
        classes: class of each image, used where `labels` has none.
        **options: further arguments of `ImageSource`.
    """

    encoded = True

    def __init__(
        self,
        *,
        channels: int,
        labels: tuple[Mapping[str, str], Mapping[str, str] | None],
        classes: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        given, truth = labels
        super().__init__(
            bands=band_names(None, channels), labels=given, truth=classes if truth is None else truth, **options
        )

    @abstractmethod
    def read_bytes(self, position: int) -> bytes:
        """Return the file of the image at `position` of `ids`.

        Raises:
            UnreadableImageError: with the reason, if it cannot be read.
        """

    def raw_bytes(self, id_: str) -> bytes:
        """See `ImageSource.raw_bytes`."""
        return self.read_bytes(self._position[id_])

    def load(self, position: int) -> Pixels:
        """See `ImageSource.load`."""
        return decode(self.read_bytes(position), len(self.bands))


def folder_classes(root: Path | str, paths: Sequence[str], classes: str) -> dict[str, str] | None:
    """Return the first folder of each path as its class.

    Args:
        root: root of the paths, for messages.
        paths: paths of the images below the root.
        classes: "folders" takes folders as classes, "none" does not, "auto" does if every image lies in a folder and
            there are at least two of them.

    Raises:
        ConfigError: if `classes` is none of these.
        DataError: if `classes` is "folders" and images lie in no folder.
    """
    check_choice("dataset.source.classes", classes, CLASSES)
    if classes == "none":
        return None
    loose = [path for path in paths if "/" not in path]
    if classes == "folders" and loose:
        raise DataError(
            f"{root}: classes=folders needs every image in a sub-folder named by its class, but {len(loose):,} lie in "
            f"the folder itself, the first is {loose[0]}"
        )
    truth = {path: path[: path.index("/")] for path in paths} if not loose else {}
    return truth if classes == "folders" or len(set(truth.values())) > 1 else None


def check_complete(root: Path, classes: Mapping[str, str], ids: Sequence[str], option: str) -> None:
    """Check that every image has a class.

    Raises:
        DataError: if one has none; the message names the `option` that turns classes off.
    """
    if len(classes) < len(ids):
        missing = next(id_ for id_ in ids if id_ not in classes)
        raise DataError(
            f"{root}: {len(ids) - len(classes):,} of {len(ids):,} images have no label, the first is {missing}; "
            f"correct dataset.source.{option}, or set it to null to read the images without classes"
        )


def no_images(root: object, wanted: str) -> DataError:
    """Return the error about an archive without images, in which `wanted` ("members", "files") were looked for."""
    return DataError(f"{root}: there are no images in it, expected {wanted} that end in {', '.join(sorted(SUFFIXES))}")
