"""Adapt the backbone to an archive without labels: `python -m anomalymatch.adapt dataset=galaxyzoo1 data.root=PATH`."""

import logging
from importlib import import_module
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from anomalymatch.cli import launch, make_callable
from anomalymatch.config import FILE, check_same_run, compose
from anomalymatch.errors import ConfigError, DataError, StorageError
from anomalymatch.files import make_folder, remove_leftovers, write_text
from anomalymatch.terminal import console

logger = logging.getLogger(__name__)
NAME = "adapt"


def main() -> None:
    """Start the command."""
    launch(_adapt_and_show, name=NAME, stopped="Finished epochs are kept: the same command continues.")


def adapt(*overrides: str) -> Path:
    """Adapt the backbone to an archive by self-supervised training, without labels.

    `adapt("dataset=folder", "data.root=photos")` does what `python -m anomalymatch.adapt` does. The same call continues
    after an interruption, and ends with the same numbers.

    Keys that are used most; `python -m anomalymatch.adapt --cfg job` prints all with their defaults:
        dataset=auto: kind of the images, as for a run; its held-out split is left out.
        data.root=PATH: folder, file or URL of the images.
        adapt=simclr: or vicreg, byol, dino.
        augment=objects: or galaxies, texture: the views; some data sets choose one.
        adapt.epochs=20: passes over the images.
        adapt.image_size=96: side of the views in pixels, if not that of the model.
        adapt.trainable_groups=3: layer groups that learn, the last ones; null: all.
        adapt.optimizer.lr=1.0e-3: peak of the learning rate.
        adapt.minutes=60: stop at the end of an epoch after so many minutes.
        output=FOLDER: folder of the weights.
        seed=0: seed of the order of the images, the views and the heads.

    Args:
        overrides: keys with values, as on the command line.

    Returns:
        The file of the weights, for `model.weights`; a JSON file beside it describes them.

    Raises:
        AnomalyMatchError: with a message of one line.

    Example:
        >>> words = ["dataset=folder", "data.root=photos", "adapt.image_size=32", "adapt.epochs=1", "logger=none"]
        >>> am.adapt(*words, "output=adapted/photos").name
        'weights.safetensors'
    """
    return execute(compose(*overrides, name=NAME))[0]


def execute(config: DictConfig) -> tuple[Path, list[str]]:
    """Start or continue an adaptation; return the file of the weights, and the result in sentences."""
    # Imported one by one, so that mistyped words and wrong images are reported without the wait for PyTorch.
    from anomalymatch.build_images import IMAGES, build_task, check_place, check_same_images, remember_images

    check_place("data.root", config.data.root)
    task = build_task(config)
    from anomalymatch.algorithms.base import WEIGHTS
    from anomalymatch.build import build_adaptation, build_tracker

    run = build_adaptation(config, task)  # reports wrong values before anything is written
    name = Path(str(config.data.root).rstrip("/")).stem if config.dataset.name == "auto" else config.dataset.name
    folder = Path(config.output).expanduser() if config.output else Path("adapted") / f"{name}-{config.adapt.name}"
    weights = folder / WEIGHTS
    if weights.exists():  # before the first epoch nothing is lost with other settings
        check_same_run(folder, config, NAME)
        if config.output is None:  # a folder that is given is meant
            ways = f"add output=FOLDER for weights of their own, or output={folder} to go on with these weights"
            check_same_images(folder, config, task.source, ways)
    split = f"; the {len(task.holdout):,} of the held-out split are left out" if task.holdout else ""
    logger.info("Adapting to %s images of %s%s", f"{len(task.pool):,}", task.source.name, split)
    try:
        with FileLock(make_folder(folder) / ".lock", timeout=0):
            remove_leftovers(folder)
            write_text(folder / FILE, OmegaConf.to_yaml(config))
            remember_images(folder, config, task.source)
            tracker = build_tracker(config, folder)
            try:
                adapted = run(folder, lambda row: tracker.log_step(1, row))
            finally:
                tracker.finish()
    except (ConfigError, DataError):  # refused: the folder is left as it was
        if not weights.exists():
            for file in (FILE, IMAGES, ".lock"):
                (folder / file).unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
        raise
    except Timeout:
        raise StorageError(
            f"another process is working in {folder}: wait for it or choose another folder by output="
        ) from None
    return adapted.weights, list(adapted.sentences())


def _adapt_and_show(config: DictConfig) -> None:
    weights, sentences = execute(config)
    for sentence in sentences:
        console.print(sentence, soft_wrap=True, markup=False, highlight=False)
    console.print(f"Use them: model.weights={weights}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    # Imported by name, because a launcher cannot send a function of `__main__` to other processes.
    import_module("anomalymatch.adapt").main()
else:
    make_callable(__name__, adapt)
