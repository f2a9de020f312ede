import math

import numpy as np
import pytest

from anomalymatch.checks import check_choice, check_range
from anomalymatch.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "limits"),
    [
        (1, {"low": 1}),
        (0, {"low": 0, "high": 1}),
        (1, {"low": 0, "high": 1}),
        (np.float32(0.5), {"above": 0, "below": 1}),
        (np.int64(3), {"low": 1}),
        (math.inf, {"low": 0}),
        (-5, {"below": math.inf}),
        (-5, {}),
        (None, {"low": 1, "null": True}),
    ],
)
def test_values_in_range_pass(value, limits):
    check_range("al.budget", value, **limits)


@pytest.mark.parametrize(
    ("value", "limits", "said"),
    [
        (0, {"low": 1}, "at least 1"),
        (65_536, {"low": 0, "high": 65_535}, "between 0 and 65,535"),
        (-0.1, {"low": 0, "high": 1}, "between 0 and 1"),
        (1.0, {"low": 0.5, "below": 1}, "at least 0.5 and below 1"),
        (0.0, {"above": 0, "high": 1}, "above 0 and at most 1"),
        (0.0, {"above": 0}, "above 0"),
        (math.inf, {"above": 0, "below": math.inf}, "a finite number and above 0"),
        (math.nan, {}, "a number"),
        (math.nan, {"low": 0}, "at least 0"),
        (0, {"low": 1, "null": True}, "at least 1, or null"),
        (None, {"low": 1}, "at least 1"),
        ("2", {"low": 1}, "at least 1"),
        (True, {"low": 1}, "at least 1"),
        ([3], {"low": 1}, "at least 1"),
    ],
)
def test_others_are_refused_with_key_value_and_range(value, limits, said):
    with pytest.raises(ConfigError) as caught:
        check_range("al.budget", value, **limits)
    assert str(caught.value) == f"al.budget is {value}: it must be {said}"


@pytest.mark.parametrize(
    ("value", "choices", "null"),
    [("ray", ("local", "ray"), False), (5, (0, 1, 5), False), (None, ("mvtec",), True), ("pca", {"pca": 1}, False)],
)
def test_choices_pass(value, choices, null):
    check_choice("key", value, choices, null=null)


@pytest.mark.parametrize(
    ("value", "choices", "null", "said"),
    [
        ("rya", ("local", "ray"), False, "'rya': choose one of local, ray (did you mean ray?)"),
        ("x", ("local", "ray"), False, "'x': choose one of local, ray"),
        (3, (1, 4, 8), False, "3: choose one of 1, 4, 8"),
        (["ray"], ("local", "ray"), False, "['ray']: choose one of local, ray (did you mean ray?)"),
        (None, ("local", "ray"), False, "None: choose one of local, ray"),
        ("mvtek", ("mvtec",), True, "'mvtek': choose one of mvtec, or null (did you mean mvtec?)"),
    ],
)
def test_other_choices_are_refused_with_the_most_similar(value, choices, null, said):
    with pytest.raises(ConfigError) as caught:
        check_choice("key", value, choices, null=null)
    assert str(caught.value) == f"key is {said}"
