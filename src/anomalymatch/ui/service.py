"""Service behind the labelling page: labels, the ranking that follows them, groups and training; no web code."""

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from anomalymatch.active.run_folder import RunReader, page_lock
from anomalymatch.algorithms.probe.regression import Probe
from anomalymatch.backbones.image_text import ImageTextEmbedding
from anomalymatch.data.label_log import FROM_FILE, LabelEvent, LabelLog, export_csv
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import AnomalyMatchError, StorageError
from anomalymatch.evaluation.advice import StoppingRule
from anomalymatch.files import remove_leftovers
from anomalymatch.ranking import Ranking
from anomalymatch.types import Image, Label
from anomalymatch.ui.description import Description
from anomalymatch.ui.evidence import HeatMaps, LocateEvidence
from anomalymatch.ui.examples import Examples
from anomalymatch.ui.exports import KINDS, Export, export, import_labels, refusal
from anomalymatch.ui.features import FeatureStore
from anomalymatch.ui.gallery import Gallery
from anomalymatch.ui.groups import Divide, Groups
from anomalymatch.ui.labels import LabelIndex, clean_annotator
from anomalymatch.ui.live import LiveRanking
from anomalymatch.ui.map import ArchiveMap
from anomalymatch.ui.notes import Notes
from anomalymatch.ui.people import People
from anomalymatch.ui.pictures import Pictures
from anomalymatch.ui.preparation import Preparation, Prepare
from anomalymatch.ui.reranking import Reranking
from anomalymatch.ui.saved_views import SavedViews
from anomalymatch.ui.state import Logits, SearchState
from anomalymatch.ui.summary import summarise_search
from anomalymatch.ui.training import Training
from anomalymatch.ui.veil import NO_VEIL, Veil
from anomalymatch.ui.views import Change, Details, Page, Query, Summary, Tile

logger = logging.getLogger(__name__)
CROWD = 5
"""With more open pages, rankings rest and pages are updated less often, to leave time for labels."""
EncodeImages = Callable[[Sequence[Image]], Float32[np.ndarray, "n d"]]


class LabelService:
    """Service of the labelling page, also usable from Python. All methods are thread-safe.

    All that take an id raise a `DataError` if it is not in the archive.

    Args:
        run: the run folder, with its configuration.
        source: the images.
        prepare: prepares the live ranking on their features in the background, see `Prepare`.
        encode: computes pooled features of images that are not in the source.
        locate: computes the evidence in an image, for heat maps.
        training_steps: steps of a training; 0 if unknown.
        cache: folder for thumbnails and maps.
        workers: threads that decode pictures.
        seed: seed of the random audit.
        divide: divides images into groups.
        needs_labels: True if a training needs an anomaly and a normal.
        stopping: rule for the advice to stop labelling.
        text: image-text model for an order by a description; None for no such order.
        descriptions: what to look for, in words, unless the run folder says otherwise.
        scores: further columns of the metadata, see `read_scores`.
    """

    def __init__(
        self,
        run: Path,
        source: ImageSource,
        prepare: Prepare,
        *,
        encode: EncodeImages,
        locate: LocateEvidence,
        training_steps: int,
        cache: Path,
        workers: int,
        seed: int,
        divide: Divide,
        needs_labels: bool,
        stopping: StoppingRule,
        text: ImageTextEmbedding | None = None,
        descriptions: Sequence[str] = (),
        scores: pa.Table | None = None,
        trust: bool = False,
    ) -> None:
        self.run, self.source, self.name, self.total = run, source, source.name, len(source.ids)
        self._lock, self._is_open = page_lock(run), True
        remove_leftovers(run)
        try:
            self._log = LabelLog.of_run(run)
        except StorageError:
            self._lock.release()
            raise
        self._writing, self._summarising = threading.Lock(), threading.Lock()
        self._summary: tuple[object, Summary] | None = None
        self._listeners: list[Callable[[Change], None]] = []
        self._reader = RunReader(run)
        self.pictures = Pictures(source, cache, workers=workers, scores=scores)
        self.channels = self.pictures.channels
        self.examples = Examples(run / "examples", lambda image: encode([image])[0], source)
        told = partial(self._tell, Change("map"))
        self.map = ArchiveMap(self._full_store, cache / "maps", seed=seed, on_change=told)
        self._metadata = known = self.pictures.metadata_of
        header, within = known.header if known.has_headers else None, self.map.within
        gallery = Gallery(
            source.ids, seed=seed, metadata=known.table, within=within, classes=source.truth, header=header
        )
        self.columns = gallery.columns
        self.notes = Notes(run / "notes.json", self._update_note)
        self.views = SavedViews(run / "views.json", partial(self._tell, Change("views")))
        self._state = SearchState(source.ids, source.name, LabelIndex(self._log), gallery, stopping, self.notes)
        self.heat_maps = HeatMaps(self.pictures, self._fitted, self._reader, locate)
        self.preparation = Preparation(prepare, on_live=self._use, on_change=partial(self._tell, Change("features")))
        self._has_restored_examples = False
        self.audit_progress = self._state.audit_progress
        self.people = People(partial(self._tell, Change("people")))
        self._cycle = self._reader.finished_cycles()
        self._state.add_trainings(self._reader, range(1, self._cycle + 1))
        changed = partial(self._tell, Change("groups"))
        checked = partial(self._divide, divide)
        self.groups = Groups(run / "groups.json", checked, self._state.labels_and_ranking, changed, self._state.index)
        self.groups.follow(self._log.valid_actions())  # a process may have been killed between an undo and its move
        described = partial(self._tell, Change("description"))
        self.description = Description(
            run, text, descriptions, wait=self.preparation.wait, on_order=self._use_description, on_change=described
        )
        ranked = partial(self._tell, Change("ranking"))
        self._reranking = Reranking(self._refit, on_ranking=ranked, is_crowded=lambda: self.listeners > CROWD)
        self.training = Training(
            run,
            steps=training_steps,
            words=["trust=true"] if trust else [],
            check=partial(self._check_trainable, needs_labels),
            on_change=self._update_training,
        )
        self.preparation.start()

    @property
    def stretches(self) -> Sequence[str]:
        """Stretches that the page offers, see `Pictures.stretches`."""
        return self.pictures.stretches

    def page(self, query: Query) -> Page:
        """Return one page of the gallery.

        Raises:
            DataError: if a group or a column of the query does not exist, or no image of the group `query.kind` is an
                anomaly.
            LabelError: if `query.kind` is given while features are missing.
        """
        if query.text:  # before the lock of the state
            self._state.gallery.text.read_headers()
        page = self._state.page(query, *self._groups_of(query))
        return replace(page, tiles=self._with_groups(page.tiles))

    def _groups_of(self, query: Query) -> tuple[Sequence[str], Sequence[str]]:
        """Return the images of the groups `group` and `kind` of a query."""
        group, kind = (() if number is None else self.groups.get(number).ids for number in (query.group, query.kind))
        if query.kind is not None:
            self.preparation.check()
        return group, kind

    def found(self, query: Query) -> list[str]:
        """Return the ids of the images on all pages of a query."""
        return self._state.found(query, *self._groups_of(query))

    def values(self, query: Query, ids: Sequence[str]) -> dict[str, str] | None:
        """Return the value of each image in the column that orders a query; None if no column does."""
        return self._state.values(query, ids)

    def map_marks(self, veil: Veil = NO_VEIL) -> bytes:
        """Return the scores of the images on the map, 0 to 254 or 255 for none, then their labels as `CODES`."""
        scores, codes = self._state.marks(self.map.positions, veil)
        return np.where(np.isnan(scores), 255, scores * 254).astype(np.uint8).tobytes() + codes.tobytes()

    def map_tile(self, number: int, version: str) -> Tile | None:
        """Return the image with a number on the map of a version; None if there is none."""
        position = self.map.position(number, version)
        return None if position is None else self.tiles([self.source.ids[position]])[0]

    def map_numbers(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the number on the map of each image that is on it."""
        numbers = self.map.numbers(self._state.positions(ids)).tolist()
        return {id_: number for id_, number in zip(ids, numbers, strict=True) if number >= 0}

    def tiles(self, ids: Sequence[str]) -> list[Tile]:
        """Return the tiles of images."""
        return self._with_groups(self._state.tiles(ids))

    def neighbours(self, id_: str, count: int) -> list[Tile]:
        """Return the `count` images most similar to `id_`, most similar first; none if it has no features."""
        nearest = self._state.neighbours(id_, count)
        return self.tiles([self.source.ids[i] for i in nearest.tolist()])

    def _with_groups(self, tiles: Sequence[Tile]) -> list[Tile]:
        numbers = self.groups.numbers()
        return [replace(tile, group=numbers[tile.id]) if tile.id in numbers else tile for tile in tiles]

    def details(self, id_: str) -> Details:
        """Return the details of an image for the large view."""
        (tile,) = self.tiles([id_])
        history, pictures = self._state.labels.history(id_), self.pictures
        on_sky = pictures.coordinates(id_), pictures.orientation(id_), pictures.size(id_)
        return Details(tile, pictures.metadata(id_), *on_sky, history)

    def summary(self) -> Summary:
        """Summarise the search: counts, scores, estimate, annotators. All open pages share the work."""
        with self._summarising:
            now = (self._state.version, self._state.gallery.version, self._cycle, self._reranking.seconds)
            if self._summary is None or self._summary[0] != now:
                self._summary = now, summarise_search(self._state, cycle=self._cycle, seconds=self._reranking.seconds)
            return self._summary[1]

    def heat_map(self, id_: str, *, stretch: str, channel: str | None) -> bytes:
        """Return the picture of an image with a heat map of the evidence for its score, see `HeatMaps.picture`."""
        cycle = self._cycle if self._state.scores.mode == "trained" else None
        if cycle is None and self._fitted() is None:
            self.preparation.check()
        return self.heat_maps.picture(id_, stretch=stretch, channel=channel, cycle=cycle)

    def label(self, ids: Sequence[str], label: Label | None, annotator: str, key: str = "") -> int:
        """Label images, or remove their labels with None; return their number.

        The labels are on disk when this returns. The ranking follows in the background. Of several calls with the same
        `key`, here and in `undo` and `redo`, only the first has an effect.

        Raises:
            StorageError: if the log cannot be written; then, as after a `DataError`, none is labelled.
        """
        self._add_labels(dict.fromkeys(ids, label), annotator, key)
        return len(set(ids))

    def label_kind(self, ids: Sequence[str], number: int, annotator: str, key: str = "") -> int:
        """Label images anomaly and move them into a group; return their number.

        Undo takes them back to the groups in which they were, and redo repeats it. Other labels leave them in the
        group, whose order follows from its anomalies only.

        Raises:
            DataError: if there is no such group; as after the errors of `label`, nothing has changed then.
        """
        self.groups.get(number)
        action = self._add_labels(dict.fromkeys(ids, Label.ANOMALY), annotator, key)
        self.groups.assign(number, ids, action)
        return len(set(ids))

    def note(self, id_: str, text: str) -> None:
        """Write a note on an image; an empty one removes it."""
        self._state.positions([id_])  # raises for an unknown image
        self.notes.write(id_, text)

    def toggle_star(self, id_: str) -> bool:
        """Give an image a star or take it away; return True if it has one now."""
        self._state.positions([id_])
        return self.notes.toggle_star(id_)

    def _update_note(self, id_: str) -> None:
        self._state.update_notes()
        self._tell(Change("notes", (id_,)))

    def undo(self, annotator: str, key: str = "") -> dict[str, Label | None]:
        """Undo the annotator's last action; return the labels that it gave, none if nothing is left to undo."""
        return self._revert(self._log.undo, annotator, key)

    def redo(self, annotator: str, key: str = "") -> dict[str, Label | None]:
        """Redo what the annotator has undone last, unless a label came since; return the labels."""
        return self._revert(self._log.redo, annotator, key)

    def _revert(
        self, revert: Callable[..., dict[str, Label | None]], annotator: str, key: str
    ) -> dict[str, Label | None]:
        with self._writing:
            labels = revert(annotator=clean_annotator(annotator), key=key)
            self._state.read_labels()
            self.groups.follow(self._log.valid_actions())
        if labels:
            self._notify_labels(list(labels), annotator)
        return labels

    def recent(self, annotator: str, count: int) -> dict[str, Label]:
        """Return the annotator's last `count` labels of different images, newest first."""
        with self._state.lock:
            return self._state.labels.recent(annotator, count)

    def place(self, query: Query, id_: str) -> int | None:
        """Return the index, from 0, of an image in the results of a query; None if the query does not find it."""
        return self._state.place(query, id_, *self._groups_of(query))

    def import_csv(self, text: str, annotator: str) -> int:
        """Import labels from a CSV `filename,label`; return the number of labels that were new.

        Raises:
            LabelError: if it is not such a CSV, or names images that are not in the archive.
        """
        labels = import_labels(text, self._state.index)
        known = self.labels
        new = {id_: label for id_, label in labels.items() if known.get(id_) != label}
        self._add_labels(new, annotator)
        return len(new)

    def add_given_labels(self, given: Mapping[str, Label]) -> None:
        """Add the labels that came with the images, unless the log has them already."""
        self._add_labels(self._log.new_labels(given), FROM_FILE)

    def export(self, kind: str) -> Export:
        """Export labels and images in one of the formats of `anomalymatch.ui.exports`.

        Raises:
            ConfigError: if there is no such format.
            DataError: if there is nothing to export in it.
        """
        return export(kind, self)

    @property
    def unread_headers(self) -> int:
        """Number of images whose headers a text filter does not search yet."""
        return self._state.gallery.text.unread

    def refused_exports(self) -> dict[str, str]:
        """Return the reason for each export that cannot be written now."""
        return {kind: reason for kind in KINDS if (reason := refusal(kind, self))}

    @property
    def labels(self) -> dict[str, Label]:
        """The label of each labelled image."""
        return self._state.labels_and_ranking()[0]

    @property
    def events(self) -> list[LabelEvent]:
        """All label events, oldest first, including undone ones."""
        return self._log.events()

    @property
    def ranking(self) -> Ranking | None:
        """The ranking in use; None before the first."""
        return self._state.ranking()

    @property
    def order(self) -> int:
        """Version of the orders, see `Gallery.version`."""
        return self._state.gallery.version

    @property
    def novelty(self) -> Logits | None:
        """Novelty of each image, NaN for unreadable ones; None if it is unknown."""
        return self._state.novelty

    def _add_labels(self, labels: Mapping[str, Label | None], annotator: str, key: str = "") -> int | None:
        """Add labels; return their action in the log, None if there were none or their key is known."""
        if not labels:
            return None
        ids = list(labels)
        name, scores = clean_annotator(annotator), self._state.probabilities(ids)
        with self._writing:  # a page must not wait for the disk, nor a label for a page
            action = self._log.append(labels, annotator=name, cycle=self._cycle, scores=scores, key=key)
            self._state.read_labels()
        self._notify_labels(ids, annotator)
        return action

    def _notify_labels(self, ids: Sequence[str], annotator: str) -> None:
        self._tell(Change("labels", tuple(ids), annotator))
        self._reranking.request()

    def rerank(self) -> float:
        """Fit the probe on the current labels and rank by it; return the seconds it took.

        If the features could not be computed, this tries again.

        Raises:
            LabelError: if no image has features yet.
        """
        if self.preparation.status().state == "failed":
            self.preparation.start()
            self._tell(Change("features"))
        if self._state.live is None:
            self.preparation.check()
        return self._reranking.run()

    @property
    def listeners(self) -> int:
        """Number of listeners, one for each open page."""
        return len(self._listeners)

    def rank_by(self, mode: str) -> None:
        """Rank by the live probe ("live"), the last training ("trained") or "both".

        Raises:
            ConfigError: if the mode is not available now.
        """
        with self._state.lock:
            self._state.scores.choose(mode)
            self._state.update_scores()
        self._tell(Change("ranking"))

    def add_example(self, name: str, data: bytes, annotator: str) -> str:
        """Add an image that is not in the archive as an example of an anomaly; return its id.

        Raises:
            DataError: if it is not an image, or too large.
            LabelError: if the features of the archive are missing.
        """
        self.preparation.check()
        id_ = self.examples.add(name, data).id
        self._notify_examples(id_, annotator)
        return id_

    def remove_example(self, id_: str) -> None:
        """Remove an example."""
        self.examples.remove(id_)
        self._notify_examples(id_)

    def _use(self, live: LiveRanking) -> None:
        self._state.use(live)
        if not self._has_restored_examples:
            self._has_restored_examples = True
            self.examples.restore()
            self._tell(Change("examples"))
        self._reranking.run()

    def _refit(self) -> bool:
        """Fit the probe on the current labels and rank by it; return False if no image has features yet."""
        if self._state.live is None:
            return False
        self._state.refit(self.examples.features())
        return True

    def _full_store(self) -> FeatureStore | None:
        """Return the features of the archive; None before those of all images are there."""
        return None if self._state.live is None or self.preparation.obstacle else self._state.live.store

    def _fitted(self) -> Probe | None:
        return None if self._state.live is None else self._state.live.fitted

    def _divide(
        self, divide: Divide, ids: Sequence[str], normals: Collection[str], count: int | None
    ) -> Sequence[Sequence[str]]:
        self.preparation.check()
        return divide(ids, normals, count)

    def _check_trainable(self, needs_labels: bool) -> None:
        if self.preparation.status().state == "working":  # the training would wait for the same features
            self.preparation.check()
        if needs_labels:
            self._state.check_trainable()

    def _use_description(self, ranking: Ranking | None) -> None:
        self._state.describe(ranking)
        self._tell(Change("ranking"))

    def _notify_examples(self, id_: str, annotator: str = "") -> None:
        self._tell(Change("examples", (id_,), annotator))
        self._reranking.request()

    def subscribe(self, listener: Callable[[Change], None]) -> Callable[[], None]:
        """Call `listener` after every change, in the thread that made it; return a function that unsubscribes."""
        self._listeners.append(listener)
        return partial(self._listeners.remove, listener)

    def _tell(self, change: Change) -> None:
        self.map.resume()  # it may wait for the features
        for listener in list(self._listeners):
            listener(change)

    def close(self) -> None:
        """Stop a training, write labels.csv and close the files. No label is lost without it."""
        self.preparation.close()
        self.training.close()
        self.description.close()
        self._reranking.close()
        self.map.close()
        self.pictures.close()
        if self._is_open:
            self._is_open = False
            try:
                export_csv(self.labels, self.run / "labels.csv")
            except StorageError as error:
                logger.warning("labels.csv is not up to date: %s", error)
            self._log.close()
            self._lock.release()

    def _update_training(self) -> None:
        done = self._reader.finished_cycles()
        if done > self._cycle:
            try:
                self._state.add_trainings(self._reader, range(self._cycle + 1, done + 1))
            except AnomalyMatchError as error:
                logger.warning("The scores of training %d cannot be shown: %s", done, error)
            self._cycle = done
            self._tell(Change("ranking"))
        self._tell(Change("training"))
