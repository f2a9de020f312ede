"""Compare FixMatch, the probe and the mean of both, at the sizes of the data sets (README, The probe, once more).

One call makes `--trainings` of the missing trainings, because each takes minutes; the table is of all that were made.
Of photographs, all anomalies and every fifth other image are ranked, with five times the weight.
"""

import argparse
import time
from itertools import product

import numpy as np
from bench import ALONE, NO_CROPS, Row, group_by, make_parser, markdown, parse_options, read_csv, table, write_csv
from recipes import PROBLEMS
from sklearn.metrics import average_precision_score

from anomalymatch import compose, initial_labels, make_learner
from anomalymatch.terminal import console

TASKS = [name for name, problem in PROBLEMS.items() if problem.fine_tuned]
KEYS = ("task", "size", "iterations")
MEASURES = ("probe", "fixmatch", "mean", "probe_seconds", "fixmatch_seconds")
SHARE = {"miniimagenet": 5}
"""Of so many images that are no anomalies one is ranked, where the data set has many."""


def main() -> None:
    """Make some of the missing trainings and print the tables."""
    parser = make_parser(__doc__, quick="one draw of the demo at 32 px, two iterations")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=PROBLEMS)
    parser.add_argument("--size", type=int, help="image side in pixels, without crops (default: as configured)")
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--trainings", type=int, default=1, help="largest number of trainings of this call")
    options = parse_options(parser)
    if options.quick:
        options.tasks, options.size, options.iterations, options.draws = ["demo lenses"], 32, 2, 1
    path = options.results / "configured_sizes.csv"
    rows = read_csv(path) if path.exists() else []
    for draw, task in product(range(options.draws), options.tasks):
        name = {
            "task": task,
            "size": str(options.size or "configured"),
            "iterations": str(options.iterations),
            "draw": str(draw),
        }
        if options.trainings and not any(name.items() <= row.items() for row in rows):
            options.trainings -= 1
            console.print(f"configured_sizes: {name}", highlight=False)
            rows.append(name | measure(task, draw, options))
            write_csv(path, rows)
    print(table(rows, KEYS, MEASURES))
    print(by_draw(rows))


def measure(name: str, draw: int, options: argparse.Namespace) -> Row:
    """Train once; return the average precision of each ranking, the seconds, and if the guard kept the probe."""
    problem = PROBLEMS[name]
    sized = ["model.image_size=${dataset.image_size}"] if options.size is None else []
    sized += [] if options.size is None else [f"model.image_size={options.size}", *NO_CROPS]
    overrides = [*problem.overrides, f"seed={draw}", *sized]
    task = problem.open_task(f"seed={draw}", *sized)
    labels = initial_labels(task, anomalies=5, normals=compose(*overrides).dataset.start.normals, seed=draw)
    rest = [id_ for id_ in task.pool if id_ not in labels]
    every = SHARE.get(problem.dataset, 1)
    truth = task.truth(rest)
    wanted = [id_ for i, (id_, rare) in enumerate(zip(rest, truth, strict=True)) if rare or i % every == 0]
    probe = make_learner("probe", task, *overrides)
    probe.embedding.probe_features  # noqa: B018 (computed now: they are not part of the time)
    own = [
        ALONE,
        f"trainer.iterations={options.iterations}",
        *(["algorithm.learner.guard=off"] if options.quick else []),
    ]
    learner = make_learner("fixmatch", task, *overrides, *own)
    seconds, logits = {}, {}
    for key, each in {"probe": probe, "fixmatch": learner}.items():
        began = time.monotonic()
        ranking = each.fit(labels, pool=rest).rank(wanted)
        seconds[f"{key}_seconds"] = round(time.monotonic() - began, 1)
        logits[key] = ranking.restrict(wanted).logits
    logits["mean"] = standardise(logits["probe"]) + standardise(logits["fixmatch"])
    truth = task.truth(wanted)
    weights = np.where(truth, 1.0, every)
    aps = {key: float(average_precision_score(truth, each, sample_weight=weights)) for key, each in logits.items()}
    return aps | seconds | {"fell_back": int(any("kept" in note for note in learner.guard.notes))}


def standardise(logits: np.ndarray) -> np.ndarray:
    """Subtract the mean and divide by the standard deviation."""
    return (logits - logits.mean()) / logits.std()


def by_draw(rows: list[Row]) -> str:
    """Format the average precision of each draw."""
    lines = []
    for key, some in group_by(rows, KEYS).items():
        cells = [", ".join(f"{float(row[name]):.3f}" for row in some) for name in ("probe", "fixmatch", "mean")]
        lines.append([*key, *cells])
    return markdown([*KEYS, "probe", "fixmatch", "mean"], lines)


if __name__ == "__main__":
    main()
