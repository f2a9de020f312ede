"""State of a search: labels, scores and their orders by position, joined under one lock."""

import logging
import threading
from collections.abc import Container, Iterable, Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int8, Int32, Int64
from scipy.special import expit

from anomalymatch.active.run_folder import RunReader
from anomalymatch.checks import check_choice
from anomalymatch.data.label_log import LabelEvent
from anomalymatch.data.source import IdIndex
from anomalymatch.errors import DataError, LabelError
from anomalymatch.evaluation.advice import StoppingRule, Yield
from anomalymatch.evaluation.discovery import UNKNOWN, WANTED
from anomalymatch.evaluation.ranks import interleave
from anomalymatch.lru import LRU
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label
from anomalymatch.ui.audit import AuditProgress, measure_audit
from anomalymatch.ui.gallery import CODES, Gallery
from anomalymatch.ui.labels import LabelIndex
from anomalymatch.ui.live import LiveRanking
from anomalymatch.ui.notes import Notes
from anomalymatch.ui.veil import NO_VEIL, Veil
from anomalymatch.ui.views import Estimate, FirstOrder, Histogram, Page, Query, Show, Sort, Tile

logger = logging.getLogger(__name__)
Logits = Float32[np.ndarray, " n"]
MODES = ("live", "trained", "both")
DIVERSE_IMAGES = 200
"""Size of the diverse batch that is shown before the first ranking."""
BINS = 60
CACHED_KINDS = 4
NO_DESCRIPTION = "Nothing is described yet: write what you look for in the side panel."
DESCRIBED_FIRST = "the images that fit the description, in turn with {}"
FIRST_NOTE = "Nothing is ranked yet: the page shows {}. Label what you see."
IN_FILE_ORDER = "the images in the order of the archive"


class ScoreIndex:
    """Logits of all images by the live and the trained ranking; NaN for unreadable images.

    Attributes:
        live: of the probe on the current labels; None before it can be fitted.
        trained: of the last training; None before the first.
    """

    def __init__(self) -> None:
        self.live: Logits | None = None
        self.trained: Logits | None = None
        self._chosen = "both"

    @property
    def modes(self) -> tuple[str, ...]:
        """The rankings available now."""
        if self.trained is None:
            return MODES[:1]
        return MODES if self.live is not None else MODES[1:2]

    @property
    def mode(self) -> str:
        """The ranking in use: the chosen one if it is available."""
        return self._chosen if self._chosen in self.modes else self.modes[-1]

    def choose(self, mode: str) -> None:
        """Choose the ranking; a `ConfigError` is raised if it is unknown or not available yet."""
        check_choice("ranking mode", mode, self.modes)
        self._chosen = mode

    def logits(self) -> Logits | None:
        """Return the logits of the ranking in use; None before the first ranking."""
        if self.mode == "both" and self.live is not None and self.trained is not None:
            return mean_logits(self.live, self.trained)
        return self.trained if self.mode == "trained" else self.live


def mean_logits(live: Logits, trained: Logits) -> Logits:
    """Average the standardised logits of two rankings, on the scale of the first.

    A trained network is far more confident than the probe: in a mean of plain logits, the network alone would rank.
    Images that the training did not rank keep their live logits.
    """
    finite = np.isfinite(live) & np.isfinite(trained)
    if not finite.any():
        return live
    (m1, s1), (m2, s2) = (_mean_and_spread(values[finite]) for values in (live, trained))
    return np.where(np.isfinite(trained), (live + (trained - m2) * (s1 / s2) + m1) / 2, live)


def _mean_and_spread(values: Logits) -> tuple[np.float32, np.float32]:
    mean, sd = values.mean(), values.std()
    return mean, sd if sd > 0 else np.float32(1)


class SearchState:
    """State of a search: connects the label index, the live ranking and the gallery.

    `refit` is slow for large archives and may run beside everything else; the other methods are fast and share a lock.
    All that take an id raise a `DataError` if it is not in the archive, whose `name` is in the message.

    Attributes:
        live: the live ranking; None while no image has features.
        version: how often labels have changed.
    """

    def __init__(
        self,
        ids: Sequence[str],
        name: str,
        labels: LabelIndex,
        gallery: Gallery,
        stopping: StoppingRule,
        notes: Notes,
    ) -> None:
        self.ids, self.labels, self.gallery, self.stopping, self.notes = ids, labels, gallery, stopping, notes
        self.live: LiveRanking | None = None
        self.index = IdIndex(ids, name)
        self.scores = ScoreIndex()
        self.lock, self.version = threading.RLock(), 0
        self._fitting = threading.Lock()
        self._codes: Int8[np.ndarray, " n"] = np.zeros(len(ids), dtype=np.int8)
        self._sequence: Int32[np.ndarray, " n"] = np.zeros(len(ids), dtype=np.int32)  # of the current labels
        self._logits: Logits | None = None
        self._trained_novelty: Logits | None = None
        self._conflicts: Int64[np.ndarray, " c"] = np.array([], np.int64)
        self.described: Logits | None = None
        self._first: Int64[np.ndarray, " n"] | None = None  # the order before the first ranking, on first use
        self._kinds: LRU[tuple[bytes, ...], Int64[np.ndarray, " n"]] = LRU(CACHED_KINDS)
        labelled = self.labels.labels()
        gone = [id_ for id_ in labelled if id_ not in self.index]
        if gone:
            logger.warning(
                "%d labelled images are not in %s: their labels are kept but not used; the first is %s",
                len(gone),
                name,
                gone[0],
            )
        self.update_labels(labelled)

    @property
    def novelty(self) -> Logits | None:
        """Novelty of each image by the last training without labels, else by its features; None if unknown."""
        if self._trained_novelty is not None:
            return self._trained_novelty
        return None if self.live is None else self.live.novelty

    def use(self, live: LiveRanking) -> None:
        """Take over a live ranking, of more images than the last."""
        with self.lock:
            self.live, self._first, self._kinds = live, None, LRU(CACHED_KINDS)
            self.gallery.version += 1  # also of the order before the first ranking
            self._update_gallery()

    def positions(self, ids: Sequence[str]) -> Int64[np.ndarray, " k"]:
        """Return the positions of images."""
        return np.array([self.index[id_] for id_ in ids], dtype=np.int64)

    def read_labels(self) -> None:
        """Read new events of the log."""
        with self.lock:
            self.update_labels(self.labels.refresh())

    def update_labels(self, changed: Iterable[str]) -> None:
        """Copy the labels of the images `changed` from the label index."""
        with self.lock:
            for id_ in changed:
                if id_ in self.index:  # the run folder may contain images that were deleted later
                    event, position = self.labels.current(id_), self.index[id_]
                    self._codes[position] = 0 if event is None or event.label is None else CODES[event.label]
                    self._sequence[position] = 0 if event is None else event.sequence
            self.version += 1
            self._update_gallery()

    def update_notes(self) -> None:
        """Take over changed notes."""
        with self.lock:
            self._update_gallery()

    def update_scores(self) -> None:
        """Compute the logits of the ranking in use again."""
        with self.lock:
            self._logits = self.scores.logits()
            self._update_gallery()

    def describe(self, ranking: Ranking | None) -> None:
        """Take over the ranking by a description; None removes it."""
        described = None if ranking is None else self._read_logits(ranking)
        with self.lock:
            self.described, self._first = described, None
            self._update_gallery()

    def refit(self, examples: Float32[np.ndarray, "e d"]) -> None:
        """Fit the probe on the current labels and on the pooled features of `examples`, and rank by it."""
        with self._fitting:
            with self.lock:
                live = self.live
                groups = [np.flatnonzero(self._codes == CODES[label]) for label in Label]
            if live is None:
                return
            rows = live.store.encode(examples)
            logits = live.fit(groups[0], groups[1], rows, np.concatenate(groups[2:]))
            with self.lock:
                self.scores.live = logits
                self.update_scores()

    def rank_kind(self, ids: Sequence[str]) -> Int64[np.ndarray, " n"]:
        """Return the positions of the readable images, by a probe for the anomalies among `ids` against all others.

        Raises:
            DataError: if none of `ids` is labelled anomaly.
        """
        with self.lock:
            codes = self._codes.copy()
        mine = np.zeros(len(codes), dtype=bool)
        mine[self.positions([id_ for id_ in ids if id_ in self.index])] = True
        rare = codes == CODES[Label.ANOMALY]
        kind, rest = mine & rare, (rare & ~mine) | (codes == CODES[Label.NORMAL])
        parts = tuple(np.flatnonzero(each) for each in (kind, rest, (codes > 0) & ~kind & ~rest))
        if not len(parts[0]):
            raise DataError("no image of this group is labelled anomaly yet: nothing can be ranked by it")
        key = tuple(part.tobytes() for part in parts)
        return self._kinds.get(key, lambda: self._rank_kind(*parts))

    def _rank_kind(self, *parts: Int64[np.ndarray, " _"]) -> Int64[np.ndarray, " n"]:
        logits = None if self.live is None else self.live.fit_kind(*parts)
        if logits is None:
            raise DataError("the images of this group that are labelled anomaly cannot be read")
        order = np.argsort(-logits, kind="stable")  # NaN last
        return order[np.isfinite(logits[order])]

    def add_trainings(self, run: RunReader, cycles: Sequence[int]) -> None:
        """Take the ranking from the last of `cycles`, and the novelty from the last one that began without labels."""
        cold = [cycle for cycle in cycles if run.began_cold(cycle)]
        trained, novelty = ([self._read_logits(run.ranking(c)) for c in last] for last in (cycles[-1:], cold[-1:]))
        with self.lock:
            self.scores.trained = trained[0] if trained else self.scores.trained
            self._trained_novelty = novelty[0] if novelty else self._trained_novelty
            self.update_scores()

    def _read_logits(self, ranking: Ranking) -> Logits:
        logits = np.full(len(self.ids), np.nan, dtype=np.float32)
        for id_, value in zip(ranking.ids, ranking.logits, strict=True):
            if id_ in self.index:
                logits[self.index[id_]] = value
        return logits

    def page(self, query: Query, group: Sequence[str] = (), kind: Sequence[str] = ()) -> Page:
        """Return a page, see `LabelService.page`; `group` and `kind` have the images of those groups of the query."""
        ranked = None if query.kind is None else self.rank_kind(kind)  # before the lock: a fit takes time
        with self.lock:
            like, note = self._resolve(query, group, ranked)
            version = self.gallery.version
        found, total = self.gallery.page(query, like)  # without the lock: it may have to sort the archive
        if query.start >= total:  # the last page
            query = query.from_start(max(0, total - 1) // query.size * query.size)
        pages = query.page + max(1, -(-(total - query.start) // query.size))
        values = self._values(query, found)
        return Page(self._tiles(found), total, query.page, pages, note, version, values)

    def place(self, query: Query, id_: str, group: Sequence[str] = (), kind: Sequence[str] = ()) -> int | None:
        """Return the place of an image among all that a query finds, see `LabelService.place`."""
        ranked = None if query.kind is None else self.rank_kind(kind)
        with self.lock:
            like, _ = self._resolve(query, group, ranked)
            return self.gallery.place(query, self.index[id_], like)

    def found(self, query: Query, group: Sequence[str] = (), kind: Sequence[str] = ()) -> list[str]:
        """Return the ids of the images on all pages of a query, see `page`."""
        ranked = None if query.kind is None else self.rank_kind(kind)
        with self.lock:
            like, _ = self._resolve(query, group, ranked)
            return [self.ids[i] for i in self.gallery.found(query, like).tolist()]

    def values(self, query: Query, ids: Sequence[str]) -> dict[str, str] | None:
        """Return the value of each image in the column that orders a query; None if no column does."""
        return self._values(query, self.positions(ids))

    def _values(self, query: Query, positions: Int64[np.ndarray, " k"]) -> dict[str, str] | None:
        if query.column is None:
            return None
        texts = self.gallery.columns.texts(query.column, positions)
        return {self.ids[i]: text for i, text in zip(positions.tolist(), texts, strict=True)}

    def marks(
        self, positions: Int64[np.ndarray, " k"], veil: Veil = NO_VEIL
    ) -> tuple[Float64[np.ndarray, " k"], Int8[np.ndarray, " k"]]:
        """Return the score of each image, NaN without one, and its label as one of `CODES`, as far as a veil lets."""
        with self.lock:
            every = None if veil.scores else self._logits
            logits = np.full(len(positions), np.nan) if every is None else every[positions]
            codes = self._codes.copy()
            codes[self.unseen(veil.blind) if veil.blind else []] = 0
            return expit(logits.astype(np.float64)), codes[positions]

    def _resolve(
        self, query: Query, group: Sequence[str], ranked: Int64[np.ndarray, " n"] | None
    ) -> tuple[Int64[np.ndarray, " n"] | None, str]:
        """Return the images that replace an order in `Gallery.page`, and the note of a page."""
        like = None if query.like is None else self.neighbours(query.like, 10 * query.size)
        if query.group is not None:
            like = self.positions([id_ for id_ in group if id_ in self.index])
        like = like if ranked is None else ranked
        if query.show is Show.REVIEW:
            like = self.to_review()
        elif query.show is Show.SECOND:
            like = self._known(self.labels.second_opinions(query.annotator))
        elif query.audit:
            like = self._audit_order(query.audit).astype(np.int64)
        note = ""
        if self._logits is None and like is None and query.sort is Sort.SCORE and query.show is Show.UNLABELLED:
            first = IN_FILE_ORDER if self.live is None else self.live.first
            note = FIRST_NOTE.format(first if self.described is None else DESCRIBED_FIRST.format(first))
            like = self._first_order()
        elif self.described is None and like is None and query.sort is Sort.DESCRIPTION:
            note = NO_DESCRIPTION
        return like, note

    def _first_order(self) -> Int64[np.ndarray, " n"]:
        """Return all positions in the order before the first ranking."""
        if self._first is None:
            plain = np.arange(len(self.ids)) if self.live is None else self._plain_first(self.live)
            described = None if self.described is None else self.gallery.described().astype(np.int64)
            self._first = plain if described is None else interleave(described, plain)
        return self._first

    def _plain_first(self, live: LiveRanking) -> Int64[np.ndarray, " n"]:
        """Return the first order without a description."""
        if live.first is FirstOrder.RANDOM:
            return self.gallery.audit().astype(np.int64)
        novel = self.gallery.novel().astype(np.int64)
        if live.first is FirstOrder.NOVEL:
            return novel
        diverse = self._diverse_first(live)
        return diverse if live.first is FirstOrder.DIVERSE else interleave(novel, diverse)

    def _diverse_first(self, live: LiveRanking) -> Int64[np.ndarray, " n"]:
        """Return a diverse batch, then all other images."""
        first = live.first_batch(DIVERSE_IMAGES)
        rest = np.ones(len(self.ids), dtype=bool)
        rest[first] = False
        return np.concatenate([first, np.flatnonzero(rest)])

    def tiles(self, ids: Sequence[str]) -> list[Tile]:
        """Return the tiles of images, see `LabelService.tiles`."""
        return self._tiles(self.positions(ids))

    def neighbours(self, id_: str, count: int) -> Int64[np.ndarray, " k"]:
        """Return the positions of the images most similar to `id_`; none if it has no features."""
        position, live = self.index[id_], self.live
        return np.array([], dtype=np.int64) if live is None else live.store.nearest(position, count)

    def probabilities(self, ids: Sequence[str]) -> dict[str, float]:
        """Return the score of each image that has one."""
        positions, logits = self.positions(ids), self._logits
        if logits is None:
            return {}
        scores = expit(logits[positions].astype(np.float64))
        return {id_: float(score) for id_, score in zip(ids, scores, strict=True) if not np.isnan(score)}

    def ranking(self) -> Ranking | None:
        """Return the ranking in use, of the readable images; None before the first."""
        with self.lock:
            if self._logits is None:
                return None
            kept = np.flatnonzero(np.isfinite(self._logits))
            return Ranking([self.ids[i] for i in kept.tolist()], self._logits[kept].astype(np.float64))

    def labels_and_ranking(self) -> tuple[dict[str, Label], Ranking | None]:
        """Return the label of each image and the ranking in use, at one moment."""
        with self.lock:
            return self.labels.labels(), self.ranking()

    @property
    def unreadable(self) -> Int64[np.ndarray, " u"]:
        """Positions of the images that cannot be read, as far as known."""
        return np.array([], dtype=np.int64) if self.live is None else self.live.store.unreadable

    def _audit_order(self, count: int | None = None) -> Int32[np.ndarray, " r"]:
        """Return the positions of the readable images in the order of the random audit, all or the first `count`."""
        unreadable = self.unreadable
        order = self.gallery.audit()[: None if count is None else count + len(unreadable)]
        return order[~np.isin(order, unreadable)][:count] if len(unreadable) else order

    def audit_progress(self, goal: int) -> AuditProgress:
        """Measure the progress of the random audit towards a number of images."""
        progress = measure_audit(self._codes[self._audit_order()], goal)
        advice = self.stopping.audit_advice(progress.left, found=progress.found)
        return progress._replace(advice=advice) if progress.is_done else progress

    def unseen(self, annotator: str) -> Int64[np.ndarray, " k"]:
        """Return the positions of the labelled images that an annotator has not labelled."""
        with self.lock:
            return self._known([id_ for id_ in self.labels.labels() if annotator not in self.labels.people(id_)])

    def to_review(self) -> Int64[np.ndarray, " k"]:
        """Return the positions of the images in conflict or labelled unsure, newest label first."""
        with self.lock:
            found = np.union1d(self._conflicts, np.flatnonzero(self._codes == CODES[Label.UNSURE]))
            return found[np.argsort(-self._sequence[found], kind="stable")].astype(np.int64)

    def _known(self, ids: Sequence[str]) -> Int64[np.ndarray, " k"]:
        """Return the positions of the images that are in the archive."""
        return self.positions([id_ for id_ in ids if id_ in self.index])

    def counts(self) -> dict[Label, int]:
        """Count the images of the archive with each label."""
        with self.lock:
            return {label: int((self._codes == code).sum()) for label, code in CODES.items()}

    def estimate_left(self) -> Estimate:
        """Estimate the number of unlabelled anomalies from the random audit, with advice on whether to continue."""
        order = self._audit_order()
        audit = measure_audit(self._codes[order], WANTED)
        with self.lock:
            events = self.labels.current_events()
        if audit.sample < audit.goal:
            reason = f"label {WANTED} images of the random audit for an estimate; so far {audit.sample}"
            return Estimate(*UNKNOWN, reason, "")
        sample = {self.ids[i] for i in order[: audit.sample].tolist()}
        recent = recent_yield(events, sample, self.stopping.recent_labels)
        return Estimate(*audit.left, "", self.stopping.advice(audit.left, recent, found=audit.found))

    def check_trainable(self) -> None:
        """Raise a `LabelError` unless an anomaly and a normal are labelled."""
        counts = self.counts()
        for label in (Label.ANOMALY, Label.NORMAL):
            if not counts[label]:
                raise LabelError(f"training needs an anomaly and a normal: no image is labelled {label} yet")

    def histogram(self) -> Histogram | None:
        """Return the histogram of the scores; None before the first ranking."""
        with self.lock:
            logits, codes = self._logits, self._codes.copy()
        if logits is None:
            return None
        scores = expit(logits.astype(np.float64))
        counts, edges = np.histogram(scores[(codes == 0) & np.isfinite(scores)], bins=BINS, range=(0, 1))
        labelled = {label: scores[(codes == CODES[label]) & np.isfinite(scores)] for label in Label}
        return Histogram(edges, counts.astype(np.int64), labelled)

    def _update_gallery(self) -> None:
        newest = np.flatnonzero(self._codes)
        notes = self.notes.all()
        self._conflicts = self._known(self.labels.conflicts())
        marked = {
            Show.CONFLICTS: self._conflicts,
            Show.STARRED: self._known([id_ for id_, note in notes.items() if note.star]),
            Show.NOTED: self._known([id_ for id_, note in notes.items() if note.text]),
        }
        self.gallery.update(
            logits=self._logits,
            novelty=self.novelty,
            described=self.described,
            labels=self._codes,
            newest=newest[np.argsort(-self._sequence[newest])],
            marked=marked,
            diverse=(lambda candidates, _: candidates) if self.live is None else self.live.diverse,
        )

    def _tiles(self, positions: Int64[np.ndarray, " k"]) -> list[Tile]:
        every = self._logits
        ranks = self.gallery.rank(positions).tolist()  # without the lock, as in `page`
        logits = None if every is None else every[positions].astype(np.float64)
        scores = [None] * len(ranks) if logits is None else [float(s) if s == s else None for s in expit(logits)]
        tiles = []
        with self.lock:
            for position, score, rank in zip(positions.tolist(), scores, ranks, strict=True):
                id_ = self.ids[position]
                event = self.labels.current(id_)
                label, annotator = (None, None) if event is None else (event.label, event.annotator)
                note, conflict = self.notes.get(id_), self.labels.has_conflict(id_)
                people = [] if event is None else self.labels.people(id_)
                place = id_, score, rank or None
                tiles.append(Tile(*place, label, annotator, conflict, None, note.star, note.text, people))
        return tiles


def recent_yield(events: Sequence[LabelEvent], audit: Container[str], count: int) -> Yield:
    """Count the anomalies among the last `count` labels (`events`, oldest first), without those of the random audit."""
    recent = [event.label for event in events if event.id not in audit][-count:]
    return Yield(sum(label is Label.ANOMALY for label in recent), len(recent))
