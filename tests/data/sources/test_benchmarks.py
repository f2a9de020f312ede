import gzip
import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.utils import instantiate
from pictures import png

from anomalymatch.config import compose
from anomalymatch.data.sources import benchmarks
from anomalymatch.data.sources.benchmarks import cifar10, galaxymnist, galaxyzoo1, miniimagenet
from anomalymatch.data.sources.parquet import ParquetSource
from anomalymatch.errors import DataError, DownloadError
from anomalymatch.types import Reject

REAL = Path(os.environ.get("ANOMALYMATCH_DATA", Path(__file__).parents[4] / "shared" / "data"))


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANOMALYMATCH_DATA", raising=False)


def hdf5(n: int, resolution: int = 64) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["images"] = np.zeros((n, resolution, resolution, 3), dtype=np.uint8)
        file["labels"] = (np.arange(n) % 4).astype(np.uint8)
    return buffer.getvalue()


def parquet(path: Path, n: int = 4, image: str = "image") -> Path:
    features = {"info": {"features": {"label": {"names": ["x", "y"]}}}}
    table = pa.table({image: [{"bytes": png(0), "path": None}] * n, "label": pa.array([i % 2 for i in range(n)])})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)
    return path


def galaxies(folder: Path, resolution: int = 64) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_dataset.hdf5").write_bytes(hdf5(8, resolution))
    (folder / "test_dataset.hdf5").write_bytes(hdf5(4, resolution))
    return folder


def test_galaxymnist_in_a_folder(tmp_path: Path) -> None:
    source = galaxymnist(str(galaxies(tmp_path / "set")), str(tmp_path / "cache"))
    assert source.name == "galaxymnist"
    assert source.holdout == {f"test_dataset/{i:06d}" for i in range(4)}
    assert list((source.truth or {}).values())[:4] == list(benchmarks.GALAXYMNIST_CLASSES)
    assert not (tmp_path / "cache").exists()


def test_galaxymnist_of_another_resolution_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected images of 224 x 224 pixels, found 64 x 64"):
        galaxymnist(galaxies(tmp_path), tmp_path / "cache", resolution=224)
    with pytest.raises(DataError, match="64 or 224 pixels, got 128"):
        galaxymnist(None, tmp_path, resolution=128)
    assert galaxymnist(galaxies(tmp_path, 224), tmp_path, resolution=224).name == "galaxymnist224"


@pytest.fixture
def archives(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Small packed files, with their checksums in place of the official ones."""
    packed = {name: gzip.compress(hdf5(n)) for name, n in [("train_dataset.hdf5", 8), ("test_dataset.hdf5", 4)]}
    official = benchmarks.GALAXYMNIST[64]
    small = {name: official[name]._replace(md5=hashlib.md5(data).hexdigest()) for name, data in packed.items()}
    monkeypatch.setitem(benchmarks.GALAXYMNIST, 64, small)
    return packed


def test_galaxymnist_is_unpacked_into_the_cache(archives: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name, data in archives.items():
        (root / f"{name}.gz").write_bytes(data)
    for _ in range(2):
        assert len(galaxymnist(root, tmp_path / "cache")) == 12
    assert sorted(path.name for path in root.iterdir()) == ["test_dataset.hdf5.gz", "train_dataset.hdf5.gz"]
    assert (tmp_path / "cache/galaxymnist/64px/train_dataset.hdf5").is_file()


def test_galaxymnist_with_a_wrong_checksum_is_refused(archives: dict[str, bytes], tmp_path: Path) -> None:
    for name in archives:
        (tmp_path / f"{name}.gz").write_bytes(b"something else")
    with pytest.raises(DownloadError, match=r"train_dataset\.hdf5\.gz is damaged or another file"):
        galaxymnist(tmp_path, tmp_path / "cache")
    assert (tmp_path / "train_dataset.hdf5.gz").exists()


def test_galaxymnist_is_downloaded(archives: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = []

    def download(url: str, target: Path, *, md5: str) -> Path:
        urls.append(url)
        target.write_bytes(archives[target.stem])
        return target

    monkeypatch.setattr(benchmarks, "download", download)
    for _ in range(2):
        assert len(galaxymnist(None, tmp_path)) == 12
    assert urls == [
        "https://dl.dropboxusercontent.com/s/5a14de0o7slyif9/train_dataset.hdf5.gz",
        "https://dl.dropboxusercontent.com/s/5rza12nn24cwd2k/test_dataset.hdf5.gz",
    ]
    assert not list(tmp_path.rglob("*.gz"))


def test_galaxymnist_offline_names_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "GALAXYMNIST_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(
        DownloadError, match=r"put the file train_dataset\.hdf5\.gz into .*64px yourself, or take dataset=demo"
    ):
        galaxymnist(None, tmp_path)


def test_folder_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected train_dataset\.hdf5 or train_dataset\.hdf5\.gz in this folder"):
        galaxymnist(tmp_path, tmp_path)
    for function in (miniimagenet, cifar10, galaxyzoo1):
        with pytest.raises(DataError, match=r"expected a Parquet file .*, found none"):
            function(tmp_path, tmp_path)
        with pytest.raises(DataError, match=r"data\.root=.*none does not exist"):
            function(tmp_path / "none", tmp_path)


def test_order_of_the_folders_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "cache/galaxyzoo1/a.parquet", 1)
    assert len(galaxyzoo1(None, tmp_path / "cache")) == 1
    parquet(tmp_path / "shared/galaxyzoo1/a.parquet", 2)
    monkeypatch.setenv("ANOMALYMATCH_DATA", str(tmp_path / "shared"))
    assert len(galaxyzoo1(None, tmp_path / "cache")) == 2
    parquet(tmp_path / "root/a.parquet", 3)
    assert len(galaxyzoo1(tmp_path / "root", tmp_path / "cache")) == 3
    monkeypatch.setenv("ANOMALYMATCH_DATA", str(tmp_path / "nowhere"))
    assert len(galaxyzoo1(None, tmp_path / "cache")) == 1


def test_galaxyzoo1_cannot_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere to download it from, so point data\.root at .* or take dataset=demo"):
        galaxyzoo1(None, tmp_path)


@pytest.mark.parametrize("image", ["image", "img"])
def test_cifar10_in_both_layouts(tmp_path: Path, image: str) -> None:
    parquet(tmp_path / "plain_text/train-00000-of-00001.parquet", 6, image)
    parquet(tmp_path / "plain_text/test-00000-of-00001.parquet", 2, image)
    source = cifar10(tmp_path, tmp_path)
    assert (source.name, len(source)) == ("cifar10", 8)
    assert source.holdout == {f"test-00000-of-00001/{i:07d}" for i in range(2)}
    assert not [image for image in source.read(source.ids) if isinstance(image, Reject)]


class Hub:
    """Return a hub with two shards that may break off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = None
        self.arriving = ["train", "test"]
        self.calls: list[dict[str, Any]] = []
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def dataset_info(self, repository: str, timeout: float) -> SimpleNamespace:
        if self.error:
            raise self.error
        files = [SimpleNamespace(rfilename=name) for name in ("README.md", "data/train.parquet", "data/test.parquet")]
        return SimpleNamespace(sha="abc", siblings=files)

    def download(self, repository: str, **options: Any) -> None:
        self.calls.append({"repository": repository} | options)
        for name in self.arriving:
            parquet(Path(options["local_dir"]) / f"data/{name}.parquet")


def test_hub_set_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    for _ in range(2):
        assert miniimagenet(None, tmp_path).ids[::4] == ["test/0000000", "train/0000000"]
    assert len(hub.calls) == 1
    wanted = {"repository": "timm/mini-imagenet", "repo_type": "dataset", "allow_patterns": "data/*.parquet"}
    assert wanted.items() <= hub.calls[0].items()
    assert hub.calls[0]["revision"] == "abc"


def test_incomplete_hub_download_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    hub.arriving = ["train"]
    with pytest.raises(DownloadError, match="1 of 2 files did not arrive"):
        miniimagenet(None, tmp_path)
    hub.error = OSError("no\nnetwork")
    for function, name in ((miniimagenet, "timm/mini-imagenet"), (cifar10, "uoft-cs/cifar10")):
        with pytest.raises(DownloadError, match=rf"^cannot download {name} .*\(no\): .*or take dataset=demo$"):
            function(None, tmp_path)
    hub.error, hub.arriving = None, ["test"]
    assert len(miniimagenet(None, tmp_path)) == 8


@pytest.mark.parametrize("name", ["galaxymnist", "miniimagenet", "cifar10", "galaxyzoo1"])
def test_configuration_opens_the_set(name: str, tmp_path: Path) -> None:
    galaxies(tmp_path)
    parquet(tmp_path / "test-0.parquet", 8)
    config = compose(f"dataset={name}", f"data.root={tmp_path}", f"data.cache_dir={tmp_path}")
    assert config.dataset.name == name
    source = instantiate(config.dataset.source)
    assert source.read(source.ids[:1])[0].shape[2] == 3


real_images = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images: ANOMALYMATCH_DATA={REAL} is missing")


@pytest.mark.realdata
@real_images
@pytest.mark.parametrize(
    ("function", "n", "n_holdout", "shape"),
    [
        (miniimagenet, 20_000, 0, (84, 84, 3)),
        (cifar10, 15_000, 5_000, (32, 32, 3)),
        (galaxyzoo1, 6_664, 0, (150, 150, 3)),
    ],
)
def test_real_sets(
    function: Any, n: int, n_holdout: int, shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANOMALYMATCH_DATA", str(REAL))
    source = function(None, tmp_path)
    assert (len(source), len(source.holdout)) == (n, n_holdout)
    assert {image.shape for image in source.read(source.ids[:: n // 200])} == {shape}
    assert compose(f"dataset={function.__name__}").dataset.anomaly in Counter(source.truth.values())


@pytest.mark.realdata
@real_images
def test_real_parquet_files() -> None:
    neu = ParquetSource(REAL / "neu_steel", channels=1)
    assert set(Counter((neu.truth or {}).values()).values()) == {150}
    assert {image.shape for image in neu.read(neu.ids[:300])} == {(200, 200, 1)}
    tiles = ParquetSource(REAL / "magnetic_tile")
    assert not [image for image in tiles.read(tiles.ids[::7]) if isinstance(image, Reject)]
