"""The service under the labelling page: labels, the ranking that follows them, training; nothing of the web."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from anomalymatch.active.run_folder import RunReader
from anomalymatch.data.label_log import FROM_FILE, LabelEvent, LabelLog
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import AnomalyMatchError, UnreadableImageError
from anomalymatch.ranking import Ranking
from anomalymatch.types import Image, Label
from anomalymatch.ui.examples import Examples
from anomalymatch.ui.exports import Export, export, import_labels
from anomalymatch.ui.gallery import Gallery
from anomalymatch.ui.groups import Divide, Groups
from anomalymatch.ui.labels import Change, LabelBook, Listener, Listeners, checked_name
from anomalymatch.ui.live import LiveRanking
from anomalymatch.ui.pictures import STRETCHES, Pictures
from anomalymatch.ui.state import Board, Logits, summarise
from anomalymatch.ui.training import Background, Training
from anomalymatch.ui.views import Details, Page, Query, Summary, Tile

logger = logging.getLogger(__name__)
Encode = Callable[[Sequence[Image]], Float32[np.ndarray, "n d"]]


class LabelService:
    """What the page calls. Every method may be called from any thread; a label is on disk when `label` returns.

    Args:
        run: the run folder, with its configuration.
        source: the images.
        live: the ranking on their features.
        encode: pooled features of images that are not in the source.
        training_steps: of a training; 0 if they are not known.
        cache: folder for thumbnails.
        workers: threads that make them.
        seed: of the random audit.
        divide: finds groups among images.
        needs_labels: whether a training can do nothing without an anomaly and a normal.
    """

    def __init__(
        self,
        run: Path,
        source: ImageSource,
        live: LiveRanking,
        *,
        encode: Encode,
        training_steps: int,
        cache: Path,
        workers: int,
        seed: int,
        divide: Divide,
        needs_labels: bool,
    ) -> None:
        self.run, self.source, self.name, self.total = run, source, source.name, len(source.ids)
        self._listeners = Listeners()
        self._reader = RunReader(run)
        self._log = LabelLog(run / "labels.sqlite")
        self.pictures = Pictures(source, cache, workers=workers)
        self.stretches, self.channels = STRETCHES, self.pictures.channels
        self.examples = Examples(
            run / "examples",
            lambda image: live.seen.encode(encode([image]))[0],
            source,
            dimensions=live.seen.dimensions,
        )
        gallery = Gallery(source.ids, seed=seed, metadata=self.pictures.metadata_of.table)
        self._board = Board(source.ids, source.name, LabelBook(self._log), live, gallery)
        self._seconds = math.nan
        self._cycle = self._reader.finished_cycles()
        self._board.take_trainings(self._reader, range(1, self._cycle + 1))
        changed = partial(self._listeners.tell, Change("groups"))
        self.groups = Groups(run / "groups.json", divide, self._board.state, changed)
        self._refitting = Background(self.rerank, "re-ranking")
        self.rerank()
        self.training = Training(
            run,
            steps=training_steps,
            check=self._board.check_trainable if needs_labels else lambda: None,
            on_change=self._training_changed,
        )

    def page(self, query: Query) -> Page:
        """The images of one page.

        Raises:
            DataError: if `query.like` is not in the archive, or there is no group `query.group`.
        """
        return self._board.page(query, () if query.group is None else self.groups.members(query.group).ids)

    def tiles(self, ids: Sequence[str]) -> list[Tile]:
        """The present state of `ids`.

        Raises:
            DataError: if one is not in the archive.
        """
        return self._board.tiles(ids)

    def neighbours(self, id_: str, count: int) -> list[Tile]:
        """The `count` images most like `id_`, the most alike first; none if it cannot be read."""
        with self._board.lock:
            nearest = self._board.neighbours(id_, count)
            return self._board.tiles([self.source.ids[i] for i in nearest.tolist()])

    def details(self, id_: str) -> Details:
        """What the large view shows of an image.

        Raises:
            DataError: if it is not in the archive.
        """
        (tile,) = self.tiles([id_])
        size = None
        with suppress(UnreadableImageError):  # the metadata say why
            size = self.pictures.size(id_)
        with self._board.lock:
            history = self._board.book.history(id_)
        return Details(
            tile=tile,
            size=size,
            metadata=self.pictures.metadata(id_),
            coordinates=self.pictures.coordinates(id_),
            history=history,
        )

    def label(self, ids: Sequence[str], label: Label | None, annotator: str) -> None:
        """Label images, or take their labels away with None; the ranking follows in the background.

        Raises:
            DataError: if an image is not in the archive; then none is labelled.
            StorageError: if the log cannot be written; then none is labelled.
        """
        if ids:
            self._say(dict.fromkeys(ids, label), annotator)

    def undo(self, annotator: str) -> list[str]:
        """Take back what the annotator did last; return its images, if there is anything left to undo."""
        with self._board.lock:
            ids = self._board.book.undo(checked_name(annotator))
            self._board.show_labels(ids)
        if ids:
            self._labelled(ids, annotator)
        return ids

    def import_csv(self, text: str, annotator: str) -> int:
        """Take over the labels of a CSV `filename,label` that say something new; return how many.

        Raises:
            LabelError: if it is no such CSV, or names images that are not in the archive.
        """
        labels = import_labels(text, self._board.index)
        known = self.labels
        new = {id_: label for id_, label in labels.items() if known.get(id_) != label}
        if new:
            self._say(new, annotator)
        return len(new)

    def take_given(self, given: Mapping[str, Label]) -> None:
        """Take over labels that came with the images, where they are new."""
        new = self._log.new_labels(given)
        if new:
            self._say(new, FROM_FILE)

    def export(self, kind: str) -> Export:
        """Write the finds in one of the formats of `exports`.

        Raises:
            ConfigError: if there is no such format.
            DataError: if there is nothing to write in it.
        """
        return export(kind, self)

    @property
    def labels(self) -> dict[str, Label]:
        """The label of each image."""
        return self._board.state()[0]

    @property
    def events(self) -> list[LabelEvent]:
        """All that was said, oldest first, with what was undone."""
        return self._log.events()

    @property
    def ranking(self) -> Ranking | None:
        """What ranks now; None before the first ranking."""
        return self._board.ranking()

    @property
    def novelty(self) -> Logits | None:
        """How unlike the others each image of the source is, NaN if it cannot be read; None if that is unknown."""
        return self._board.novelty

    def _say(self, labels: Mapping[str, Label | None], annotator: str) -> None:
        ids = list(labels)
        with self._board.lock:
            self._board.positions(ids)
            self._board.book.say(
                labels, annotator=checked_name(annotator), cycle=self._cycle, scores=self._board.scores_of(ids)
            )
            self._board.show_labels(ids)
        self._labelled(ids, annotator)

    def _labelled(self, ids: Sequence[str], annotator: str) -> None:
        self._listeners.tell(Change("labels", tuple(ids), annotator))
        self._refitting.ask()

    def rerank(self) -> float:
        """Fit the probe on all that is known now, and rank by it; return the seconds it took."""
        start = time.monotonic()
        self._board.refit(self.examples.features())
        self._seconds = time.monotonic() - start
        self._listeners.tell(Change("ranking"))
        return self._seconds

    def rank_by(self, mode: str) -> None:
        """Rank by the live probe, the last training, or both.

        Raises:
            ConfigError: if that cannot be chosen now.
        """
        with self._board.lock:
            self._board.scores.choose(mode)
            self._board.show_scores()
        self._listeners.tell(Change("ranking"))

    def modes(self) -> Sequence[str]:
        """What `rank_by` takes now."""
        return self._board.scores.modes

    def add_example(self, name: str, data: bytes, annotator: str) -> str:
        """Take an image that is not in the archive as an example of an anomaly; return its id.

        Raises:
            DataError: if it is no image, or too large.
        """
        id_ = self.examples.add(name, data).id
        self._listeners.tell(Change("examples", (id_,), annotator))
        self._refitting.ask()
        return id_

    def remove_example(self, id_: str) -> None:
        """Forget an example.

        Raises:
            DataError: if there is no such example.
        """
        self.examples.remove(id_)
        self._listeners.tell(Change("examples", (id_,)))
        self._refitting.ask()

    def example_ids(self) -> list[str]:
        """The examples, in the order in which they came."""
        return [example.id for example in self.examples.all()]

    def example_thumbnail(self, id_: str, side: int) -> bytes:
        """See `Examples.thumbnail`."""
        return self.examples.thumbnail(id_, side)

    def _training_changed(self) -> None:
        done = self._reader.finished_cycles()
        if done > self._cycle:
            try:
                self._board.take_trainings(self._reader, range(self._cycle + 1, done + 1))
            except AnomalyMatchError as error:
                logger.warning("The scores of training %d cannot be shown: %s", done, error)
            self._cycle = done
            self._listeners.tell(Change("ranking"))
        self._listeners.tell(Change("training"))

    def summary(self) -> Summary:
        """The state of the search at one glance."""
        return summarise(self._board, cycle=self._cycle, seconds=self._seconds)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` at every change, from whichever thread makes it; returns what ends that."""
        return self._listeners.add(listener)

    def close(self) -> None:
        """Stop a training, and close the files. Nothing is lost without it."""
        self.training.close()
        self._refitting.close()
        self.pictures.close()
        self._log.close()
