"""Open any archive by its path: suffix and contents decide on the source."""

import csv
import inspect
import logging
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from anomalymatch.data.find import Folder, Scan, scan, walk
from anomalymatch.data.remote import Remote, is_remote, local_path
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.source import EIGHT_BITS, ImageSource
from anomalymatch.data.sources.catalogue_rows import USUAL_DEC, USUAL_RA, USUAL_TILE
from anomalymatch.data.sources.encoded import SUFFIXES
from anomalymatch.data.sources.parquet import REJECTS_FILE
from anomalymatch.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


class Kind(NamedTuple):
    """Kind of archive: its name in `dataset=NAME`, that of its files in messages, its module, class and suffixes."""

    dataset: str
    what: str
    module: str
    source: str
    suffixes: tuple[str, ...]

    def opener(self) -> Callable[..., ImageSource]:
        """Import and return the class of the source."""
        return getattr(import_module(f"anomalymatch.data.sources.{self.module}"), self.source)


_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_FITS = (".fits", ".fit", ".fts", ".fits.gz", ".fit.gz", ".fits.fz")
KINDS = {
    kind.dataset: kind
    for kind in (
        Kind("folder", "images", "folder", "FolderSource", tuple(sorted(SUFFIXES))),
        Kind("zip", "zip archives", "zip", "ZipSource", (".zip",)),
        Kind("webdataset", "tar shards", "tar", "WebDatasetSource", _TAR),
        Kind("parquet", "Parquet files", "parquet", "ParquetSource", (".parquet",)),
        Kind("hdf5", "HDF5 files", "hdf5", "HDF5Source", (".h5", ".hdf5")),
        Kind("zarr", "Zarr stores", "zarr", "ZarrSource", (".zarr", ".zarr.zip")),
        Kind("numpy", "NumPy files", "numpy", "NumpySource", (".npy", ".npz")),
        Kind("fits", "FITS files", "fits", "FitsSource", _FITS),
        Kind("catalogue", "catalogues", "catalogue", "CatalogueSource", (".csv",)),
    )
}
_BY_SUFFIX = {suffix: kind.dataset for kind in KINDS.values() for suffix in kind.suffixes}
_IMAGES = KINDS["folder"].suffixes
_ZARR_MARKS = frozenset({"zarr.json", ".zarray", ".zgroup"})
_POSITIONS = {"ra_column", "x_column"}
"""Options that mark any CSV file as a catalogue."""


def open_path(
    root: str | Path | None,
    *,
    cache_dir: str | Path,
    rendering: Rendering = EIGHT_BITS,
    labels_file: str | Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> ImageSource:
    """Open a folder of images, an archive or a URL with the source for its format.

    Args:
        root: a file or folder, or a URL of one.
        cache_dir: folder for copies of remote archives and for indices of archives.
        rendering: conversion of the bands to 8-bit channels.
        labels_file: a CSV `filename,label`; see `FolderSource`.
        storage_options: arguments of a URL's file system.
        **options: further options of the source that is found.

    Raises:
        DataError: if `root` is None, or there is nothing that can be opened, or more than one kind of data.
        ConfigError: if that source has no such option.
    """
    if root is None:
        raise DataError("dataset=auto needs data.root=PATH, a folder of images, an archive, or a URL of one")
    if is_remote(root):
        scanned = None
        kind, place = _remote(str(root), cache_dir, storage_options)
        if isinstance(place, str):  # a folder of images is read in place
            options["storage_options"] = storage_options
    else:
        kind, place, scanned = _kind_of_path(local_path(root, None, ()), bool(_POSITIONS & set(options)))
    logger.info("%s: opened as dataset=%s", root, kind.dataset)
    given = options | ({} if labels_file is None else {"labels_file": labels_file})
    arguments = _arguments(kind, given, {"cache_dir": cache_dir, "scanned": scanned})
    return kind.opener()(place, rendering=rendering, **arguments)


def _arguments(kind: Kind, given: dict[str, Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Return the `given` options, all of which the source must have, and those `offered` that it has."""
    parameters = _options(kind.opener())
    known = parameters - {"rendering", "scanned"}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigError(
            f"dataset=auto found {kind.what}, and dataset={kind.dataset} has no option {', '.join(unknown)}: choose "
            f"from {', '.join(sorted(known))}"
        )
    return given | {key: value for key, value in offered.items() if key in parameters}


def _options(opener: Callable[..., ImageSource]) -> set[str]:
    """Return the names of a source's options, including the options of its base classes."""
    options: set[str] = set()
    for step in inspect.getmro(opener) if isinstance(opener, type) else (opener,):
        parameters = inspect.signature(step).parameters.values()
        options |= {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return options


def _remote(url: str, cache_dir: str | Path, storage_options: Mapping[str, Any] | None) -> tuple[Kind, str | Path]:
    dataset = _by_name(url.rstrip("/"))
    if dataset is None:
        entries = Remote(url, storage_options).list(sorted(_BY_SUFFIX))
        names = [entry.id for entry in entries if not entry.id.endswith(".csv")]
        dataset = _only_kind(url, Counter(filter(None, map(_by_name, names))))
    kind = KINDS[dataset]
    if dataset == "folder":
        if _by_name(url) is not None:
            raise _one_image(url)
        return kind, url
    if dataset == "zarr":
        raise DataError(f"{url}: Zarr stores are not read over the network, copy it to this machine")
    return kind, local_path(url, cache_dir, kind.suffixes, storage_options)


def _kind_of_path(path: Path, with_positions: bool) -> tuple[Kind, Path, Scan | None]:
    if path.is_dir():
        return _kind_of_folder(path)
    if not path.is_file():
        raise DataError(f"{path}: expected a folder of images or an archive, found nothing; correct data.root")
    is_catalogue = path.suffix.lower() == ".csv" and (with_positions or _has_positions(path))
    dataset = "catalogue" if is_catalogue else _kind_of_file(path)
    if dataset == "folder":
        raise _one_image(path)
    if dataset is None:
        wanted = ", ".join(sorted(suffix for suffix in _BY_SUFFIX if _BY_SUFFIX[suffix] != "folder"))
        columns = " with the columns ra and dec, or tile, x and y" if path.suffix.lower() == ".csv" else ""
        raise DataError(f"{path}: expected a folder or a file that ends in {wanted}{columns}; this is none of them")
    return KINDS[dataset], path, None


def _kind_of_folder(root: Path) -> tuple[Kind, Path, Scan]:
    """Return the kind of data in a folder, its place, and the images, from a single walk through the folder."""
    found: Counter[str] = Counter()
    last: dict[str, Path] = {}

    def counted() -> Iterator[Folder]:
        for folder in walk(root):
            for dataset, path in _others_in(root, folder):
                found[dataset] += 1
                last[dataset] = path
            yield folder

    images = scan(root, _IMAGES, counted())
    if images.named:
        found["folder"] = images.named
    dataset = _only_kind(str(root), found)
    # A catalogue is a single file.
    return KINDS[dataset], last[dataset] if dataset == "catalogue" and found[dataset] == 1 else root, images


def _others_in(root: Path, folder: Folder) -> Iterator[tuple[str, Path]]:
    """Yield the kind and path of all archives in a folder; a Zarr store counts as one."""
    path = root / folder.path
    if folder.path.lower().endswith(".zarr/") or any(child.name in _ZARR_MARKS for child in folder.files):
        folder.folders.clear()
        folder.files.clear()
        yield "zarr", path
    for child in folder.files:
        if child.name.lower().endswith(_IMAGES) or child.name.startswith(".") or child.is_dir():
            continue
        if dataset := _kind_of_file(path / child.name):
            yield dataset, path / child.name


def _by_name(name: str) -> str | None:
    suffixes = [suffix for suffix in _BY_SUFFIX if name.lower().endswith(suffix)]
    return _BY_SUFFIX[max(suffixes, key=len)] if suffixes else None


def _kind_of_file(path: Path) -> str | None:
    """Return the kind of a file; None for labels, metadata and rejects, which only accompany others."""
    dataset = _by_name(path.name)
    if dataset == "zip" and _is_zarr(path):
        return "zarr"
    # Beside images, a table of positions is a catalogue of cutouts only if it names tiles.
    if dataset == "catalogue" and not (USUAL_TILE in _header(path) and _has_positions(path)):
        return None
    if path.name == REJECTS_FILE or path.name.endswith("metadata.parquet"):
        return None
    return dataset


def _is_zarr(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rpartition("/")[2] in _ZARR_MARKS for name in archive.namelist())
    except Exception:  # its own source describes the damage
        return False


def _header(path: Path) -> set[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return {name.strip().lower() for name in next(csv.reader(file), [])}
    except (OSError, UnicodeDecodeError, csv.Error):
        return set()


def _has_positions(path: Path) -> bool:
    names = _header(path)
    return bool(names & set(USUAL_RA) and names & set(USUAL_DEC)) or names >= {USUAL_TILE, "x", "y"}


def _only_kind(root: str, found: Counter[str]) -> str:
    if not found:
        what = ", ".join(kind.what for kind in KINDS.values())
        raise DataError(f"{root}: there is nothing in it that can be opened: expected one of {what}")
    if len(found) > 1:
        counts = ", ".join(f"{n:,} {KINDS[name].what}" for name, n in found.most_common())
        raise DataError(
            f"{root}: there is more than one kind of data in it ({counts}): choose one by "
            f"{' or '.join(f'dataset={name}' for name in found)}, or give data.root=PATH of one kind"
        )
    return next(iter(found))


def _one_image(root: str | Path) -> DataError:
    return DataError(f"{root}: this is a single image, set data.root to the folder that holds the images")
