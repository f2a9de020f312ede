"""FITS files as a source: one image per file, its extensions or the planes of its cube as bands."""

import logging
from collections.abc import Sequence
from pathlib import Path

from astropy.wcs import WCS

from anomalymatch.data.codecs import MAX_PIXELS
from anomalymatch.data.rendering import Rendering, band_names
from anomalymatch.data.source import EIGHT_BITS, BaseSource
from anomalymatch.data.sources import files as _tree
from anomalymatch.data.sources.encoded import read_labels
from anomalymatch.data.sources.fits_reader import FITS_SUFFIXES, Extensions, FitsImages, check_extensions
from anomalymatch.data.sources.sky import Sky
from anomalymatch.errors import DataError, UnreadableImageError
from anomalymatch.types import Pixels

logger = logging.getLogger(__name__)

TRIED = 10
"""How many files may be unreadable before one that can tell what the bands are."""


class FitsSource(BaseSource):
    """The FITS files below a folder, or one file; an id is the POSIX path relative to the folder.

    BSCALE and BZERO are applied, BLANK becomes NaN. Hidden files and folders are skipped, and so, with a warning, are
    links that leave the folder. Only the headers of the first file that can be read are read at construction; a file
    with another number of bands, or with other names of them where these come from the headers, becomes a `Reject`.

    Args:
        root: the folder, or one file.
        extensions: index or name of a FITS extension, or several of them as bands of one image; None takes the first
            with an image of 2 axes (one band) or 3 axes (the slowest one, NAXIS3, runs over the bands).
        bands: names of the bands; None takes the names of the extensions, else FILTER, else CTYPE3, else usual ones.
        labels_file: see `FolderSource`.
        rendering: how pixels become 8-bit channels.

    Attributes:
        labels: labels by a person, by id; empty without a labels file.

    Raises:
        DataError: if there is nothing at `root`, no FITS file in it, or none of the first ten can be read.
        ConfigError: if `bands` are not one different name for each band, or `extensions` an empty list.
        LabelError: if the labels file is missing, wrong, or an incomplete benchmark.
    """

    def __init__(
        self,
        root: Path,
        *,
        extensions: Extensions = None,
        bands: Sequence[str] | None = None,
        labels_file: Path | None = None,
        rendering: Rendering = EIGHT_BITS,
    ) -> None:
        check_extensions(extensions)
        entries = _entries(root)
        self.root = root if root.is_dir() else root.parent
        self.extensions = extensions
        ids = [entry[0] for entry in entries]
        count, names, units = self._layout(ids)
        self._named = bands is None and names is not None
        self.labels, truth = read_labels(root, labels_file, ids)
        super().__init__(
            name=root.resolve().name,
            ids=ids,
            bands=band_names(names if bands is None else bands, count),
            units=units,
            rendering=rendering,
            fingerprint=_tree.fingerprint(f"fits {extensions!r}", entries),
            truth=truth,
        )

    def _layout(self, ids: Sequence[str]) -> tuple[int, Sequence[str] | None, str | None]:
        """Number of bands, names and units of the first file that can be read."""
        reasons = []
        for id_ in ids[:TRIED]:
            try:
                with FitsImages(self.root / id_, self.extensions) as images:
                    return images.bands, images.names, images.units
            except UnreadableImageError as error:
                reasons.append(f"{id_}: {error}")
        raise DataError(
            f"{self.root}: expected FITS files with images, but none of the first {len(reasons)} can be used, "
            f"the first is {reasons[0]}; correct data.root or dataset.source.extensions"
        )

    def _load(self, position: int) -> Pixels:
        with FitsImages(self.root / self.ids[position], self.extensions) as images:
            check_bands(images.bands, images.names, self.bands, named=self._named)
            height, width = images.shape
            if height * width > MAX_PIXELS:
                raise UnreadableImageError(f"{width} x {height} pixels is more than {MAX_PIXELS:,}")
            return images.cut()

    def wcs_of(self, id_: str) -> WCS | None:
        """World coordinates of an image; None if it has no celestial ones or cannot be read.

        Raises:
            DataError: if the id is not in the source.
        """
        try:
            with FitsImages(self.root / self.ids[self._position[id_]], self.extensions) as images:
                return images.wcs()
        except UnreadableImageError:
            return None

    def coordinates(self, id_: str) -> tuple[float, float] | None:
        """Right ascension and declination (ICRS) of the middle of an image in degrees; None where unknown.

        Raises:
            DataError: if the id is not in the source.
        """
        try:
            with FitsImages(self.root / self.ids[self._position[id_]], self.extensions) as images:
                sky = Sky.of(images.wcs(), images.shape)
        except UnreadableImageError:
            return None
        return None if sky is None else sky.centre()


def fits_source(
    root: str | Path | None,
    *,
    extensions: Extensions = None,
    bands: Sequence[str] | None = None,
    labels_file: str | Path | None = None,
    rendering: Rendering = EIGHT_BITS,
) -> FitsSource:
    """Build a `FitsSource` from configuration values; see there.

    Raises:
        DataError: if `root` is None, too.
    """
    if root is None:
        raise DataError("dataset=fits needs data.root=PATH, the folder that holds the FITS files")
    labels = None if labels_file is None else Path(labels_file).expanduser()
    plain = extensions if extensions is None or isinstance(extensions, int | str) else list(extensions)
    return FitsSource(Path(root).expanduser(), extensions=plain, bands=bands, labels_file=labels, rendering=rendering)


def check_bands(count: int, names: Sequence[str] | None, expected: Sequence[str], *, named: bool) -> None:
    """Refuse an image that does not have the bands of the others; their names matter if they were `named` by headers.

    Raises:
        UnreadableImageError: if the number of bands differs, or their names.
    """
    if count != len(expected):
        raise UnreadableImageError(f"it has {count} bands instead of {len(expected)}: {', '.join(expected)}")
    if named and (names is None or tuple(names) != tuple(expected)):
        found = "have no names in its headers" if names is None else f"are {', '.join(names)}"
        raise UnreadableImageError(
            f"its bands {found} instead of {', '.join(expected)}; give dataset.source.bands to take them as such"
        )


def _entries(root: Path) -> list[_tree.Entry]:
    if root.is_file():
        stat = root.stat()
        return [(root.name, stat.st_size, stat.st_mtime_ns)]
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder with FITS files, found nothing; set data.root to an existing one")
    entries, skipped = _tree.scan(root, FITS_SUFFIXES)
    if not entries:
        raise DataError(
            f"{root}: there are no FITS files in it{_tree.describe(skipped)}, "
            f"expected files that end in {', '.join(FITS_SUFFIXES)}"
        )
    if skipped:
        logger.warning("%s: skipped what was found beside the images%s", root, _tree.describe(skipped))
    return entries
