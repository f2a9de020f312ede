"""Labelling command: `python -m anomalymatch.label dataset=folder data.root=PATH`."""

import atexit
import logging
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import closing
from html import escape
from importlib import import_module, util
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from anomalymatch.cli import launch, make_callable
from anomalymatch.config import FILE, check_same_run, config_folder, resumed
from anomalymatch.errors import ConfigError
from anomalymatch.files import write_text
from anomalymatch.listening import OpeningPage, open_site
from anomalymatch.saved_config import has_foreign_targets

if TYPE_CHECKING:
    from anomalymatch.types import Label
    from anomalymatch.ui.service import LabelService

logger = logging.getLogger(__name__)
NAME = "label"
PATIENCE_S = 60.0
"""Time that a page in a process has to end before it is killed."""


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


class LabelPage:
    """Labelling page in a process of its own, which a notebook shows in a frame.

    Args:
        process: the process; it ends with the program that started it, at the latest.
        url: address of the page.
        run: run folder.
        height: height of the frame in pixels.
    """

    def __init__(self, process: "subprocess.Popen[str]", url: str, run: Path, height: int) -> None:
        self.process, self.url, self.run, self.height = process, url, run, height
        atexit.register(self.close)

    @property
    def labels(self) -> "dict[str, Label]":
        """The present label of each labelled image."""
        from anomalymatch.data.label_log import LabelLog

        log = LabelLog.of_run(self.run)
        try:
            return log.current()
        finally:
            log.close()

    def close(self) -> None:
        """Stop the page. No label is lost."""
        atexit.unregister(self.close)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __repr__(self) -> str:
        """Return the address, or that the page is closed."""
        return f"LabelPage({self.url if self.process.poll() is None else 'closed'})"

    def _repr_html_(self) -> str:
        url = escape(self.url)
        frame = f'<iframe src="{url}" width="100%" height="{self.height}" style="border: 0" allow="clipboard-write">'
        return f'<p><a href="{url}" target="_blank">{url}</a></p>{frame}</iframe>'


def label(*overrides: str, folder: Path | str, height: int = 800, proxy: str | None = None) -> LabelPage:
    """Open the labelling page, for a notebook: the last value of a cell is shown as the page in a frame.

    `label("dataset=folder", "data.root=photos", folder="runs/photos")` does what `python -m anomalymatch.label` does,
    in a process of its own. The same call continues a search. If the notebook runs on another machine than the browser,
    its server needs jupyter-server-proxy.

    Args:
        overrides: keys of the configuration, as in the command: `python -m anomalymatch.label --help` explains them.
        folder: run folder.
        height: height of the frame in pixels.
        proxy: base URL of the notebook's server if it has jupyter-server-proxy, "/" for most; None takes that of
            JupyterHub, if the notebook runs there. An empty text shows the page without a proxy.

    Returns:
        The page, with `labels`, `url` and `close()`.

    Raises:
        ConfigError: if the page cannot be opened; the message is that of the command.

    Example:
        >>> page = am.label("dataset=folder", "data.root=photos", folder="runs/photos")
        >>> len(page.labels)
        5
        >>> page.close()
    """
    run = Path(folder).expanduser().resolve()
    base = os.environ.get("JUPYTERHUB_SERVICE_PREFIX", "") if proxy is None else proxy
    words = [*overrides, f"ui.run={run}", "ui.port=0", "ui.show=false", "ui.frames=true"]
    words += [f"ui.prefix={base.rstrip('/')}/proxy/PORT"] if base else []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "anomalymatch.label", *words], stdout=subprocess.PIPE, stderr=said, text=True
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            process.communicate()
            said.seek(0)
            lines = [text for text in said.read().splitlines() if text.strip()] or ["it ended without a word"]
            raise ConfigError(f"the page cannot be opened: {lines[-1].removeprefix('error: ')}")
    # Under the name of the notebook's own server: browsers refuse storage to frames of other sites.
    return LabelPage(process, line.split()[-1].replace("//127.0.0.1:", "//localhost:"), run, height)


def _serve(config: DictConfig) -> None:
    if util.find_spec("nicegui") is None:
        raise ConfigError('the page needs NiceGUI: pip install "anomalymatch[ui]"')
    page = config.ui
    site = open_site(page.host, page.port, token=page.token, prefix=page.prefix)
    with closing(site.listening):
        with OpeningPage(site, show=page.show) as opening:
            service = open_service(config, list(HydraConfig.get().overrides.task))
        with closing(service):
            from anomalymatch.ui.web.app import serve

            show = page.show and not opening.is_shown
            serve(service, site, show=show, frames=page.frames, survey=page.survey)
    logger.info("Labels, trainings and rankings are in %s", service.run)


def _without_page(config: DictConfig) -> DictConfig:
    if config.dataset.anomaly is not None:
        raise ConfigError(f"dataset.anomaly={config.dataset.anomaly}: on the page, a person decides what is an anomaly")
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "ui"])


if __name__ == "__main__":
    import_module("anomalymatch.label").main()
else:
    make_callable(__name__, label)
