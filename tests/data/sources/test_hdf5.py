import io
import os
import signal
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from pictures import colours, stack, write_encoded_hdf5
from PIL import Image as PillowImage

from anomalymatch.checks import trusting
from anomalymatch.data.sources import hdf5
from anomalymatch.data.sources.hdf5 import HDF5Source
from anomalymatch.errors import DataError
from anomalymatch.types import Reject


def write(path: Path, images: Any, labels: Any = None, **options: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images, **options)
        if labels is not None:
            file["labels"] = labels
    return path


def encoded(value: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PillowImage.new("RGB", (6, 5), (value, value, value)).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    first = write(tmp_path / "train.hdf5", stack(5), np.array([0, 1, 0, 1, 0], dtype=np.uint8))
    return [first, write(tmp_path / "test.hdf5", stack(3, 5), np.array([1, 1, 0]), chunks=(2, 4, 5, 3))]


def test_several_files(files: list[Path]) -> None:
    source = HDF5Source(files, class_names=["x", "y"], holdout_files=["test*"])
    assert source.ids == [f"train/{i:06d}" for i in range(5)] + [f"test/{i:06d}" for i in range(3)]
    assert list((source.truth or {}).values()) == list("xyxyxyyx")
    assert colours(source) == list(range(8))


def test_string_labels_and_channels(tmp_path: Path) -> None:
    grey = np.array([[[10, 20]], [[30, 40]]], dtype=np.uint8)
    file = write(tmp_path / "a.h5", grey, np.array([b"cat", "dög".encode()]))
    assert HDF5Source(file).truth == {"a/000000": "cat", "a/000001": "dög"}
    assert HDF5Source(file, channels=3).read(["a/000001"])[0].tolist() == [[[30, 30, 30], [40, 40, 40]]]


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_encoded_images_with_names(tmp_path: Path, form: str) -> None:
    file = write_encoded_hdf5(
        tmp_path / "a.h5", [encoded(40, form), encoded(90, form), b"no image", b""], filenames=list("dbca")
    )
    source = HDF5Source(file)
    assert (source.ids, source.channels, source.files[0].shape) == (list("dbca"), 3, (4,))
    assert [image[2, 2].tolist() for image in source.read(["b", "d"])] == [[90] * 3, [40] * 3]
    assert [image.shape for image in HDF5Source(file, channels=1).read(["b", "d"])] == [(5, 6, 1)] * 2
    rejects = source.read(["c", "a"])
    assert isinstance(rejects[0], Reject)
    assert rejects[1] == Reject("a", "the file is empty (0 bytes)")
    assert HDF5Source(file, ids="none").ids == [f"a/{i:06d}" for i in range(4)]


def test_encoded_images_as_opaque_bytes_and_objects(tmp_path: Path) -> None:
    pictures = [encoded(40, "JPEG"), encoded(90, "JPEG")]
    length = max(map(len, pictures))
    opaque = np.array([np.void(data.ljust(length, b"\0")) for data in pictures])
    assert colours(HDF5Source(write(tmp_path / "a.h5", opaque))) == [40, 90]
    assert colours(HDF5Source(write(tmp_path / "b.h5", np.array(pictures)))) == [40, 90]


def test_attributes_name_bands_and_units(tmp_path: Path) -> None:
    file = write(tmp_path / "a.h5", np.zeros((2, 4, 5, 2), dtype=np.float32))
    source = HDF5Source(file)
    assert (source.bands, source.units) == (("band0", "band1"), None)
    with h5py.File(file, "r+") as opened:
        opened.attrs["bands"] = ["g", "i"]
        opened.attrs["BUNIT"] = "nJy"
    source = HDF5Source(file)
    assert (source.bands, source.units) == (("g", "i"), "nJy")
    with h5py.File(file, "r+") as opened:
        opened["images"].attrs["bands"] = "u, z"
        opened["images"].attrs["units"] = np.bytes_("mag")
    source = HDF5Source(file)
    assert (source.bands, source.units) == (("u", "z"), "mag")
    assert HDF5Source(file, bands=["x", "y"]).bands == ("x", "y")
    with h5py.File(file, "r+") as opened:
        opened["images"].attrs["bands"] = ["u"]
    with pytest.raises(DataError, match="its attribute bands names u, but there are 2 bands"):
        HDF5Source(file)
    assert HDF5Source(file, bands=["x", "y"]).bands == ("x", "y")


def test_ids_of_any_name_and_kind(tmp_path: Path) -> None:
    file = write(tmp_path / "a.h5", stack(2))
    with h5py.File(file, "r+") as opened:
        opened["objid"] = [77, 5]
        opened["twice"] = ["a", "a"]
        opened["none"] = ["a", ""]
        opened["latin"] = np.array([b"a", b"\xff"])
    assert colours(HDF5Source(file, ids="objid"), ["5", "77"]) == [1, 0]
    with pytest.raises(DataError, match=r"ids must be unique, but 'a' occurs 2 times; set dataset\.source\.ids=none"):
        HDF5Source(file, ids="twice")
    with pytest.raises(DataError, match="expected strings or numbers in latin"):
        HDF5Source(file, ids="latin")
    with pytest.raises(DataError, match=r"there is no name, set dataset\.source\.ids to one of images, latin, none"):
        HDF5Source(file, ids="name")


def test_datasets_in_other_files_need_trust(tmp_path: Path) -> None:
    secret = write(tmp_path / "secret/s.h5", stack(2))
    (tmp_path / "secret/raw").write_bytes(bytes(2 * 4 * 5 * 3))
    layout = h5py.VirtualLayout(shape=(2, 4, 5, 3), dtype="uint8")
    layout[:] = h5py.VirtualSource(secret, "images", shape=(2, 4, 5, 3))
    kinds = {
        "link": lambda file: file.__setitem__("images", h5py.ExternalLink(secret, "images")),
        "virtual": lambda file: file.create_virtual_dataset("images", layout),
        "raw": lambda file: file.create_dataset(
            "images", (2, 4, 5, 3), "uint8", external=[(tmp_path / "secret/raw", 0, 120)]
        ),
    }
    for name, make in kinds.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            make(file)
        with pytest.raises(DataError, match=r"its dataset images lies in other files .*trust=true"):
            HDF5Source(tmp_path / f"{name}.h5")
        with trusting(True):
            source = HDF5Source(tmp_path / f"{name}.h5")
        assert colours(source) == ([0, 0] if name == "raw" else [0, 1])


def test_files_on_which_the_library_crashes_or_hangs_are_refused(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, describe = os.getpid(), HDF5Source.describe

    def crash(self: HDF5Source, file: Any) -> Any:
        if file.path == files[1] and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGSEGV)
        return describe(self, file)

    monkeypatch.setattr(HDF5Source, "describe", crash)
    with pytest.raises(DataError, match=r"test\.hdf5: expected an HDF5 file.* crashes on it, or hangs"):
        HDF5Source(files)
    assert len(HDF5Source(files[0])) == 5
    assert not hdf5._survives(lambda: time.sleep(9), 1)


def test_damaged_chunk_is_rejected_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", stack(6), chunks=(2, 4, 5, 3), compression="gzip")
    with h5py.File(path) as file:
        chunk = file["images"].id.get_chunk_info(1)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset + 2 : chunk.byte_offset + 8] = b"\xff" * 6
    path.write_bytes(data)
    source = HDF5Source(path)
    results = source.read(source.ids)
    assert [isinstance(result, Reject) for result in results] == [False, False, True, True, False, False]
    assert [int(results[i][0, 0, 0]) for i in (0, 1, 4, 5)] == [0, 1, 4, 5]


def test_messages(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no dataset pixels, found images, labels"):
        HDF5Source(files, images="pixels")
    with pytest.raises(DataError, match="labels from 0 to 0 in labels for the classes x, found 0 to 1"):
        HDF5Source(files, class_names=["x"])
    for other in (np.zeros((2, 4, 4), dtype=complex), np.zeros(2, dtype="i4,f4")):
        with pytest.raises(DataError, match="expected integers, floats, booleans, or encoded images"):
            HDF5Source(write(tmp_path / "other.h5", other))
