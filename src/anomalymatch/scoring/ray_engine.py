"""The Ray Data engine: read and decode on all processors, score by a pool of actors, write from there.

A row is the unit of recovery: when a worker dies, Ray starts another one and gives it the rows again, and a part is
still written whole, by one rename, with the same numbers.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anomalymatch.backbones.inference import Inference
from anomalymatch.data.source import ImageSource
from anomalymatch.data.stream import load_batch
from anomalymatch.errors import ConfigError
from anomalymatch.progress import Advance
from anomalymatch.scoring.backends import make_scorer
from anomalymatch.scoring.engine import batches_of, make_part
from anomalymatch.scoring.parts import Manifest, PartFolder, TopK
from anomalymatch.scoring.trained import Trained
from anomalymatch.types import Reject

if TYPE_CHECKING:
    from anomalymatch.scoring.spec import ScoringSpec

CORES_PER_ACTOR = 2
Row = dict[str, Any]


def score_parts_on_ray(
    trained: Trained,
    source: ImageSource,
    spec: "ScoringSpec",
    inference: Inference,
    folder: PartFolder,
    parts: Sequence[int],
    *,
    top: TopK,
    advance: Advance,
) -> None:
    """Score `parts` on Ray; the arguments are those of the local engine.

    On a cluster, archive, run and output folder must have the same paths on every machine.

    Raises:
        ConfigError: if Ray is not installed or the cluster cannot be reached.
    """
    with _ray(spec) as ray:
        resources = ray.cluster_resources()
        cores, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        actors = min(len(parts), spec.actors or gpus or max(1, cores // CORES_PER_ACTOR))
        decode = _Decode(source, folder.manifest, trained.network().spec.image_size)
        threads = max(1, cores // actors)
        rows = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
        # Actors ask for less than a core: they leave the cores to the decoders, with which Ray must not merge them.
        done = rows.map(decode, num_cpus=1).map(
            _Score,
            fn_constructor_args=(trained, folder.manifest, inference, str(folder.path), threads),
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=0.1,
            num_gpus=1 if gpus else 0,
        )
        for row in done.iter_rows():
            table = folder.read(int(row["part"]), ["id", "logit"]).drop_null()
            top.add(table["id"].to_pylist(), table["logit"].to_numpy())
            advance(int(row["images"]))


@contextmanager
def _ray(spec: "ScoringSpec") -> Iterator[Any]:
    """Ray, connected: to what this process uses already, to `spec.ray_address`, or to a cluster of this machine."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError('scoring.engine=ray needs: pip install "anomalymatch[ray]"') from None
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=spec.ray_address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"scoring.ray_address={spec.ray_address}: there is no Ray cluster ({reason})") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


@dataclass(frozen=True)
class _Decode:
    """Images of a part, decoded and resized: one row in, one row out."""

    source: ImageSource
    manifest: Manifest
    size: int

    def __call__(self, row: Row) -> Row:
        batches = [
            load_batch(self.source, self.source.ids[start:stop], self.size)
            for start, stop in batches_of(self.manifest, int(row["part"]))
        ]
        rejects = [reject for batch in batches for reject in batch.rejects]
        return {
            "part": row["part"],
            "ids": [id_ for batch in batches for id_ in batch.ids],
            "images": np.concatenate([batch.images.permute(0, 2, 3, 1).numpy() for batch in batches]),
            "lengths": [len(batch.ids) for batch in batches],
            "rejected": [reject.id for reject in rejects],
            "reasons": [reject.reason for reject in rejects],
        }


class _Score:
    """An actor: holds the network, scores and writes one part after the other."""

    def __init__(self, trained: Trained, manifest: Manifest, inference: Inference, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.manifest = manifest
        self.folder = PartFolder(Path(folder), manifest)
        network = trained.network()
        self.width = network.backbone.features if manifest.features else 0
        _, self.score = make_scorer(
            network,
            inference,
            backend=manifest.backend,
            count=manifest.images,
            batch_size=manifest.batch_size,
            features=manifest.features,
        )

    def __call__(self, row: Row) -> Row:
        number, images = int(row["part"]), np.asarray(row["images"])
        ends = np.cumsum(np.asarray(row["lengths"], dtype=np.int64))
        # The same batches as those of the local engine, for the same numbers.
        batches = [images[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True) if end > start]
        outputs = [self.score(torch.from_numpy(np.array(batch)).permute(0, 3, 1, 2)) for batch in batches]
        rejects = [Reject(str(id_), str(reason)) for id_, reason in zip(row["rejected"], row["reasons"], strict=True)]
        part = make_part([str(id_) for id_ in row["ids"]], outputs, rejects, width=self.width)
        self.folder.write(number, part)
        return {"part": number, "images": len(part.ids) + len(rejects)}
