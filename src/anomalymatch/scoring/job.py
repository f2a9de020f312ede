"""One scoring job: open or continue its folder, score what is missing, and finish when all is there."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from anomalymatch.backbones.inference import Inference
from anomalymatch.data.source import ImageSource
from anomalymatch.errors import StorageError
from anomalymatch.files import make_folder, storage_errors
from anomalymatch.progress import progress
from anomalymatch.scoring.backends import find_batch_size, make_scorer
from anomalymatch.scoring.engine import score_parts
from anomalymatch.scoring.finish import finish, is_finished
from anomalymatch.scoring.gpu_decode import check_gpu_decode
from anomalymatch.scoring.parts import Manifest, PartFolder, RunningTop, open_manifest, read_manifest, share_of
from anomalymatch.scoring.spec import ScoringSpec
from anomalymatch.scoring.trained import Trained

logger = logging.getLogger(__name__)


def run_job(trained: Trained, source: ImageSource, spec: ScoringSpec, inference: Inference, output: Path) -> bool:
    """Score `source` into `output`, going on where an earlier call was stopped.

    Args:
        trained: the network and what it expects.
        source: the archive, opened with the rendering of the training.
        spec: how to score.
        inference: device, precision and decoding threads.
        output: the folder: manifest.json, parts/, then scores/, top.csv, rejects.parquet and pictures.

    Returns:
        Whether the whole archive is scored and the tables are made; False while other shares are missing.

    Raises:
        DataError: if the bands of the archive are not those of the training.
        ConfigError: if the folder holds another job, or a value is wrong.
        StorageError: if the disk is full, or something in the folder is corrupt.
    """
    trained.input.check(source)
    if spec.decode == "gpu":
        check_gpu_decode(source, inference.torch_device)
    with storage_errors(output), _alone(make_folder(output) / f".lock-{spec.shard.replace('/', '-')}"):
        if is_finished(output, trained, source):
            logger.info("%s is complete already", output)
            return True
        with FileLock(output / ".lock-manifest"):  # the first of the shares decides for all
            folder = PartFolder(output, _manifest(trained, source, spec, inference, output))
        parts = share_of(folder.manifest.parts, spec.shard)
        missing = folder.missing(parts)
        top = RunningTop(
            spec.top, output / ("top.csv" if spec.shard == "1/1" else f"top-{spec.shard.replace('/', '-')}.csv")
        )
        for part in sorted(set(parts) - set(missing)):
            table = folder.read(part, ["id", "logit"]).drop_null()
            top.add(table["id"].to_pylist(), table["logit"].to_numpy())
        if missing:
            _score(trained, source, spec, inference, folder, missing, top)
        return finish(folder, source, spec.top)


def _score(
    trained: Trained,
    source: ImageSource,
    spec: ScoringSpec,
    inference: Inference,
    folder: PartFolder,
    missing: Sequence[int],
    top: RunningTop,
) -> None:
    rows = (folder.manifest.rows(part) for part in missing)
    with progress("Scoring", sum(stop - start for start, stop in rows)) as advance:
        if spec.engine == "ray":
            from anomalymatch.scoring.ray_engine import score_parts_on_ray

            score_parts_on_ray(trained, source, spec, inference, folder, missing, top=top, advance=advance)
            return
        network, manifest = trained.network(), folder.manifest
        _, score = make_scorer(
            network,
            inference,
            backend=manifest.backend,
            count=len(source.ids),
            batch_size=manifest.batch_size,
            features=manifest.features,
        )
        score_parts(
            source,
            score,
            folder,
            missing,
            size=network.spec.image_size,
            width=network.backbone.features if manifest.features else 0,
            workers=inference.workers,
            decode_on=inference.torch_device if spec.decode == "gpu" else None,
            top=top,
            advance=advance,
        )


def _alone(lock: Path) -> Any:
    try:
        return FileLock(lock, timeout=0).acquire()
    except Timeout:
        raise StorageError(
            f"another process is scoring this share into {lock.parent}: wait for it, or choose another output folder"
        ) from None


def _manifest(trained: Trained, source: ImageSource, spec: ScoringSpec, inference: Inference, output: Path) -> Manifest:
    """The manifest in `output`, or a new one; what was measured or chosen once stays chosen."""
    saved = read_manifest(output)
    backend, batch_size = spec.backend, spec.batch_size
    if saved is not None:
        backend = saved.backend if backend == "auto" else backend
        batch_size = batch_size or saved.batch_size
    network = trained.network()
    if batch_size is None:
        batch_size = find_batch_size(network, inference)
    if backend == "auto":
        backend, _ = make_scorer(
            network, inference, backend="auto", count=len(source.ids), batch_size=batch_size, features=False
        )
    manifest = Manifest(
        run_id=trained.run_id,
        archive=source.name,
        fingerprint=source.fingerprint,
        images=len(source.ids),
        part_images=spec.part_images,
        batch_size=min(batch_size, spec.part_images),
        backend=backend,
        precision="bf16" if inference.computes_bf16 else "fp32",
        decode=spec.decode,
        features=spec.features,
    )
    open_manifest(output, manifest)
    return manifest
