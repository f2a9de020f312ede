import io
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image as PillowImage

from anomalymatch.data.source import ImageSource
from anomalymatch.data.sources.arrays import ArraySource
from anomalymatch.data.sources.hdf5 import hdf5_source
from anomalymatch.errors import DataError
from anomalymatch.types import Reject


def write(path: Path, images: Any, labels: Any = None, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images, **options)
        if labels is not None:
            file["labels"] = labels
    return path


def stack(n: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 5, 3), dtype=np.uint8)


def encoded(value: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PillowImage.new("RGB", (6, 5), (value, value, value)).save(buffer, form)
    return buffer.getvalue()


def write_encoded(path: Path, files: list[bytes], names: list[Any] | None = None) -> Path:
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (len(files),), dtype=h5py.vlen_dtype(np.uint8))
        for row, data in enumerate(files):
            images[row] = np.frombuffer(data, dtype=np.uint8)
        if names is not None:
            file["filenames"] = names
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    first = write(tmp_path / "train.hdf5", stack(5), np.array([0, 1, 0, 1, 0], dtype=np.uint8))
    return [first, write(tmp_path / "test.hdf5", stack(3, 5), np.array([1, 1, 0]), chunks=(2, 4, 5, 3))]


def values(source: ArraySource, ids: Any = None) -> list[int]:
    return [int(image[0, 0, 0]) for image in source.read(source.ids if ids is None else ids)]


def test_files_follow_one_another(files: list[Path]) -> None:
    source = hdf5_source(files, class_names=["x", "y"], holdout_files=["test*"])
    assert isinstance(source, ImageSource)
    assert source.ids == [f"train/{i:06d}" for i in range(5)] + [f"test/{i:06d}" for i in range(3)]
    assert list((source.truth or {}).values()) == list("xyxyxyyx")
    assert source.holdout == {f"test/{i:06d}" for i in range(3)}
    order = [7, 0, 5, 5, 4]
    images = source.read([source.ids[i] for i in order])
    assert [int(image[0, 0, 0]) for image in images] == order
    assert {image.shape for image in images} == {(4, 5, 3)}


def test_config_values(files: list[Path]) -> None:
    assert hdf5_source(str(files[0])).truth == {f"train/{i:06d}": str(i % 2) for i in range(5)}
    assert hdf5_source([str(file) for file in files], labels="none").truth is None
    assert hdf5_source(files, name="mine").name == "mine"


def test_a_folder_is_read_in_the_order_of_its_paths(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no HDF5")
    (tmp_path / ".hidden.h5").write_text("no HDF5")
    assert values(hdf5_source(tmp_path)) == [5, 6, 7, 0, 1, 2, 3, 4]
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub/test.h5", stack(1, 9), [0])
    source = hdf5_source(tmp_path)
    assert [id_ for id_ in source.ids if id_.endswith("000")] == ["sub/test/000000", "test/000000", "train/000000"]


def test_string_labels_and_channels(tmp_path: Path) -> None:
    grey = np.array([[[10, 20]], [[30, 40]]], dtype=np.uint8)
    file = write(tmp_path / "a.h5", grey, np.array([b"cat", "dög".encode()]))
    assert hdf5_source(file).truth == {"a/000000": "cat", "a/000001": "dög"}
    assert hdf5_source(file).read(["a/000000"])[0].tolist() == [[[10], [20]]]
    assert hdf5_source(file, channels=3).read(["a/000001"])[0].tolist() == [[[30, 30, 30], [40, 40, 40]]]
    colour = hdf5_source(write(tmp_path / "b.h5", stack(1, 9)), channels=1)
    assert colour.read(["b/000000"])[0].tolist() == [[[9]] * 5] * 4


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_encoded_images_beside_their_names(tmp_path: Path, form: str) -> None:
    file = write_encoded(tmp_path / "a.h5", [encoded(40, form), encoded(90, form), b"no image", b""], list("dbca"))
    source = hdf5_source(file)
    assert (source.ids, source.channels, source.shapes) == (list("dbca"), 3, [(4,)])
    assert [image[2, 2].tolist() for image in source.read(["b", "d"])] == [[90] * 3, [40] * 3]
    assert [image.shape for image in hdf5_source(file, channels=1).read(["b", "d"])] == [(5, 6, 1)] * 2
    rejects = source.read(["c", "a"])
    assert isinstance(rejects[0], Reject)
    assert rejects[1] == Reject("a", "the file is empty (0 bytes)")
    assert hdf5_source(file, ids="none").ids == [f"a/{i:06d}" for i in range(4)]


def test_encoded_images_as_opaque_bytes_and_objects(tmp_path: Path) -> None:
    pictures = [encoded(40, "JPEG"), encoded(90, "JPEG")]
    length = max(map(len, pictures))
    opaque = np.array([np.void(data.ljust(length, b"\0")) for data in pictures])
    assert values(hdf5_source(write(tmp_path / "a.h5", opaque))) == [40, 90]
    assert values(hdf5_source(write(tmp_path / "b.h5", np.array(pictures)))) == [40, 90]


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "int16", "<i4", ">f4", "float64"])
def test_pixels_of_any_type_in_both_layouts(tmp_path: Path, dtype: str) -> None:
    table = np.arange(2 * 4 * 5 * 2).reshape(2, 4, 5, 2).astype(dtype)
    last = hdf5_source(write(tmp_path / "last.h5", table, chunks=(2, 2, 2, 1)))
    first = hdf5_source(write(tmp_path / "first.h5", np.moveaxis(table, 3, 1)))
    for source in (last, first):
        pixels = source.load(1)
        assert pixels.tolist() == table[1].tolist()
        assert pixels.dtype == np.dtype(dtype).newbyteorder("=")
        assert pixels.flags.c_contiguous
    assert hdf5_source(write(tmp_path / "square.h5", table), layout="nchw").load(0).shape == (5, 2, 4)


def test_attributes_name_bands_and_units(tmp_path: Path) -> None:
    file = write(tmp_path / "a.h5", np.zeros((2, 4, 5, 2), dtype=np.float32))
    source = hdf5_source(file)
    assert (source.bands, source.units) == (("band0", "band1"), None)
    with h5py.File(file, "r+") as opened:
        opened.attrs["bands"] = ["g", "i"]
        opened.attrs["BUNIT"] = "nJy"
    source = hdf5_source(file)
    assert (source.bands, source.units) == (("g", "i"), "nJy")
    with h5py.File(file, "r+") as opened:
        opened["images"].attrs["bands"] = "u, z"
        opened["images"].attrs["units"] = np.bytes_("mag")
    source = hdf5_source(file)
    assert (source.bands, source.units) == (("u", "z"), "mag")
    assert hdf5_source(file, bands=["x", "y"]).bands == ("x", "y")
    with h5py.File(file, "r+") as opened:
        opened["images"].attrs["bands"] = ["u"]
    with pytest.raises(DataError, match="its attribute bands names u, but there are 2 bands"):
        hdf5_source(file)
    assert hdf5_source(file, bands=["x", "y"]).bands == ("x", "y")


def test_ids_of_any_name_and_kind(tmp_path: Path) -> None:
    file = write(tmp_path / "a.h5", stack(2))
    with h5py.File(file, "r+") as opened:
        opened["objid"] = [77, 5]
        opened["twice"] = ["a", "a"]
        opened["none"] = ["a", ""]
        opened["latin"] = np.array([b"a", b"\xff"])
    assert values(hdf5_source(file, ids="objid"), ["5", "77"]) == [1, 0]
    with pytest.raises(DataError, match=r"ids must be unique, but 'a' occurs 2 times; set dataset\.source\.ids=none"):
        hdf5_source(file, ids="twice")
    with pytest.raises(DataError, match="expected strings or numbers in latin"):
        hdf5_source(file, ids="latin")
    with pytest.raises(DataError, match=r"there is no name, set dataset\.source\.ids to one of images, latin, none"):
        hdf5_source(file, ids="name")


def test_fingerprint(files: list[Path]) -> None:
    first = hdf5_source(files).fingerprint
    assert hdf5_source(files).fingerprint == first
    others = [hdf5_source(files, channels=1), hdf5_source(files, layout="nchw"), hdf5_source(files[0])]
    write(files[0], stack(5, 100), np.array([0, 1, 0, 1, 0], dtype=np.uint8))
    assert len({first, hdf5_source(files).fingerprint, *(other.fingerprint for other in others)}) == 5


def test_setting_up_reads_no_image(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read = h5py.Dataset.__getitem__

    def checked(self: h5py.Dataset, *args: Any) -> Any:
        assert self.name != "/images"
        return read(self, *args)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", checked)
    assert len(hdf5_source(files)) == 8


def test_many_threads(files: list[Path]) -> None:
    source = hdf5_source(files, cache_bytes=1)
    picks = [np.random.default_rng(seed).integers(0, 8, 20).tolist() for seed in range(30)]
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda pick: values(source, [source.ids[i] for i in pick]), picks)
    assert list(results) == picks


def _read_in_child(source: ArraySource, queue: Any) -> None:
    queue.put(values(source, ["test/000001"]))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_other_processes(files: list[Path]) -> None:
    source = hdf5_source(files)
    source.read(source.ids)
    assert values(pickle.loads(pickle.dumps(source)), ["test/000001"]) == [6]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    with source._blocks.files.use(0), source._blocks.blocks.use((1, 0)):  # as another thread may at a fork
        child = context.Process(target=_read_in_child, args=(source, queue))
        child.start()
        child.join(20)
    assert queue.get() == [6]


def test_missing_or_other_file_is_rejected_at_reading(files: list[Path]) -> None:
    source = hdf5_source(files)
    files[1].unlink()
    good, bad = source.read(["train/000001", "test/000000"])
    assert good[0, 0, 0] == 1
    assert isinstance(bad, Reject)
    assert bad.reason == f"row 0 of {files[1]} cannot be read: No such file or directory"
    write(files[1], stack(3, 100))
    assert "has changed since the set was opened" in source.read(["test/000000"])[0].reason


def test_damage_gives_rejects_and_no_wrong_images(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(4)]
    path = write_encoded(tmp_path / "a.h5", [encoded(10 * i) for i in range(4)], names)
    whole = path.read_bytes()
    good = 0
    for length in range(0, len(whole), len(whole) // 25):
        path.write_bytes(whole[:length])
        try:
            source = hdf5_source(path)
        except DataError:
            continue
        for id_, result in zip(source.ids, source.read(source.ids), strict=True):
            if not isinstance(result, Reject):
                good += 1
                assert result[0, 0, 0] == 10 * int(id_[0])
    path.write_bytes(whole)
    assert values(hdf5_source(path)) == [0, 10, 20, 30]


def test_damaged_chunk_is_rejected_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", stack(6), chunks=(2, 4, 5, 3), compression="gzip")
    with h5py.File(path) as file:
        chunk = file["images"].id.get_chunk_info(1)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset + 2 : chunk.byte_offset + 8] = b"\xff" * 6
    path.write_bytes(data)
    source = hdf5_source(path)
    results = source.read(source.ids)
    assert [isinstance(result, Reject) for result in results] == [False, False, True, True, False, False]
    assert [int(results[i][0, 0, 0]) for i in (0, 1, 4, 5)] == [0, 1, 4, 5]


def test_messages(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset=hdf5 needs data\.root=PATH"):
        hdf5_source(None)
    with pytest.raises(DataError, match="expected an HDF5 file or a folder with such files, found nothing"):
        hdf5_source(tmp_path / "none.h5")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected an HDF5 file or a folder with such files, found none"):
        hdf5_source(tmp_path / "empty")
    with pytest.raises(DataError, match="the list is empty"):
        hdf5_source([])
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(DataError, match="expected an HDF5 file, but it cannot be read"):
        hdf5_source(tmp_path / "text.h5")
    with pytest.raises(DataError, match="no dataset pixels, found images, labels"):
        hdf5_source(files, images="pixels")
    with pytest.raises(DataError, match=r"there is no kinds, set dataset\.source\.labels to one of images, labels"):
        hdf5_source(files, labels="kinds")
    with pytest.raises(DataError, match="labels from 0 to 0 in labels for the classes x, found 0 to 1"):
        hdf5_source(files, class_names=["x"])
    with pytest.raises(DataError, match=r"of integers or floats in images, found \(2, 3, 4, 5, 6\) and uint8"):
        hdf5_source(write(tmp_path / "axes.h5", np.zeros((2, 3, 4, 5, 6), dtype=np.uint8)))
    for other in (np.zeros((2, 4, 4), dtype=bool), np.zeros((2, 4, 4), dtype=complex), np.zeros(2, dtype="i4,f4")):
        with pytest.raises(DataError, match="expected integers, floats, or encoded images as bytes in images, found"):
            hdf5_source(write(tmp_path / "other.h5", other))
    with pytest.raises(DataError, match="one per image, found the shape"):
        hdf5_source(write(tmp_path / "short.h5", stack(2), np.zeros(3, dtype=np.uint8)))
    with pytest.raises(DataError, match="have the same name"):
        hdf5_source([files[0], files[0]])
    with pytest.raises(DataError, match="has no image 'z'"):
        hdf5_source(files).read(["z"])
    with pytest.raises(DataError, match="there are no images in it"):
        hdf5_source(write(tmp_path / "nothing.h5", np.zeros((0, 4, 4))))
