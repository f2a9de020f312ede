import math

import pytest

from anomalymatch.evaluation.advice import Yield, advice, recent_yield
from anomalymatch.evaluation.discovery import UNKNOWN, Count

MANY, FEW = Count(30, 12, 80), Count(1, 0, 3)


def rows(*pairs, audited=None):
    return [
        {"labels": labels, "found": found} | ({} if audited is None else {"audited": audited[i]})
        for i, (labels, found) in enumerate(pairs)
    ]


def test_yield_of_the_last_forty_labels():
    assert recent_yield(rows((100, 5))) == (0, 0)
    assert recent_yield(rows((100, 5), (120, 9))) == (4, 20)
    assert recent_yield(rows((100, 5), (120, 20), (140, 22), (160, 23))) == (3, 40)
    assert recent_yield(rows((100, 5), (110, 9), (115, 10), (145, 11))) == (6, 45)


def test_corrections_and_audits_end_the_yield():
    assert recent_yield(rows((100, 5), (120, 9), (120, 8), (140, 9))) == (1, 20)  # a label was corrected
    assert recent_yield(rows((100, 5), (120, 9), (140, 9), (160, 9), audited=(0, 0, 20, 20))) == (0, 20)
    assert recent_yield(rows((100, 5), (120, 9), audited=(30, 29))) == (4, 20)  # the search met a sealed image


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
    text = advice(left, recent, found=found, above=above)
    assert said in text
    assert bool(said) == bool(text)


def test_without_an_estimate_there_is_no_text():
    assert advice(Count(math.nan, math.nan, math.nan), Yield(0, 400), found=3, above=FEW) == ""
