"""Adaptation: self-supervised training of a pretrained backbone on the images of an archive, before any label.

`methods.py` holds the choices of `adapt=` (heads and losses by lightly), `module.py` the LightningModule, `checks.py`
the checks of the features, and `training.py` the training, which can be interrupted.
"""

from anomalymatch.algorithms.adaptation.module import Adaptation, AdaptationSpec
from anomalymatch.algorithms.adaptation.training import Adapted, Recipe, adapt

__all__ = ["Adaptation", "AdaptationSpec", "Adapted", "Recipe", "adapt"]
