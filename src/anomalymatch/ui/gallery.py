"""Gallery: sorts, filters and pages the images of an archive of millions by position."""

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Float64, Int8, Int32, Int64, UInt64
from scipy.special import expit

from anomalymatch.evaluation.discovery import audit_order
from anomalymatch.lru import LRU
from anomalymatch.types import Label
from anomalymatch.ui.columns import Columns
from anomalymatch.ui.views import QUEUES, Area, ColumnOrder, Query, Show, Sort

logger = logging.getLogger(__name__)
DiverseFirst = Callable[[Int64[np.ndarray, " c"], int], Int64[np.ndarray, " k"]]
"""Function that sorts candidates so that the first ones differ most; omitted ones follow in the order given."""
Within = Callable[[Area], Int64[np.ndarray, " k"]]
Header = Callable[[str], Mapping[str, str]]
Order = Int32[np.ndarray, " n"]

CACHED_RESULTS = 8
HEADERS_S = 2.0
"""Longest wait of a text filter for the headers of files; the first filter starts to read them."""
DIVERSE_BLOCK = 500
"""Size of the blocks, in order of score, that are sorted by diversity: the top first, never the whole archive."""
CODES = {label: code for code, label in enumerate(Label, start=1)}
"""Integer codes of the labels in arrays; 0 is no label."""
_SORT_KEYS: dict[Sort, Callable[[Float32[np.ndarray, " n"]], Float32[np.ndarray, " n"]]] = {
    Sort.SCORE: np.negative,
    Sort.LOWEST: np.positive,
    Sort.UNCERTAIN: np.abs,
    Sort.MEDIAN: lambda logits: np.abs(logits - np.nanmedian(logits)),
}
"""Keys, from logits, of the orders by score; the smallest comes first."""


class Gallery:
    """Gallery of an archive. Every image that a query finds is on exactly one of its pages.

    Args:
        ids: all images.
        seed: seed of the random audit.
        metadata: see `TextFilter` and `Columns`.
        within: returns the positions of the images in an area of the map; None if there is no map.
        classes: see `TextFilter`.
        header: likewise.

    Attributes:
        text: the text filter.
        columns: the columns of the metadata for orders and ranges.
        version: how often scores, novelty or fit to the description, and with them the orders, have changed.
    """

    def __init__(
        self,
        ids: Sequence[str],
        *,
        seed: int,
        metadata: pa.Table | None,
        within: Within | None = None,
        classes: Mapping[str, str] | None = None,
        header: Header | None = None,
    ) -> None:
        self.version = 0
        self.text, self._within = TextFilter(ids, metadata, classes, header), within
        self.columns = Columns(metadata)
        self._numbers = cache(partial(share_numbers, ids))
        self._parts: LRU[tuple[int, int], Bool[np.ndarray, " n"]] = LRU(CACHED_RESULTS)
        # Independent of the scores, so that an audit continues where it stopped.
        audit = cache(lambda: audit_order(len(ids), seed).astype(np.int32))
        orders = _Orders(len(ids), None, audit)
        nothing = np.array([], dtype=np.int64)
        labels = np.zeros(len(ids), np.int8)
        self._snapshot = _Snapshot(orders, orders, orders, labels, nothing, {}, lambda candidates, _: candidates)

    def update(
        self,
        *,
        logits: Float32[np.ndarray, " n"] | None,
        novelty: Float32[np.ndarray, " n"] | None,
        described: Float32[np.ndarray, " n"] | None = None,
        labels: Int8[np.ndarray, " n"],
        newest: Int64[np.ndarray, " l"],
        marked: Mapping[Show, Int64[np.ndarray, " c"]],
        diverse: DiverseFirst,
    ) -> None:
        """Replace the state that pages show.

        Args:
            logits: NaN for images without a score; None before the first ranking. The array must not be changed
                afterwards; if it is the same array as before, it is not sorted again.
            novelty: likewise.
            described: likewise, of the order by a description.
            labels: by `CODES`; copied.
            newest: labelled images, newest label first.
            marked: images that pass the filters `CONFLICTS`, `STARRED` and `NOTED`.
            diverse: see `DiverseFirst`.
        """
        old = self._snapshot
        orders, novel, fitting = old.orders.of(logits), old.novel.of(novelty), old.described.of(described)
        self.version += (orders, novel, fitting) != (old.orders, old.novel, old.described)
        self._snapshot = _Snapshot(orders, novel, fitting, labels.copy(), newest, marked, diverse)

    def page(self, query: Query, like: Int64[np.ndarray, " k"] | None = None) -> tuple[Int64[np.ndarray, " t"], int]:
        """Return the positions of the images of one page and the number of images on all pages.

        A page beyond the end becomes the last page. A score range other than 0 to 1 leaves out images without a score;
        otherwise they come last. Ties are in order of position, as are all images before the first ranking.

        Args:
            query: what to show.
            like: neighbours of an image, nearest first, or the images of one of `QUEUES`; those that pass the filters
                are shown, not the whole archive.
        """
        snapshot = self._snapshot  # one state for the whole page, whatever other threads do
        found = self._found(snapshot, query, like)
        start = query.start if query.start < len(found) else max(0, len(found) - 1) // query.size * query.size
        stop = min(start + query.size, len(found))
        if like is None and query.sort is Sort.DIVERSE:
            return _diverse_range(snapshot, _key(query), found, start, stop), len(found)
        return found[start:stop].astype(np.int64), len(found)

    def place(self, query: Query, position: int, like: Int64[np.ndarray, " k"] | None = None) -> int | None:
        """Return the index, from 0, of an image in the results of a query; None if the query does not find it."""
        snapshot = self._snapshot
        found = self._found(snapshot, query, like)
        places = np.flatnonzero(found == position)
        if not len(places):
            return None
        start = 0
        if like is None and query.sort is Sort.DIVERSE:
            start = int(places[0]) // DIVERSE_BLOCK * DIVERSE_BLOCK
            block = _diverse_range(snapshot, _key(query), found, start, min(start + DIVERSE_BLOCK, len(found)))
            places = np.flatnonzero(block == position)
        return start + int(places[0])

    def found(self, query: Query, like: Int64[np.ndarray, " k"] | None = None) -> Int64[np.ndarray, " f"]:
        """Return the positions of the images on all pages of a query, see `page`."""
        return self._found(self._snapshot, query, like).astype(np.int64)

    def _found(self, snapshot: "_Snapshot", query: Query, like: Int64[np.ndarray, " k"] | None) -> np.ndarray:
        """Return the positions of all images that a query finds; the blocks of the diverse order are not sorted."""
        if like is not None:
            return _select(like, self._mask(snapshot, query))
        if query.area:  # not kept: the map may come later
            return _select(self._order(snapshot, query), self._mask(snapshot, query))
        key = (*_key(query), self.text.headers_read)
        return snapshot.results.get(key, lambda: _select(self._order(snapshot, query), self._mask(snapshot, query)))

    def _order(self, snapshot: "_Snapshot", query: Query) -> Order:
        return self.columns.order(query.sort) if isinstance(query.sort, ColumnOrder) else snapshot.order(query.sort)

    def rank(self, positions: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
        """Return ranks by score, 1 for the highest; 0 without a score."""
        return self._snapshot.orders.ranks[positions].astype(np.int64)

    def audit(self) -> Order:
        """Return all positions in the order of the random audit."""
        return self._snapshot.orders.audit()

    def novel(self) -> Order:
        """Return all positions, most novel first; in order of position if no novelty is known."""
        return self._snapshot.novel.by(Sort.SCORE)

    def described(self) -> Order:
        """Return all positions, best fit to the description first; in order of position without a description."""
        return self._snapshot.described.by(Sort.SCORE)

    def _mask(self, snapshot: "_Snapshot", query: Query) -> Bool[np.ndarray, " n"] | None:
        """Return the images that pass the filters; None for all."""
        masks = []
        if query.show is not Show.ALL and query.show not in QUEUES:
            masks.append(snapshot.shown(query.show))
        if query.low > 0 or query.high < 1:
            masks.append((snapshot.orders.scores >= query.low) & (snapshot.orders.scores <= query.high))
        if query.text:
            masks.append(self.text.matches(query.text))
        if query.share[1] > 1:
            part, parts = query.share
            masks.append(self._parts.get(query.share, lambda: self._numbers() % parts == part - 1))
        if query.area:
            masks.append(np.zeros(snapshot.orders.count, dtype=bool))
            masks[-1][self._within(query.area) if self._within else []] = True
        masks += [self.columns.within(limits) for limits in query.ranges]
        return np.logical_and.reduce(masks) if masks else None


class TextFilter:
    """Filter by text in ids, classes, `metadata` (columns of any type) and headers of images, ignoring case.

    Args:
        ids: all images.
        metadata: one row for each image.
        classes: class of each image, where known.
        header: returns the header of an image; None if the files have none.
    """

    def __init__(
        self,
        ids: Sequence[str],
        metadata: pa.Table | None,
        classes: Mapping[str, str] | None = None,
        header: Header | None = None,
    ) -> None:
        self._ids, self._metadata, self._classes = ids, pa.table({}) if metadata is None else metadata, classes or {}
        self._header, self._headers = header, list[str]()
        self._starting, self._all_read = threading.Lock(), threading.Event()
        self._results: LRU[tuple[str, int], Bool[np.ndarray, " n"]] = LRU(CACHED_RESULTS)

    @property
    def headers_read(self) -> int:
        """Number of images whose headers are searched so far."""
        return len(self._headers)

    @property
    def unread(self) -> int:
        """Number of images whose headers have not been read yet."""
        return 0 if self._header is None else len(self._ids) - len(self._headers)

    def read_headers(self, seconds: float = HEADERS_S) -> None:
        """Start to read all headers in a thread, unless it runs, and wait for its end, for `seconds` at most."""
        if self._header is None or self._all_read.is_set():
            return
        if self._starting.acquire(blocking=False):
            threading.Thread(target=self._read_headers, name="headers", daemon=True).start()
        self._all_read.wait(seconds)

    def _read_headers(self) -> None:
        for id_ in self._ids:
            words = {} if self._header is None else self._header(id_)
            self._headers.append("\n".join(f"{name} {value}" for name, value in words.items()).lower())
        self._all_read.set()

    def matches(self, text: str) -> Bool[np.ndarray, " n"]:
        """Return True for each image with `text` in its id, its class, a column, or its header as far as it is read."""
        return self._results.get((text, self.headers_read), lambda: self._search(text))

    def _search(self, text: str) -> Bool[np.ndarray, " n"]:
        pattern = pc.utf8_lower(pa.scalar(text)).as_py()
        found = np.zeros(len(self._ids), dtype=bool)
        for column in self._columns:
            hits = pc.match_substring(column, pattern).fill_null(False)
            found |= hits.to_numpy(zero_copy_only=False) if isinstance(hits, pa.Array) else hits.to_numpy()
        for place, header in enumerate(self._headers):
            found[place] |= pattern in header
        return found

    @cached_property
    def _columns(self) -> list[pa.Array | pa.ChunkedArray]:
        """All text in lower case; 64-bit offsets hold more than two gigabytes."""
        columns = [pc.utf8_lower(pa.array(list(self._ids), pa.large_string()))]
        if self._classes:
            columns.append(pc.utf8_lower(pa.array([self._classes.get(id_) for id_ in self._ids], pa.large_string())))
        for name in self._metadata.column_names:
            try:
                columns.append(pc.utf8_lower(self._metadata.column(name).cast(pa.large_string())))
            except pa.ArrowException as error:  # lists and structures have no text
                logger.debug("The column %s is not searched: %s", name, error)
        return columns


class _Orders:
    """Orders of all images by one array of scores, each computed on first use."""

    def __init__(self, count: int, logits: Float32[np.ndarray, " n"] | None, audit: Callable[[], Order]) -> None:
        self.count, self.logits, self.audit = count, logits, audit
        self.by = cache(self._sorted)

    def of(self, logits: Float32[np.ndarray, " n"] | None) -> "_Orders":
        """Return the orders by other scores; these orders if the scores are the same array."""
        return self if logits is self.logits else _Orders(self.count, logits, self.audit)

    def _sorted(self, sort: Sort) -> Order:
        """Sort by one of `_SORT_KEYS`; without scores, images are in order of position."""
        if self.logits is None or np.isnan(self.logits).all():
            return np.arange(self.count, dtype=np.int32)
        return _ascending(_SORT_KEYS[sort](self.logits))

    @cached_property
    def scores(self) -> Float64[np.ndarray, " n"]:
        return np.full(self.count, np.nan) if self.logits is None else expit(self.logits.astype(np.float64))

    @cached_property
    def ranks(self) -> Order:
        ranks = np.zeros(self.count, dtype=np.int32)
        if self.logits is not None:
            ranks[self.by(Sort.SCORE)] = np.arange(1, self.count + 1)
            ranks[np.isnan(self.logits)] = 0
        return ranks


class _Snapshot:
    """State of the gallery between two updates, with cached results."""

    def __init__(
        self,
        orders: _Orders,
        novel: _Orders,
        described: _Orders,
        labels: Int8[np.ndarray, " n"],
        newest: Int64[np.ndarray, " l"],
        marked: Mapping[Show, Int64[np.ndarray, " c"]],
        diverse: DiverseFirst,
    ) -> None:
        self.orders, self.novel, self.described, self.labels = orders, novel, described, labels
        self.newest, self.marked, self.diverse = newest, marked, diverse
        self.results: LRU[tuple[object, ...], Order] = LRU(CACHED_RESULTS)
        self.blocks: LRU[tuple[object, ...], Order] = LRU(CACHED_RESULTS)

    def order(self, sort: Sort) -> Order:
        if sort is Sort.NEWEST:
            rest = np.ones(self.orders.count, dtype=bool)
            rest[self.newest] = False
            return np.concatenate([self.newest.astype(np.int32), _select(self.orders.by(Sort.SCORE), rest)])
        if sort is Sort.AUDIT:
            return self.orders.audit()
        if sort is Sort.NOVELTY:
            return self.novel.by(Sort.SCORE)
        if sort is Sort.DESCRIPTION:
            return self.described.by(Sort.SCORE)
        return self.orders.by(sort if sort in _SORT_KEYS else Sort.SCORE)

    def shown(self, show: Show) -> Bool[np.ndarray, " n"]:
        if show in (Show.CONFLICTS, Show.STARRED, Show.NOTED):
            mask = np.zeros(self.orders.count, dtype=bool)
            mask[self.marked.get(show, [])] = True
            return mask
        if show is Show.LABELLED:
            return self.labels > 0
        return self.labels == (0 if show is Show.UNLABELLED else CODES[Label(show)])


def share_numbers(ids: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    """Return a number of each image by a hash of its id; its remainder by n is the part of n in which the image is.

    A part is a random sample, so that it is ranked as well as the whole archive. A hash does not depend on the order:
    with every n-th image of a ranking, an image would change its part with each new ranking.
    """
    digests = (hashlib.blake2b(id_.encode("utf-8", "surrogatepass"), digest_size=8).digest() for id_ in ids)
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _key(query: Query) -> tuple[object, ...]:
    return query.sort, query.show, query.low, query.high, query.text, query.area, query.ranges, query.share


def _select(order: np.ndarray, mask: Bool[np.ndarray, " n"] | None) -> np.ndarray:
    return order if mask is None else order[mask[order]]


def _diverse_range(
    snapshot: _Snapshot, key: tuple[object, ...], found: Order, start: int, stop: int
) -> Int64[np.ndarray, " t"]:
    """Return images `start` to `stop` of `found` after sorting each of its blocks by diversity."""

    def make(number: int) -> Order:
        candidates = found[number * DIVERSE_BLOCK : (number + 1) * DIVERSE_BLOCK].astype(np.int64)
        first = snapshot.diverse(candidates, len(candidates))
        return np.concatenate([first, candidates[~np.isin(candidates, first)]]).astype(np.int32)

    numbers = range(start // DIVERSE_BLOCK, -(-stop // DIVERSE_BLOCK))
    blocks = [found[:0], *(snapshot.blocks.get((key, number), partial(make, number)) for number in numbers)]
    offset = numbers.start * DIVERSE_BLOCK
    return np.concatenate(blocks)[start - offset : stop - offset].astype(np.int64)


def _ascending(values: Float32[np.ndarray, " n"]) -> Order:
    """Sort positions by value, ties by position, NaN last.

    Value and position are packed into one integer: these sort four times as fast as a stable sort of the values.
    """
    bits = (values + np.float32(0)).view(np.uint32)  # the sum turns minus zero into zero
    bits = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    bits[np.isnan(values)] = np.iinfo(np.uint32).max
    keys = bits.astype(np.uint64) << np.uint64(32) | np.arange(len(values), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int32)
