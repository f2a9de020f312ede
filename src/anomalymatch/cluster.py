"""Group images by what is odd about them: `python -m anomalymatch.cluster run=RUN top=500`."""

import logging
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE
from rich.table import Table

from anomalymatch.checks import check_range
from anomalymatch.cli import errors_in_a_line, launch, make_callable
from anomalymatch.config import FILE, compose, config_folder
from anomalymatch.errors import ConfigError, StorageError
from anomalymatch.terminal import console, set_up_logging

if TYPE_CHECKING:
    from anomalymatch.data.source import ImageSource

logger = logging.getLogger(__name__)
NAME = "cluster"
BENCHMARKS = ("mvtec",)
Row = dict[str, float | int | str]


def main() -> None:
    """Entry point of the command."""
    launch(_command, name=NAME, stopped="The patches that were computed are kept: the same command goes on from there.")


def cluster(*overrides: str) -> Path:
    """Do what the command does, from Python: `cluster("run=runs/mine", "top=200", "clusters=6")`.

    Args:
        overrides: as on the command line.

    Returns:
        The folder with clusters.parquet, groups.csv, the sheets and report.html; of names=PATH, the CSV of labels.

    Raises:
        AnomalyMatchError: with one clear sentence.
    """
    return execute(compose(*overrides, name=NAME))[0]


def execute(config: DictConfig) -> tuple[Path, list[Row]]:
    """Group the images (or label the named groups); return where the result is, and its table."""
    # Imported late: a mistyped word on the command line should not have to wait for torch.
    from anomalymatch.build import build, build_embedding, build_source, build_tracker
    from anomalymatch.clustering.analysis import cluster as group_images
    from anomalymatch.clustering.figures import check_map
    from anomalymatch.clustering.mvtec import write_benchmark
    from anomalymatch.clustering.names import GROUPS, label_groups, read_names
    from anomalymatch.clustering.patches import PatchEmbedding
    from anomalymatch.clustering.report import pictures, write_clusters
    from anomalymatch.data.task import Task
    from anomalymatch.files import make_folder

    if config.names is not None:
        return label_groups(Path(config.names).expanduser()), []
    check_map(config.map)
    if config.benchmark not in (None, *BENCHMARKS):
        raise ConfigError(f"benchmark is {config.benchmark!r}: choose {', '.join(BENCHMARKS)}, or null")
    check_range("seed", config.seed, low=0)
    config = _with_run(config)
    patch_spec, spec = build(config.clustering.patches), build(config.clustering.spec)

    def patches_of(source: "ImageSource") -> PatchEmbedding:
        return PatchEmbedding(build_embedding(config, Task(source, source.ids, [], None)), patch_spec)

    output = Path(config.output).expanduser() if config.output else _output(config)
    if config.benchmark == "mvtec":
        return output, write_benchmark(output, config.data.root, patches_of, spec, seed=config.seed)
    if (output / GROUPS).exists() and read_names(output / GROUPS):
        raise ConfigError(f"{output / GROUPS} has names of other groups: choose another folder by output=PATH")
    source = build_source(config)
    ids, normals, chosen = _selection(config, source)
    found = group_images(patches_of(source), ids, spec, clusters=config.clusters, normals=normals, seed=config.seed)
    shown = f"run={config.run} top={config.top}" if config.run else f"data.root={config.data.root}"
    rows = write_clusters(
        make_folder(output),
        found,
        source,
        map_method=config.map,
        seed=config.seed,
        facts={"Chosen": chosen, "Compared with": f"{len(normals):,} labelled normals" if normals else "each other"},
        config=OmegaConf.to_yaml(config, resolve=True),
        command=f"python -m anomalymatch.cluster {shown}",
    )
    tracker = build_tracker(config, output)
    try:
        tracker.log_groups(rows, pictures(output))
    finally:
        tracker.finish()
    if found.grouping.choice is not None:
        logger.info("%s", found.grouping.choice.sentence)
    return output, rows


@hydra.main(config_path=str(config_folder()), config_name=NAME, version_base="1.3")
def _command(config: DictConfig) -> None:
    with errors_in_a_line():
        set_up_logging(config.log_level)
        output, rows = execute(config)
    show(rows, output)


def show(rows: list[Row], output: Path) -> None:
    """Print the table of the groups."""
    if rows:
        table = Table(header_style="bold", box=SIMPLE, padding=0)
        for column in rows[0]:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
        console.print(table)
    console.print(f"Written: {output}", soft_wrap=True, markup=False)


def _with_run(config: DictConfig) -> DictConfig:
    """The images and their stretch are those of the run, where one is given."""
    if config.run is None:
        return config
    path = Path(config.run).expanduser() / FILE
    if not path.is_file():
        raise StorageError(f"run={config.run}: there is no such run folder (no {FILE} in it)")
    saved = cast(DictConfig, OmegaConf.load(path))
    theirs = OmegaConf.create({"dataset": saved._get_node("dataset"), "stretch": saved._get_node("stretch")})
    root = {"data": {"root": config.data.root if config.data.root is not None else saved.data.root}}
    size = {"dataset": {"image_size": config.dataset.image_size}}
    kept = OmegaConf.masked_copy(config, [str(key) for key in config if key not in ("dataset", "stretch")])
    return cast(DictConfig, OmegaConf.merge(kept, theirs, root, size))


def _selection(config: DictConfig, source: "ImageSource") -> tuple[list[str], list[str], str]:
    """The images to group, the labelled normals, and in words what was chosen."""
    from anomalymatch.active.run_folder import RunReader
    from anomalymatch.data.label_log import LabelLog
    from anomalymatch.types import Label

    if config.labelled is not None and config.labelled not in list(Label):
        raise ConfigError(f"labelled is {config.labelled!r}: choose one of {', '.join(Label)}, or null")
    if config.run is None:
        if config.labelled is not None:
            raise ConfigError("labelled needs run=RUN: without a run there are no labels")
        return list(source.ids), [], "all images"
    if config.top < 2:
        raise ConfigError(f"top is {config.top}: grouping needs at least 2 images")
    run = Path(config.run).expanduser()
    log = LabelLog(run / "labels.sqlite")
    try:
        labels = log.current()
    finally:
        log.close()
    known = set(source.ids)
    normals = [id_ for id_, label in labels.items() if label == Label.NORMAL and id_ in known]
    if config.labelled is not None:
        ids = [id_ for id_, label in labels.items() if label == config.labelled and id_ in known]
        return sorted(ids), [] if config.labelled == Label.NORMAL else normals, f"labelled {config.labelled}"
    reader = RunReader(run)
    cycle = reader.finished_cycles()
    if cycle < 1:
        raise StorageError(f"run={config.run}: no cycle of it is finished, so nothing is ranked")
    ranking = reader.ranking(cycle)
    rest = ranking.restrict(set(ranking.ids) & known - set(normals))
    return rest.top(config.top), normals, f"the {min(config.top, len(rest)):,} top-ranked of cycle {cycle}"


def _output(config: DictConfig) -> Path:
    if config.run is not None:
        return Path("groups") / Path(config.run).expanduser().resolve().name
    if config.data.root is None:
        return Path("groups") / str(config.dataset.name)
    return Path("groups") / (Path(str(config.data.root).rstrip("/")).stem or "images")


if __name__ == "__main__":
    # By its proper name: a launcher can send only that to other processes.
    import_module("anomalymatch.cluster").main()
else:
    make_callable(__name__, cluster)
