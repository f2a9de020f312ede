import threading
import time
import weakref
from itertools import islice

import cv2
import numpy as np
import pytest
import torch

from anomalymatch.data import stream as module
from anomalymatch.data.stream import collect, next_readable, read_images, resize, stream
from anomalymatch.errors import DataError
from anomalymatch.types import Reject


def decoders():
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize("batch_size", [1, 7, 30, 100])
@pytest.mark.parametrize("workers", [1, 4])
def test_order_and_pixels(make_source, batch_size, workers):
    source = make_source(30, size=20)
    ids = [source.ids[i] for i in np.random.default_rng(0).permutation(30)]
    batches = list(stream(source, ids, size=20, batch_size=batch_size, workers=workers))
    assert [len(batch.ids) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert [id_ for batch in batches for id_ in batch.ids] == ids
    images = torch.cat([batch.images for batch in batches])
    expected = torch.from_numpy(np.stack(source.read(ids))).permute(0, 3, 1, 2)
    assert torch.equal(images, expected)
    assert images.dtype == torch.uint8
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    assert all(batch.rejects == [] for batch in batches)
    assert not decoders()


def test_order_is_kept_if_later_batches_are_ready_first(make_source, monkeypatch):
    source = make_source(12)
    read = source.read

    def slow_first(ids):
        time.sleep(0.05 if ids[0] in ("im000000", "im000004") else 0)
        return read(ids)

    monkeypatch.setattr(source, "read", slow_first)
    batches = list(stream(source, source.ids, size=16, batch_size=2, workers=4))
    assert [id_ for batch in batches for id_ in batch.ids] == source.ids


def test_unreadable_images_are_reported(make_source):
    bad = {"im000002", "im000004", "im000005"}
    batches = list(
        stream(make_source(8, unreadable=bad, channels=1), [f"im{i:06d}" for i in range(8)], size=16, batch_size=2)
    )
    assert [batch.ids for batch in batches] == [["im000000", "im000001"], ["im000003"], [], ["im000006", "im000007"]]
    assert [reject.id for batch in batches for reject in batch.rejects] == sorted(bad)
    assert batches[1].rejects == [Reject("im000002", "the file is truncated")]
    assert batches[2].images.shape == (0, 1, 16, 16)
    assert batches[2].images.dtype == torch.uint8
    assert list(stream(make_source(3), [], size=16, batch_size=4)) == []


def test_an_error_of_the_source_is_raised(make_source):
    with pytest.raises(DataError, match="no image 'z'"):
        list(stream(make_source(30), ["im000001", "z"], size=16, batch_size=1))
    assert not decoders()


def test_the_consumer_may_stop_early(make_source):
    source = make_source(400)
    batches = stream(source, source.ids, size=16, batch_size=4, workers=2)
    assert len(list(islice(batches, 3))) == 3
    batches.close()
    assert not decoders()
    assert source.reads <= 4 * (3 + 2 + 2)


@pytest.mark.parametrize("workers", [1, 3])
def test_few_batches_are_in_memory(make_source, monkeypatch, workers):
    alive, most = 0, 0
    lock = threading.Lock()
    to_tensor = module.to_tensor

    def gone():
        nonlocal alive
        with lock:
            alive -= 1

    def counted(images):
        nonlocal alive, most
        tensor = to_tensor(images)
        with lock:
            alive += 1
            most = max(most, alive)
        weakref.finalize(tensor, gone)
        return tensor

    monkeypatch.setattr(module, "to_tensor", counted)
    source = make_source(120)
    for _batch in stream(source, source.ids, size=16, batch_size=2, workers=workers):
        time.sleep(0.002)  # a slow model: the decoders run ahead as far as possible
    assert workers <= most <= workers + 3  # the model uses one


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("shape", [(40, 40), (20, 31), (8, 50), (16, 16), (1, 1)])
def test_resize_any_number_of_channels(shape, channels):
    image = np.random.default_rng(0).integers(0, 256, (*shape, channels), dtype=np.uint8)
    resized = resize(image, 16, "stretch")
    assert (resized is image) == (shape == (16, 16)), "an image of the right size is returned unchanged"
    np.testing.assert_array_equal(resize(image[::-1], 16, "stretch"), resize(image[::-1].copy(), 16, "stretch"))
    assert resized.shape == (16, 16, channels)
    assert resized.dtype == np.uint8
    for k in range(channels):  # channels are independent
        np.testing.assert_allclose(
            resize(image[..., k : k + 1], 16, "stretch")[..., 0], resized[..., k].astype(int), atol=1
        )


@pytest.mark.parametrize(("height", "width"), [(30, 60), (60, 20)])
def test_fit_keeps_shapes_where_it_says_so(height, width):
    """A circle stays one, at the centre, if the image is padded or cropped; borders have the mean colour."""
    y, x = np.mgrid[:height, :width]
    circle = (np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) <= 8).astype(np.uint8)[..., None] * 150 + 50
    for fit in ("stretch", "pad", "crop"):
        image = resize(circle, 64, fit)
        rows, columns = ((image[..., 0] > 125).any(axis).sum() for axis in (1, 0))
        assert image.shape == (64, 64, 1)
        assert (0.9 < rows / columns < 1.1) == (fit != "stretch")
        assert (image[0, 0, 0] == image[-1, -1, 0] == round(circle.mean())) == (fit == "pad")
        assert np.abs(np.argwhere(image[..., 0] > 125).mean(0) - 31.5).max() <= 0.6  # it is at the centre


def test_shrinking_averages_and_enlarging_interpolates():
    image = np.zeros((32, 32, 1), dtype=np.uint8)
    image[::2] = 200  # stripes; sampling would give 0 or 200
    assert np.unique(resize(image, 16, "stretch")).tolist() == [100]
    ramp = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], 16, axis=0)
    large = resize(ramp, 64, "stretch")
    expected = cv2.resize(ramp, (64, 64), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_array_equal(large[..., 0], expected)
    assert (np.diff(large[0, 8:-8, 0].astype(int)) >= 0).all()


def batches():
    yield ["a", "b"], np.array([[1.0], [2.0]], np.float32), [Reject("x", "truncated")]
    yield [], None, [Reject("y", "empty")]
    yield [], np.empty((0, 1), np.float32), []
    yield ["c"], np.array([[3.0]], np.float32), []


def test_rows_and_rejects_are_kept_apart():
    done = []
    found = collect(batches(), np.empty((0, 1), np.float16), lambda n=1, note="": done.append(n))
    assert found.ids == ["a", "b", "c"]
    np.testing.assert_array_equal(found.rows, np.array([[1.0], [2.0], [3.0]], np.float16), strict=True)
    assert [(reject.id, reject.reason) for reject in found.rejects] == [("x", "truncated"), ("y", "empty")]
    assert done == [3, 1, 0, 1]


@pytest.mark.parametrize("given", [[], [([], None, [Reject("x", "truncated")])]])
def test_without_readable_images_the_rows_are_empty(given):
    found = collect(given, np.empty((0, 7)))
    assert found.rows.shape == (0, 7)
    assert len(found.rejects) == len(given)


@pytest.mark.parametrize("rows", [None, np.zeros((1, 2))])
def test_each_image_needs_a_row(rows):
    with pytest.raises(ValueError, match="2 images"):
        collect([(["a", "b"], rows, [])], np.empty((0, 2)))


def test_images_that_can_be_read(make_source):
    source = make_source(5, unreadable=["im000001", "im000003"])
    found = read_images(source, ["im000003", "im000002", "im000001", "im000000"])
    assert found.ids == ["im000002", "im000000"]
    assert [image.shape for image in found.images] == [(32, 32, 3)] * 2
    np.testing.assert_array_equal(found.images[1], source.read(["im000000"])[0])
    assert [reject.id for reject in found.rejects] == ["im000003", "im000001"]
    assert read_images(source, []) == ([], [], [])


@pytest.mark.parametrize(("position", "expected"), [(0, 2), (2, 2), (3, 2), (4, 4)])
def test_the_next_readable_image(make_source, position, expected):
    source = make_source(5, unreadable=["im000000", "im000001", "im000003"])
    ids = list(source.ids) if position != 3 else source.ids[:4]
    image, found = next_readable(source, ids, position, 32)
    assert found == expected
    np.testing.assert_array_equal(image, source.read([ids[found]])[0])


def test_no_readable_image(make_source):
    source = make_source(3, unreadable=["im000000", "im000001", "im000002"])
    with pytest.raises(DataError, match=r"^array: .* 3 images .* 3 .*the file is truncated .*im000001"):
        next_readable(source, source.ids, 1, 32)
