"""Guided random audit: its progress towards a goal, and the estimate in words."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int8

from anomalymatch.evaluation.discovery import Count, anomalies_among, anomalies_left
from anomalymatch.types import Label
from anomalymatch.ui.gallery import CODES

GOAL = 200
"""Size of an audit unless a person chooses another: without an anomaly among them, at most 1.5 % are (95 %)."""


START = (
    "Label each image, whatever it shows: scores are hidden, and the order is random. Go on to the goal: to stop early "
    "at a number that one likes makes the interval less sure."
)


class AuditProgress(NamedTuple):
    """Progress of a random audit.

    Attributes:
        goal: number of images to label, at most all readable ones.
        labelled: number of them with a label.
        sample: number of images up to the first one without a label, which are the random sample.
        anomalies: number of anomalies in the sample.
        unsure: number of unsure ones in the sample, which count as normal.
        images: number of readable images in the archive.
        total: estimated number of anomalies in the archive, with an exact 90 % interval; NaN without a sample.
        left: estimated number of those without a label.
        found: number of all labelled anomalies.
        advice: a sentence on whether to go on, once the goal is reached.
    """

    goal: int
    labelled: int
    sample: int
    anomalies: int
    unsure: int
    images: int
    total: Count
    left: Count
    found: int
    advice: str = ""

    @property
    def is_done(self) -> bool:
        """True if all images up to the goal have a label."""
        return self.labelled >= self.goal


def measure_audit(codes: Int8[np.ndarray, " n"], goal: int) -> AuditProgress:
    """Measure the progress of an audit.

    Args:
        codes: labels of all readable images as `CODES`, in the order of the audit.
        goal: number of images to label.
    """
    is_open = codes == 0
    sample = codes[: int(is_open.argmax())] if is_open.any() else codes
    anomalies, found = (int(np.count_nonzero(part == CODES[Label.ANOMALY])) for part in (sample, codes))
    unlabelled, goal = int(np.count_nonzero(is_open)), min(goal, len(codes))
    total = anomalies_among(len(codes), len(sample), anomalies)
    left = anomalies_left(len(codes), len(sample), anomalies, found=found, unlabelled=unlabelled)
    unsure = int(np.count_nonzero(sample == CODES[Label.UNSURE]))
    labelled = goal - int(np.count_nonzero(is_open[:goal]))
    return AuditProgress(goal, labelled, len(sample), anomalies, unsure, len(codes), total, left, found)


def describe_audit(progress: AuditProgress) -> str:
    """Say in one sentence what an audit has shown so far."""
    _, _, sample, anomalies, unsure, images, total, *_ = progress
    if not sample or math.isnan(total.high):
        return START
    share = f"that is {percent(total.low / images)} to {percent(total.high / images)} % of the archive"
    doubt = f" and {unsure:,} unsure" if unsure else ""
    verb = "is an anomaly" if anomalies == 1 else "are anomalies"
    begin = f"Of {sample:,} random image{'s' * (sample != 1)}, {anomalies:,} {verb}{doubt}"
    return f"{begin}: {share}, or {total.low:,.0f} to {total.high:,.0f} images (90 % sure)."


def explain_goal(goal: int) -> str:
    """Say in one sentence what an audit of a size can show (the rule of three, Jovanovic & Levy 1997)."""
    most = percent(min(1.0, 3 / goal))
    return f"If none of {goal:,} random images is an anomaly, at most {most} % of the archive are (95 %)."


def percent(share: float) -> str:
    """Format a share in percent with two significant digits, without trailing zeros."""
    value = 100 * share
    if not value:
        return "0"
    text = f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
