"""Everything at one glance, for the side panel."""

import numpy as np
from scipy.special import logit

from anomalymatch.types import Label
from anomalymatch.ui.board import Board
from anomalymatch.ui.estimate import estimate_left
from anomalymatch.ui.summary import Estimate, Summary

SURE = 1e-9
"""Scores are kept this far from 0 and 1 where their logits are wanted again."""


def summarise(board: Board, *, cycle: int, seconds: float, seed: int) -> Summary:
    """The state of a search.

    Args:
        board: labels and scores.
        cycle: trainings that are finished.
        seconds: the last re-ranking took.
        seed: of the estimate's interval.
    """
    with board.lock:
        book = board.book
        found = book.discovery()
        return Summary(
            images=len(board.ids),
            unreadable=len(board.ids) - len(board.live.bank.positions),
            counts=book.counts(),
            spent=range(1, len(found) + 1),
            found=found,
            histogram=board.histogram(),
            estimate=_estimate(board, seed),
            agreements=book.agreements(),
            conflicts=book.conflicts(),
            annotators=book.annotators(),
            mode=board.scores.mode,
            modes=board.scores.modes,
            cycle=cycle,
            seconds=seconds,
        )


def _estimate(board: Board, seed: int) -> Estimate:
    seen = [event for event in board.book.standing() if event.score is not None and event.label is not Label.UNSURE]
    given = np.clip([event.score or 0.0 for event in seen], SURE, 1 - SURE)
    anomalous = [event.label is Label.ANOMALY for event in seen]
    return estimate_left(logit(given), anomalous, board.unlabelled_logits(), seed=seed)
