"""Mean-shifted contrastive learning: one-class fine-tuning on normal images (arXiv 2106.03844)."""

from anomalymatch.algorithms.msc.learner import MscLearner
from anomalymatch.algorithms.msc.module import MeanShiftedContrastive, MscSpec

__all__ = ["MeanShiftedContrastive", "MscLearner", "MscSpec"]
