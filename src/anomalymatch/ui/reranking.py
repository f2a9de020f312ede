"""Re-ranking of the archive in the background after labels."""

import math
import time
from collections.abc import Callable

from anomalymatch.ui.training import BackgroundTask

LONGEST_REST_S = 2.0


class Reranking:
    """Re-ranking in a thread; labels that come during one share the next.

    Args:
        refit: ranks the archive by the current labels; returns False if that is not possible yet.
        on_ranking: called after each ranking, from the thread that ranked.
        is_crowded: returns True while so many pages are open that rankings must leave time for labels.

    Attributes:
        seconds: how long the last ranking took; NaN before the first.
    """

    def __init__(
        self, refit: Callable[[], bool], *, on_ranking: Callable[[], None], is_crowded: Callable[[], bool]
    ) -> None:
        self._refit, self._on_ranking, self._is_crowded = refit, on_ranking, is_crowded
        self.seconds = math.nan
        self._task = BackgroundTask(self._work, "re-ranking")

    def run(self) -> float:
        """Rank now and return the seconds that it took; NaN if it is not possible yet."""
        start = time.monotonic()
        if not self._refit():
            return math.nan
        self.seconds = time.monotonic() - start
        self._on_ranking()
        return self.seconds

    def request(self) -> None:
        """Rank soon, in the background."""
        self._task.request()

    def close(self) -> None:
        """Wait for the end of a ranking and start no other."""
        self._task.close()

    def _work(self) -> None:
        seconds = self.run()
        if self._is_crowded() and seconds > 0:
            time.sleep(min(3 * seconds, LONGEST_REST_S))
