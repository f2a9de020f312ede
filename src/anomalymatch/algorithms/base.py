"""Learners: fit on a few labels, rank the rest. The loop, a notebook and the labelling page all speak to these."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from anomalymatch.algorithms.fixmatch.loss import anomaly_logit
from anomalymatch.algorithms.lightning import StepListener
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.network import Network
from anomalymatch.progress import Advance, ignore_progress
from anomalymatch.ranking import Ranking
from anomalymatch.types import Reject

Truth = Callable[[Sequence[str]], np.ndarray]
"""Whether each image is an anomaly, in a benchmark."""
WEIGHTS, NOVELTY, BACKBONE = "weights.safetensors", "novelty.safetensors", "backbone.safetensors"
"""Files of a cycle: the network that scores, the features of normal images, and a backbone by itself."""
GUARD = "guard.txt"
"""File of a cycle with the findings of the training's guard, one sentence a line."""
COLD = "cold_start"
"""File that marks a cycle which was ranked without enough labels."""


@runtime_checkable
class Learner(Protocol):
    """Protocol of all algorithms: fit on a few labels, rank images, save and restore.

    A learner that `algorithm=` names also says, as class attributes, `is_detector` (it has a `detector` that measures
    the distance to normal images) and `trains` (fitting changes the network by gradient steps, which takes minutes).
    """

    needs_labels: bool
    """True if fitting needs at least one anomaly and one normal."""
    on_step: StepListener
    """Called with the losses of every training step."""

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> None:
        """Train.

        Args:
            labels: label by image id; unsure and artefact teach nothing.
            pool: unlabelled images to learn from, where the algorithm does; None means all of the source.
            cycle: number of this training; it only selects the random numbers.

        Raises:
            LabelError: if `needs_labels` and no image is labelled anomaly, or none normal.
        """
        ...

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """Score `ids` in this order, or all images of the source.

        Raises:
            DataError: if one of them is not in the source.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the weights, so that `restore` brings back this very state."""
        ...

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote."""
        ...


def ranked_by(
    network: Network, embedding: Embedding, ids: Sequence[str], advance: Advance = ignore_progress
) -> Ranking:
    """Images in the order of a network's logits.

    Args:
        network: see `Network`; its features need not be those of `embedding` any more.
        embedding: the images, and how they are computed.
        ids: which of them.
        advance: called with the number of images that are done.
    """
    inference, size = embedding.inference, embedding.image_size
    kept: list[str] = []
    logits = [np.empty(0)]
    rejects: list[Reject] = []
    forward = inference.prepare(network, size=size, count=len(ids))
    for batch in inference.run(forward, embedding.source, ids, size=size):
        kept += batch.ids
        rejects += batch.rejects
        logits.append(anomaly_logit(torch.from_numpy(batch.outputs)).double().numpy())
        advance(len(batch.ids) + len(batch.rejects))
    return Ranking(kept, np.concatenate(logits), rejects)
