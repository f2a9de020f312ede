"""The orientations of an image whose content has no up, or no left: a network sees each of them as another image."""

import torch
from jaxtyping import Shaped
from torch import Tensor

ORIENTATIONS = (1, 2, 4, 8)
"""Over how many of them features can be averaged."""


def turned(images: Shaped[Tensor, "b c s s"], orientation: int) -> Shaped[Tensor, "b c s s"]:
    """Square images as they are (0), mirrored (1), upside down (2), both (3), and the same four transposed (4 to 7).

    The first two differ in nothing but left and right, the first four need no turn by a quarter, and the eight are all.
    """
    flipped = images.flip([axis for bit, axis in ((1, 3), (2, 2)) if orientation & bit])
    chosen = flipped.transpose(2, 3) if orientation & 4 else flipped
    return chosen.contiguous(memory_format=torch.channels_last)
