"""How many anomalies are left, from a random sample of the archive."""

import math

import numpy as np

from anomalymatch.ui.summary import Estimate

WANTED = 20
"""Images of the random audit that must be labelled before anything can be said."""
DRAWS = 20_000
NONE = Estimate(math.nan, math.nan, math.nan, "")


def estimate_left(*, images: int, audited: int, audited_anomalies: int, anomalies: int, seed: int) -> Estimate:
    """Estimate the anomalies among the unlabelled images.

    The labels of the top of a ranking say nothing of the rest: extrapolated by score or by rank, they were wrong by
    factors of ten and more on real archives. A random sample does. The share of anomalies has Jeffreys' prior
    Beta(1/2, 1/2), and what is known to be there is the least that can be.

    Args:
        images: in the archive, as far as they can be read.
        audited: of them, labelled images that are a random sample.
        audited_anomalies: anomalies among these.
        anomalies: all that were found, in the sample or not.
        seed: of the draws from the posterior.
    """
    if audited < min(WANTED, images):
        return NONE._replace(reason=f"label {WANTED} images of the random audit for an estimate; so far {audited}")
    rng = np.random.default_rng(seed)
    share = rng.beta(audited_anomalies + 0.5, audited - audited_anomalies + 0.5, DRAWS)
    others = rng.binomial(images - audited, share)
    left = np.maximum(others - (anomalies - audited_anomalies), 0)
    possible = left[others >= anomalies - audited_anomalies]
    low, middle, high = np.quantile(possible if len(possible) else left, [0.05, 0.5, 0.95])
    return Estimate(float(middle), float(low), float(high), "")
