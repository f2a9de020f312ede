"""Summary of a search for the page: counts, scores, estimate, annotators."""

from anomalymatch.ui.state import SearchState
from anomalymatch.ui.views import Summary


def summarise_search(state: SearchState, *, cycle: int, seconds: float) -> Summary:
    """Summarise a search after `cycle` trainings; the last re-ranking took `seconds`."""
    histogram, estimate, labels = state.histogram(), state.estimate_left(), state.labels
    with state.lock:  # only for what is fast: a label must not wait
        return Summary(
            images=len(state.ids),
            unreadable=len(state.unreadable),
            counts=state.counts(),
            found=labels.discovery(),
            histogram=histogram,
            estimate=estimate,
            agreements=labels.agreements(),
            conflicts=labels.conflicts(),
            reviews=len(state.to_review()),
            annotators=labels.annotators(),
            mode=state.scores.mode,
            modes=state.scores.modes,
            cycle=cycle,
            seconds=seconds,
        )
