import itertools
import time

import numpy as np
import pytest

from anomalymatch.data.sources import demo
from anomalymatch.data.sources.demo import COMMON, RARE, DemoSource, Grid, Shape, blobs, profile
from anomalymatch.errors import ConfigError


def pixels(source):
    return np.stack(source.read(source.ids))


def gallery(name, count=40, size=64):
    """`count` images of one class, as float."""
    grid = Grid.of(size)
    return [demo._render(np.random.default_rng([5, i]), grid, name).astype(float) for i in range(count)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    cache = tmp_path_factory.mktemp("demo")
    return cache, DemoSource(cache_dir=cache, count=40, size=32, rare_fraction=0.1)


def test_ids_classes_and_pixels(small, tmp_path):
    source = small[1]
    assert (source.name, source.channels, source.ids[1]) == ("demo", 3, "demo-000001")
    assert list(source.truth) == list(source.ids)
    assert len({image.tobytes() for image in source.read(source.ids)}) == 40  # no two are alike
    before = pixels(source)
    source.read(["demo-000003"])[0][:] = 0
    np.testing.assert_array_equal(pixels(source), before)
    odd = DemoSource(cache_dir=tmp_path, count=1, size=33).read(["demo-000000"])[0]
    assert (odd.shape, odd.dtype, odd.flags.c_contiguous) == ((33, 33, 3), np.uint8, True)


def test_same_seed_same_bytes(small, tmp_path):
    again = DemoSource(cache_dir=tmp_path, count=40, size=32, rare_fraction=0.1)
    np.testing.assert_array_equal(pixels(again), pixels(small[1]))
    assert (again.fingerprint, again.truth) == (small[1].fingerprint, small[1].truth)


def test_images_do_not_depend_on_the_count(small, tmp_path):
    fewer = DemoSource(cache_dir=tmp_path, count=15, size=32, rare_fraction=0.1)
    np.testing.assert_array_equal(pixels(fewer), pixels(small[1])[:15])
    assert list(fewer.truth.items()) == list(small[1].truth.items())[:15]


def test_another_seed_gives_other_images(small, tmp_path):
    other = DemoSource(cache_dir=tmp_path, count=40, size=32, rare_fraction=0.1, seed=1)
    assert not any((a == b).all() for a, b in zip(pixels(other), pixels(small[1]), strict=True))
    assert list(other.truth.values()) != list(small[1].truth.values())


@pytest.mark.parametrize("name", [*COMMON, *RARE])
def test_galaxies_look_alike_at_another_size(name):
    def likeness(a, b):
        return np.corrcoef(a.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).ravel(), b.ravel())[0, 1]

    assert np.median([likeness(*pair) for pair in zip(gallery(name, 9, 64), gallery(name, 9, 32), strict=True)]) > 0.9


@pytest.mark.parametrize("key", ["count", "size", "rare", "rare_fraction", "seed"])
def test_every_argument_changes_the_fingerprint(small, tmp_path, key):
    base = {"count": 2, "size": 16, "rare": "lens_arc", "rare_fraction": 0.1, "seed": 0}
    change = {"count": 3, "size": 17, "rare": "merger", "rare_fraction": 0.2, "seed": 1}
    a = DemoSource(cache_dir=tmp_path, **base)
    b = DemoSource(cache_dir=tmp_path, **base | {key: change[key]})
    assert a.fingerprint != b.fingerprint


@pytest.mark.parametrize("fraction", [0.003, 0.01, 0.125, 0.5, 0.9])
def test_prevalence_is_exact_and_common_classes_are_equal(fraction):
    classes = demo._assign_classes(4000, "merger", fraction, seed=3)
    counts = {name: classes.count(name) for name in (*COMMON, "merger")}
    assert sum(counts.values()) == len(classes) == 4000
    assert counts["merger"] == round(4000 * fraction)
    common = [counts[name] for name in COMMON]
    assert max(common) - min(common) <= 1


def test_classes_are_shuffled():
    classes = demo._assign_classes(1000, "lens_arc", 0.01, seed=0)
    repeats = sum(a == b for a, b in itertools.pairwise(classes))
    assert 180 < repeats < 320
    places = {i % demo.BLOCK for i, name in enumerate(classes) if name == "lens_arc"}
    assert len(places) > 5


def test_warning_without_anomalies(tmp_path, caplog):
    DemoSource(cache_dir=tmp_path, count=1, size=16, rare_fraction=1e-4)
    assert "none of the 1 demo images is a lens_arc" in caplog.text


def test_the_second_call_reads_the_cache(small, monkeypatch):
    cache, source = small
    monkeypatch.setattr(demo, "_render", None)
    again = DemoSource(cache_dir=str(cache), count=40, size=32, rare_fraction=0.1)
    np.testing.assert_array_equal(pixels(again), pixels(source))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"size": 15}, "size is 15: it must be at least 16"),
        ({"rare": "quasar"}, "rare is 'quasar': choose one of lens_arc, merger"),
        ({"rare_fraction": 0.0}, r"rare_fraction is 0\.0"),
        ({"rare_fraction": 1.0}, r"rare_fraction is 1\.0"),
        ({"rare_fraction": float("nan")}, "rare_fraction is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_arguments(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        DemoSource(cache_dir=tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("index", "ratio"), [(1.0, 1.0), (1.0, 0.4), (4.0, 0.7)])
def test_brightness_is_the_mean_within_the_half_light_ellipse(index, ratio):
    grid, radius, angle = Grid.of(600), 12.0, 0.6
    light = profile(grid, Shape(radius, index, ratio, angle), 50.0)
    along, across = (
        grid.x * np.cos(angle) + grid.y * np.sin(angle),
        grid.y * np.cos(angle) - grid.x * np.sin(angle),
    )
    inside = np.hypot(along, across / ratio) < radius
    assert light[inside].mean() == pytest.approx(50, rel=0.03)


def test_blobs_are_gaussians():
    grid = Grid.of(64)
    light = blobs(grid, np.array([0.5, 5.5]), np.array([0.5, -3.5]), 2.0, np.array([3.0, 4.0]))
    slow = sum(
        p * np.exp(-((grid.x - x) ** 2 + (grid.y - y) ** 2) / 8) for x, y, p in [(0.5, 0.5, 3.0), (5.5, -3.5, 4.0)]
    )
    np.testing.assert_allclose(light, slow)


def axis_ratio(image):
    """Minor over major axis from the second moments of the bright part within 20 pixels of the middle."""
    grid = Grid.of(len(image))
    light = np.where(np.hypot(grid.x, grid.y) < 20, np.maximum(image.sum(axis=2) - 45, 0), 0)
    x, y = (light * grid.x).sum() / light.sum(), (light * grid.y).sum() / light.sum()
    dx, dy = grid.x - x, grid.y - y
    moments = np.array([[dx * dx, dx * dy], [dx * dy, dy * dy]]) * light
    low, high = np.linalg.eigvalsh(moments.sum(axis=(2, 3)))
    return np.sqrt(low / high)


def test_elongation_of_the_common_classes():
    ratios = {name: np.median([axis_ratio(i) for i in gallery(name)]) for name in COMMON}
    assert ratios["edge_on_disk"] < 0.35 < ratios["smooth_cigar"] < 0.65 < 0.8 < ratios["smooth_round"]


def blueness(image, inner, outer):
    """Blue over red light in a ring, after the sky is taken off."""
    grid = Grid.of(len(image))
    distance = np.hypot(grid.x, grid.y)
    ring = image[(distance > inner) & (distance < outer)].mean(axis=0) - np.median(image[distance > 28], axis=0)
    return (ring[2] + 1) / (ring[0] + 1)


def test_lenses_are_red_inside_and_blue_outside():
    ring = {n: np.median([blueness(i, 6, 14) for i in gallery(n)]) for n in (*COMMON, "lens_arc")}
    assert ring["lens_arc"] > 1.2 * ring["smooth_round"]
    assert ring["unbarred_spiral"] > 1.2 * ring["smooth_round"]
    assert np.median([blueness(i, 0, 3) for i in gallery("lens_arc")]) < 0.9


def test_the_rare_class_is_not_trivial():
    # Overlap: one colour in one ring must not separate lenses from all else.
    lens = np.array([blueness(i, 6, 14) for i in gallery("lens_arc")])
    others = np.array([blueness(i, 6, 14) for name in COMMON for i in gallery(name)])
    wins = (lens[:, None] > others).mean()
    assert 0.5 < wins < 0.9


@pytest.mark.parametrize("name", [*COMMON, *RARE])
def test_cutouts_look_like_a_survey(name):
    images = np.stack(gallery(name))
    corners = images[:, :6, :6]
    assert 1 < np.median(corners) < 10
    assert 1.5 < np.median(corners.std(axis=(1, 2))) < 5
    centre = images[:, 24:40, 24:40].max(axis=(1, 2, 3))
    assert np.median(centre) > 80
    assert centre.min() > 20
    assert (images == 255).mean() < 0.01


@pytest.mark.slow
def test_the_default_set_renders_in_time(tmp_path):
    start = time.process_time()
    source = DemoSource(cache_dir=tmp_path)
    assert time.process_time() - start < 60  # seconds of one core: about 9, and twice that with types checked
    assert list(source.truth.values()).count("lens_arc") == 40
