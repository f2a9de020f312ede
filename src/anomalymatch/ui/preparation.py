"""Preparation of the live ranking in the background: the features of all images, their store, and novelty."""

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from anomalymatch.errors import AnomalyMatchError, ConfigError, LabelError
from anomalymatch.progress import Advance, CancelledError, ProgressMeter, ProgressStatus, ShowProgress
from anomalymatch.text import reason
from anomalymatch.ui.live import LiveRanking
from anomalymatch.ui.training import BackgroundTask

logger = logging.getLogger(__name__)
Prepare = Callable[[ShowProgress, Callable[[LiveRanking], None]], LiveRanking]
"""Computes the features of an archive with a progress and returns the live ranking; before that, it may pass rankings
of the first images to a function."""
COMPUTING = "the features of the images are still being computed"
SETTLE_S = 2.0
"""Longest wait for cached features before the page opens without a ranking."""
PATIENCE_S = 30.0
"""Longest wait for the end of a batch: a program that ends during one would crash. A busy machine takes seconds."""


@dataclass(frozen=True)
class PreparationStatus:
    """Status of the preparation.

    Attributes:
        state: working, ready or failed.
        progress: of the current step, while working.
        message: why it failed; otherwise empty.
    """

    state: str
    progress: ProgressStatus
    message: str = ""


class Preparation:
    """Thread that prepares the live ranking; finished shards of features stay in the cache when it is stopped.

    Args:
        prepare: see `Prepare`.
        on_live: called in the thread with each live ranking, that of all images last.
        on_change: called when the state changes, from the thread.
    """

    def __init__(
        self, prepare: Prepare, *, on_live: Callable[[LiveRanking], None], on_change: Callable[[], None]
    ) -> None:
        self._prepare, self._on_live, self._on_change = prepare, on_live, on_change
        self._meter = ProgressMeter()
        self._state, self._message = "working", ""
        self._error: Exception | None = None
        self._ended, self._settled = threading.Event(), threading.Event()
        self._task = BackgroundTask(self._work, "preparation of the ranking")

    def start(self) -> None:
        """Start, or start again after a failure."""
        self._state, self._message, self._error = "working", "", None
        self._ended.clear()
        self._settled.clear()
        self._task.request()

    def status(self) -> PreparationStatus:
        """Return the status."""
        return PreparationStatus(self._state, self._meter.status(), self._message)

    @property
    def obstacle(self) -> str:
        """Why there is no ranking of all images yet, as a clause; empty when there is."""
        failed = f"the features of the images could not be computed, because {self._message}"
        return {"working": COMPUTING, "failed": failed}.get(self._state, "")

    def check(self) -> None:
        """Raise a `LabelError` unless the features of all images are there."""
        if self._state == "working":
            raise LabelError(f"{COMPUTING}: try again when they are there")
        if self._state == "failed":
            raise LabelError(f"{self.obstacle}: press r to try again")

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the end, at most for `seconds`."""
        self._ended.wait(seconds)

    def settle(self, seconds: float) -> None:
        """Wait, at most for `seconds`, until all is there because it is cached, or is known to take long.

        Raises:
            ConfigError: if a setting was wrong.
        """
        self._settled.wait(seconds)
        if isinstance(self._error, ConfigError):
            raise self._error

    def close(self) -> None:
        """Stop the work at its next batch."""
        self._meter.cancel()
        self._ended.set()
        self._task.close(PATIENCE_S)

    def _work(self) -> None:
        try:
            live = self._prepare(self._show, self._on_live)
            self._on_live(live)
            self._state = "ready"
        except CancelledError:
            return
        except Exception as error:
            if not isinstance(error, AnomalyMatchError):  # the memory of a graphics card, for example
                logger.exception("The preparation of the ranking failed")
            self._error, self._message, self._state = error, reason(error), "failed"
        finally:
            self._ended.set()
            self._settled.set()
        self._on_change()

    def _show(self, description: str, total: int) -> AbstractContextManager[Advance]:
        self._settled.set()
        return self._meter.show(description, total)
