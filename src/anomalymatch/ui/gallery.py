"""From a query to the images of a page, in an archive of millions."""

import logging
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Float64, Int8, Int32, Int64
from scipy.special import expit

from anomalymatch.evaluation.discovery import audit_order
from anomalymatch.types import Label
from anomalymatch.ui.recent import Recent
from anomalymatch.ui.views import Query, Show, Sort

logger = logging.getLogger(__name__)
REMEMBERED_TEXTS = 8


class TextFilter:
    """Finds text in ids and metadata, in any case of letters.

    Args:
        ids: all images.
        metadata: columns of any type, a row for each image; None without any.
    """

    def __init__(self, ids: Sequence[str], metadata: pa.Table | None) -> None:
        self._ids, self._metadata = ids, pa.table({}) if metadata is None else metadata
        self._recent: Recent[Bool[np.ndarray, " n"]] = Recent(REMEMBERED_TEXTS)

    def matches(self, text: str) -> Bool[np.ndarray, " n"]:
        """Whether each image has `text` in its id or in a column."""
        return self._recent.get(text, lambda: self._search(text))

    def _search(self, text: str) -> Bool[np.ndarray, " n"]:
        pattern = pc.utf8_lower(pa.scalar(text)).as_py()
        found = np.zeros(len(self._ids), dtype=bool)
        for column in self._columns:
            hits = pc.match_substring(column, pattern).fill_null(False)
            found |= hits.to_numpy(zero_copy_only=False) if isinstance(hits, pa.Array) else hits.to_numpy()
        return found

    @cached_property
    def _columns(self) -> list[pa.Array | pa.ChunkedArray]:
        """All text in small letters, made when it is first asked for; 64-bit offsets hold more than two gigabytes."""
        columns = [pc.utf8_lower(pa.array(list(self._ids), pa.large_string()))]
        for name in self._metadata.column_names:
            try:
                columns.append(pc.utf8_lower(self._metadata.column(name).cast(pa.large_string())))
            except pa.ArrowException as error:  # lists and structures have no text
                logger.debug("The column %s is not searched: %s", name, error)
        return columns


Diverse = Callable[[Int64[np.ndarray, " c"], int], Int64[np.ndarray, " k"]]
"""Orders candidates so that the first ones differ most; what it leaves out follows in the order given."""
Order = Int32[np.ndarray, " n"]

DIVERSE_BLOCK = 500
"""Images, in the order of their score, that are sorted by how they differ: the top first, never the whole archive."""
REMEMBERED = 8
CODES = {label: code for code, label in enumerate(Label, start=1)}
"""How labels are written in an array; 0 is none."""


class Gallery:
    """Answers queries; every image that a query finds is on exactly one of its pages.

    Args:
        ids: all images.
        seed: of the random audit.
        metadata: what else the text of a query is looked for in, a row for each image; None for nothing.
    """

    def __init__(self, ids: Sequence[str], *, seed: int, metadata: pa.Table | None) -> None:
        self._text = TextFilter(ids, metadata)
        # The same whatever the scores are, so that an audit goes on where it stood.
        audit = cache(lambda: audit_order(len(ids), seed).astype(np.int32))
        orders = _Orders(len(ids), None, audit)
        nothing = np.array([], dtype=np.int64)
        labels = np.zeros(len(ids), np.int8)
        self._view = _View(orders, orders, labels, nothing, nothing, lambda candidates, _: candidates)

    def update(
        self,
        *,
        logits: Float32[np.ndarray, " n"] | None,
        novelty: Float32[np.ndarray, " n"] | None,
        labels: Int8[np.ndarray, " n"],
        newest: Int64[np.ndarray, " l"],
        conflicts: Int64[np.ndarray, " c"],
        diverse: Diverse,
    ) -> None:
        """Show another state from now on.

        Args:
            logits: NaN for images without a score; None before the first ranking. They must not be altered
                afterwards; the same array as the last time is not sorted again.
            novelty: how unlike the others each image is, for that order; likewise.
            labels: by `CODES`; copied.
            newest: labelled images, the last one first.
            conflicts: images on which annotators disagree.
            diverse: see `Diverse`.
        """
        orders, novel = self._view.orders.of(logits), self._view.novel.of(novelty)
        self._view = _View(orders, novel, labels.copy(), newest, conflicts, diverse)

    def page(self, query: Query, like: Int64[np.ndarray, " k"] | None = None) -> tuple[Int64[np.ndarray, " t"], int]:
        """Positions of the images of one page, and how many there are on all pages.

        Past the last page it is the last one. A range of scores that is not all of 0 to 1 leaves out images without
        a score; otherwise they come last. Equal scores are in the order of positions, and before the first ranking
        all are.

        Args:
            query: what to show.
            like: neighbours of an image, nearest first, of which those that pass the filters are shown instead of
                the whole archive.
        """
        view = self._view  # one state for the whole page, whatever other threads do meanwhile
        if like is None:
            key = (query.sort, query.show, query.low, query.high, query.text)
            found = view.recent.get(key, lambda: _kept(view.order(query.sort), self._mask(view, query)))
        else:
            found = _kept(like, self._mask(view, query))
        start = min(query.page, max(0, len(found) - 1) // query.size) * query.size
        stop = min(start + query.size, len(found))
        if like is None and query.sort is Sort.DIVERSE:
            return _spread(view, key, found, start, stop), len(found)
        return found[start:stop].astype(np.int64), len(found)

    def rank(self, positions: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        """Places by score, 1 for the highest; 0 without one."""
        return self._view.orders.ranks[positions].astype(np.int64)

    def audit(self) -> Order:
        """All positions in the order of the random audit."""
        return self._view.orders.audit()

    def novel(self) -> Order:
        """All positions, the most novel first; in order where no novelty is known."""
        return self._view.novel.highest

    def _mask(self, view: "_View", query: Query) -> Bool[np.ndarray, " n"] | None:
        """Which images pass the filters; None for all."""
        masks = []
        if query.show is not Show.ALL:
            masks.append(view.shown(query.show))
        if query.low > 0 or query.high < 1:
            masks.append((view.orders.scores >= query.low) & (view.orders.scores <= query.high))
        if query.text:
            masks.append(self._text.matches(query.text))
        return np.logical_and.reduce(masks) if masks else None


class _Orders:
    """All images sorted by one set of scores, each order when it is first asked for."""

    def __init__(self, count: int, logits: Float32[np.ndarray, " n"] | None, audit: Callable[[], Order]) -> None:
        self.count, self.logits, self.audit = count, logits, audit

    def of(self, logits: Float32[np.ndarray, " n"] | None) -> "_Orders":
        """Those by other scores; these if the scores are the same array."""
        return self if logits is self.logits else _Orders(self.count, logits, self.audit)

    @cached_property
    def positions(self) -> Order:
        return np.arange(self.count, dtype=np.int32)

    @cached_property
    def highest(self) -> Order:
        return self.positions if self.logits is None else _rising(-self.logits)

    @cached_property
    def lowest(self) -> Order:
        return self.positions if self.logits is None else _rising(self.logits)

    @cached_property
    def uncertain(self) -> Order:
        return self.positions if self.logits is None else _rising(np.abs(self.logits))

    @cached_property
    def median(self) -> Order:
        if self.logits is None or np.isnan(self.logits).all():
            return self.positions
        return _rising(np.abs(self.logits - np.nanmedian(self.logits)))

    @cached_property
    def scores(self) -> Float64[np.ndarray, " n"]:
        return np.full(self.count, np.nan) if self.logits is None else expit(self.logits.astype(np.float64))

    @cached_property
    def ranks(self) -> Order:
        ranks = np.zeros(self.count, dtype=np.int32)
        if self.logits is not None:
            ranks[self.highest] = np.arange(1, self.count + 1)
            ranks[np.isnan(self.logits)] = 0
        return ranks


class _View:
    """One state of the labelling."""

    def __init__(
        self,
        orders: _Orders,
        novel: _Orders,
        labels: Int8[np.ndarray, " n"],
        newest: Int64[np.ndarray, " l"],
        conflicts: Int64[np.ndarray, " c"],
        diverse: Diverse,
    ) -> None:
        self.orders, self.novel, self.labels = orders, novel, labels
        self.newest, self.conflicts, self.diverse = newest, conflicts, diverse
        self.recent: Recent[Order] = Recent(REMEMBERED)
        self.blocks: Recent[Order] = Recent(REMEMBERED)

    def order(self, sort: Sort) -> Order:
        if sort is Sort.NEWEST:
            rest = np.ones(self.orders.count, dtype=bool)
            rest[self.newest] = False
            return np.concatenate([self.newest.astype(np.int32), _kept(self.orders.highest, rest)])
        if sort is Sort.AUDIT:
            return self.orders.audit()
        if sort is Sort.NOVELTY:
            return self.novel.highest
        if sort is Sort.LOWEST:
            return self.orders.lowest
        if sort is Sort.UNCERTAIN:
            return self.orders.uncertain
        return self.orders.median if sort is Sort.MEDIAN else self.orders.highest

    def shown(self, show: Show) -> Bool[np.ndarray, " n"]:
        if show is Show.CONFLICTS:
            mask = np.zeros(self.orders.count, dtype=bool)
            mask[self.conflicts] = True
            return mask
        if show is Show.LABELLED:
            return self.labels > 0
        return self.labels == (0 if show is Show.UNLABELLED else CODES[Label(show)])


def _kept(order: np.ndarray, mask: Bool[np.ndarray, " n"] | None) -> np.ndarray:
    return order if mask is None else order[mask[order]]


def _spread(view: _View, key: tuple[object, ...], found: Order, start: int, stop: int) -> Int64[np.ndarray, " t"]:
    """Images `start` to `stop` of `found` with every block of it sorted by how its images differ."""

    def make(number: int) -> Order:
        candidates = found[number * DIVERSE_BLOCK : (number + 1) * DIVERSE_BLOCK].astype(np.int64)
        first = view.diverse(candidates, len(candidates))
        return np.concatenate([first, candidates[~np.isin(candidates, first)]]).astype(np.int32)

    numbers = range(start // DIVERSE_BLOCK, -(-stop // DIVERSE_BLOCK))
    blocks = [found[:0], *(view.blocks.get((key, number), partial(make, number)) for number in numbers)]
    offset = numbers.start * DIVERSE_BLOCK
    return np.concatenate(blocks)[start - offset : stop - offset].astype(np.int64)


def _rising(values: Float32[np.ndarray, " n"]) -> Order:
    """Positions by rising value, equal ones by position, NaN last.

    Value and position make one integer: those are sorted four times as fast as a stable sort of the values.
    """
    bits = (values + np.float32(0)).view(np.uint32)  # which turns minus zero into zero
    bits = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    bits[np.isnan(values)] = np.iinfo(np.uint32).max
    keys = bits.astype(np.uint64) << np.uint64(32) | np.arange(len(values), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int32)
