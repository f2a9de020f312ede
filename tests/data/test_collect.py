import numpy as np
import pytest

from anomalymatch.data.collect import collect, next_readable, read_images
from anomalymatch.errors import DataError
from anomalymatch.types import Reject


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
    image, found = next_readable(source, ids, position)
    assert found == expected
    np.testing.assert_array_equal(image, source.read([ids[found]])[0])


def test_no_readable_image(make_source):
    source = make_source(3, unreadable=["im000000", "im000001", "im000002"])
    with pytest.raises(DataError, match="3 images"):
        next_readable(source, source.ids, 1)
