import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hydra.utils import instantiate
from PIL import Image as PillowImage
from PIL import ImageEnhance, ImageOps

from anomalymatch.algorithms.augmentation import objects as augment
from anomalymatch.algorithms.augmentation.objects import (
    AutoContrast,
    Brightness,
    Contrast,
    ObjectAugmentation,
    Saturation,
    Sharpness,
)
from anomalymatch.algorithms.augmentation.transforms import Cutout
from anomalymatch.config import compose

SIZE = 32
DEFAULT = instantiate(compose("dataset=folder", "data.root=unused").augment)


def augmented(**changes):
    return replace(DEFAULT, **changes)


def noise(channels=3, size=SIZE, seed=0, high=256):
    return np.random.default_rng(seed).integers(0, high, (size, size, channels), dtype=np.uint8)


def smooth(channels=3, size=SIZE):
    """Make a smooth image, which interpolation changes little."""
    y, x = np.mgrid[0:size, 0:size] / size
    bands = [np.sin(3 * x + k) * np.cos(2 * y - k) * 100 + 120 for k in range(channels)]
    return np.stack(bands, axis=2).astype(np.uint8)


def views(augmentation, kind, image, count=40):
    view = getattr(augmentation, kind)(image.shape[2])
    return [view(image, seed) for seed in range(count)]


@pytest.mark.parametrize("kind", ["weak", "strong"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_same_seed_same_view_in_any_order(kind, channels):
    image = noise(channels)
    first = views(DEFAULT, kind, image)
    again = getattr(DEFAULT, kind)(channels)
    np.testing.assert_array_equal(image, noise(channels))  # the image itself is left alone
    for seed in (7, 39, 0, 7, 21):
        np.testing.assert_array_equal(again(image, seed), first[seed])
    assert all(view.shape == image.shape and view.dtype == np.uint8 for view in first)
    assert all(view.flags.c_contiguous for view in first)
    assert len({view.tobytes() for view in first}) > 25


@pytest.mark.parametrize("shape", [(16, 40), (41, 17), (1, 1)])
def test_images_that_are_not_square_keep_their_shape(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert {view.shape for view in views(DEFAULT, "strong", image)} == {image.shape}


def shifted(image, dx, dy):
    padded = np.pad(image, ((8, 8), (8, 8), (0, 0)), mode="reflect")
    return padded[8 - dy : 8 - dy + SIZE, 8 - dx : 8 - dx + SIZE]


def find_weak(image, view, reach=4, vertical=False):
    """Find the flips and whole-pixel shifts that turn `image` into `view`."""
    flips = {(): image, ("h",): image[:, ::-1]}
    if vertical:
        flips |= {("v",): image[::-1], ("h", "v"): image[::-1, ::-1]}
    steps = range(-reach, reach + 1)
    return [
        (f, dx, dy)
        for f, base in flips.items()
        for dx in steps
        for dy in steps
        if (shifted(base, dx, dy) == view).all()
    ]


def test_weak_is_a_flip_and_a_shift_and_nothing_else():
    image = noise()
    found = [find_weak(image, view) for view in views(DEFAULT, "weak", image, 60)]
    assert all(len(matches) == 1 for matches in found)  # up to 12.5 % of 32 px, mirrored at the edges
    flips = [match[0][0] for match in found]
    assert 15 < flips.count(("h",)) < 45
    assert {match[0][1] for match in found} >= {-3, -2, -1, 0, 1, 2, 3}
    assert {match[0][2] for match in found} >= {-3, -2, -1, 0, 1, 2, 3}


def test_every_shift_up_to_the_largest_is_equally_likely():
    view = augmented(flip=0.0, translate=0.125, border="constant").weak(1)
    image = np.full((64, 64, 1), 255, dtype=np.uint8)
    shifts = []
    for seed in range(4000):
        shown = view(image, seed)[..., 0] > 0
        rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
        # What is black was uncovered: at the top or left by a positive shift.
        shifts.append([64 - len(at) if at[0] else len(at) - 64 for at in (rows, columns)])
    for axis in np.array(shifts).T:
        assert set(axis) == set(range(-8, 9))
        counts = np.unique(axis, return_counts=True)[1]
        expected = len(axis) / 17
        assert ((counts - expected) ** 2 / expected).sum() < 39.3  # chi-square with 16 degrees of freedom, 0.1 %


@pytest.mark.parametrize(("algorithm", "border"), [("fixmatch", "reflect"), ("fixmatch_reference", "constant")])
def test_the_reference_recipe_fills_with_black(algorithm, border):
    views_of = instantiate(compose("augment=objects", f"algorithm={algorithm}").algorithm.learner.augmentation)
    assert views_of.border == border
    light = np.full((32, 32, 3), 200, dtype=np.uint8)
    for kind in ("weak", "strong"):
        still = replace(views_of, operations=0, cutout=0.0, translate=0.3)
        assert any((view == 0).any() for view in views(still, kind, light)) == (border == "constant")
    turned = replace(views_of, cutout=0.0, translate=0.0)._operations(3)[-5:-2]  # rotation and shears
    for step in turned:
        turns = [step(image=light)["image"] for _ in range(20)]  # some are close to none
        assert any((turn < 190).any() for turn in turns) == (border == "constant")  # at the corners


def test_flips_and_shifts_are_drawn_independently():
    image = noise()
    drawn = views(augmented(vertical_flip=0.5, translate=0.07), "weak", image, 200)
    found = [find_weak(image, view, reach=2, vertical=True)[0] for view in drawn]
    counts = [sum(match[0] == flips for match in found) for flips in ((), ("h",), ("v",), ("h", "v"))]
    assert sum(counts) == 200
    assert min(counts) > 25  # 50 each are expected
    dx, dy = np.array([match[1:] for match in found]).T
    assert abs(np.corrcoef(dx, dy)[0, 1]) < 0.3
    flipped = np.array(["h" in match[0] for match in found])
    assert abs(np.corrcoef(flipped, dx)[0, 1]) < 0.3


class Spy(augment.A.ImageOnlyTransform):
    """Operation that only records its place in the list."""

    def __init__(self, place, record):
        super().__init__(p=1.0)
        self.place, self.record = place, record

    def apply(self, img, **_):
        self.record[-1].append(self.place)
        return img


def drawn_operations(monkeypatch, channels=3, count=600, operations=3):
    """Return the operations of many strong views, as places in the list of all operations."""
    record = []
    made = ObjectAugmentation._operations

    def spied(self, channels):
        return [Spy(place, record) for place in range(len(made(self, channels)))]

    monkeypatch.setattr(ObjectAugmentation, "_operations", spied)
    view = augmented(operations=operations).strong(channels)
    for seed in range(count):
        record.append([])
        view(noise(channels, 8), seed)
    return record


@pytest.mark.parametrize(("channels", "kinds"), [(1, 13), (2, 12), (3, 14), (5, 12)])
def test_strong_draws_three_operations_for_each_image(monkeypatch, channels, kinds):
    record = drawn_operations(monkeypatch, channels)
    assert {len(drawn) for drawn in record} == {3}
    counts = np.bincount([place for drawn in record for place in drawn], minlength=kinds)
    expected = 3 * len(record) / kinds
    assert len(counts) == kinds
    assert ((counts - expected) ** 2 / expected).sum() < 40  # chi-square with at most 13 degrees of freedom
    # With replacement, and in the order in which they were drawn.
    assert any(len(set(drawn)) < len(drawn) for drawn in record)
    falling = [drawn for drawn in record if drawn[0] > drawn[1] > drawn[2]]
    assert 0.09 * len(record) < len(falling) < 0.2 * len(record)


@pytest.mark.parametrize("factor", [0.05, 0.4, 0.95])
@pytest.mark.parametrize("ours", [Brightness, Contrast, Saturation, Sharpness])
def test_photometric_operations_are_pillows(ours, factor):
    theirs = getattr(ImageEnhance, "Color" if ours is Saturation else ours.__name__)
    image = smooth()
    got = ours((factor, factor))(image=image)["image"].astype(int)
    expected = np.asarray(theirs(PillowImage.fromarray(image)).enhance(factor)).astype(int)
    inner = slice(1, -1)  # Pillow does not smooth the outermost pixels
    assert np.abs(got - expected)[inner, inner].max() <= 1
    assert (got != image).any() or factor == 0.95


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_brightness_and_contrast_of_any_number_of_bands(channels):
    image = smooth(channels)
    dark = Brightness((0.5, 0.5))(image=image)["image"].astype(int)
    assert np.abs(dark - image * 0.5).max() <= 1
    flat = Contrast((0.0, 0.0))(image=image)["image"]
    assert np.unique(flat).size == 1
    assert abs(int(flat[0, 0, 0]) - image.mean()) < 12
    same = [kind((1.0, 1.0))(image=image)["image"] for kind in (Brightness, Contrast, Sharpness)]
    assert all((copy == image).all() for copy in same)


@pytest.mark.parametrize("low_high", [(100, 200), (100, 255), (0, 40), (7, 7)])
def test_autocontrast_is_pillows(low_high):
    low, high = low_high
    image = np.random.default_rng(0).integers(low, high + 1, (16, 16, 3), dtype=np.uint8)
    got = AutoContrast(p=1.0)(image=image)["image"].astype(int)
    assert np.abs(got - np.asarray(ImageOps.autocontrast(PillowImage.fromarray(image)))).max() <= 1


def test_autocontrast_by_hand():
    image = np.array([[100, 150, 255, 255]], dtype=np.uint8)[..., None].repeat(5, axis=2)
    assert AutoContrast(p=1.0)(image=image)["image"][0, :, 4].tolist() == [0, 82, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_equalize_is_pillows(channels):
    step = augment._photometric((0.5, 0.5), channels)[-1]
    image = smooth(channels, 128) // 2 + noise(channels, 128, high=50)
    got = step(image=image)["image"].reshape(image.shape).astype(int)
    mode = image[..., 0] if channels == 1 else image
    expected = np.asarray(ImageOps.equalize(PillowImage.fromarray(mode))).reshape(image.shape)
    assert np.abs(got - expected).mean() < 3


def test_cutout_is_a_square_of_at_most_half_the_side():
    sides, touching = [], 0
    view = Cutout(0.5)
    for seed in range(300):
        view.set_random_seed(seed)
        hole = (view(image=np.zeros((40, 40, 2), dtype=np.uint8))["image"][..., 0]) == 127
        rows, columns = np.nonzero(hole)
        if not rows.size:
            continue
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert hole.sum() == height * width <= 21 * 21
        inside = rows.min() > 0 and rows.max() < 39 and columns.min() > 0 and columns.max() < 39
        touching += not inside
        if inside:
            assert abs(height - width) <= 1  # where an edge does not cut it off
            sides.append(height)
    assert max(sides) >= 18
    assert min(sides) <= 3
    assert touching > 30


def test_cutout_share_one_and_zero():
    assert (augmented(cutout=0.0, operations=0, flip=0.0, translate=0.0).strong(3)(noise(), 1) == noise()).all()
    grey = [(view == 127).mean() for view in views(augmented(cutout=1.0, operations=0), "strong", noise(high=100))]
    assert max(grey) > 0.5


def test_rotations_stay_within_their_limit():
    image = np.zeros((65, 65, 1), dtype=np.uint8)
    image[31:34, 22:43] = 255  # a horizontal bar, whose rotations stay inside
    step = augmented(rotate=20.0)._operations(1)[-5]
    angles = []
    for seed in range(80):
        step.set_random_seed(seed)
        moments = cv2.moments(step(image=image)["image"].reshape(65, 65))
        angles.append(0.5 * math.degrees(math.atan2(2 * moments["mu11"], moments["mu20"] - moments["mu02"])))
    assert max(map(abs, angles)) <= 20.5
    assert max(angles) > 15
    assert min(angles) < -15
