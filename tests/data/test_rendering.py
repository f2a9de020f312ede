import json
from functools import partial

import numpy as np
import pytest
from astropy.visualization import (
    AsymmetricPercentileInterval,
    MinMaxInterval,
    ZScaleInterval,
)
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from omegaconf import OmegaConf

import anomalymatch
from anomalymatch.config import config_folder
from anomalymatch.data.rendering import (
    CURVES,
    DEFAULT_BANDS,
    INTERVALS,
    Rendering,
    _limits,
    _matrix,
    _pair,
    band_names,
    midtones,
)
from anomalymatch.data.source import EIGHT_BITS
from anomalymatch.errors import ConfigError, DataError, UnreadableImageError

GRI = ("g", "r", "i")
STRETCHES = sorted(path.stem for path in (config_folder() / "stretch").glob("*.yaml"))
RNG = np.random.default_rng(0)
NOISE = RNG.normal(100, 20, (24, 20, 3)).astype(np.float32)
RAMP = np.linspace(0, 1, 11).reshape(1, 11, 1)


def sky(size=128, seed=0):
    """Make a galaxy and stars on a sky without background, in units of its noise; return the galaxy's place too."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size].astype(float)
    r = np.hypot(x - 60, (y - 68) / 0.6)
    image = 60 * np.exp(-r / 9) + 400 * np.exp(-r / 2) + rng.normal(0, 1, (size, size))
    for _ in range(14):
        cx, cy = rng.uniform(3, size - 3, 2)
        image += 10 ** rng.uniform(0.7, 3.2) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 3.92)
    return image.astype(np.float32)[..., None], (slice(64, 72), slice(56, 64))


def curve(rendering, x):
    """Evaluate the formula of the curve."""
    a = rendering.parameter
    if rendering.curve == "log":
        a = 1000 if a is None else a
        return np.log(a * x + 1) / np.log(a + 1)
    if rendering.curve == "asinh":
        a = 0.1 if a is None else a
        return np.arcsinh(x / a) / np.arcsinh(1 / a)
    return x**0.5 if rendering.curve == "sqrt" else x


def slow(rendering, plane, low, high):
    """Render a channel with a known interval pixel by pixel."""
    out = np.zeros(plane.shape, dtype=np.float64)
    for at, value in np.ndenumerate(plane):
        if np.isnan(value) or high <= low:
            continue
        out[at] = 255 * curve(rendering, (min(max(float(value), low), high) - low) / (high - low))
    return out


@pytest.mark.parametrize("name", ["linear", "sqrt", "log", "asinh"])
@pytest.mark.parametrize("parameter", [None, 3.0])
@pytest.mark.parametrize(
    ("interval", "astropy"),
    [
        ("auto", MinMaxInterval()),
        ("minmax", MinMaxInterval()),
        ("percentile", AsymmetricPercentileInterval(2, 90)),
        ("zscale", ZScaleInterval()),
    ],
)
def test_rendering_equals_its_slow_twin(name, parameter, interval, astropy):
    rendering = Rendering(interval, name, parameter if name in ("log", "asinh") else None, percentiles=(2, 90))
    pixels = np.concatenate([NOISE, NOISE[:4] * 8])
    image = rendering(pixels, GRI)
    assert image.dtype == np.uint8
    for k in range(3):
        low, high = astropy.get_limits(pixels[..., k])
        assert np.abs(image[..., k] - slow(rendering, pixels[..., k], low, high)).max() <= 0.501


def test_values_by_hand():
    values = {
        "linear": [0, 26, 51, 76, 102, 128, 153, 178, 204, 230, 255],
        "sqrt": [0, 81, 114, 140, 161, 180, 198, 213, 228, 242, 255],  # 255 sqrt(x)
        "log": [0, 170, 196, 211, 221, 229, 236, 242, 247, 251, 255],  # 255 log10(1000x + 1) / log10(1001)
        "asinh": [0, 75, 123, 155, 178, 197, 212, 225, 236, 246, 255],  # 255 asinh(10x) / asinh(10)
    }
    for name, expected in values.items():
        image = Rendering("minmax", name)(RAMP * 40 - 7, ("grey",))
        assert np.abs(image[0, :, 0].astype(int) - expected).max() <= (1 if name == "linear" else 0), name


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_midtones_transfer_function(balance, median, target):
    assert midtones(0.0, balance) == 0
    assert midtones(1.0, balance) == pytest.approx(1, rel=1e-9)
    assert midtones(balance, balance) == pytest.approx(0.5)
    assert midtones(median, midtones(median, target)) == pytest.approx(target)
    x = np.linspace(0, 1, 50)
    assert (np.diff(midtones(x, balance)) > 0).all()


@pytest.mark.parametrize("target", [None, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("interval", ["minmax", "percentile"])
def test_midtones_move_the_median_to_the_target(target, interval):
    grey = 255 * (target or 0.25)
    image = Rendering(interval, "midtones", target)(NOISE[:23, :19], GRI)
    assert np.abs(np.median(image, axis=(0, 1)) - grey).max() <= 0.501
    assert image.min() == 0
    assert image.max() == 255


def test_missing_pixels_do_not_change_the_median():
    """If half of an image is NaN, as at the edge of a field, the other half looks as it does alone."""
    rendering = Rendering("minmax", "midtones")
    pixels = np.concatenate([NOISE, np.full((60, 20, 3), np.nan, np.float32)])
    pixels[0, 0], pixels[0, 1] = np.inf, -np.inf
    cut = pixels[:24].copy()
    assert np.array_equal(rendering(pixels, GRI)[:24], rendering(cut, GRI))
    assert abs(int(np.median(rendering(pixels, GRI)[:24])) - 64) <= 1


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("per_channel", [True, False])
def test_scale_and_offset_change_nothing(interval, name, per_channel):
    rendering = Rendering(interval, name, per_channel=per_channel)
    pixels = np.rint(NOISE).astype(np.float64)
    before = rendering(pixels, GRI)
    # Powers of two and small whole numbers are exact; zscale fits a line, which is not.
    after = rendering(pixels * 1024 + 512, GRI)
    assert np.abs(before.astype(int) - after).max() <= (interval == "zscale")
    assert np.array_equal(before, rendering(np.rint(NOISE).astype(np.int16), GRI))
    if interval != "zscale":
        assert np.array_equal(before, rendering(np.rint(NOISE).astype(np.uint16), GRI))


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("name", CURVES)
def test_named_bands_may_be_permuted(order, name):
    limits = {"r": (60.0, 160.0)}
    rendering = Rendering("percentile", name, limits=limits)
    image = rendering(NOISE, GRI)
    permuted = rendering(NOISE[..., list(order)], [GRI[k] for k in order])
    assert np.array_equal(permuted, image[..., list(order)])
    combined = Rendering("minmax", name, combine={"x": {"g": 2, "i": 1}, "y": {"r": 1}})
    again = combined(NOISE[..., list(order)], [GRI[k] for k in order])
    assert np.array_equal(combined(NOISE, GRI), again)


def test_a_common_interval_keeps_ratios():
    pixels = np.array([[[0, 10, 100], [20, 40, 80], [50, 100, 200]]], dtype=np.float32)
    image = Rendering("minmax", per_channel=False)(pixels, GRI)
    assert image.tolist() == [[[0, 13, 128], [26, 51, 102], [64, 128, 255]]]
    assert Rendering("minmax")(pixels, GRI).tolist() == [[[0, 0, 42], [102, 85, 0], [255, 255, 255]]]


def test_a_common_median_keeps_the_order_of_colours():
    """A red image stays red with a common median, and becomes grey with a median for each channel."""
    pixels = NOISE * np.array([1, 2, 4], dtype=np.float32)
    linked = Rendering("minmax", "midtones", per_channel=False)(pixels, GRI)
    assert (np.diff(np.median(linked, axis=(0, 1))) > 20).all()
    assert abs(np.median(linked) - 64) <= 1
    alone = Rendering("minmax", "midtones")(pixels, GRI)
    assert np.ptp(np.median(alone, axis=(0, 1))) <= 1


def test_limits_by_name():
    pixels = np.array([[[0.0, 0.0], [5.0, 5.0], [10.0, 10.0], [40.0, 40.0]]])
    image = Rendering("minmax", limits={"r": [0, 10]})(pixels, ("g", "r"))
    assert image[0, :, 0].tolist() == [0, 32, 64, 255]
    assert image[0, :, 1].tolist() == [0, 128, 255, 255]
    common = Rendering("minmax", limits={"r": [0, 10]}, per_channel=False)(pixels * [1, 2], ("g", "r"))
    assert common[0, :, 0].tolist() == [0, 16, 32, 128]
    assert common[0, :, 1].tolist() == [0, 255, 255, 255]
    eight_bits = np.array([[[0], [50], [100], [200]]], dtype=np.uint8)
    assert Rendering(limits={"grey": (0, 100)})(eight_bits, ("grey",))[0, :, 0].tolist() == [0, 128, 255, 255]


def test_combined_bands_by_hand():
    pixels = np.array([[[1, 10, 100], [2, 30, 500]]], dtype=np.int16)
    limits = {"a": (0, 51), "b": (0, 255)}
    rendering = Rendering("minmax", combine={"b": {"i": 0.5, "g": -1}, "a": {"r": 1}}, limits=limits)
    assert rendering.channels(GRI) == ("b", "a")
    assert rendering(pixels, GRI).tolist() == [[[49, 50], [248, 150]]]


def test_nan_in_an_unused_band_is_ignored():
    pixels = NOISE.copy()
    pixels[..., 1] = np.nan
    rendering = Rendering(combine={"a": {"g": 1, "r": 0}, "b": {"i": 1}})
    assert np.array_equal(rendering(pixels, GRI), rendering(NOISE, GRI))
    pixels[3, 4, 0] = np.nan
    assert rendering(pixels, GRI)[3, 4, 0] == 0
    spreads = Rendering(combine={"a": {"g": 1, "r": 1}})
    with pytest.raises(UnreadableImageError, match="finite"):
        spreads(pixels, GRI)


def test_8_bits_stay_unchanged():
    pixels = RNG.integers(90, 120, (5, 6, 3), dtype=np.uint8)
    assert EIGHT_BITS(pixels, GRI) is pixels
    assert Rendering(combine={}, limits={})(pixels, GRI) is pixels
    same = Rendering(combine={name: {name: 1} for name in GRI})
    assert np.array_equal(same(pixels, GRI), pixels)
    assert np.array_equal(Rendering(curve="log")(pixels, GRI), np.rint(slow(Rendering(curve="log"), pixels, 0, 255)))


CHANGES = [
    ({}, {"interval": "percentile"}),
    ({}, {"interval": "zscale"}),
    ({}, {"curve": "sqrt"}),
    ({}, {"curve": "log"}),
    ({}, {"curve": "asinh"}),
    ({}, {"curve": "midtones"}),
    ({"curve": "log"}, {"curve": "log", "parameter": 10}),
    ({"curve": "asinh"}, {"curve": "asinh", "parameter": 1}),
    ({"curve": "midtones"}, {"curve": "midtones", "parameter": 0.5}),
    ({"interval": "percentile"}, {"interval": "percentile", "percentiles": (5, 99.5)}),
    ({"interval": "percentile"}, {"interval": "percentile", "percentiles": (0.5, 95)}),
    ({}, {"limits": {"r": (0, 200)}}),
    ({}, {"per_channel": False}),
    ({"curve": "midtones", "limits": dict.fromkeys(GRI, (0, 300))}, {"per_channel": False}),
    ({}, {"combine": {"g": {"g": 1}, "r": {"r": 1, "g": 1}, "i": {"i": 1}}}),
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_every_option_changes_the_image_and_the_fingerprint(before, after, make_source):
    options = [{"interval": "minmax", **values} for values in (before, {**before, **after})]
    pixels = np.concatenate([NOISE, NOISE[:3] * 5]) * [1, 2, 3]  # zscale clips the bright rows
    first, second = (Rendering(**values)(pixels, GRI) for values in options)
    assert not np.array_equal(first, second)
    keys = [make_source(bands=GRI, rendering=Rendering(**values)).fingerprint for values in options]
    assert keys[0] != keys[1]
    rendering = Rendering(**options[1])
    eight_bits = RNG.integers(90, 120, (24, 20, 3), dtype=np.uint8)
    assert not np.array_equal(rendering(eight_bits, GRI), eight_bits)
    again = Rendering(**json.loads(json.dumps(rendering.as_dict())))
    assert again == rendering


def test_nan_and_infinity():
    pixels = np.array([[[np.nan], [0.0], [5.0], [10.0], [np.inf], [-np.inf], [-np.finfo(float).max]]])
    for interval in ("auto", "minmax"):
        assert Rendering(interval)(pixels, ("grey",)).ravel().tolist() == [0, 0, 128, 255, 255, 0, 0]
    for name in CURVES:
        image = Rendering("minmax", name)(pixels, ("grey",)).ravel()
        assert image[[0, 1, 3, 4, 5]].tolist() == [0, 0, 255, 255, 0]
    assert Rendering("percentile", percentiles=(0, 50))(pixels, ("grey",)).ravel().tolist()[:4] == [0, 0, 255, 255]
    spike = np.where(np.arange(16).reshape(4, 4, 1) == 0, 8.0, 0.0)  # its median of 0 has no midtones
    assert Rendering("minmax", "midtones")(spike, ("grey",)).tolist() == (spike / 8 * 255).tolist()


@pytest.mark.parametrize("fill", [np.finfo(np.float32).max, np.finfo(np.float32).min, 1e30, -1e30, 9.969e36])
@pytest.mark.parametrize("interval", INTERVALS)
def test_fill_values_are_holes(fill, interval):
    rendering = Rendering(interval, "midtones")
    filled, holes = NOISE.copy(), NOISE.copy()
    filled[3:9, 4], holes[3:9, 4] = fill, np.nan
    image = rendering(filled, GRI)
    assert np.array_equal(image, rendering(holes, GRI))
    assert len(np.unique(image)) > 50
    combined = Rendering(interval, combine={"a": {"g": 0.25, "r": 0.5}})
    assert np.array_equal(combined(filled, GRI), combined(holes, GRI))
    assert EIGHT_BITS(np.array([[[1e29], [0.0]]]), ("grey",)).tolist() == [[[255], [0]]]


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("value", [-3, 0, 7])
def test_a_constant_channel_becomes_black(interval, name, value):
    pixels = NOISE.copy()
    pixels[..., 1] = value
    pixels[..., 2] = np.nan
    image = Rendering(interval, name)(pixels, GRI)
    assert not image[..., 1:].any()
    assert image[..., 0].any()
    assert not Rendering(interval, name)(np.full((5, 5, 1), value, np.int32), ("grey",)).any()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (NOISE[..., :2], r"2 bands .* 3: g, r, i$"),
        (NOISE[..., :2].astype(np.uint8), r"2 bands .* 3: g, r, i$"),
        (NOISE.astype(np.complex64), "complex64"),
        (NOISE.astype(object), "object"),
        (NOISE.astype("U4"), "<U4"),
        (NOISE * np.nan, "finite"),
        (np.full((2, 2, 3), np.inf), "finite"),
        (NOISE[:0], "no pixels"),
        (NOISE[:0].astype(np.uint8), "no pixels"),
    ],
)
def test_pixels_that_cannot_be_rendered(pixels, message):
    with pytest.raises(UnreadableImageError, match=message):
        EIGHT_BITS(pixels, GRI)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": "max"}, r"stretch\.interval is 'max'.*zscale"),
        ({"curve": "cubic"}, r"stretch\.curve is 'cubic'.*midtones"),
        ({"curve": "sqrt", "parameter": 2}, r"stretch\.parameter is 2.*stretch\.curve"),
        ({"percentiles": (99, 1)}, r"stretch\.percentiles are 99\.0 and 1\.0"),
        ({"percentiles": (-1, 50)}, r"0 and 100"),
        ({"percentiles": (5, 101)}, r"0 and 100"),
        ({"percentiles": (1, 2, 3)}, r"stretch\.percentiles is \(1, 2, 3\)"),
        ({"percentiles": (float("nan"), 5)}, r"stretch\.percentiles is nan"),
        ({"limits": {"g": [3, 3]}}, r"stretch\.limits\.g are 3\.0 and 3\.0"),
        ({"limits": {"g": [4]}}, r"stretch\.limits\.g is \[4\]"),
        ({"limits": {"g": [0, float("inf")]}}, r"stretch\.limits\.g is inf"),
        ({"curve": "log", "parameter": 0}, r"stretch\.parameter is 0:"),
        ({"curve": "log", "parameter": float("nan")}, r"stretch\.parameter is nan"),
        ({"curve": "midtones", "parameter": 1}, r"stretch\.parameter is 1:.* 1"),
        ({"parameter": 0.1}, r"stretch\.parameter is 0\.1.*linear"),
        ({"combine": {"a": {}}}, r"stretch\.combine\.a "),
        ({"combine": {"a": {"g": 0}}}, r"stretch\.combine\.a "),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        Rendering(**options)


@pytest.mark.parametrize(
    ("parse", "value", "message"),
    [
        (partial(_pair, "stretch.percentiles"), ["a", "b"], "stretch.percentiles is a:"),
        (_limits, {"g": 4}, "stretch.limits.g is 4:"),
        (_limits, {"g": "ab"}, "stretch.limits.g is ab:"),
        (_limits, [0, 1], r"stretch.limits is \[0, 1\]:"),
        (_matrix, {"a": {"g": "x"}}, "stretch.combine.a.g is x:"),
        (_matrix, {"a": {"g": True}}, "stretch.combine.a.g is True:"),
        (_matrix, {"a": "g"}, "stretch.combine.a is g:"),
        (_matrix, "g", "stretch.combine is g:"),
    ],
)
def test_values_of_a_wrong_type(parse, value, message):
    """Below `Rendering` itself, for which the type checks of the tests would raise first."""
    with pytest.raises(ConfigError, match=f"^{message}"):
        parse(OmegaConf.create({"value": value}).value)


def test_unknown_bands_and_channels():
    with pytest.raises(DataError, match=r"stretch\.combine .* u, z,.* g, r, i$"):
        Rendering(combine={"red": {"z": 1, "g": 1}, "blue": {"u": 1}}).channels(GRI)
    with pytest.raises(DataError, match=r"stretch\.limits .* red,.* g, r, i$"):
        Rendering(limits={"red": (0, 1)}).channels(GRI)
    with pytest.raises(DataError, match=r"stretch\.limits .* g,.* red$"):
        Rendering(limits={"g": (0, 1)}, combine={"red": {"g": 1}}).channels(GRI)
    assert Rendering().channels(GRI) == GRI


def test_names_of_bands():
    assert band_names(None, 1) == ("grey",)
    assert band_names(None, 5) == ("band0", "band1", "band2", "band3", "band4")
    assert all(len(names) == count for count, names in DEFAULT_BANDS.items())
    assert band_names(["u", "g"], 2) == ("u", "g")
    for names in (["u"], ["u", "u"], ["u", "g", "r"]):
        with pytest.raises(ConfigError, match=r"^dataset\.source\.bands=\[.* 2 "):
            band_names(names, 2)


def test_configured_default_equals_the_default(make_source):
    """Equal renderings have equal fingerprints, whatever the types of their values."""
    configured = instantiate(anomalymatch.compose("stretch=linear").stretch)
    assert configured == EIGHT_BITS == Rendering(percentiles=[0.5, 99.5], limits={}, combine={})
    assert make_source(rendering=configured).fingerprint == make_source().fingerprint


@pytest.mark.parametrize("name", STRETCHES)
def test_configured_stretches_show_sources_on_a_sky(name):
    pixels, galaxy = sky()
    rendering = instantiate(anomalymatch.compose(f"stretch={name}").stretch)
    image = rendering(pixels, ("grey",))
    background, source = np.median(image), np.median(image[galaxy])
    assert source - background > 5 if name == "linear" else source - background > 70
    assert background < 90, "the sky is dark"
    assert (image == 255).mean() < 0.1, "few pixels are saturated"
    if name != "linear":
        assert len(np.unique(image)) > 60
    order = np.argsort(pixels.ravel())
    assert (np.diff(image.ravel()[order].astype(int)) >= 0).all(), "brighter stays brighter"


def test_configured_stretches():
    pixels, _ = sky()
    built = {name: instantiate(anomalymatch.compose(f"stretch={name}").stretch) for name in STRETCHES}
    assert STRETCHES == ["asinh", "linear", "log", "midtones", "percentile", "sqrt", "zscale"]
    assert len({rendering(pixels, ("grey",)).tobytes() for rendering in built.values()}) == len(STRETCHES)
    assert all(rendering.parameter is None for rendering in built.values())
    assert abs(np.median(built["midtones"](pixels, ("grey",))) - 64) <= 1


def test_options_of_the_command_line():
    words = ["stretch.limits={red: [-0.1, 30]}", "stretch.combine={red: {i: 1}, blue: {g: 0.7, u: 0.3}}"]
    rendering = instantiate(anomalymatch.compose("stretch=asinh", "stretch.parameter=0.02", *words).stretch)
    combine = {"red": {"i": 1.0}, "blue": {"g": 0.7, "u": 0.3}}
    assert rendering == Rendering("percentile", "asinh", 0.02, limits={"red": (-0.1, 30)}, combine=combine)
    assert rendering.channels("ugri") == ("red", "blue")


def shown_values(pixels):
    values = pixels.astype(np.float64)
    return np.isfinite(values) & ((pixels.dtype.kind != "f") | (np.abs(values) < 1e30))


KINDS = [np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.int32, np.uint32, np.int64, np.float16, np.float32]
SHAPES = hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([*KINDS, np.float64]).flatmap(lambda kind: hnp.arrays(kind, SHAPES)),
    st.sampled_from(INTERVALS),
    st.sampled_from(CURVES),
    st.booleans(),
)
def test_any_pixels_give_an_image_or_a_reason(pixels, interval, name, per_channel):
    bands = band_names(None, pixels.shape[2])
    before = pixels.copy()
    try:
        image = Rendering(interval, name, per_channel=per_channel)(pixels, bands)
    except UnreadableImageError:
        assert not shown_values(pixels).any()
        return
    assert (image.dtype, image.shape) == (np.uint8, pixels.shape)
    assert np.array_equal(pixels, before, equal_nan=pixels.dtype.kind == "f"), "the pixels are not modified"
    for k in range(pixels.shape[2]):  # brighter stays brighter
        plane, shown = pixels[..., k].ravel(), image[..., k].ravel().astype(int)
        valid = shown_values(plane) | np.isinf(plane)
        order = np.argsort(plane[valid], kind="stable")
        assert (np.diff(shown[valid][order]) >= 0).all()
        assert not shown[~valid].any()
