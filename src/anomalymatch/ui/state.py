"""The state of an archive that is being labelled: labels, scores and their orders, all by position."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int8, Int64
from scipy.special import expit

from anomalymatch.active.run_folder import RunReader
from anomalymatch.data.label_log import LabelEvent
from anomalymatch.data.source import IdIndex
from anomalymatch.errors import ConfigError, LabelError
from anomalymatch.evaluation.advice import RECENT, Yield, advice
from anomalymatch.evaluation.discovery import UNKNOWN, WANTED, anomalies_left
from anomalymatch.evaluation.ranks import interleave
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label
from anomalymatch.ui.gallery import CODES, Gallery
from anomalymatch.ui.labels import LabelBook
from anomalymatch.ui.live import LiveRanking
from anomalymatch.ui.views import Beginning, Estimate, Histogram, Page, Query, Show, Sort, Summary, Tile

MODES = ("live", "trained", "both")
Logits = Float32[np.ndarray, " n"]


class Scores:
    """Logits of every image by what ranks; NaN for images that cannot be read.

    Attributes:
        live: of the probe on the labels of this moment; None before it can be fitted.
        trained: of the last training; None before the first.
    """

    def __init__(self) -> None:
        self.live: Logits | None = None
        self.trained: Logits | None = None
        self._chosen = "both"

    @property
    def modes(self) -> tuple[str, ...]:
        """What can rank now."""
        if self.trained is None:
            return MODES[:1]
        return MODES if self.live is not None else MODES[1:2]

    @property
    def mode(self) -> str:
        """What ranks: what was chosen, as far as it is there."""
        return self._chosen if self._chosen in self.modes else self.modes[-1]

    def choose(self, mode: str) -> None:
        """Rank by `mode`.

        Raises:
            ConfigError: if there is no such mode, or not yet.
        """
        if mode not in self.modes:
            raise ConfigError(f"cannot rank by {mode!r} now: choose one of {', '.join(self.modes)}")
        self._chosen = mode

    def logits(self) -> Logits | None:
        """What ranks; None before anything can."""
        if self.mode == "both" and self.live is not None and self.trained is not None:
            return mean_logits(self.live, self.trained)
        return self.trained if self.mode == "trained" else self.live


def mean_logits(live: Logits, trained: Logits) -> Logits:
    """The mean of both in units of their own spread, on the scale of the first.

    A trained network is far surer of itself than the probe: the mean of the plain logits would be its ranking alone.
    """
    finite = np.isfinite(live) & np.isfinite(trained)
    if not finite.any():
        return live
    (m1, s1), (m2, s2) = (_spread(values[finite]) for values in (live, trained))
    return (live + (trained - m2) * (s1 / s2) + m1) / 2


def _spread(values: Logits) -> tuple[np.float32, np.float32]:
    mean, sd = values.mean(), values.std()
    return mean, sd if sd > 0 else np.float32(1)


DIVERSE_IMAGES = 200
"""Images of the diverse batch that an archive without labels begins with."""
BINS = 60
FIRST_NOTE = "Nothing to rank by yet: these images are {}. Label what you see."


class Board:
    """Joins the label book, the live ranking and the gallery.

    `refit` is slow for large archives and may run while everything else goes on; all else is fast and has one lock.

    Args:
        ids: all images of the archive.
        name: of the archive, for messages.
        book: the labels.
        live: the ranking.
        gallery: the orders.
    """

    def __init__(
        self,
        ids: Sequence[str],
        name: str,
        book: LabelBook,
        live: LiveRanking,
        gallery: Gallery,
    ) -> None:
        self.ids, self.book, self.live, self.gallery = ids, book, live, gallery
        self.index = IdIndex(ids, name)
        self.scores = Scores()
        self.lock = threading.RLock()
        self._fitting = threading.Lock()
        self._codes: Int8[np.ndarray, " n"] = np.zeros(len(ids), dtype=np.int8)
        self._logits: Logits | None = None
        self.novelty: Logits | None = live.novelty
        self.show_labels(self.book.labels())

    def positions(self, ids: Sequence[str]) -> Int64[np.ndarray, " k"]:
        """Where `ids` are.

        Raises:
            DataError: if one is not in the archive.
        """
        return np.array([self.index[id_] for id_ in ids], dtype=np.int64)

    def show_labels(self, changed: Iterable[str]) -> None:
        """Take over what the book says of the images `changed`."""
        with self.lock:
            for id_ in changed:
                if id_ in self.index:  # a run folder may know images that have since been deleted
                    event = self.book.last(id_)
                    self._codes[self.index[id_]] = 0 if event is None or event.label is None else CODES[event.label]
            self._show()

    def refit(self, examples: Float32[np.ndarray, "e d"]) -> None:
        """Fit the probe on the labels of this moment and on `examples`, and rank by it."""
        with self._fitting:
            with self.lock:
                groups = [np.flatnonzero(self._codes == CODES[label]) for label in Label]
            logits = self.live.fit(groups[0], groups[1], examples, np.concatenate(groups[2:]))
            with self.lock:
                self.scores.live = logits
                self.show_scores()

    def take_trainings(self, run: RunReader, cycles: Sequence[int]) -> None:
        """Let the scores of the last of `cycles` rank, too; those of the last one without labels say what is novel."""
        cold = [cycle for cycle in cycles if run.began_cold(cycle)]
        trained, novelty = ([self._logits_of(run.ranking(c)) for c in last] for last in (cycles[-1:], cold[-1:]))
        with self.lock:
            self.scores.trained = trained[0] if trained else self.scores.trained
            self.novelty = novelty[0] if novelty else self.novelty
            self.show_scores()

    def _logits_of(self, ranking: Ranking) -> Logits:
        logits = np.full(len(self.ids), np.nan, dtype=np.float32)
        for id_, value in zip(ranking.ids, ranking.logits, strict=True):
            if id_ in self.index:
                logits[self.index[id_]] = value
        return logits

    def show_scores(self) -> None:
        """Take over what ranks now."""
        with self.lock:
            self._logits = self.scores.logits()
            self._show()

    def page(self, query: Query, group: Sequence[str] = ()) -> Page:
        """See `LabelService.page`; `group` are the images of the group that the query asks for."""
        with self.lock:
            like = None if query.like is None else self.neighbours(query.like, 10 * query.size)
            if query.group is not None:
                like = self.positions([id_ for id_ in group if id_ in self.index])
            note = ""
            if self._logits is None and like is None and query.sort is Sort.SCORE and query.show is Show.UNLABELLED:
                note = FIRST_NOTE.format(self.live.first)
                like, query = self._beginning(query)
            found, total = self.gallery.page(query, like)
            pages = max(1, -(-total // query.size))
            return Page(self._tiles(found), total, min(query.page, pages - 1), pages, note)

    def _beginning(self, query: Query) -> tuple[Int64[np.ndarray, " n"] | None, Query]:
        """What is shown before the first ranking, as `Gallery.page` takes it."""
        if self.live.first is Beginning.DIVERSE:
            return self._diverse_first, query
        if self.live.first is Beginning.MIXED:
            return self._mixed_first, query
        return None, replace(query, sort=Sort.NOVELTY if self.live.first is Beginning.NOVEL else Sort.AUDIT)

    @cached_property
    def _mixed_first(self) -> Int64[np.ndarray, " n"]:
        return interleave(self.gallery.novel().astype(np.int64), self._diverse_first)

    @cached_property
    def _diverse_first(self) -> Int64[np.ndarray, " n"]:
        """A diverse batch, then all others."""
        first = self.live.first_batch(DIVERSE_IMAGES)
        rest = np.ones(len(self.ids), dtype=bool)
        rest[first] = False
        return np.concatenate([first, np.flatnonzero(rest)])

    def tiles(self, ids: Sequence[str]) -> list[Tile]:
        """See `LabelService.tiles`."""
        with self.lock:
            return self._tiles(self.positions(ids))

    def neighbours(self, id_: str, count: int) -> Int64[np.ndarray, " k"]:
        """Positions of the images nearest to `id_`, without itself; none if it cannot be read."""
        at = self.positions([id_])
        if not self.live.bank.has(at)[0]:
            return at[:0]
        nearest = self.live.bank.nearest(self.live.bank.rows(at)[0], count + 1)
        return nearest[nearest != at[0]][:count]

    def scores_of(self, ids: Sequence[str]) -> dict[str, float]:
        """Probability by id, for those that have one."""
        return {tile.id: tile.score for tile in self.tiles(ids) if tile.score is not None}

    def ranking(self) -> Ranking | None:
        """What ranks now, as a ranking of the readable images."""
        with self.lock:
            if self._logits is None:
                return None
            kept = np.flatnonzero(np.isfinite(self._logits))
            return Ranking([self.ids[i] for i in kept.tolist()], self._logits[kept].astype(np.float64))

    def state(self) -> tuple[dict[str, Label], Ranking | None]:
        """The label of each image, and what ranks now."""
        with self.lock:
            return self.book.labels(), self.ranking()

    def audited(self) -> dict[str, Label]:
        """The labelled images that are a random sample of the archive.

        The random audit has a fixed order: as far as all of it is labelled, for whatever reason, it is such a sample.
        """
        with self.lock:
            order = self.gallery.audit().astype(np.int64)
            order = order[self.live.bank.has(order)]
            unlabelled = self._codes[order] == 0
            sample = order[: int(unlabelled.argmax())] if unlabelled.any() else order
            labels = {code: label for label, code in CODES.items()}
            return {self.ids[i]: labels[int(self._codes[i])] for i in sample.tolist()}

    def codes(self) -> Int8[np.ndarray, " r"]:
        """The labels of all images that can be read, as `CODES` writes them; 0 is none."""
        with self.lock:
            return self._codes[self.live.bank.positions]

    def check_trainable(self) -> None:
        """Refuse a training without an anomaly and a normal.

        Raises:
            LabelError: if one of them is missing.
        """
        with self.lock:
            counts = self.book.counts()
        for label in (Label.ANOMALY, Label.NORMAL):
            if not counts[label]:
                raise LabelError(f"training needs images of both kinds, and none is labelled {label} yet")

    def histogram(self) -> Histogram | None:
        """Of the scores; None before the first ranking."""
        with self.lock:
            if self._logits is None:
                return None
            scores = expit(self._logits.astype(np.float64))
            counts, edges = np.histogram(scores[(self._codes == 0) & np.isfinite(scores)], bins=BINS, range=(0, 1))
            labelled = {label: scores[(self._codes == CODES[label]) & np.isfinite(scores)] for label in Label}
            return Histogram(edges, counts.astype(np.int64), labelled)

    def _show(self) -> None:
        standing: list[LabelEvent] = self.book.standing()
        known = [event.id for event in reversed(standing) if event.id in self.index]
        conflicts = [id_ for id_ in self.book.conflicts() if id_ in self.index]
        self.gallery.update(
            logits=self._logits,
            novelty=self.novelty,
            labels=self._codes,
            newest=self.positions(known),
            conflicts=self.positions(conflicts),
            diverse=self.live.diverse,
        )

    def _tiles(self, positions: Int64[np.ndarray, " k"]) -> list[Tile]:
        ranks = self.gallery.rank(positions).tolist()
        logits = None if self._logits is None else self._logits[positions].astype(np.float64)
        scores = [None] * len(ranks) if logits is None else [float(s) if s == s else None for s in expit(logits)]
        return [
            self._tile(self.ids[position], score, rank)
            for position, score, rank in zip(positions.tolist(), scores, ranks, strict=True)
        ]

    def _tile(self, id_: str, score: float | None, rank: int) -> Tile:
        event = self.book.last(id_)
        return Tile(
            id=id_,
            score=score,
            rank=rank or None,
            label=None if event is None else event.label,
            annotator=None if event is None else event.annotator,
            conflict=self.book.conflict(id_),
        )


def estimate(board: Board) -> Estimate:
    """What is left, and whether to go on."""
    with board.lock:
        audit, codes, standing = board.audited(), board.codes(), board.book.standing()
    if len(audit) < min(WANTED, len(codes)):
        return Estimate(*UNKNOWN, f"label {WANTED} images of the random audit for an estimate; so far {len(audit)}", "")
    found = int((codes == CODES[Label.ANOMALY]).sum())
    left = anomalies_left(
        len(codes),
        len(audit),
        sum(label is Label.ANOMALY for label in audit.values()),
        found=found,
        unlabelled=int((codes == 0).sum()),
    )
    return Estimate(*left, "", advice(left, search_yield(standing, audit), found=found))


def search_yield(standing: Sequence[LabelEvent], audit: dict[str, Label]) -> Yield:
    """What the last labels of the search found; those of the audit are random, and say nothing of it.

    Args:
        standing: the label that counts of each image, oldest first.
        audit: the random sample.
    """
    recent = [event.label for event in standing if event.id not in audit][-RECENT:]
    return Yield(sum(label is Label.ANOMALY for label in recent), len(recent))


def summarise(board: Board, *, cycle: int, seconds: float) -> Summary:
    """The state of a search.

    Args:
        board: labels and scores.
        cycle: trainings that are finished.
        seconds: the last re-ranking took.
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
            estimate=estimate(board),
            agreements=book.agreements(),
            conflicts=book.conflicts(),
            annotators=book.annotators(),
            mode=board.scores.mode,
            modes=board.scores.modes,
            cycle=cycle,
            seconds=seconds,
        )
