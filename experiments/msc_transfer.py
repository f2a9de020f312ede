"""Compare ImageNet weights and weights that MSC learned on the pool as a start for probe and FixMatch (README, 10).

MSC is trained once for each seed, without labels, on Galaxy Zoo 1. Both algorithms then run one cycle from either
weights, with the same labels.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from bench import ALONE, NO_CROPS, Job, dataset_overrides, make_parser, parse_options, run_jobs, table

from anomalymatch import run
from anomalymatch.algorithms.base import BACKBONE

MEASURES = ("auroc", "ap", "heldout_auroc", "heldout_ap", "seconds")


def main() -> None:
    """Run the jobs and print the table."""
    parser = make_parser(__doc__, quick="32 px, one seed, two iterations")
    parser.add_argument("--size", type=int, default=96, help="image side in pixels")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of MSC")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the probe; FixMatch uses the first")
    parser.add_argument("--iterations", type=int, default=30, help="iterations of FixMatch")
    options = parse_options(parser)
    if options.quick:
        options.size, options.epochs, options.seeds, options.iterations = 32, 1, 1, 2
    rows = run_jobs("msc_transfer", list(jobs(options)), options)
    print(table(rows, ("anomaly", "algorithm", "weights"), MEASURES))


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield the jobs of both algorithms from both weights."""
    for seed in range(options.seeds):
        for name, weights in (("ImageNet", "auto"), ("MSC", train_msc(seed, options))):
            for algorithm in ("probe", "fixmatch") if seed == 0 else ("probe",):
                for anomaly in ("merger", "dont_know"):
                    own = [ALONE, "algorithm.learner.batch.labelled=8"] if algorithm == "fixmatch" else []
                    yield Job(
                        {"anomaly": anomaly, "algorithm": algorithm, "weights": name, "seed": seed},
                        [
                            *common_overrides(seed, options.size),
                            f"dataset.anomaly={anomaly}",
                            f"algorithm={algorithm}",
                            f"model.weights={weights}",
                            f"trainer.iterations={options.iterations}",
                            "augment=objects",
                            "augment.vertical_flip=0.5",
                            *own,
                        ],
                    )


def train_msc(seed: int, options: argparse.Namespace) -> Path:
    """Train MSC on the pool without labels and return the file of its backbone."""
    folder = options.runs / "msc_transfer" / f"msc-{options.size}-{options.epochs}-{seed}"
    run(
        *common_overrides(seed, options.size),
        "algorithm=msc",
        f"algorithm.learner.epochs={options.epochs}",
        "algorithm.learner.least_normals=100000",
        "algorithm.learner.two_views.vertical_flip=0.5",
        "al.pool_size=null",
        "al.compare_probe=false",
        "logger=none",
        folder=folder,
    )
    path: Path = (folder / "cycles" / "01" / BACKBONE).resolve()
    return path


def common_overrides(seed: int, size: int) -> list[str]:
    """Return the overrides of all runs."""
    return [*dataset_overrides("galaxyzoo1"), f"seed={seed}", f"model.image_size={size}", *NO_CROPS, "al.cycles=1"]


if __name__ == "__main__":
    main()
