"""Task of a run: the rare class, the pool that may be labelled, and the held-out split for evaluation."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool

from anomalymatch.checks import check_range
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import ConfigError, DataError, LabelError
from anomalymatch.notebook import html_table
from anomalymatch.ranking import Ranking
from anomalymatch.text import listed
from anomalymatch.types import Label

SHOWN = 8
"""Number of images that a notebook shows of a task."""


@dataclass(frozen=True, repr=False)
class Task:
    """Image source, divided into pool and held-out split.

    Attributes:
        source: images of both.
        pool: ids that are ranked, queried and trained on.
        holdout: ids that are only evaluated on, the same in each cycle.
        anomalies: ids of the true anomalies of both in a benchmark; None for a user's own archive.
        dataset: entry of `conf/dataset` that it was opened with; its settings are the defaults of `make_learner`.

    Example:
        >>> task
        <Task demo: 160 images in the pool, 40 held out, 20 true anomalies>
        >>> int(task.truth(task.pool).sum())
        16
    """

    source: ImageSource
    pool: Sequence[str]
    holdout: Sequence[str]
    anomalies: frozenset[str] | None
    dataset: str = "auto"

    @property
    def labels(self) -> dict[str, Label]:
        """Labels by a person that came with the images."""
        return dict(self.source.labels)

    def __repr__(self) -> str:
        known = "" if self.anomalies is None else f", {len(self.anomalies):,} true anomalies"
        held_out = f", {len(self.holdout):,} held out" if self.holdout else ""
        labels = f", {len(self.source.labels):,} labels" if self.source.labels else ""
        return f"<Task {self.source.name}: {len(self.pool):,} images in the pool{held_out}{known}{labels}>"

    def _repr_html_(self) -> str:
        """Show the task in a notebook: its counts, and its first images."""
        return html_table(repr(self).strip("<>"), [{"id": id_} for id_ in self.pool[:SHOWN]], self.source)

    def truth(self, ids: Iterable[str]) -> Bool[np.ndarray, " n"]:
        """Return a mask of the true anomalies among `ids`.

        Raises:
            DataError: if the truth is unknown.
        """
        if self.anomalies is None:
            raise DataError(
                f"{self.source.name}: the true anomalies are unknown: set dataset.anomaly=CLASS for a dataset with "
                "classes, or label images yourself"
            )
        return np.fromiter(map(self.anomalies.__contains__, ids), dtype=bool)

    @cached_property
    def members(self) -> tuple[frozenset[str], frozenset[str]]:
        """Ids of the pool and of the held-out split, to look them up."""
        return frozenset(self.pool), frozenset(self.holdout)

    @cached_property
    def rare(self) -> int | None:
        """Number of true anomalies of the pool; None if the truth is unknown."""
        return None if self.anomalies is None else len(self.anomalies & self.members[0])

    def unlabelled(self, ranking: Ranking, labels: Mapping[str, Label]) -> Ranking:
        """Return the ranking of the images of the pool without a label; that of the last call is kept.

        The steps of a round ask for the same one.
        """
        given = frozenset(labels)
        for known, ids, rest in self._last:
            if known is ranking and ids == given:
                return rest
        # In a ranking of all images, the pool is recognised as a list; one of few need not look at all of its ids.
        pool = self.pool if len(ranking) >= len(self.pool) else self.members[0]
        self._last[:] = [(ranking, given, ranking.restrict(pool).without(given))]
        return self._last[0][2]

    @cached_property
    def _last(self) -> list[tuple[Ranking, frozenset[str], Ranking]]:
        return []

    def label(self, id_: str) -> Label:
        """Return the true label of an image.

        Raises:
            DataError: if the truth is unknown.
        """
        return Label.ANOMALY if self.truth([id_])[0] else Label.NORMAL


def make_task(
    source: ImageSource | Any,
    *,
    anomaly: str | Sequence[str] | None = None,
    normal: str | Sequence[str] | None = None,
    prevalence: float | None = None,
    holdout: float = 0.2,
    seed: int = 0,
) -> Task:
    """Divide `source` into pool and held-out split, with `anomaly` as the rare class.

    Args:
        source: images; a benchmark has their `truth`.
        anomaly: name of the rare class, or several names; None if the truth is unknown.
        normal: instead, name of the normal class, or several; every other class is an anomaly.
        prevalence: share of anomalies in each split; None keeps all images. The class that is too frequent is
            subsampled, so no image is repeated.
        holdout: share of each class in the held-out split, unless the dataset has an official test split. The split
            depends on the ids alone, not on the seed.
        seed: seed of the subsample.

    Raises:
        ConfigError: if a share is out of range or the class does not exist.
        DataError: if `source` is none, or has no truth though `anomaly` is given.

    Example:
        >>> am.make_task(task.source, anomaly="lens_arc", holdout=0.5)
        <Task demo: 102 images in the pool, 98 held out, 20 true anomalies>
    """
    if not isinstance(source, ImageSource):
        raise DataError(
            f"make_task takes an ImageSource, got {type(source).__name__}: open arrays with from_arrays, files with "
            f"from_paths or from_dataframe, data sets of torchvision or Hugging Face with from_dataset"
        )
    check_range("dataset.holdout", holdout, low=0, below=0.9)
    if anomaly is not None and normal is not None:
        raise ConfigError("dataset.anomaly and dataset.normal: give only one of them")
    given = anomaly if normal is None else normal
    if given is None:
        if prevalence is not None:
            raise ConfigError("dataset.prevalence needs dataset.anomaly=CLASS, the rare class")
        return Task(source, list(source.ids), [], None)
    key = "dataset.anomaly" if normal is None else "dataset.normal"
    truth, names = _truth(source, [given] if isinstance(given, str) else list(given), key)
    anomalies = frozenset(id_ for id_ in source.ids if (truth[id_] in names) == (normal is None))
    held_out = source.holdout or _split(source.ids, truth, holdout)
    sides = [[i for i in source.ids if i not in held_out], [i for i in source.ids if i in held_out]]
    if prevalence is not None:
        check_range("dataset.prevalence", prevalence, above=0, below=1)
        rng = np.random.default_rng([seed, 0x7A5C])
        sides = [_subsample(side, anomalies, prevalence, rng) for side in sides]
    return Task(source, sides[0], sides[1], anomalies)


def initial_labels(task: Task, *, anomalies: int, normals: int, seed: int) -> dict[str, Label]:
    """Draw the initial labels of a benchmark at random from the pool.

    Raises:
        LabelError: if the pool has fewer anomalies or normals than asked for.

    Example:
        >>> labels = am.initial_labels(task, anomalies=5, normals=30, seed=0)
        >>> len(labels)
        35
    """
    truth = task.truth(task.pool)
    rng = np.random.default_rng([seed, 0x1AB])
    labels: dict[str, Label] = {}
    for label, wanted, count in ((Label.ANOMALY, True, anomalies), (Label.NORMAL, False, normals)):
        candidates = np.flatnonzero(truth == wanted)
        if count < 1:
            raise LabelError(f"al.initial asks for {count} images labelled {label}: training needs at least one")
        if count > len(candidates):
            raise LabelError(
                f"al.initial asks for {count} images labelled {label}, but the pool of {len(task.pool)} images has "
                f"only {len(candidates)}: ask for fewer, or take a larger set"
            )
        labels |= {task.pool[i]: label for i in sorted(rng.choice(candidates, count, replace=False))}
    return labels


def _truth(source: ImageSource, given: Sequence[str], key: str) -> tuple[Mapping[str, str], frozenset[str]]:
    """Return the class of each image, and the `given` classes as the source writes them; capitals do not matter."""
    if source.truth is None:
        raise DataError(
            f"{source.name} has no classes, so {key}={listed(given)} is unknown: leave it out, or give a labels file "
            "with the class of every image"
        )
    classes = sorted(set(source.truth.values()))
    alike = {name: [known for known in classes if known.lower() == name.strip().lower()] for name in given}
    names = {name: name if name in classes else found[0] if len(found) == 1 else None for name, found in alike.items()}
    unknown = [name for name in given if names[name] is None]
    if unknown:
        raise ConfigError(f"{source.name} has no class {unknown[0]!r} for {key}: choose from {listed(classes)}")
    chosen = frozenset(name for name in names.values() if name is not None)
    if chosen == set(classes):
        raise ConfigError(f"{key} names every class of {source.name}: leave out some of them")
    return source.truth, chosen


def _split(ids: Sequence[str], truth: Mapping[str, str], share: float) -> frozenset[str]:
    """Hold out `share` of each class, in the order of hashed ids: independent of their order and any seed."""
    by_class: dict[str, list[str]] = {}
    for id_ in ids:
        by_class.setdefault(truth[id_], []).append(id_)
    held_out: set[str] = set()
    for members in by_class.values():
        members.sort(key=lambda id_: hashlib.blake2b(id_.encode(), digest_size=8).digest())
        held_out.update(members[: round(share * len(members))])
    return frozenset(held_out)


def _subsample(ids: list[str], anomalies: frozenset[str], prevalence: float, rng: np.random.Generator) -> list[str]:
    if not ids:
        return ids
    rare = np.fromiter((id_ in anomalies for id_ in ids), dtype=bool)
    a, n = int(rare.sum()), int((~rare).sum())
    if a > prevalence * (a + n):
        drop, excess = np.flatnonzero(rare), a - round(n * prevalence / (1 - prevalence))
    else:
        drop, excess = np.flatnonzero(~rare), n - round(a * (1 - prevalence) / prevalence)
    dropped = set(rng.choice(drop, max(0, excess), replace=False).tolist())
    return [id_ for i, id_ in enumerate(ids) if i not in dropped]
