"""Loading of views: the order of the images, tiles, tensors, and loaders with worker processes."""

import cv2
import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from anomalymatch.backbones.tta import Tiling
from anomalymatch.data.stream import scale
from anomalymatch.types import Image


def epoch_draws(pool: int, count: int, rng: np.random.Generator) -> Int64[np.ndarray, " m"]:
    """Draw positions in 0 … pool-1 in passes, each of which has every position once, in random order."""
    passes = -(-count // pool)
    return np.concatenate([rng.permutation(pool) for _ in range(passes)])[:count]


def whole_or_tile(image: Image, tiling: Tiling, seed: int) -> UInt8[np.ndarray, "s s c"]:
    """Return a square image in the size of a tile, or one of its tiles, with the same probability.

    Args:
        image: an image of `tiling.side` squared pixels.
        tiling: its tiles; the image itself is returned where it is the only tile.
        seed: decides which.
    """
    if tiling.count == 1:
        return image
    rng = np.random.default_rng(seed)
    if rng.random() < 0.5:
        return scale(image, tiling.size, tiling.size)
    top, left = tiling.boxes[rng.integers(len(tiling.boxes))]
    return np.ascontiguousarray(image[top : top + tiling.size, left : left + tiling.size])


def view_loader(views: Dataset, batch_size: int, workers: int) -> DataLoader:
    """Make a loader of views in their order, prepared by so many worker processes."""
    return DataLoader(
        views,
        batch_size=batch_size,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        worker_init_fn=_use_one_thread,
        generator=torch.Generator(),  # of the seed of the workers: else the loader would draw from the global one
        pin_memory=torch.cuda.is_available(),
    )


def _use_one_thread(worker: int) -> None:
    # Workers are the parallelism; OpenCV's own threads would only compete with them, and do not survive a fork.
    cv2.setNumThreads(0)


def image_tensor(image: Image) -> UInt8[Tensor, "c h w"]:
    """Convert an image to a tensor with channels first, without a copy."""
    return torch.from_numpy(image).permute(2, 0, 1)
