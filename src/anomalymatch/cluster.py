"""Group images by the kind of their anomaly: `python -m anomalymatch.cluster run=RUN top=500`."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from anomalymatch.checks import check_choice, check_range
from anomalymatch.cli import launch, make_callable
from anomalymatch.config import compose, with_images_of_run
from anomalymatch.errors import ConfigError
from anomalymatch.terminal import console, print_table

logger = logging.getLogger(__name__)
NAME = "cluster"


def main() -> None:
    """Start the command."""
    launch(_group_and_show, name=NAME, stopped="Computed patches are kept: the same command continues.")


def cluster(*overrides: str) -> Path:
    """Group images by the kind of their anomaly.

    `cluster("run=runs/mine", "top=200", "clusters=6")` does what `python -m anomalymatch.cluster` does.

    Keys that are used most; `python -m anomalymatch.cluster --cfg job` prints all with their defaults:
        run=FOLDER: run whose images and labels are used.
        top=500: number of images from the top of the run's last ranking.
        labelled=anomaly: group the images with this label instead.
        data.root=PATH: images to group, without a run.
        clusters=6: number of groups; without it, the number is chosen.
        clustering.spec.method=ward: or kmeans, spectral, hdbscan.
        names=FILE: a groups.csv with names, which become labels.
        map=pca: or umap, for the map in two dimensions.
        output=FOLDER: folder of the groups.

    Args:
        overrides: keys with values, as on the command line.

    Returns:
        The folder with clusters.parquet, groups.csv, the sheets and report.html; of names=PATH, the CSV of labels.

    Raises:
        AnomalyMatchError: with a message of one line.

    Example:
        >>> folder = am.cluster("run=runs/mine", "top=20", "clusters=2", "logger=none")
        >>> (folder / "report.html").is_file()
        True
    """
    return execute(compose(*overrides, name=NAME))[0]


def execute(config: DictConfig) -> tuple[Path, Sequence[Mapping[str, float | int | str]]]:
    """Group the images, or label the named groups; return the path of the result, and its table."""
    # Imported one by one, so that mistyped words and paths are reported without the wait for PyTorch.
    from anomalymatch.build_images import build, build_source, check_place

    check_choice("benchmark", config.benchmark, ["mvtec"], null=True)
    check_range("seed", config.seed, low=0)
    check_place("names", config.names)
    check_place("run", config.run)
    check_place("data.root", config.data.root)
    from anomalymatch.build import build_patches, build_tracker, select_images
    from anomalymatch.clustering.analysis import cluster_images
    from anomalymatch.clustering.figures import MAPS
    from anomalymatch.clustering.mvtec import write_benchmark
    from anomalymatch.clustering.report import GROUPS, label_groups, pictures, read_names, write_clusters
    from anomalymatch.files import make_folder

    if config.names is not None:
        return label_groups(Path(config.names).expanduser()), []
    check_choice("map", config.map, MAPS)
    config = with_images_of_run(config)
    spec, seed, patches_of = build(config.clustering.spec), config.seed, partial(build_patches, config)
    output = Path(config.output).expanduser() if config.output else _output(config)
    if config.benchmark == "mvtec":
        return output, write_benchmark(output, config.data.root, patches_of, spec, seed=seed)
    if (output / GROUPS).exists() and read_names(output / GROUPS):
        raise ConfigError(f"{output / GROUPS} has names of other groups: choose another folder by output=PATH")
    source = build_source(config)
    chosen = select_images(config, source)
    found = cluster_images(
        patches_of(source), chosen.ids, spec, clusters=config.clusters, normals=chosen.normals, seed=seed
    )
    compared = f"{len(chosen.normals):,} labelled normals" if chosen.normals else "each other"
    words = f"run={config.run} top={config.top}" if config.run else f"data.root={config.data.root}"
    rows = write_clusters(
        make_folder(output),
        found,
        source,
        map_method=config.map,
        seed=seed,
        facts={"Chosen": chosen.description, "Compared with": compared},
        config=OmegaConf.to_yaml(config, resolve=True),
        command=f"python -m anomalymatch.cluster {words}",
    )
    tracker = build_tracker(config, output)
    try:
        tracker.log_groups(rows, pictures(output))
    finally:
        tracker.finish()
    if found.grouping.choice is not None:
        logger.info("%s", found.grouping.choice.sentence)
    return output, rows


def _group_and_show(config: DictConfig) -> None:
    output, rows = execute(config)
    if rows:
        print_table(rows)
    console.print(f"Written: {output}", soft_wrap=True, markup=False)


def _output(config: DictConfig) -> Path:
    if config.run is not None:
        return Path("groups") / Path(config.run).expanduser().resolve().name
    if config.data.root is None:
        return Path("groups") / str(config.dataset.name)
    return Path("groups") / (Path(str(config.data.root).rstrip("/")).stem or "images")


if __name__ == "__main__":
    # Imported by name, because a launcher cannot send a function of `__main__` to other processes.
    import_module("anomalymatch.cluster").main()
else:
    make_callable(__name__, cluster)
