"""Contract tests of the views of every choice of `augment=`."""

from functools import cache

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from anomalymatch.build_images import build
from anomalymatch.config import compose
from anomalymatch.errors import ConfigError

CHOICES = ("galaxies", "objects", "texture")
KINDS = ("weak", "strong", "contrastive")
SIZE = 24


@cache
def node_of(choice):
    return compose(f"augment={choice}").augment


def make(choice, **changes):
    return instantiate(OmegaConf.to_container(node_of(choice), resolve=True) | changes)


def view_of(augmentation, kind, channels, size=SIZE):
    return augmentation.contrastive(channels, size) if kind == "contrastive" else getattr(augmentation, kind)(channels)


def noise(channels=3, size=SIZE):
    return np.random.default_rng(0).integers(0, 256, (size, size, channels), dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_same_seed_gives_the_same_view_in_any_order(choice, channels, kind):
    image, view = noise(channels), view_of(make(choice), kind, channels)
    first = [view(image, seed) for seed in range(20)]
    np.testing.assert_array_equal(image, noise(channels))  # the image itself is left alone
    again = view_of(make(choice), kind, channels)
    for seed in (7, 19, 0, 7):
        np.testing.assert_array_equal(again(image, seed), first[seed])
    assert all(each.shape == image.shape and each.dtype == np.uint8 and each.flags.c_contiguous for each in first)
    assert len({each.tobytes() for each in first}) > 15


KNOBS = {
    "objects": {
        "flip": 0.0,
        "vertical_flip": 0.5,
        "translate": 0.3,
        "operations": 1,
        "factor": [0.5, 0.6],
        "posterize_bits": [1, 2],
        "rotate": 90.0,
        "shear": 1.0,
        "strong_translate": 0.05,
        "cutout": 0.0,
        "border": "constant",
    },
    "galaxies": {
        "translate": 0.3,
        "rotate": 0.0,
        "zoom": [1.0, 1.0],
        "strong_translate": 0.3,
        "blur": 0.1,
        "noise": 0.2,
        "gain": 0.8,
        "band_gain": 0.8,
        "border": "reflect",
    },
    "texture": {
        "translate": 0.3,
        "rotate": 90.0,
        "zoom": [1.0, 1.0],
        "strong_translate": 0.3,
        "brightness": 0.5,
        "contrast": 0.8,
        "blur": 0.1,
        "noise": 0.2,
        "cutout": 0.0,
        "border": "constant",
    },
}
WEAK = {"flip", "vertical_flip", "translate", "border"}
"""Knobs that change the weak view too."""
ALONE = {"cutout"}
"""Knobs that do not change the view of contrastive learning."""


@pytest.mark.parametrize("choice", CHOICES)
def test_every_knob_is_turned_below(choice):
    keys = {key for key in node_of(choice) if not key.startswith("_")}
    assert keys - {"two_views"} == set(KNOBS[choice])  # turned in test_pairs.py


@pytest.mark.parametrize(("choice", "knob"), [(choice, knob) for choice in CHOICES for knob in KNOBS[choice]])
def test_every_knob_changes_its_views(choice, knob):
    plain, changed = make(choice), make(choice, **{knob: KNOBS[choice][knob]})
    for kind in KINDS:
        one, other = (view_of(each, kind, 3) for each in (plain, changed))
        seeds = range(60 if choice == "objects" else 10)
        differ = any(not np.array_equal(one(noise(), seed), other(noise(), seed)) for seed in seeds)
        strong = choice == "objects" or knob != "translate"
        expected = {
            "weak": knob in WEAK,
            "strong": strong,
            "contrastive": strong and choice != "objects" and knob not in ALONE,
        }
        assert differ == expected[kind], kind


@pytest.mark.parametrize("choice", CHOICES)
def test_smaller_views_of_contrastive_learning_are_parts_at_the_same_scale(choice):
    small = make(choice).contrastive(4, 10)(noise(4), 3)
    assert small.shape == (10, 10, 4)
    if choice == "galaxies":
        whole = make(choice).contrastive(4, SIZE)(noise(4), 3)
        np.testing.assert_array_equal(small, whole[7:17, 7:17])


def test_the_views_of_contrastive_learning_of_objects_have_settings_of_their_own():
    still = {"crop": [1.0, 1.0], "jitter_probability": 0.0, "grey": 0.0, "blur": 0.0, "flip": 0.0}
    words = [f"augment.two_views.{key}={value}" for key, value in still.items()]
    view = instantiate(compose("augment=objects", *words).augment).contrastive(3, SIZE)
    np.testing.assert_array_equal(view(noise(), 1), noise())


WRONG = {
    "objects": """flip=1.5 cutout=-0.1 translate=nan operations=-1 rotate=-5.0 shear=-0.1 factor=[0.9,0.1]
        factor=[0.5,0.6,0.7] posterize_bits=[0,8] border=mirror border=sky two_views.blur=2.0 two_views.crop=[0.0,1.0]
        two_views.jitter=[0.1] two_views.jitter=[0.0,0.0,0.0,0.9] two_views.blur_sigma=[2.0,1.0]""",
    "galaxies": """translate=-0.1 rotate=181.0 zoom=[0.0,1.0] zoom=[1.2,0.6] strong_translate=2.0 blur=-1.0 noise=nan
        gain=1.0 band_gain=-0.1 border=constant""",
    "texture": "translate=1.5 rotate=-1.0 zoom=[1.0] brightness=2.0 contrast=-0.5 blur=nan cutout=1.5 border=sky",
}


@pytest.mark.parametrize(("choice", "word"), [(name, word) for name, words in WRONG.items() for word in words.split()])
def test_a_wrong_value_is_an_error_that_names_its_key(choice, word):
    key, value = word.split("=")
    node = OmegaConf.merge(node_of(choice), OmegaConf.from_dotlist([word.replace("nan", ".nan")]))
    with pytest.raises(ConfigError) as error:
        build(node)
    name = key if key.startswith("two_views") else f"augment.{key}"
    assert str(error.value).replace("'", "").startswith(f"{name} is {value.replace(',', ', ')}")
