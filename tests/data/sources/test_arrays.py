from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from anomalymatch.data.sources.arrays import ArraySource
from anomalymatch.data.sources.hdf5 import HDF5Source
from anomalymatch.data.sources.numpy import NumpySource
from anomalymatch.data.sources.zarr import ZarrSource
from anomalymatch.errors import ConfigError, DataError


def write(path: Path, *shape: int) -> Path:
    np.save(path, np.arange(np.prod(shape)).reshape(shape).astype(np.uint8))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a.npy", 4, 6, 5, 3)


def write_as(kind: str, folder: Path, table: np.ndarray) -> ArraySource:
    path = folder / f"images{kind.split()[0]}"
    if kind == ".npy":
        np.save(path, table)
    elif kind == ".npz":
        np.savez(path, images=table)
    elif kind == ".h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("images", data=table, chunks=tuple(-(-n // 2) for n in table.shape))
    else:
        group = zarr.open_group(path, mode="w", zarr_format=int(kind[-1]))
        group.create_array("images", data=table, chunks=tuple(-(-n // 2) for n in table.shape))
    return {".h5": HDF5Source, ".zarr": ZarrSource}.get(path.suffix, NumpySource)(path)


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "<i4", ">f4", "float64"])
@pytest.mark.parametrize("kind", [".npy", ".npz", ".h5", ".zarr 2", ".zarr 3"])
def test_pixels_of_any_type_layout_and_order(tmp_path: Path, kind: str, dtype: str) -> None:
    table = np.arange(1, 1 + 2 * 4 * 5 * 2).reshape(2, 4, 5, 2).astype(dtype)
    arrays = {"last": table, "first": np.moveaxis(table, 3, 1).copy(), "fortran": np.asfortranarray(table)}
    for name, array in arrays.items():
        (tmp_path / name).mkdir()
        pixels = write_as(kind, tmp_path / name, array).load(1)
        assert pixels.tolist() == table[1].tolist()
        assert pixels.dtype == np.dtype(dtype).newbyteorder("=")
        assert pixels.flags.c_contiguous
    grey = write_as(kind, tmp_path, table[..., 0])
    assert (grey.bands, grey.load(0).tolist()) == (("grey",), table[0, :, :, :1].tolist())


@pytest.mark.parametrize(
    ("shape", "layout", "image"),
    [
        ((2, 6, 5), "auto", (6, 5, 1)),
        ((2, 6, 5), "nchw", (6, 5, 1)),
        ((2, 6, 5, 3), "auto", (6, 5, 3)),
        ((2, 3, 6, 5), "auto", (6, 5, 3)),
        ((2, 6, 5, 7), "nhwc", (6, 5, 7)),
        ((2, 5, 5, 5), "nchw", (5, 5, 5)),
        ((2, 5, 6, 5), "nhwc", (5, 6, 5)),
        ((2, 64, 4, 65), "auto", (4, 65, 64)),
        ((2, 66, 4, 65), "nhwc", (66, 4, 65)),
    ],
)
def test_layouts(tmp_path: Path, shape: tuple[int, ...], layout: str, image: tuple[int, ...]) -> None:
    source = NumpySource(write(tmp_path / "b.npy", *shape), layout=layout)
    assert source.load(1).shape == image
    assert len(source.bands) == image[2]


@pytest.mark.parametrize("shape", [(2, 5, 6, 5), (2, 66, 4, 65), (2, 65, 4, 66)])
def test_ambiguous_layouts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"which axis holds the bands; set dataset\.source\.layout to nhwc or nchw"):
        NumpySource(write(tmp_path / "b.npy", *shape))


@pytest.mark.parametrize("shape", [(4,), (4, 5), (2, 3, 4, 5, 6)])
def test_shapes_that_cannot_hold_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"expected images of the shape .*; set dataset\.source\.each=true"):
        NumpySource(write(tmp_path / "b.npy", *shape), each=False)
    with pytest.raises(DataError, match="cannot have the shape"):
        NumpySource(write(tmp_path / "c.npy", 2, 0, 5))


@pytest.mark.parametrize("kind", [".h5", ".zarr 3"])
def test_one_image_in_place_of_many_is_refused_until_a_key_decides(tmp_path: Path, kind: str) -> None:
    image = np.arange(20 * 27 * 3).reshape(20, 27, 3).astype(np.uint8)
    with pytest.raises(DataError, match=r"one image with 3 bands, or of 20 images .*layout=nhw"):
        write_as(kind, tmp_path, image)
    path = next(tmp_path.iterdir())
    source = {".h5": HDF5Source, ".zarr": ZarrSource}[path.suffix](path, layout="nhw")
    assert (len(source), source.load(2)[..., 0].tolist()) == (20, image[2].tolist())


@pytest.mark.parametrize("kind", [".npy", ".npz", ".h5", ".zarr 2", ".zarr 3"])
def test_booleans_are_0_and_1(tmp_path: Path, kind: str) -> None:
    masks = np.zeros((2, 9, 8), dtype=bool)
    masks[:, 3:5, 2:6] = True
    source = write_as(kind, tmp_path, masks)
    assert (source.load(1)[..., 0] == masks[1]).all()
    assert source.load(1).dtype == np.int8
    assert (source.read(source.ids)[1][..., 0] == np.where(masks[1], 255, 0)).all()


@pytest.mark.parametrize("kind", [".h5", ".zarr"])
def test_arrays_far_larger_than_their_file_are_refused(tmp_path: Path, kind: str) -> None:
    path, shape = tmp_path / f"a{kind}", (10**9, 64, 64, 3)
    if kind == ".h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("images", shape, "uint8", chunks=(1, 64, 64, 3))
    else:
        zarr.open_group(path, mode="w").create_array("images", shape=shape, dtype="uint8", chunks=(1, 64, 64, 3))
    with pytest.raises(DataError, match=r"it claims 1,000,000,000 images of 12,288 bytes, but has"):
        {".h5": HDF5Source, ".zarr": ZarrSource}[kind](path)


def test_wrong_options(path: Path) -> None:
    with pytest.raises(ConfigError, match="layout is 'hwc': choose one of auto, nhw, nhwc, nchw"):
        NumpySource(path, layout="hwc")
    with pytest.raises(ConfigError, match="channels is 2: choose one of 1, 3, 4, or null"):
        NumpySource(path, channels=2)
    with pytest.raises(ConfigError, match="expected 3 different names"):
        NumpySource(path, bands=["g", "i"])


def test_channels_convert_photographs(path: Path, tmp_path: Path) -> None:
    image = NumpySource(path).read(["a/000001"])[0]
    four = NumpySource(path, channels=4)
    assert four.bands == ("red", "green", "blue", "alpha")
    assert four.read(["a/000001"])[0][0, 0].tolist() == [*image[0, 0].tolist(), 255]
    assert NumpySource(path, channels=1, bands=["light"]).bands == ("light",)
    six = write(tmp_path / "six.npy", 2, 9, 8, 6)
    with pytest.raises(DataError, match=r"channels=3 is for grey, RGB and RGBA images, and these have 6 bands"):
        NumpySource(six, channels=3)
    grey = write(tmp_path / "grey.npy", 1, 6, 5)
    with pytest.raises(DataError, match=r"the files must agree on the number of bands, but .*a\.npy has 3 and .*grey"):
        NumpySource([path, grey])
    assert {image.shape[2] for image in NumpySource([path, grey], channels=3).read(["a/000000", "grey/000000"])} == {3}


def test_classes_in_some_files_only(path: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", images=np.zeros((1, 6, 5, 3), dtype=np.uint8), labels=["x"])
    with pytest.raises(DataError, match=r"a\.npy: there are no labels in it, but there are in other files"):
        NumpySource(tmp_path)
    assert NumpySource(tmp_path, labels="none").truth is None
