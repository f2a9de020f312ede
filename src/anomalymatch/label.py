"""The labelling page: `python -m anomalymatch.label dataset=folder data.root=PATH`."""

import logging
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from anomalymatch.cli import errors_in_a_line, launch
from anomalymatch.config import FILE, check_same_run, config_folder, resumed
from anomalymatch.errors import ConfigError
from anomalymatch.files import make_folder, write_text
from anomalymatch.terminal import set_up_logging

if TYPE_CHECKING:
    from anomalymatch.ui.service import LabelService

logger = logging.getLogger(__name__)
NAME = "label"


def main() -> None:
    """Entry point of the command."""
    launch(_command, name=NAME, stopped="What was computed is kept: the same command goes on from there.")


def open_service(config: DictConfig, overrides: list[str]) -> "LabelService":
    """The images, their features and the run folder as a service; features are computed now if need be.

    Args:
        config: of the command, or `compose(..., name="label")`.
        overrides: the words of the command line; with `resume` only a few are allowed.

    Raises:
        AnomalyMatchError: with one clear sentence.
    """
    # Imported late: a mistyped word on the command line should not have to wait for torch.
    from anomalymatch.build import build, build_detector, build_embedding, build_grouper, build_source
    from anomalymatch.data.task import Task
    from anomalymatch.types import Label
    from anomalymatch.ui.features import build_bank, build_seen
    from anomalymatch.ui.live import LiveRanking
    from anomalymatch.ui.novelty import novelty_of
    from anomalymatch.ui.service import LabelService
    from anomalymatch.ui.views import Beginning

    page = config.ui
    if config.resume is not None:
        run = Path(config.resume).expanduser()
        config = resumed(run, config, [word for word in overrides if not word.startswith("ui.")])
        source = build_source(config)
    else:
        source = build_source(config)
        run = Path(page.run).expanduser() if page.run else Path("runs") / f"label-{source.name}"
        config = _begun(run, config)
    embedding = build_embedding(config, Task(source, source.ids, [], None))
    features, folder = embedding.load_features(), embedding.features_folder
    kept = {"compression": page.compression, "dimensions": page.dimensions, "folder": folder}
    bank = build_bank(features.last, source.ids, **kept)
    cold = config.al.cold_start.name
    beginnings = {"none": Beginning.DIVERSE} | {order.name.lower(): order for order in Beginning}
    # The classes of the learner and of the cold start, where there is one.
    learner, *rankers = (build(node.learner).func for node in (config.algorithm, config.al.cold_start) if node.learner)
    probe, seen = build(config.probe), build_seen(bank, features, source.ids, **kept)
    live = LiveRanking(
        bank,
        probe,
        seed=config.seed,
        novelty=novelty_of(bank, build_detector(config, page.novelty), len(source.ids), folder=folder),
        first=beginnings.get(cold, Beginning.NOVEL),
        seen=seen,
        turned=lambda at: seen.bank.encode(
            embedding.reoriented_features([source.ids[i] for i in at], probe.orientations)
        ),
    )
    service = LabelService(
        run,
        source,
        live,
        encode=embedding.encode,
        # A detector trains for epochs, so that its number of steps is not known in advance.
        training_steps=0 if any(c.is_detector and c.trains for c in (learner, *rankers)) else config.trainer.iterations,
        cache=Path(config.data.cache_dir) / "thumbnails",
        workers=config.inference.workers,
        seed=config.seed,
        divide=build_grouper(config, embedding),
        needs_labels=learner.needs_labels and not any(cold_start.trains for cold_start in rankers),
    )
    service.take_given({id_: Label(label) for id_, label in source.labels.items()})
    return service


@hydra.main(config_path=str(config_folder()), config_name=NAME, version_base="1.3")
def _command(config: DictConfig) -> None:
    with errors_in_a_line():
        set_up_logging(config.log_level)
        _serve(config, list(HydraConfig.get().overrides.task))


def _serve(config: DictConfig, overrides: list[str]) -> None:
    try:
        from anomalymatch.ui.web.app import serve
    except ImportError as error:
        raise ConfigError(f'the page needs NiceGUI: pip install "anomalymatch[ui]" ({error})') from error
    service = open_service(config, overrides)
    page = config.ui
    try:
        serve(service, host=page.host, port=page.port, token=page.token, show=page.show)
    finally:
        service.close()
    logger.info("Labels, trainings and rankings are in %s", service.run)


def _begun(run: Path, config: DictConfig) -> DictConfig:
    """The configuration of a run folder that is begun now, or goes on: that of a main job, without the page."""
    if config.dataset.anomaly is not None:
        raise ConfigError(f"dataset.anomaly={config.dataset.anomaly}: on the page, a person says what is an anomaly")
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "ui"])
    check_same_run(run, config)
    if not (run / FILE).exists():
        write_text(make_folder(run) / FILE, OmegaConf.to_yaml(config))
    return config


if __name__ == "__main__":
    import_module("anomalymatch.label").main()
