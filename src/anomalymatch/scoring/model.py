"""Trained model of a run: weights, and the input that it expects."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from anomalymatch.algorithms.base import NOVELTY, WEIGHTS
from anomalymatch.backbones.checkpoint import InputSpec, load_input, load_network
from anomalymatch.backbones.network import Network
from anomalymatch.errors import StorageError


@dataclass(frozen=True)
class TrainedModel:
    """Trained model of a run.

    Attributes:
        weights: the checkpoint file.
        run_id: name of the run, its cycle and a hash of the weights.
        input: bands, units and rendering of the training.
    """

    weights: Path
    run_id: str
    input: InputSpec

    def network(self) -> Network:
        """Load the network, in evaluation mode."""
        return load_network(self.weights)


def find_model(run: Path, cycle: int | None = None) -> TrainedModel:
    """Find the trained model of a run.

    Args:
        run: a run folder, or a checkpoint file.
        cycle: number of the cycle; None takes the last one.

    Raises:
        StorageError: if there is none.
    """
    weights = run if run.suffix == ".safetensors" else _find_weights(run, cycle)
    if not weights.is_file():
        raise StorageError(f"run={run}: there are no weights in {weights}")
    digest = hashlib.blake2b(weights.read_bytes(), digest_size=4).hexdigest()
    name = weights.stem if weights is run else f"{run.resolve().name}/{weights.parent.name}"
    return TrainedModel(weights, f"{name}-{digest}", load_input(weights))


def _find_weights(run: Path, cycle: int | None) -> Path:
    if not run.is_dir():
        raise StorageError(f"run={run}: there is no such run folder or .safetensors file")
    by_cycle = {int(path.parent.name): path for path in run.glob(f"cycles/[0-9][0-9]*/{WEIGHTS}")}
    if not by_cycle and any(run.glob(f"cycles/[0-9][0-9]*/{NOVELTY}")):
        raise StorageError(
            f"run={run}: its algorithm ranks by distances to stored images and has no network that scores other "
            f"archives: the scores of its own archive are in cycles/; score others with a run of probe or fixmatch"
        )
    if not by_cycle:
        raise StorageError(f"run={run}: it has no finished cycle, finish it with resume={run}")
    chosen = max(by_cycle) if cycle is None else cycle
    if chosen not in by_cycle:
        numbers = ", ".join(map(str, sorted(by_cycle)))
        raise StorageError(f"run={run}: there is no cycle={cycle} with weights, choose one of {numbers}")
    return by_cycle[chosen]
