"""Protocol of all algorithms and names of the files that they write."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from anomalymatch.ranking import Ranking

Truth = Callable[[Sequence[str]], np.ndarray]
"""Function that returns for each id of a benchmark True if the image is an anomaly."""
StepListener = Callable[[dict[str, float]], None]
"""Function that is called with the metrics of each training step."""
WEIGHTS, NOVELTY, BACKBONE = "weights.safetensors", "novelty.safetensors", "backbone.safetensors"
"""Files of a cycle: the network that scores, a fitted novelty detector, and a fine-tuned backbone."""
GUARD = "guard.txt"
"""File of a cycle with the findings of the training guard, one sentence a line."""
COLD = "cold_start"
"""File that marks a cycle that was ranked without enough labels."""


T = TypeVar("T")


@runtime_checkable
class Learner(Protocol):
    """Protocol of all algorithms: fit on a few labels, rank images, save and restore.

    A learner that `algorithm=` names also says, as class attributes, `is_detector` (it has a `detector` that measures
    the distance to normal images) and `trains` (fitting changes the network by gradient steps, which takes minutes).

    Example:
        >>> learner = am.make_learner("probe", task)
        >>> isinstance(learner, am.Learner), learner.needs_labels
        (True, True)
    """

    needs_labels: bool
    """True if fitting needs at least one anomaly and one normal."""
    on_step: StepListener
    """Function called with the losses of every training step.

    Where several processes train, the first of them calls it, so it must be picklable.
    """

    def fit(self, labels: Mapping[str, str], *, pool: Sequence[str] | None = None, cycle: int = 1) -> "Learner":
        """Train, and return the learner itself.

        Args:
            labels: label by image id; images labelled unsure or artefact are not used.
            pool: unlabelled images to learn from, for algorithms that use them; None means the pool of the task, so
                that nothing is learnt from the held-out split.
            cycle: number of this training; it only selects the random numbers.

        Raises:
            LabelError: if `needs_labels` and no image is labelled anomaly, or none normal.
        """
        ...

    def rank(self, ids: Sequence[str] | None = None) -> Ranking:
        """Score `ids` in this order, or the pool of the task.

        Raises:
            DataError: if an id is not in the source.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write all that `restore` needs to bring back the same state."""
        ...

    def restore(self, folder: Path) -> None:
        """Read the files that `save` wrote."""
        ...


def ignore_step(row: dict[str, float]) -> None:
    """Do nothing with the metrics of a step: the default listener."""


def require_fitted(state: T | None) -> T:
    """Return the fitted state of a learner.

    Raises:
        RuntimeError: if there is none yet.
    """
    if state is None:
        raise RuntimeError("call fit or restore before rank or save")
    return state


def derive_seed(*numbers: int) -> int:
    """Derive a seed from other numbers: the seed of a run and the cycle, or that of a training, a view and a draw."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
