"""The ranking that follows every label: the probe, fitted anew on the bank."""

from collections.abc import Callable
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int64

from anomalymatch.active.strategies import k_centres
from anomalymatch.algorithms.probe.learner import POOL_IMAGES
from anomalymatch.algorithms.probe.regression import ProbeSpec, self_train
from anomalymatch.backbones.features import Scaling
from anomalymatch.ui.features import FeatureBank, Seen
from anomalymatch.ui.one_thread import one_thread
from anomalymatch.ui.views import Beginning

Turned = Callable[[Int64[np.ndarray, " a"]], Float32[np.ndarray, "t d"]]
"""What the probe sees of images, by their positions, when they are mirrored and turned."""
SUPPOSED_NORMALS = 200
FIRST_SAMPLE = 5_000


class LiveRanking:
    """Ranks an archive by a probe on its feature bank; a million images take a fraction of a second.

    Args:
        bank: features of the archive.
        probe: how the probe is fitted.
        seed: of the images that stand for the archive: the pool, the supposed normals, the first batch.
        novelty: how unlike the others each image is, see `novelty_of`; None if that is unknown.
        first: the order before the first ranking; a diverse batch if it asks for an unknown novelty.
        seen: what the probe sees, of the same images; None for `bank` as it is.
        turned: gives other views of the labelled anomalies, which teach, too; None for none.
    """

    def __init__(
        self,
        bank: FeatureBank,
        probe: ProbeSpec,
        *,
        seed: int,
        novelty: Float32[np.ndarray, " n"] | None = None,
        first: Beginning = Beginning.MIXED,
        seen: Seen | None = None,
        turned: Turned | None = None,
    ) -> None:
        self.bank, self.probe, self.seed, self.novelty, self.turned = bank, probe, seed, novelty, turned
        self.seen, self._scaling = seen or Seen(bank, Scaling.plain(bank.dimensions))
        needs_novelty = first in (Beginning.MIXED, Beginning.NOVEL)
        self.first = Beginning.DIVERSE if needs_novelty and novelty is None else first
        # Evenly spaced, as the probe's learner does, but fixed: one label must not exchange the whole pool.
        self._pool = bank.positions[:: max(1, len(bank.positions) // POOL_IMAGES)]

    @cached_property
    def _pool_rows(self) -> Float32[np.ndarray, "p d"]:
        return self.seen.rows(self._pool)

    def fit(
        self,
        anomalies: Int64[np.ndarray, " a"],
        normals: Int64[np.ndarray, " b"],
        extra: Float32[np.ndarray, "e d"],
        others: Int64[np.ndarray, " o"] | None = None,
    ) -> Float32[np.ndarray, " n"] | None:
        """Log-odds of all images, NaN for what cannot be read; None while there is nothing to rank by.

        While fewer than `SUPPOSED_NORMALS` images are labelled normal, random unlabelled ones fill them up: anomalies
        are rare, so most of these are normal. The labelled ones alone say little of the archive, for they are the
        first of a ranking: they look like anomalies.

        Args:
            anomalies: positions of the images labelled anomaly.
            normals: positions of those labelled normal.
            extra: features of further anomalies that are not in the archive, as `seen` has them.
            others: positions of images labelled otherwise: they are not taken for unlabelled ones.
        """
        taken = np.concatenate([anomalies, normals, *([] if others is None else [others])])
        anomalies, normals = (group[self.bank.has(group)] for group in (anomalies, normals))
        normals = np.concatenate([normals, self._supposed_normals(taken, SUPPOSED_NORMALS - len(normals))])
        positive = np.concatenate([self.seen.rows(anomalies), extra])
        if not len(positive) or not len(normals):
            return None
        unlabelled = ~np.isin(self._pool, taken) if self.probe.rounds else np.zeros(len(self._pool), dtype=bool)
        turned = self.turned(anomalies) if self.turned else None
        with one_thread():
            pool = self._pool_rows[unlabelled]
            probe = self_train(positive, self.seen.rows(normals), pool, self.probe, self._scaling, turned=turned)
        return self.seen.project(probe.coefficients, probe.intercept)

    def first_batch(self, count: int) -> Int64[np.ndarray, " k"]:
        """Positions of `count` images that differ from each other, to start with; fewer if fewer can be read."""
        return self.diverse(self._draw(FIRST_SAMPLE), count)

    def diverse(self, candidates: Int64[np.ndarray, " c"], count: int) -> Int64[np.ndarray, " k"]:
        """Up to `count` of `candidates` that cover them greedily, the first one first; unreadable ones are left out."""
        readable = candidates[self.bank.has(candidates)]
        return readable[k_centres(self.bank.rows(readable), count)]

    def _supposed_normals(self, taken: Int64[np.ndarray, " t"], count: int) -> Int64[np.ndarray, " k"]:
        drawn = self._draw(SUPPOSED_NORMALS + len(taken))
        return drawn[~np.isin(drawn, taken)][: max(0, count)]

    def _draw(self, count: int) -> Int64[np.ndarray, " k"]:
        """Random readable images; the first ones stay the same however many are drawn."""
        return self.bank.positions[np.random.default_rng(self.seed).permutation(len(self.bank.positions))[:count]]
