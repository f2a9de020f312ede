"""Labelling command: `python -m anomalymatch.label dataset=folder data.root=PATH`."""

import logging
from importlib import import_module, util
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from anomalymatch.cli import launch
from anomalymatch.config import FILE, check_same_run, config_folder, resumed
from anomalymatch.errors import ConfigError
from anomalymatch.files import write_text
from anomalymatch.saved_config import has_foreign_targets

if TYPE_CHECKING:
    from anomalymatch.ui.service import LabelService

logger = logging.getLogger(__name__)
NAME = "label"


def main() -> None:
    """Run the command."""
    launch(_serve, name=NAME, stopped="Completed work is kept: run the same command to continue.")


def open_service(config: DictConfig, overrides: list[str]) -> "LabelService":
    """Open the service of the page in a new run folder, or in that of an earlier run with the same settings.

    With `config.resume`, only a few `overrides` are allowed.

    Raises:
        AnomalyMatchError: with one sentence.
    """
    # Imported late: wrong words and wrong images are reported without the wait for PyTorch.
    from anomalymatch.build_images import build_source, check_same_images, remember_images

    page = config.ui
    if config.resume is not None:
        run = Path(config.resume).expanduser()
        config = resumed(run, config, [word for word in overrides if not word.startswith("ui.")])
        source = build_source(config)
    else:
        source = build_source(config)
        run = Path(page.run).expanduser() if page.run else Path("runs") / f"label-{source.name}"
        config = _without_page(config)
        check_same_run(run, config)
        ways = f"add ui.run=FOLDER for labels of their own, or resume={run} to use its labels for these images, too"
        check_same_images(run, config, source, ways)
    from anomalymatch.active.run_folder import page_lock
    from anomalymatch.build import build_label_service

    own = config.trust or has_foreign_targets(config, config_folder())
    with page_lock(run):  # before anything is written
        service = build_label_service(config, page, run, source, trust=own)
        if not (run / FILE).exists():  # last, so that a command that is refused can be corrected
            write_text(run / FILE, OmegaConf.to_yaml(config))
        remember_images(run, config, source)
        return service


def _serve(config: DictConfig) -> None:
    if util.find_spec("nicegui") is None:
        raise ConfigError('the page needs NiceGUI: pip install "anomalymatch[ui]"')
    service = open_service(config, list(HydraConfig.get().overrides.task))
    from anomalymatch.ui.web.app import serve

    page = config.ui
    try:
        serve(service, host=page.host, port=page.port, token=page.token, show=page.show)
    finally:
        service.close()
    logger.info("Labels, trainings and rankings are in %s", service.run)


def _without_page(config: DictConfig) -> DictConfig:
    if config.dataset.anomaly is not None:
        raise ConfigError(f"dataset.anomaly={config.dataset.anomaly}: on the page, a person decides what is an anomaly")
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "ui"])


if __name__ == "__main__":
    import_module("anomalymatch.label").main()
