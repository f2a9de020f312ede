"""The trained network of a run, with what it expects of an archive."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from anomalymatch.backbones.checkpoint import InputSpec, load_input, load_network
from anomalymatch.backbones.network import Network
from anomalymatch.errors import StorageError

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Trained:
    """What scoring needs of a run.

    Attributes:
        weights: the checkpoint file.
        run_id: name of the run, its cycle and a hash of the weights.
        input: bands, units and rendering of the training.
    """

    weights: Path
    run_id: str
    input: InputSpec

    def network(self) -> Network:
        """The network, ready to predict."""
        return load_network(self.weights)


def find_trained(run: Path, cycle: int | None = None) -> Trained:
    """The weights of a run: those of its last cycle, or of `cycle`, or of a checkpoint file itself.

    Raises:
        StorageError: if there are none.
    """
    weights = run if run.suffix == ".safetensors" else _weights_of(run, cycle)
    if not weights.is_file():
        raise StorageError(f"run={run}: there are no weights in {weights}")
    digest = hashlib.blake2b(weights.read_bytes(), digest_size=4).hexdigest()
    name = weights.stem if weights is run else f"{run.resolve().name}/{weights.parent.name}"
    return Trained(weights, f"{name}-{digest}", load_input(weights))


def _weights_of(run: Path, cycle: int | None) -> Path:
    if not run.is_dir():
        raise StorageError(f"run={run}: there is no such run folder or .safetensors file")
    found = sorted(run.glob(f"cycles/[0-9][0-9]*/{WEIGHTS}"), key=lambda path: int(path.parent.name))
    if not found and any(run.glob("cycles/[0-9][0-9]*/novelty.safetensors")):
        raise StorageError(
            f"run={run}: its algorithm ranks by distances to stored images, and has no network that scores by itself: "
            f"the scores of its own archive are in cycles/, score other archives by a run of probe or fixmatch"
        )
    if not found:
        raise StorageError(f"run={run}: no cycle of it is finished, finish it with resume={run}")
    if cycle is None:
        return found[-1]
    by_number = {int(path.parent.name): path for path in found}
    if cycle not in by_number:
        numbers = ", ".join(map(str, by_number))
        raise StorageError(f"run={run}: there is no cycle={cycle} with weights, choose one of {numbers}")
    return by_number[cycle]
