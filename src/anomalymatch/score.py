"""Rank an archive of any size with a trained run: `python -m anomalymatch.score run=RUN data=PATH`."""

import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import cast

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE
from rich.table import Table

from anomalymatch.cli import errors_in_a_line, launch, make_callable
from anomalymatch.config import compose, config_folder
from anomalymatch.terminal import console, set_up_logging

logger = logging.getLogger(__name__)
NAME = "score"
SHOWN = 20


def main() -> None:
    """Entry point of the command."""
    sys.argv[1:] = [expanded(word) for word in sys.argv[1:]]
    launch(_command, name=NAME, stopped="What is scored is kept: the same command goes on from there.")


def score(*overrides: str) -> Path:
    """Do what the command does, from Python: `score("run=runs/mine", "data.root=archive.zip")`.

    Args:
        overrides: as on the command line.

    Returns:
        The folder with scores/, top.csv, rejects.parquet and the pictures.

    Raises:
        AnomalyMatchError: with one clear sentence.
    """
    return execute(compose(*map(expanded, overrides), name=NAME))[0]


def execute(config: DictConfig) -> tuple[Path, bool]:
    """Score (or go on scoring); return the folder, and whether the whole archive is done."""
    # Imported late: a mistyped word on the command line should not have to wait for torch.
    from anomalymatch.build import build, build_source
    from anomalymatch.data.rendering import Rendering
    from anomalymatch.scoring.job import run_job
    from anomalymatch.scoring.model import find_model

    spec, inference = build(config.scoring), build(config.inference)
    model = find_model(Path(config.run).expanduser(), config.cycle)
    target = f"{Rendering.__module__}.{Rendering.__qualname__}"
    stretch = OmegaConf.create({"stretch": {"_target_": target, **model.input.rendering.as_dict()}})
    source = build_source(cast(DictConfig, OmegaConf.merge(config, stretch)))
    output = Path(config.output).expanduser() if config.output else _output(config, source.name)
    return output, run_job(model, source, spec, inference, output)


@hydra.main(config_path=str(config_folder()), config_name=NAME, version_base="1.3")
def _command(config: DictConfig) -> None:
    with errors_in_a_line():
        set_up_logging(config.log_level)
        output, complete = execute(config)
    if complete:
        show(output)


def show(output: Path) -> None:
    """Print the first of the list."""
    table = Table(header_style="bold", box=SIMPLE, padding=0)
    lines = (output / "top.csv").read_text(encoding="utf-8").splitlines()
    for column in lines[0].split(","):
        table.add_column(column, justify="left" if column == "id" else "right")
    for line in lines[1 : SHOWN + 1]:
        rank, *id_, value, logit = line.split(",")
        table.add_row(rank, ",".join(id_).strip('"'), value, logit)
    console.print(table)
    console.print(f"Scores: {output / 'scores'}   pictures: {output / 'top.png'}", soft_wrap=True, markup=False)


def expanded(word: str) -> str:
    """`data=PATH` means `data.root=PATH`."""
    return f"data.root={word.removeprefix('data=')}" if word.startswith("data=") and "{" not in word else word


def _output(config: DictConfig, archive: str) -> Path:
    run = Path(config.run)
    name = run.stem if run.suffix else run.resolve().name
    return Path("scores") / f"{name}-{archive}"


if __name__ == "__main__":
    # By its proper name: a launcher can send only that to other processes.
    import_module("anomalymatch.score").main()
else:
    make_callable(__name__, score)
