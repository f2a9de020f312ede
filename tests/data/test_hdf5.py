import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from anomalymatch.data.hdf5 import Hdf5Source, hdf5_source
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import DataError
from anomalymatch.types import Reject


def write(path: Path, images: np.ndarray, labels: Any = None, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images, **options)
        if labels is not None:
            file["labels"] = labels
    return path


def stack(n: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 4, 3), dtype=np.uint8)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    first = write(tmp_path / "train.hdf5", stack(5), np.array([0, 1, 0, 1, 0], dtype=np.uint8))
    return [first, write(tmp_path / "test.hdf5", stack(3, 5), np.array([1, 1, 0]), chunks=(1, 2, 4, 3))]


def test_files_follow_one_another(files: list[Path]) -> None:
    source = Hdf5Source(files, class_names=["x", "y"], holdout_files=files[1:])
    assert isinstance(source, ImageSource)
    assert source.ids == [f"train/{i:06d}" for i in range(5)] + [f"test/{i:06d}" for i in range(3)]
    assert list((source.truth or {}).values()) == list("xyxyxyyx")
    assert source.holdout == {f"test/{i:06d}" for i in range(3)}
    order = [7, 0, 5, 5, 4]
    images = source.read([source.ids[i] for i in order])
    assert [int(image[0, 0, 0]) for image in images] == order
    assert {image.shape for image in images} == {(2, 4, 3)}


def test_config_values(files: list[Path]) -> None:
    assert hdf5_source(str(files[0])).truth == {f"train/{i:06d}": str(i % 2) for i in range(5)}
    assert hdf5_source([str(file) for file in files], labels=None).truth is None


def test_string_labels_and_channels(tmp_path: Path) -> None:
    grey = np.array([[[10, 20]], [[30, 40]]], dtype=np.uint8)
    file = write(tmp_path / "a.h5", grey, np.array([b"cat", "dög".encode()]))
    source = hdf5_source(file)
    assert source.truth == {"a/000000": "cat", "a/000001": "dög"}
    assert source.read(["a/000001"])[0].tolist() == [[[30, 30, 30], [40, 40, 40]]]
    assert hdf5_source(file, channels=1).read(["a/000000"])[0].tolist() == [[[10], [20]]]
    assert hdf5_source(write(tmp_path / "b.h5", stack(1, 9)), labels=None, channels=1).read(["b/000000"])[0].max() == 9


def test_fingerprint(files: list[Path]) -> None:
    first = hdf5_source(files).fingerprint
    assert hdf5_source(files).fingerprint == first
    write(files[0], stack(5, 100), np.array([0, 1, 0, 1, 0], dtype=np.uint8))
    assert hdf5_source(files).fingerprint != first


def test_many_threads(files: list[Path]) -> None:
    source = hdf5_source(files)
    picks = [np.random.default_rng(seed).integers(0, 8, 20).tolist() for seed in range(30)]
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda pick: [int(x[0, 0, 0]) for x in source.read([source.ids[i] for i in pick])], picks)
    assert list(results) == picks


def _read_in_child(source: Hdf5Source, queue: Any) -> None:
    queue.put(int(source.read(["test/000001"])[0][0, 0, 0]))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_other_processes(files: list[Path]) -> None:
    source = hdf5_source(files)
    source.read(source.ids)
    assert int(pickle.loads(pickle.dumps(source)).read(["test/000001"])[0][0, 0, 0]) == 6
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with source._state.lock:  # as another thread may hold it at the moment of a fork
        child = context.Process(target=_read_in_child, args=(source, queue))
        child.start()
        child.join(20)
    assert queue.get() == 6


def test_missing_file_is_rejected_at_reading(files: list[Path]) -> None:
    source = hdf5_source(files)
    files[1].unlink()
    good, bad = source.read(["train/000001", "test/000000"])
    assert good[0, 0, 0] == 1
    assert isinstance(bad, Reject)
    assert "row 0 of" in bad.reason


def test_messages(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected an HDF5 file, found nothing"):
        hdf5_source(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(DataError, match="expected an HDF5 file, but it cannot be read"):
        hdf5_source(tmp_path / "text.h5")
    with pytest.raises(DataError, match="no dataset pixels, found images, labels"):
        hdf5_source(files, images="pixels")
    with pytest.raises(DataError, match="no dataset kinds"):
        hdf5_source(files, labels="kinds")
    with pytest.raises(DataError, match="labels from 0 to 0 in labels for the classes x, found 0 to 1"):
        hdf5_source(files, class_names=["x"])
    with pytest.raises(DataError, match=r"uint8 in images, found \(2, 3, 4, 5\) and uint8"):
        hdf5_source(write(tmp_path / "bands.h5", np.zeros((2, 3, 4, 5), dtype=np.uint8)))
    with pytest.raises(DataError, match="and float64"):
        hdf5_source(write(tmp_path / "float.h5", np.zeros((2, 3, 4))))
    with pytest.raises(DataError, match="one per image, found the shape"):
        hdf5_source(write(tmp_path / "short.h5", stack(2), np.zeros(3, dtype=np.uint8)))
    with pytest.raises(DataError, match="have the same name"):
        hdf5_source([files[0], files[0]])
    with pytest.raises(DataError, match="has no image 'z'"):
        hdf5_source(files).read(["z"])
