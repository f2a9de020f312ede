import pytest

from anomalymatch.errors import ConfigError
from anomalymatch.evaluation.advice import StoppingRule, Yield
from anomalymatch.evaluation.discovery import UNKNOWN, Count

SETTINGS = {"recent_labels": 40, "least_labels": 20, "few": 3, "share": 0.1, "score": 0.1}
RULE = StoppingRule(**SETTINGS)
MANY, FEW = Count(30, 12, 80), Count(1, 0, 3)


def rows(*pairs, audited=None):
    return [
        {"labels": labels, "found": found} | ({} if audited is None else {"audited": audited[i]})
        for i, (labels, found) in enumerate(pairs)
    ]


def test_yield_of_the_last_forty_labels():
    assert RULE.recent_yield(rows((100, 5))) == (0, 0)
    assert RULE.recent_yield(rows((100, 5), (120, 9))) == (4, 20)
    assert RULE.recent_yield(rows((100, 5), (120, 20), (140, 22), (160, 23))) == (3, 40)
    assert RULE.recent_yield(rows((100, 5), (110, 9), (115, 10), (145, 11))) == (6, 45)


def test_corrections_and_audits_end_the_yield():
    assert RULE.recent_yield(rows((100, 5), (120, 9), (120, 8), (140, 9))) == (1, 20)  # a label was corrected
    assert RULE.recent_yield(rows((100, 5), (120, 9), (140, 9), (160, 9), audited=(0, 0, 20, 20))) == (0, 20)
    assert RULE.recent_yield(rows((100, 5), (120, 9), audited=(30, 29))) == (4, 20)  # the search met a sealed image


@pytest.mark.parametrize(
    ("left", "recent", "found", "above", "said"),
    [
        (UNKNOWN, Yield(0, 40), 5, None, ""),
        (Count(0, 0, 0), Yield(3, 40), 5, None, "no anomaly is left: stop labelling"),
        (FEW, Yield(0, 40), 5, None, "the last 40 labels found nothing and at most 3 (90 %) are left: you may stop"),
        (FEW, Yield(2, 40), 5, None, "at most 3 (90 %) are left: you may stop soon"),
        (Count(2, 0, 8), Yield(0, 20), 80, None, "at most 8 (90 %) are left: you may stop"),  # a tenth of the found
        (MANY, Yield(0, 40), 5, FEW, "at most 3 (90 %) are left above a score of 0.1: you may stop, though"),
        (MANY, Yield(0, 40), 5, FEW, "up to 80 may be left in all"),
        (MANY, Yield(0, 40), 5, MANY, "though up to 80 (90 %) may be left: go on"),
        (MANY, Yield(0, 19), 5, FEW, "about 30 are left (90 %: 12 to 80)"),  # too few labels to say that it is dry
        (MANY, Yield(5, 32), 5, None, "about 30 are left (90 %: 12 to 80); going on at the present rate finds one in"),
        (MANY, Yield(5, 32), 5, None, "one in 6.4 labels"),
        (MANY, Yield(5, 30), 5, None, "one in 6 labels"),
        (MANY, Yield(20, 20), 5, None, "one in 1 label"),
    ],
)
def test_advice(left, recent, found, above, said):
    text = RULE.advice(left, recent, found=found, above=above)
    assert said in text
    assert bool(said) == bool(text)


@pytest.mark.parametrize(
    "changed", [{"recent_labels": 20}, {"least_labels": 41}, {"few": 0}, {"share": 0.5}, {"score": 0.2}],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_each_setting_changes_the_advice(changed):
    history = rows((100, 60), (120, 61), (140, 61), (160, 61))

    def texts(rule):
        recent = rule.recent_yield(history)
        lefts = [(Count(1, 0, 2), 5), (Count(10, 5, 20), 61), (MANY, 5)]
        return [
            rule.advice(left, given, found=found, above=FEW)
            for left, found in lefts
            for given in (recent, Yield(1, 40), Yield(0, 40))
        ]

    assert texts(StoppingRule(**SETTINGS | changed)) != texts(RULE)


@pytest.mark.parametrize(
    ("key", "value"), [("recent_labels", 0), ("least_labels", 0), ("few", -1), ("share", 1.5), ("score", -0.1)]
)
def test_a_setting_out_of_range_is_refused(key, value):
    with pytest.raises(ConfigError, match=rf"al\.stopping\.{key} is {value}"):
        StoppingRule(**SETTINGS | {key: value})
