"""Ray Data scoring engine: decode on all CPUs, score in a pool of actors, and write from there.

A part is the unit of recovery: when a worker dies, Ray starts another one that scores the part again, with the same
numbers. Each part is written as a whole, by one rename.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anomalymatch.backbones.inference import Inference
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import Collected, load_batch
from anomalymatch.errors import ConfigError
from anomalymatch.progress import Advance
from anomalymatch.scoring.backends import make_scorer
from anomalymatch.scoring.finish import TopK
from anomalymatch.scoring.model import TrainedModel
from anomalymatch.scoring.parts import Manifest, PartFolder
from anomalymatch.types import Reject

CORES_PER_ACTOR = 2
_Item = dict[str, Any]
"""Values of a part in a Ray data set."""


def score_parts_on_ray(
    model: TrainedModel,
    source: ImageSource,
    inference: Inference,
    folder: PartFolder,
    parts: Sequence[int],
    *,
    actors: int | None,
    address: str | None,
    top: TopK,
    advance: Advance,
) -> None:
    """Score `parts` on Ray.

    On a cluster, archive, run and output folder must have the same paths on every machine.

    Args:
        model: the trained model.
        source: the archive.
        inference: device and precision.
        folder: folder of the finished parts.
        parts: numbers of the parts.
        actors: scoring processes; None takes one for each GPU, or for every two cores.
        address: existing cluster; None starts one on this machine.
        top: gets the ids and logits of every part.
        advance: called with the number of images of every part.

    Raises:
        ConfigError: if Ray is not installed or the cluster cannot be reached.
    """
    with _ray(address) as ray:
        resources = ray.cluster_resources()
        cores, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        actors = min(len(parts), actors or gpus or max(1, cores // CORES_PER_ACTOR))
        decode = _Decode(source, folder.manifest, model.network().spec.input_size)
        threads = max(1, cores // actors)
        items = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
        # Actors ask for less than a core, so that decoders get the cores and Ray does not merge the two.
        done = items.map(decode, num_cpus=1).map(
            _Score,
            fn_constructor_args=(model, folder.manifest, inference, str(folder.path), threads),
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=0.1,
            num_gpus=1 if gpus else 0,
        )
        for item in done.iter_rows():
            top.add(*folder.logits(int(item["part"])))
            advance(int(item["images"]))


@contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Connect to Ray: the connection of this process, `address`, or a new cluster on this machine."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError('scoring.engine=ray needs: pip install "anomalymatch[ray]"') from None
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"scoring.ray_address={address}: there is no Ray cluster ({reason})") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


@dataclass(frozen=True)
class _Decode:
    """Decode and resize the images of a part."""

    source: ImageSource
    manifest: Manifest
    size: int

    def __call__(self, item: _Item) -> _Item:
        batches = [
            load_batch(self.source, self.source.ids[start:stop], self.size)
            for start, stop in self.manifest.batches(int(item["part"]))
        ]
        rejects = [reject for batch in batches for reject in batch.rejects]
        return {
            "part": item["part"],
            "ids": [id_ for batch in batches for id_ in batch.ids],
            "images": np.concatenate([batch.images.permute(0, 2, 3, 1).numpy() for batch in batches]),
            "lengths": [len(batch.ids) for batch in batches],
            "rejected": [reject.id for reject in rejects],
            "reasons": [reject.reason for reject in rejects],
        }


class _Score:
    """Score and write parts, in an actor that holds the network."""

    def __init__(
        self, model: TrainedModel, manifest: Manifest, inference: Inference, folder: str, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self.manifest = manifest
        self.folder = PartFolder(Path(folder), manifest)
        network = model.network()
        self.width = network.backbone.features if manifest.features else 0
        _, self.score = make_scorer(network, inference, **manifest.scorer_options, int8=self.folder.int8)

    def __call__(self, item: _Item) -> _Item:
        part, images = int(item["part"]), np.asarray(item["images"])
        ends = np.cumsum(np.asarray(item["lengths"], dtype=np.int64))
        # The same batches as those of the local engine, for the same numbers.
        batches = [images[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True) if end > start]
        outputs = [self.score(torch.from_numpy(np.array(batch)).permute(0, 3, 1, 2)) for batch in batches]
        rows = np.concatenate([np.empty((0, 1 + self.width), np.float32), *outputs])
        rejects = [Reject(str(id_), str(reason)) for id_, reason in zip(item["rejected"], item["reasons"], strict=True)]
        found = Collected([str(id_) for id_ in item["ids"]], rows, rejects)
        self.folder.write(part, found)
        return {"part": part, "images": len(found.ids) + len(rejects)}
