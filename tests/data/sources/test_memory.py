"""Tasks from arrays, paths, data frames and data sets: the same pixels, ids, labels and classes as given."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor

import anomalymatch as am
from anomalymatch.errors import ConfigError, DataError, LabelError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (12, 20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (COLOUR, COLOUR),
        (COLOUR[..., 0], COLOUR[..., :1]),
        (list(COLOUR), COLOUR),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR),
        (torch.from_numpy(COLOUR).permute(0, 3, 1, 2), COLOUR),
        ([Image.fromarray(image) for image in COLOUR], COLOUR),
    ],
    ids=["colour", "grey", "list", "bands first", "tensor", "Pillow"],
)
def test_arrays_keep_their_pixels(images, expected):
    task = am.from_arrays(images)
    assert task.pool == [str(i) for i in range(12)]
    np.testing.assert_array_equal(np.stack(task.source.read(task.pool)), expected)


def test_arrays_of_any_depth_and_number_of_bands():
    deep = RNG.normal(size=(4, 16, 16, 5)).astype(np.float32)
    task = am.from_arrays(deep, ids=["a", "b", "c", "d"], bands=["u", "g", "r", "i", "z"])
    assert (task.source.bands, task.source.channels) == (("u", "g", "r", "i", "z"), 5)
    np.testing.assert_array_equal(task.source.pixels("c"), deep[2])
    assert am.from_arrays(deep).source.fingerprint != am.from_arrays(deep + 1).source.fingerprint


def test_labels_in_any_case_by_id_or_in_order():
    by_id = am.from_arrays(COLOUR, labels={"3": "Anomaly", "5": "NORMAL"})
    in_order = am.from_arrays(COLOUR, labels=[None] * 3 + ["anomaly", None, " normal"] + [None] * 6)
    assert by_id.labels == in_order.labels == {"3": am.Label.ANOMALY, "5": am.Label.NORMAL}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": {3: "anomaly"}}, LabelError, "image 3 .*'3'"),
        ({"labels": {"x": "anomaly"}}, LabelError, "image 'x'"),
        ({"labels": {"3": "odd"}}, LabelError, "'odd'"),
        ({"labels": ["anomaly"]}, LabelError, "1 labels for 12"),
        ({"ids": ["a"]}, DataError, "1 ids for 12"),
        ({"ids": ["a"] * 12}, DataError, "'a' occurs more than once"),
        ({"classes": ["a"] * 3}, DataError, "3 classes for 12"),
        ({"classes": ["a", "b"] * 6, "anomaly": "c"}, ConfigError, "no class 'c'"),
        ({"bands": ["r"]}, ConfigError, "expected 3"),
    ],
)
def test_wrong_options_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        am.from_arrays(COLOUR, **options)


@pytest.mark.parametrize("images", [COLOUR[0], np.zeros(3), [], [np.zeros(4)], ["a.png"]])
def test_objects_that_are_no_images_are_errors(images):
    with pytest.raises(DataError, match=r"expected|no images"):
        am.from_arrays(images)


def test_make_task_names_the_function_for_other_objects():
    with pytest.raises(DataError, match=r"ndarray.*from_arrays"):
        am.make_task(COLOUR)


@pytest.fixture
def files(tmp_path):
    """Four image files in two folders."""
    for i in range(4):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(COLOUR[i]).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    return sorted(tmp_path.rglob("*.png"))


def test_paths_are_ids(files):
    task = am.from_paths(files, labels={files[1]: "anomaly", str(files[2]): "normal"})
    assert task.pool == [str(file) for file in files]
    np.testing.assert_array_equal(task.source.read([str(files[0])])[0], COLOUR[0])
    assert list(task.labels.values()) == ["anomaly", "normal"]
    assert task.source.file(task.pool[3]) == files[3]
    with pytest.raises(DataError, match=r"1 of 5 .*nowhere\.png"):
        am.from_paths([*files, "nowhere.png"])
    with pytest.raises(DataError, match=r"data\.root"):
        am.from_paths(str(files[0].parent))


def test_data_frame_gives_labels_or_classes(files, tmp_path):
    names = [str(file.relative_to(tmp_path)) for file in files]
    frame = pd.DataFrame({"file": names, "said": ["Anomaly", None, "normal", ""], "kind": ["x", "y", "y", "y"]})
    task = am.from_dataframe(frame, path="file", label="said", root=tmp_path)
    assert task.labels == {names[0]: "anomaly", names[2]: "normal"}
    np.testing.assert_array_equal(task.source.read([names[1]])[0], COLOUR[2])
    benchmark = am.from_dataframe(frame, path="file", classes="kind", anomaly="x", root=tmp_path)
    assert benchmark.anomalies == {names[0]}
    with pytest.raises(DataError, match="no column 'path', but file, said, kind"):
        am.from_dataframe(frame)


def test_paths_have_the_limits_and_the_bands_of_a_folder(files, tmp_path):
    with files[0].open("r+b") as file:
        file.truncate(2**33)  # sparse
    tiff = tmp_path / "deep.tif"
    tifffile.imwrite(tiff, np.ones((5, 8, 8), np.uint16), photometric="minisblack", planarconfig="separate")
    assert "bytes" in am.from_paths(files).source.read([str(files[0])])[0].reason
    assert len(am.from_paths([tiff]).source.bands) == 5
    limited = am.from_paths(files[1:], max_pixels=1, channels=1).source
    assert "max_pixels" in limited.read([str(files[1])])[0].reason


class HubData:
    """Fake of a data set of Hugging Face: columns, and rows that are dictionaries."""

    column_names = ("picture", "label")

    def __init__(self):
        self.features = {"label": SimpleNamespace(names=["cat", "dog"])}

    def __len__(self):
        return 12

    def __getitem__(self, key):
        if key == "label":
            return [i % 2 for i in range(12)]
        return {"picture": Image.fromarray(COLOUR[key]), "label": key % 2}


def test_hugging_face_data_set_has_its_classes():
    task = am.from_dataset(HubData(), anomaly="dog")
    assert {task.source.truth[id_] for id_ in task.anomalies} == {"dog"}
    assert len(task.anomalies) == 6
    np.testing.assert_array_equal(task.source.read(["7"])[0], COLOUR[7])
    with pytest.raises(DataError, match=r"picture, label.*image="):
        am.from_dataset(HubData(), image="photo")


class Torchvision(FakeData):
    """Random images of torchvision, with the attributes that its real data sets have."""

    classes = ("zero", "one", "two")
    targets = (0, 1, 2, 0, 1, 2, 0, 1)


@pytest.mark.parametrize("transform", [None, ToTensor()])
def test_torchvision_data_set_has_its_classes_and_eight_bits(transform):
    make = partial(Torchvision, size=8, image_size=(3, 16, 24), num_classes=3)
    task = am.from_dataset(make(transform=transform), anomaly=["one", "two"])
    np.testing.assert_array_equal(task.source.read(["5"])[0], np.asarray(make()[5][0]))
    assert task.source.truth["5"] == "two"
    part = am.from_dataset(Subset(make(transform=transform), [5, 1, 3]))
    np.testing.assert_array_equal(part.source.read(["0"])[0], np.asarray(make()[5][0]))
    assert part.source.truth == {"0": "two", "1": "one", "2": "zero"}


def test_item_that_cannot_be_read_is_a_reject():
    class Broken(HubData):
        def __getitem__(self, key):
            if key == 3:
                raise OSError("torn")
            return super().__getitem__(key)

    (reject,) = am.from_dataset(Broken()).source.read(["3"])
    assert (reject.id, reject.reason) == ("3", "torn")
