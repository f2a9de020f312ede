from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate

from anomalymatch.config import compose
from anomalymatch.data.rendering import Rendering
from anomalymatch.data.sources.arrays import ArraySource
from anomalymatch.data.sources.numpy import numpy_source
from anomalymatch.errors import ConfigError, DataError, LabelError
from anomalymatch.types import Reject


def write(path: Path, *shape: int, dtype: str = "uint8") -> Path:
    np.save(path, np.arange(np.prod(shape)).reshape(shape).astype(dtype))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a.npy", 4, 6, 5, 3)


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
    source = numpy_source(write(tmp_path / "b.npy", *shape), layout=layout)
    assert source.load(1).shape == image
    assert len(source.bands) == image[2]


@pytest.mark.parametrize("shape", [(2, 5, 6, 5), (2, 66, 4, 65), (2, 65, 4, 66)])
def test_layouts_that_are_not_clear(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(
        DataError, match=r"which axis of it holds the bands .* set dataset\.source\.layout to nhwc or nchw"
    ):
        numpy_source(write(tmp_path / "b.npy", *shape))


@pytest.mark.parametrize("shape", [(4,), (4, 5), (2, 3, 4, 5, 6)])
def test_shapes_that_are_none_of_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="expected images of the shape"):
        numpy_source(write(tmp_path / "b.npy", *shape))
    with pytest.raises(DataError, match="is none of images"):
        numpy_source(write(tmp_path / "c.npy", 2, 0, 5))


def test_wrong_options(path: Path) -> None:
    with pytest.raises(ConfigError, match="layout is 'hwc': choose one of auto, nhwc, nchw"):
        numpy_source(path, layout="hwc")
    with pytest.raises(ConfigError, match="channels is 2: choose one of 1, 3, 4, or null"):
        numpy_source(path, channels=2)
    with pytest.raises(ConfigError, match="expected 3 different names"):
        numpy_source(path, bands=["g", "i"])
    with pytest.raises(DataError, match=r"no file matches b\*, correct dataset\.source\.holdout_files"):
        numpy_source(path, holdout_files=["b*"])


def test_channels_convert_photographs(path: Path, tmp_path: Path) -> None:
    image = numpy_source(path).read(["a/000001"])[0]
    four = numpy_source(path, channels=4)
    assert four.bands == ("red", "green", "blue", "alpha")
    assert four.read(["a/000001"])[0][0, 0].tolist() == [*image[0, 0].tolist(), 255]
    assert numpy_source(path, channels=1, bands=["light"]).bands == ("light",)
    six = write(tmp_path / "six.npy", 2, 9, 8, 6)
    with pytest.raises(DataError, match=r"channels=3 is for grey, RGB and RGBA images, and these have 6 bands"):
        numpy_source(six, channels=3)
    grey = write(tmp_path / "grey.npy", 1, 6, 5)
    with pytest.raises(DataError, match=r"the files must agree on the number of bands, but .*a\.npy has 3 and .*grey"):
        numpy_source([path, grey])
    assert {image.shape[2] for image in numpy_source([path, grey], channels=3).read(["a/000000", "grey/000000"])} == {3}


def test_rendering_takes_bands_by_name(tmp_path: Path) -> None:
    table = write(tmp_path / "b.npy", 2, 3, 6, 5, dtype="float32")
    rendering = Rendering(combine={"one": {"i": 1.0}}, limits={"one": [30.0, 60.0]})
    source = numpy_source(table, bands=["g", "i", "z"], rendering=rendering)
    assert source.channels == 1
    assert source.read(["b/000000"])[0][0, :3, 0].tolist() == [0, 8, 17]
    assert source.fingerprint != numpy_source(table).fingerprint


def test_labels_by_a_person_and_classes(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("filename,label\na/000001,anomaly\n")
    source = numpy_source(path, labels_file=file)
    assert (source.labels, source.truth) == ({"a/000001": "anomaly"}, None)
    file.write_text("filename,label\n" + "".join(f"a/00000{i},k{i}\n" for i in range(4)))
    source = numpy_source(path, labels_file=str(file))
    assert (source.labels, source.truth) == ({}, {f"a/00000{i}": f"k{i}" for i in range(4)})
    assert numpy_source(path).labels == {}
    file.write_text("filename,label\na/000001,k\n")
    with pytest.raises(LabelError, match="3 of 4 are missing"):
        numpy_source(path, labels_file=file)


def test_classes_in_some_files_only(path: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", images=np.zeros((1, 6, 5, 3), dtype=np.uint8), labels=["x"])
    with pytest.raises(DataError, match=r"a\.npy: there are no labels in it, but there are in other files"):
        numpy_source(tmp_path)
    assert numpy_source(tmp_path, labels="none").truth is None


def test_images_without_a_number_are_rejected(tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", np.full((2, 6, 5), np.nan, dtype=np.float32))
    assert isinstance(numpy_source(tmp_path / "b.npy").read(["b/000001"])[0], Reject)


@pytest.mark.parametrize("name", ["hdf5", "zarr", "numpy"])
def test_configurations_name_every_option(name: str) -> None:
    with pytest.raises(Exception, match=rf"dataset={name} needs data\.root=PATH"):
        instantiate(compose(f"dataset={name}").dataset.source)


def test_configuration_builds_a_source(path: Path) -> None:
    source = instantiate(compose("dataset=numpy", f"data.root={path}", "dataset.source.bands=[x,y,z]").dataset.source)
    assert isinstance(source, ArraySource)
    assert (source.bands, len(source)) == (("x", "y", "z"), 4)
