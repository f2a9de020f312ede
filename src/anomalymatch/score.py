"""Rank an archive of any size with a trained run: `python -m anomalymatch.score run=RUN data=PATH`."""

import csv
import sys
from importlib import import_module
from itertools import islice
from pathlib import Path

from omegaconf import DictConfig

from anomalymatch.cli import launch, make_callable
from anomalymatch.config import compose
from anomalymatch.terminal import console, print_table
from anomalymatch.text import from_csv_cell

NAME = "score"
SHOWN = 20


def main() -> None:
    """Start the command."""
    sys.argv[1:] = map(expand_data, sys.argv[1:])
    launch(_score_and_show, name=NAME, stopped="Finished scores are kept: the same command continues.")


def score(*overrides: str) -> Path:
    """Rank an archive of any size with the network of a finished run.

    `score("run=runs/mine", "data.root=archive.zip")` does what `python -m anomalymatch.score` does. The same call
    continues after an interruption.

    Keys that are used most; `python -m anomalymatch.score --cfg job run=any` prints all with their defaults:
        run=FOLDER: the run, or a .safetensors file in it; needed.
        data.root=PATH: the archive: folder, file or URL.
        dataset=auto: kind of the archive; auto recognises it.
        cycle=2: cycle of the weights; without it, the last.
        output=FOLDER: folder of the scores.
        scoring.top=1000: most anomalous images that are listed.
        scoring.features=true: keep the features of every image.
        scoring.cascade=auto: look at small images first, if that pays.
        scoring.shard=1/8: share of a job array.
        scoring.engine=ray: score on several machines.
        inference.device=auto: cpu, cuda or another device.

    Args:
        overrides: keys with values, as on the command line.

    Returns:
        The folder with scores/, scores.csv, top.csv, rejects.parquet and the pictures.

    Raises:
        AnomalyMatchError: with a message of one line.

    Example:
        >>> folder = am.score("run=runs/mine", "data.root=photos")
        >>> sorted(path.name for path in folder.glob("*.csv"))
        ['scores.csv', 'top.csv']
    """
    return execute(compose(*map(expand_data, overrides), name=NAME))[0]


def execute(config: DictConfig) -> tuple[Path, bool]:
    """Start or continue scoring; return the folder, and whether the whole archive is scored."""
    # Imported one by one, so that mistyped words and paths are reported without the wait for PyTorch.
    from anomalymatch.build_images import build, build_archive, check_place

    check_place("run", config.run)
    check_place("data.root", config.data.root)
    from anomalymatch.scoring.job import run_job
    from anomalymatch.scoring.model import find_model

    spec, inference = build(config.scoring), build(config.inference)
    model = find_model(Path(config.run).expanduser(), config.cycle)
    source = build_archive(config, model.input.rendering)
    output = Path(config.output).expanduser() if config.output else _output(config, source.name)
    return output, run_job(model, source, spec, inference, output)


def _score_and_show(config: DictConfig) -> None:
    output, complete = execute(config)
    if complete:
        show(output)


def show(output: Path) -> None:
    """Print the highest-ranked images and where the scores are."""
    with (output / "top.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = [{name: from_csv_cell(text) for name, text in row.items()} for row in islice(reader, SHOWN)]
    print_table(rows, {name: name for name in reader.fieldnames or ()}, left=("id",))
    console.print(f"Scores: {output / 'scores'}   pictures: {output / 'top.png'}", soft_wrap=True, markup=False)


def expand_data(word: str) -> str:
    """Replace `data=PATH` by `data.root=PATH`."""
    return f"data.root={word.removeprefix('data=')}" if word.startswith("data=") and "{" not in word else word


def _output(config: DictConfig, archive: str) -> Path:
    run = Path(config.run)
    name = run.stem if run.suffix else run.resolve().name
    return Path("scores") / f"{name}-{archive}"


if __name__ == "__main__":
    # Imported by name, because a launcher cannot send a function of `__main__` to other processes.
    import_module("anomalymatch.score").main()
else:
    make_callable(__name__, score)
