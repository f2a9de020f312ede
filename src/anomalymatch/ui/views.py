"""Data that the labelling page asks for and shows: queries, tiles, pages, the summary, details of an image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from anomalymatch.checks import check_range
from anomalymatch.data.label_log import LabelEvent
from anomalymatch.errors import ConfigError
from anomalymatch.types import Label, Orientation

MIN_TILES, MAX_TILES = 12, 200
MAX_CORNERS, MAX_RANGES = 200, 20
MAX_AUDIT, MAX_PARTS = 1_000_000, 100
Area = tuple[tuple[float, float], ...]
"""Corners of a polygon on the map."""


class Sort(StrEnum):
    """Order of the images in the gallery."""

    SCORE = "highest score"
    LOWEST = "lowest score"
    UNCERTAIN = "most uncertain"
    MEDIAN = "nearest to the median"
    NOVELTY = "most novel"
    DIVERSE = "diverse"
    DESCRIPTION = "by description"
    AUDIT = "random audit"
    NEWEST = "newest labels"


class ColumnOrder(NamedTuple):
    """Order of the images by a column, see `Columns`; images without a value come last."""

    column: str
    descending: bool = False


class ColumnRange(NamedTuple):
    """Smallest and largest value of a column to show; images without a value are left out."""

    column: str
    low: float = -math.inf
    high: float = math.inf


class FirstOrder(StrEnum):
    """Order of the images before the first ranking; the value completes "the page shows …"."""

    MIXED = "the most unusual images, interleaved with diverse ones"
    NOVEL = "the most unusual images"
    DIVERSE = "diverse images"
    RANDOM = "random images"


class Show(StrEnum):
    """Label filter of the gallery."""

    UNLABELLED = "unlabelled"
    ALL = "all"
    LABELLED = "labelled"
    ANOMALY = "anomaly"
    NORMAL = "normal"
    UNSURE = "unsure"
    ARTEFACT = "artefact"
    CONFLICTS = "conflicts"
    REVIEW = "to review"
    SECOND = "second opinion"
    STARRED = "starred"
    NOTED = "with a note"


QUEUES = (Show.REVIEW, Show.SECOND)
"""Filters with an order of their own: to review, the newest label comes first; for a second opinion, the oldest."""


@dataclass(frozen=True)
class Query:
    """Query for one page of the gallery.

    Attributes:
        sort: the order, by the search or by a column.
        low: lowest score (a probability) to show.
        high: highest score to show.
        text: text to find in ids and metadata, ignoring case; empty shows all.
        like: an image whose nearest neighbours are shown, nearest first; `sort` is ignored.
        group: number of a group to show, most typical image first; `sort` is ignored.
        kind: number of a group whose anomalies are searched: the images are ranked by a probe for them against all
            other labelled images; `sort` is ignored.
        area: corners of a polygon on the map, whose images are shown; empty shows all.
        ranges: ranges of columns, one for each column; an image has to be in all of them.
        audit: size of the guided random audit whose images are shown, in its order; 0 for none. `sort` is ignored.
        share: part k of n of the images to show, as (k, n). The parts are disjoint, and an image stays in its part.
        annotator: who asks for second opinions, with `Show.SECOND`; not part of an address.
        size: tiles of a page, 12 to 200.
        page: number of the page, from 0.
        shift: by how many images the page begins earlier: as many as labels have moved from the pages before it.

    Raises:
        ConfigError: if a number is out of range.
    """

    sort: Sort | ColumnOrder = Sort.SCORE
    show: Show = Show.UNLABELLED
    low: float = 0.0
    high: float = 1.0
    text: str = ""
    like: str | None = None
    group: int | None = None
    kind: int | None = None
    area: Area = ()
    ranges: tuple[ColumnRange, ...] = ()
    audit: int = 0
    share: tuple[int, int] = (1, 1)
    annotator: str = ""
    size: int = 48
    page: int = 0
    shift: int = 0

    def __post_init__(self) -> None:
        check_range("images per page", self.size, low=MIN_TILES, high=MAX_TILES)
        check_range("page", self.page, low=0)
        check_range("shift of the page", self.shift, low=0, high=self.size if self.page else 0)
        check_range("size of the audit", self.audit, low=0, high=MAX_AUDIT)
        part, parts = self.share
        check_range("number of parts", parts, low=1, high=MAX_PARTS)
        check_range("part", part, low=1, high=parts)
        if self.area and not 3 <= len(self.area) <= MAX_CORNERS:
            raise ConfigError(f"an area of the map has 3 to {MAX_CORNERS} corners, not {len(self.area)}")
        if len(self.ranges) > MAX_RANGES or len({one.column for one in self.ranges}) < len(self.ranges):
            raise ConfigError(f"there are at most {MAX_RANGES} ranges, one for each column")
        for column, low, high in self.ranges:
            if not low <= high:
                raise ConfigError(f"the range {low:g} to {high:g} of {column} must increase")
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(f"the score range {self.low} to {self.high} must increase and lie between 0 and 1")

    @property
    def start(self) -> int:
        """Place of the first image of the page among all images of the query."""
        return self.page * self.size - self.shift

    def from_start(self, start: int) -> "Query":
        """Return the query for the page that begins at the place `start`."""
        page = -(-start // self.size)
        return replace(self, page=page, shift=page * self.size - start)

    def changed(self, **parts: Any) -> "Query":
        """Return the query with other parts, from its first image.

        Neighbours replace groups and areas, and are shown whatever their labels if a queue was. An order or a filter
        other than that of the labels ends a random audit.
        """
        if parts.get("like"):
            parts |= {"group": None, "kind": None, "area": ()}
            parts |= {"show": Show.ALL} if self.show in QUEUES else {}
        if any(getattr(self, name) != parts[name] for name in (UNFILTERED.keys() | {"sort"}) & parts.keys()):
            parts = {"audit": 0} | parts
        return replace(self, **{"page": 0, "shift": 0} | parts)

    @property
    def column(self) -> str | None:
        """Column that orders the images; None if something else does."""
        instead = self.audit or self.show in QUEUES or (self.like, self.group, self.kind) != (None, None, None)
        return self.sort.column if isinstance(self.sort, ColumnOrder) and not instead else None

    @property
    def is_narrowed(self) -> bool:
        """True if a filter other than that of the labels is set."""
        instead = self.text or self.like or self.group is not None or self.kind is not None or self.area or self.ranges
        return bool(instead) or (self.low, self.high) != (0, 1)

    @property
    def is_filtered(self) -> bool:
        """True if the query leaves out more than the labelled images."""
        return self.is_narrowed or self.show != Show.UNLABELLED

    def passes(self, tile: "Tile") -> bool:
        """Return True if a tile passes the label filter."""
        if self.show is Show.ALL:
            return True
        if self.show is Show.CONFLICTS:
            return tile.conflict
        if self.show is Show.REVIEW:
            return tile.conflict or tile.label is Label.UNSURE
        if self.show is Show.SECOND:
            return len(tile.people) == 1 and self.annotator not in tile.people
        if self.show in (Show.STARRED, Show.NOTED):
            return tile.star if self.show is Show.STARRED else bool(tile.note)
        if self.show in (Show.LABELLED, Show.UNLABELLED):
            return (tile.label is None) == (self.show is Show.UNLABELLED)
        return tile.label == self.show


UNFILTERED: dict[str, Any] = {
    name: getattr(Query(), name) for name in ("low", "high", "text", "like", "group", "kind", "area", "ranges", "audit")
}
"""Parts of a query without any filter other than that of the labels."""


@dataclass(frozen=True)
class Tile:
    """Image in the gallery.

    Attributes:
        score: probability of being an anomaly; None before the first ranking and for unreadable images.
        rank: 1 for the highest score; None without a score.
        annotator: who gave the label.
        conflict: True if annotators disagree.
        group: number of its group; None if it is in none.
        star: True if a person gave it a star.
        note: what a person wrote about it; mostly empty.
        people: who has given it a label, without labels files and oracles.
    """

    id: str
    score: float | None
    rank: int | None
    label: Label | None
    annotator: str | None
    conflict: bool
    group: int | None = None
    star: bool = False
    note: str = ""
    people: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """Page of the gallery.

    Attributes:
        total: number of images on all pages of the query.
        page: number of this page, from 0; the last one if the query asked for a later one.
        pages: number of pages, at least 1.
        note: a sentence about these images, such as how they were chosen before the first ranking; mostly empty.
        order: version of the orders, see `Gallery.version`.
        values: value of the column that orders the images, by id; None if no column does.
    """

    tiles: Sequence[Tile]
    total: int
    page: int
    pages: int
    note: str = ""
    order: int = 0
    values: Mapping[str, str] | None = None


class Estimate(NamedTuple):
    """Estimated number of unlabelled anomalies with a 90 % interval; NaN where `reason` explains why it is missing.

    `advice` is a sentence on whether to continue; it may be empty.
    """

    left: float
    low: float
    high: float
    reason: str
    advice: str


class Agreement(NamedTuple):
    """Agreement of two annotators on the images that both labelled, with Cohen's kappa (NaN where undefined)."""

    first: str
    second: str
    images: int
    share: float
    kappa: float


class Histogram(NamedTuple):
    """Histogram of the scores of the unlabelled images, with the scores of the labelled ones by label."""

    edges: Float64[np.ndarray, " b1"]
    counts: Int64[np.ndarray, " b"]
    labelled: Mapping[Label, Float64[np.ndarray, " _"]]


@dataclass(frozen=True)
class Summary:
    """State of the whole search.

    Attributes:
        images: number of images in the archive.
        unreadable: number of images that cannot be read, as far as known.
        counts: number of images with each label.
        found: number of anomalies among the first 1, 2, 3, … labelled images.
        histogram: None before the first ranking.
        agreements: of all pairs of annotators that labelled an image in common.
        conflicts: images on which annotators disagree, newest first.
        reviews: number of images that are in conflict or labelled unsure.
        annotators: number of current labels by annotator.
        mode: the ranking in use: "live", "trained" or "both".
        modes: the rankings available.
        cycle: finished trainings.
        seconds: duration of the last re-ranking; NaN before it.
    """

    images: int
    unreadable: int
    counts: Mapping[Label, int]
    found: Sequence[int]
    histogram: Histogram | None
    estimate: Estimate
    agreements: Sequence[Agreement]
    conflicts: Sequence[str]
    reviews: int
    annotators: Mapping[str, int]
    mode: str
    modes: Sequence[str]
    cycle: int
    seconds: float


class Change(NamedTuple):
    """Change for listeners.

    `kind` is labels, notes, ranking, training, examples, groups, description, map, people, views or
    features.

    "features" means that the preparation of the ranking has ended, or began again after a failure.
    """

    kind: str
    ids: tuple[str, ...] = ()
    annotator: str = ""


@dataclass(frozen=True)
class Details:
    """Details of one image for the large view.

    Attributes:
        coordinates: right ascension and declination in degrees (ICRS); None where unknown.
        orientation: scale and directions on the sky; None where unknown.
        size: width and height in pixels; None if the image cannot be read.
        history: all label events of the image, oldest first, including undone ones.
    """

    tile: Tile
    metadata: Mapping[str, str]
    coordinates: tuple[float, float] | None
    orientation: Orientation | None
    size: tuple[int, int] | None
    history: Sequence[LabelEvent]
