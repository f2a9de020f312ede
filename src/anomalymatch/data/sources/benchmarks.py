"""Benchmark data sets: found in a folder, or downloaded into the cache."""

import gzip
import logging
import os
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from anomalymatch.data.download import download, download_lock, with_timeout
from anomalymatch.data.sources.arrays import ArraySource
from anomalymatch.data.sources.hdf5 import HDF5Source
from anomalymatch.data.sources.parquet import ParquetSource, find_shards, image_columns
from anomalymatch.errors import DataError, DownloadError, StorageError
from anomalymatch.files import atomic_file, storage_errors
from anomalymatch.text import reason

logger = logging.getLogger(__name__)

DATA_VARIABLE = "ANOMALYMATCH_DATA"
HUB_TIMEOUT_S = 12.0
GALAXYMNIST_CLASSES = ("smooth_round", "smooth_cigar", "edge_on_disk", "unbarred_spiral")
GALAXYMNIST_URL = "https://dl.dropboxusercontent.com"


class _Archive(NamedTuple):
    path: str
    md5: str


# Source: https://github.com/mwalmsley/galaxy_mnist; the checksums are those of the packed files.
GALAXYMNIST = {
    64: {
        "train_dataset.hdf5": _Archive("/s/5a14de0o7slyif9/", "e408ae294e9b975482dc1abffeb373a6"),
        "test_dataset.hdf5": _Archive("/s/5rza12nn24cwd2k/", "7a940e4cea64a8b7cb60339098f74490"),
    },
    224: {
        "train_dataset.hdf5": _Archive("/s/xenuo0ekgyi10ru/", "3391dcddac14d5b4055db73fb600ae63"),
        "test_dataset.hdf5": _Archive("/s/lczri4sb4bbcgyh/", "fb272c4e94000b4d99a09d638977b0b9"),
    },
}


def galaxymnist(root: str | Path | None, cache_dir: str | Path, resolution: int = 64) -> ArraySource:
    """Open GalaxyMNIST: 10,000 galaxies of four morphologies; the official test file is the holdout.

    Args:
        root: a folder with train_dataset.hdf5 and test_dataset.hdf5, either of them also as .gz; None looks into
            `$ANOMALYMATCH_DATA/galaxymnist`, then into the cache, and then downloads.
        cache_dir: folder for downloads and unpacked files.
        resolution: 64 or 224 pixels.

    Raises:
        DataError: if there is no such resolution, or the folder lacks the files or has those of another resolution.
        DownloadError: if the files have to be downloaded and cannot be.
    """
    if resolution not in GALAXYMNIST:
        raise DataError(f"galaxymnist: expected a resolution of 64 or 224 pixels, got {resolution}")
    folder = _given(root, "galaxymnist")
    cache = Path(cache_dir).expanduser() / "galaxymnist" / f"{resolution}px"
    files = [_galaxymnist_file(name, folder, cache, resolution) for name in GALAXYMNIST[resolution]]
    source = HDF5Source(
        files,
        name="galaxymnist" if resolution == 64 else f"galaxymnist{resolution}",
        labels="labels",
        class_names=GALAXYMNIST_CLASSES,
        layout="nhwc",
        channels=3,
        holdout_files=[files[1].name],
    )
    for file, shape in zip(files, [file.shape for file in source.files], strict=True):
        if shape[1:3] != (resolution, resolution):
            raise DataError(
                f"{file}: expected images of {resolution} x {resolution} pixels, found {shape[1]} x {shape[2]}"
            )
    return source


def miniimagenet(root: str | Path | None, cache_dir: str | Path) -> ParquetSource:
    """Open miniImageNet: photographs of 100 classes, named by WordNet id; all splits together.

    The hub's edition has 65,000 at their original sizes (7.4 GB).

    Args:
        root: a folder with its Parquet files; None looks into `$ANOMALYMATCH_DATA/miniimagenet`, then into the cache,
            and then downloads them from the hub.
        cache_dir: folder for downloads.

    Raises:
        DataError: if the folder has no such files.
        DownloadError: if the files have to be downloaded and cannot be.
    """
    return _parquet("miniimagenet", root, cache_dir, _hub("timm/mini-imagenet", "data/*.parquet"))


def cifar10(root: str | Path | None, cache_dir: str | Path) -> ParquetSource:
    """Open CIFAR-10: 60,000 photographs of 32 x 32 pixels in ten classes; the official test split is the holdout.

    Arguments and errors are those of `miniimagenet`.
    """
    return _parquet("cifar10", root, cache_dir, _hub("uoft-cs/cifar10", "*.parquet"), holdout="test-*")


def galaxyzoo1(root: str | Path | None, cache_dir: str | Path) -> ParquetSource:
    """Open Galaxy Zoo 1: colour cutouts of SDSS galaxies with the classes that people chose.

    Arguments are those of `miniimagenet`, but there is nothing to download.

    Raises:
        DataError: if there are no such files.
    """

    def refuse(target: Path) -> None:
        raise DataError(
            "galaxyzoo1: there is nowhere to download it from, so point data.root at a folder with its Parquet files "
            f"(columns image and label), put them into {target}, or take dataset=demo"
        )

    return _parquet("galaxyzoo1", root, cache_dir, refuse)


def _given(root: str | Path | None, name: str) -> Path | None:
    """Return the folder that `data.root`, else the environment, names for a data set."""
    if root is not None:
        folder = Path(root).expanduser()
        if not folder.exists():
            raise DataError(f"{name}: data.root={folder} does not exist; correct it, or take data.root=null")
        return folder
    if shared := os.environ.get(DATA_VARIABLE):
        folder = Path(shared).expanduser() / name
        return folder if folder.exists() else None
    return None


def _galaxymnist_file(name: str, folder: Path | None, cache: Path, resolution: int) -> Path:
    """Return the unpacked file `name` in `folder`; without a folder, in the cache, else downloaded."""
    if folder is not None and (folder / name).is_file():
        return folder / name
    packed = (folder or cache) / f"{name}.gz"
    if folder is not None and not packed.is_file():
        raise DataError(f"{folder}: expected {name} or {packed.name} in this folder, found neither")
    with download_lock(cache / name):
        if not (cache / name).is_file():
            archive = GALAXYMNIST[resolution][name]
            download(f"{GALAXYMNIST_URL}{archive.path}{packed.name}", packed, md5=archive.md5)
            _unpack(packed, cache / name)
            if folder is None:
                packed.unlink(missing_ok=True)
    return cache / name


def _unpack(packed: Path, target: Path) -> None:
    logger.info("unpacking %s", packed)
    with gzip.open(packed) as source, atomic_file(target) as temporary, temporary.open("wb") as file:
        shutil.copyfileobj(source, file, 2**20)


def _parquet(
    name: str,
    root: str | Path | None,
    cache_dir: str | Path,
    download: Callable[[Path], None],
    holdout: str | None = None,
) -> ParquetSource:
    """Open Parquet files with images in the column image or img; `holdout` is the pattern of the test split."""
    folder = _given(root, name)
    if folder is None:
        folder = Path(cache_dir).expanduser() / name
        if not folder.is_dir() or not any(folder.rglob("*.parquet")):
            download(folder)
    shards = [file.path for file in find_shards(folder)]
    columns = image_columns(shards[0])
    image = next((column for column in ("image", "img") if column in columns), "image")
    official = [holdout] if holdout and any(fnmatch(shard.name, holdout) for shard in shards) else []
    return ParquetSource(folder, name=name, image_column=image, holdout_files=official)


def _hub(repository: str, pattern: str) -> Callable[[Path], None]:
    """Return a function that downloads the files of a hub data set that match `pattern` into a folder."""

    def download(target: Path) -> None:
        partial = target.with_name(f".{target.name}.part")
        with download_lock(target):
            if target.is_dir() and any(target.rglob("*.parquet")):
                return  # another process was faster
            try:
                with storage_errors(target):
                    _snapshot(repository, pattern, partial)
                    partial.replace(target)
            except StorageError:
                raise
            except Exception as error:  # the hub's client raises errors of several libraries
                raise DownloadError(
                    f"cannot download {repository} from the Hugging Face hub ({reason(error)}): put its files "
                    f"{pattern} into {target}, point data.root at a folder that holds them, or take dataset=demo"
                ) from None

    return download


def _snapshot(repository: str, pattern: str, target: Path) -> None:
    """Download into `target`; resumes an earlier download."""
    from huggingface_hub import HfApi, snapshot_download

    # Listed first, because `snapshot_download` accepts a half-filled folder when it is offline.
    info = with_timeout(HUB_TIMEOUT_S, lambda: HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_S))
    wanted = [file.rfilename for file in info.siblings or [] if fnmatch(file.rfilename, pattern)]
    snapshot_download(
        repository, repo_type="dataset", revision=info.sha, allow_patterns=pattern, local_dir=target, etag_timeout=10
    )
    missing = [name for name in wanted if not (target / name).is_file()]
    if missing or not wanted:
        raise DownloadError(f"{len(missing)} of {len(wanted)} files did not arrive")
