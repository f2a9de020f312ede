"""Order of an archive by a description, computed in the background; the run folder keeps it."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anomalymatch.active.text_ranker import (
    TextRanker,
    check_descriptions,
    read_description,
    save_description,
    save_ranking,
)
from anomalymatch.backbones.image_text import ImageTextEmbedding
from anomalymatch.errors import AnomalyMatchError, ConfigError
from anomalymatch.progress import CancelledError, ProgressMeter
from anomalymatch.ranking import Ranking
from anomalymatch.text import reason
from anomalymatch.ui.training import BackgroundTask

logger = logging.getLogger(__name__)
SEPARATOR = ";"
"""Separator of several descriptions in one text."""
PATIENCE_S = 5.0
"""Time to wait for the end of the background work, which cannot stop while it downloads a model."""


@dataclass(frozen=True)
class DescriptionStatus:
    """Status of the order by a description.

    Attributes:
        state: unavailable, none, waiting (for `wait`), working, ready or failed.
        text: the description; empty for none.
        done: number of images whose features are computed, while working.
        total: number of images whose features are missing; 0 while the model is loaded.
        message: why it is unavailable or failed, or a warning; otherwise empty.
    """

    state: str = "none"
    text: str = ""
    done: int = 0
    total: int = 0
    message: str = ""


class Description:
    """Description of what a search looks for, and the order of the archive by it.

    Args:
        run: the run folder.
        embedding: image-text model and archive; None if there is no model to use.
        given: descriptions to start with, unless the run folder has others.
        wait: returns when the work may begin: two models at once on the same processors only delay each other.
        on_order: called with each new ranking, and with None when the description is removed.
        on_change: called when the status changes, mostly from another thread.

    Raises:
        StorageError: if the description in the run folder is corrupt.
    """

    def __init__(
        self,
        run: Path,
        embedding: ImageTextEmbedding | None,
        given: Sequence[str],
        *,
        wait: Callable[[], object],
        on_order: Callable[[Ranking | None], None],
        on_change: Callable[[], None],
    ) -> None:
        self._run, self._embedding, self._on_order, self._on_change = run, embedding, on_order, on_change
        self._wait, self._meter = wait, ProgressMeter()
        self._lock, self._is_closed = threading.RLock(), False
        self._state, self._message = "none", ""
        saved = read_description(run)
        self._wanted = tuple(given) if saved is None else saved.descriptions
        if saved is None and given:
            save_description(run, given)
        if saved is not None and saved.ranking is not None:
            self._state = "ready"
            on_order(saved.ranking)
        elif embedding is None:
            self._state, self._message = "unavailable", "there is no image-text model"
        self._task = BackgroundTask(self._work, "ranking by the description")
        if embedding is not None and self._state != "ready":
            self._state = "waiting" if self._wanted else "none"
            self._task.request()

    def status(self) -> DescriptionStatus:
        """Return the status."""
        with self._lock:
            text = f"{SEPARATOR} ".join(self._wanted)
            meter = self._meter.status()
            return DescriptionStatus(self._state, text, meter.done, meter.total, self._message)

    def set(self, text: str) -> None:
        """Describe what to look for; the order follows in the background. An empty text removes the description.

        Args:
            text: a description, or several with semicolons between them.

        Raises:
            ConfigError: if it is too long, or no image-text model is available.
            StorageError: if the run folder cannot be written.
        """
        parts = [part for part in text.split(SEPARATOR) if part.strip()]
        wanted = check_descriptions(parts, "the description") if parts else ()
        with self._lock:
            if self._state == "unavailable" and wanted:
                raise ConfigError(self._message)
            save_description(self._run, wanted)
            self._wanted, self._message = wanted, ""
            self._state = "waiting" if wanted else "none"
        if wanted:
            self._task.request()
        else:
            self._on_order(None)
        self._on_change()

    def close(self) -> None:
        """Stop the background work."""
        self._is_closed = True
        self._meter.cancel()
        self._task.close(PATIENCE_S)

    def _work(self) -> None:
        assert self._embedding is not None
        self._wait()
        if self._is_closed:
            return
        with self._lock:
            self._state = "working" if self._state == "waiting" else self._state
        try:
            if self._wanted:
                self._rank(self._embedding)
            else:
                self._embedding.spec.check_weights()
        except CancelledError:
            return
        except Exception as error:
            if not isinstance(error, AnomalyMatchError):  # the memory of a graphics card, for example
                logger.exception("The ranking by the description failed")
            with self._lock:
                self._state = "failed" if self._wanted else "unavailable"
                self._message = reason(error)
        self._on_change()

    def _rank(self, embedding: ImageTextEmbedding) -> None:
        embedding.features(self._meter.show)
        wanted = self._wanted  # the newest: it may have changed while the features were computed
        ranker = TextRanker(embedding, wanted)
        ranking, notes = ranker.rank(embedding.source.ids), ranker.notes()
        with self._lock:
            if wanted != self._wanted:  # replaced, and requested again, or removed
                return
            save_ranking(self._run, ranking)
            self._on_order(ranking)
            self._state, self._message = "ready", " ".join(notes)
