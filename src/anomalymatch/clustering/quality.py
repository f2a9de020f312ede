"""Measures of a grouping against true classes: NMI, ARI, F1 after optimal matching, purity."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix


def clustering_metrics(truth: Sequence[str], groups: Int64[np.ndarray, " n"]) -> dict[str, float]:
    """Compute the three measures of arXiv 2112.11573, and the purity; each is 1 for a perfect grouping.

    `nmi` is normalised by the arithmetic mean of the entropies; `ari` is corrected for chance. For `f1`, classes are
    matched one to one with groups so that the most images agree (Hungarian method); it is the mean over the classes,
    with 0 for a class without a group. `purity` is the share of images that belong to the largest class of their group.

    Raises:
        ValueError: if the lengths differ or there is no image.
    """
    if len(truth) != len(groups) or not len(groups):
        raise ValueError(f"expected one group for each of at least one image, got {len(truth)} and {len(groups)}")
    classes = np.unique(np.asarray(truth, dtype=str), return_inverse=True)[1]
    table = contingency_matrix(classes, groups)
    rows, columns = linear_sum_assignment(table, maximize=True)
    f1 = np.zeros(len(table))
    f1[rows] = 2.0 * table[rows, columns] / (table.sum(1)[rows] + table.sum(0)[columns])
    return {
        "nmi": float(normalized_mutual_info_score(classes, groups)),
        "ari": float(adjusted_rand_score(classes, groups)),
        "f1": float(f1.mean()),
        "purity": float(table.max(0).sum() / table.sum()),
    }


def group_purity(truth: Sequence[str]) -> tuple[str, float]:
    """Return the largest class of one group and its share of the images."""
    names, counts = np.unique(np.asarray(truth, dtype=str), return_counts=True)
    best = int(counts.argmax())
    return str(names[best]), float(counts[best] / counts.sum())
