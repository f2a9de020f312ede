"""What the gallery is asked for, and what it shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from anomalymatch.data.label_log import LabelEvent
from anomalymatch.errors import ConfigError
from anomalymatch.types import Label

MIN_TILES, MAX_TILES = 12, 200


class Sort(StrEnum):
    """In which order images are shown."""

    SCORE = "highest score"
    LOWEST = "lowest score"
    UNCERTAIN = "most uncertain"
    MEDIAN = "nearest to the median"
    NOVELTY = "most novel"
    DIVERSE = "diverse"
    AUDIT = "random audit"
    NEWEST = "newest labels"


class Beginning(StrEnum):
    """What an archive without a ranking begins with."""

    MIXED = "the least like all others, by turns with what differs most from each other"
    NOVEL = "the least like all others"
    DIVERSE = "as different from each other as can be"
    RANDOM = "in random order"


class Show(StrEnum):
    """Which images are shown, by their label."""

    UNLABELLED = "unlabelled"
    ALL = "all"
    LABELLED = "labelled"
    ANOMALY = "anomaly"
    NORMAL = "normal"
    UNSURE = "unsure"
    ARTEFACT = "artefact"
    CONFLICTS = "conflicts"


@dataclass(frozen=True)
class Query:
    """One page of the gallery.

    Attributes:
        sort: the order.
        show: which labels.
        low: lowest score (a probability) that is shown.
        high: highest score that is shown.
        text: what the id or the metadata contain, in any case of letters; empty for all.
        like: an image whose nearest neighbours are shown, nearest first, instead of `sort`.
        group: number of a group whose images are shown, the most typical first, instead of `sort`.
        size: tiles of a page, 12 to 200.
        page: number of the page, from 0.

    Raises:
        ConfigError: if a number is out of range.
    """

    sort: Sort = Sort.SCORE
    show: Show = Show.UNLABELLED
    low: float = 0.0
    high: float = 1.0
    text: str = ""
    like: str | None = None
    group: int | None = None
    size: int = 48
    page: int = 0

    def __post_init__(self) -> None:
        if not MIN_TILES <= self.size <= MAX_TILES:
            raise ConfigError(f"a page has {MIN_TILES} to {MAX_TILES} images, not {self.size}")
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(f"the score range {self.low} to {self.high} must rise and lie between 0 and 1")
        if self.page < 0:
            raise ConfigError(f"page {self.page}: pages count from 0")


@dataclass(frozen=True)
class Tile:
    """An image in the gallery.

    Attributes:
        id: the image.
        score: probability of being an anomaly; None before the first ranking, and for what cannot be read.
        rank: 1 for the highest score; None without a score.
        label: the label that counts, the last one given; None without one.
        annotator: who gave it.
        conflict: whether annotators disagree.
    """

    id: str
    score: float | None
    rank: int | None
    label: Label | None
    annotator: str | None
    conflict: bool


@dataclass(frozen=True)
class Page:
    """Tiles of one page.

    Attributes:
        tiles: the images.
        total: how many the query finds on all pages.
        page: number of this page, from 0; the last one if fewer were found than asked for.
        pages: how many there are, at least 1.
        note: what is special about it, in words (a diverse first batch, say); mostly empty.
    """

    tiles: Sequence[Tile]
    total: int
    page: int
    pages: int
    note: str = ""


class Estimate(NamedTuple):
    """How many anomalies are still unlabelled: the best guess and a 90 % interval; NaN where `reason` says why not.

    `advice` says in a sentence whether to go on; it may be empty.
    """

    left: float
    low: float
    high: float
    reason: str
    advice: str


class Agreement(NamedTuple):
    """How two annotators agree on the images that both labelled; `kappa` is Cohen's, NaN where it is undefined."""

    first: str
    second: str
    images: int
    share: float
    kappa: float


class Histogram(NamedTuple):
    """Scores of the unlabelled images, and where the labelled ones lie; `edges` has one more entry than `counts`."""

    edges: Float64[np.ndarray, " b1"]
    counts: Int64[np.ndarray, " b"]
    labelled: Mapping[Label, Float64[np.ndarray, " _"]]


@dataclass(frozen=True)
class Summary:
    """The state of the whole search.

    Attributes:
        images: in the archive.
        unreadable: of them, as far as is known.
        counts: labels of each kind.
        spent: labels given so far, one entry for each in the order they were given: 1, 2, 3, …
        found: anomalies among them so far, as long as `spent`.
        histogram: of the scores; None before the first ranking.
        estimate: anomalies that are left.
        agreements: of all pairs of annotators that labelled an image in common.
        conflicts: images on which annotators disagree, newest first.
        annotators: labels that each one gave and that stand.
        mode: what ranks: "live", "trained" or "both".
        modes: what could.
        cycle: trainings that are finished.
        seconds: how long the last re-ranking took; NaN before it.
    """

    images: int
    unreadable: int
    counts: Mapping[Label, int]
    spent: Sequence[int]
    found: Sequence[int]
    histogram: Histogram | None
    estimate: Estimate
    agreements: Sequence[Agreement]
    conflicts: Sequence[str]
    annotators: Mapping[str, int]
    mode: str
    modes: Sequence[str]
    cycle: int
    seconds: float


@dataclass(frozen=True)
class Details:
    """One image, as the large view shows it.

    Attributes:
        tile: score, rank and label.
        size: width and height in pixels; None if it cannot be read.
        metadata: what is known of it, by name.
        coordinates: right ascension and declination in degrees (ICRS); None where there are none.
        history: all that was said of it, oldest first, undone labels too.
    """

    tile: Tile
    size: tuple[int, int] | None
    metadata: Mapping[str, str]
    coordinates: tuple[float, float] | None
    history: Sequence[LabelEvent]
