"""FixMatch and its variants: semi-supervised training from a probe (arXiv 2001.07685, 2505.03509).

`loss.py` and `thresholds.py` hold the mathematics, `batches.py` the data, and `weighting.py`, `module.py` and
`training.py` the training. `learner.py` runs a cycle with the checks of `guard.py`.
"""

from anomalymatch.algorithms.fixmatch.batches import BatchSpec, MixedBatch, MixedBatches
from anomalymatch.algorithms.fixmatch.guard import GuardLimits, TrainingGuard
from anomalymatch.algorithms.fixmatch.learner import FixMatchLearner, refit_head
from anomalymatch.algorithms.fixmatch.module import FixMatch, FixMatchSpec
from anomalymatch.algorithms.fixmatch.training import Recipe, Trained, train

__all__ = [
    "BatchSpec",
    "FixMatch",
    "FixMatchLearner",
    "FixMatchSpec",
    "GuardLimits",
    "MixedBatch",
    "MixedBatches",
    "Recipe",
    "Trained",
    "TrainingGuard",
    "refit_head",
    "train",
]
