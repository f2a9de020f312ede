"""Everything at one glance, for the side panel."""

from anomalymatch.types import Label
from anomalymatch.ui.board import Board
from anomalymatch.ui.estimate import estimate_left
from anomalymatch.ui.summary import Estimate, Summary


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
    audited, rare = board.audited()
    return estimate_left(
        images=len(board.live.bank.positions),
        audited=audited,
        audited_anomalies=rare,
        anomalies=board.book.counts()[Label.ANOMALY],
        seed=seed,
    )
