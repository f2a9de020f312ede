"""Does it help FixMatch, and its probe, to start from the weights that MSC learnt on the unlabelled pool?

One MSC training for each seed, without labels, on the pool of galaxyzoo1; then the first cycle of both algorithms, from
these weights and from those of ImageNet, with the same labels.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from bench import DATA, Job, measure, table

from anomalymatch import run
from anomalymatch.algorithms.base import BACKBONE

RARE = ("merger", "dont_know")
MEASURES = ("auroc", "ap", "heldout_auroc", "heldout_ap", "seconds")


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="folder of the run folders")
    parser.add_argument("--size", type=int, default=96, help="side in pixels")
    parser.add_argument("--epochs", type=int, default=2, help="of msc")
    parser.add_argument("--seeds", type=int, default=3, help="of the probe; FixMatch has the first")
    parser.add_argument("--iterations", type=int, default=30, help="of FixMatch")
    parser.add_argument("--quick", action="store_true", help="32 px, one seed, two iterations")
    options = parser.parse_args()
    if options.quick:
        options.size, options.epochs, options.seeds, options.iterations = 32, 1, 1, 2
    rows = measure("msc_transfer", list(jobs(options)), options.runs)
    print(table(rows, ("anomaly", "algorithm", "weights"), MEASURES))


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Both algorithms from both weights, on the same labels."""
    for seed in range(options.seeds):
        for name, weights in (("ImageNet", "auto"), ("MSC", learnt(seed, options))):
            for algorithm in ("probe", "fixmatch") if seed == 0 else ("probe",):
                for anomaly in RARE:
                    own = ["algorithm.learner.batch.labelled=8"] if algorithm == "fixmatch" else []
                    yield Job(
                        {"anomaly": anomaly, "algorithm": algorithm, "weights": name, "seed": seed},
                        [
                            *words(seed, options.size),
                            f"dataset.anomaly={anomaly}",
                            f"algorithm={algorithm}",
                            f"model.weights={weights}",
                            f"trainer.iterations={options.iterations}",
                            "augment.vertical_flip=0.5",
                            *own,
                        ],
                    )


def learnt(seed: int, options: argparse.Namespace) -> Path:
    """The backbone that MSC trains on the pool; nothing of the labels enters."""
    folder = options.runs / "msc_transfer" / f"msc-{options.size}-{options.epochs}-{seed}"
    msc = ["algorithm=msc", f"algorithm.learner.epochs={options.epochs}", "algorithm.learner.least_normals=100000"]
    more = ["al.pool_size=null", "al.compare_probe=false", "algorithm.learner.augmentation.vertical_flip=0.5"]
    run(*words(seed, options.size), *msc, *more, "logger=none", folder=folder)
    path: Path = (folder / "cycles" / "01" / BACKBONE).resolve()
    return path


def words(seed: int, size: int) -> list[str]:
    """What all trainings have in common."""
    return [
        "dataset=galaxyzoo1",
        f"data.root={DATA / 'galaxyzoo1'}",
        f"seed={seed}",
        f"model.image_size={size}",
        "model.crops=0",
        "probe.orientations=2",
        "al.cycles=1",
    ]


if __name__ == "__main__":
    main()
