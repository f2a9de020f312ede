"""Mean-shifted contrastive learning: one-class fine-tuning on normal images (arXiv 2106.03844)."""

from anomalymatch.algorithms.msc.learner import MscLearner
from anomalymatch.algorithms.msc.module import MeanShiftedContrastive, MscSpec
from anomalymatch.algorithms.msc.views import TwoViewAugmentation, TwoViewBatches, ViewPair

__all__ = ["MeanShiftedContrastive", "MscLearner", "MscSpec", "TwoViewAugmentation", "TwoViewBatches", "ViewPair"]
