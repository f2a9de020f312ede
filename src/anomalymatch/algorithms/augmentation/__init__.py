"""Augmentation: random views of images for FixMatch, for contrastive learning and for the adaptation to an archive.

`view.py` has the view and the protocol that all augmentations follow, `transforms.py` the transformations that they
share; `objects.py`, `galaxies.py` and `texture.py` are the choices of `augment=`. `pairs.py` makes two views of each
image for contrastive learning.
"""

import os

# Before albumentations is imported: importing a library must not phone home.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from anomalymatch.algorithms.augmentation.galaxies import GalaxyAugmentation
from anomalymatch.algorithms.augmentation.objects import ObjectAugmentation
from anomalymatch.algorithms.augmentation.texture import TextureAugmentation
from anomalymatch.algorithms.augmentation.view import Augmentation, View

__all__ = ["Augmentation", "GalaxyAugmentation", "ObjectAugmentation", "TextureAugmentation", "View"]
