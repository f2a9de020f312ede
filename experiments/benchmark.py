"""Every algorithm on every task: what it ranks, what it finds with 200 labels, what it costs.

A cell is one algorithm on one task, from one start, with one oracle; each of its draws is a CSV of its own, so that a
call goes on where the last one stopped, and what the table of the results has already is not measured again. A cell
runs in a process of its own, which gives its peak memory.
"""

import argparse
import csv
import multiprocessing
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import numpy as np
from bench import HERE, Row
from benchmark_plots import draw as draw_plots
from benchmark_tables import summary
from recipes import CHEAP, PROBLEMS, RECIPES

from anomalymatch import Label, compose, initial_labels, make_learner, open_task
from anomalymatch.active.cold_start import ColdStart, Shuffled
from anomalymatch.active.evaluate import cycle_row
from anomalymatch.active.oracles import Oracle, PaperOracle, TopKOracle
from anomalymatch.active.run_folder import to_csv
from anomalymatch.algorithms.base import Learner
from anomalymatch.build import build_strategy
from anomalymatch.data.task import Task
from anomalymatch.files import write_text
from anomalymatch.ranking import Ranking
from anomalymatch.terminal import console, set_up_logging

RESULTS = "benchmark.csv"
ROUND, ROUNDS = 20, 10
"""Labels of a round, and rounds: 200 labels."""
STARTS: dict[str, tuple[int, int | None]] = {
    "5": (5, None),
    "10": (10, None),
    "0+20": (0, None),
    "5 of 100": (5, 95),
    "25 of 500": (25, 475),
    "50 of 1000": (50, 950),
}
"""Labelled anomalies and normals to start from (None: as the data set has it); no anomaly: 20 labels at random."""
QUICK = (
    *("dataset.source.count=300", "dataset.source.size=32", "dataset.source.rare_fraction=0.1"),
    *("dataset.start.normals=20", "model.image_size=32", "trainer.iterations=2"),
)
ORACLES = {"top_k": TopKOracle, "paper_oracle": PaperOracle}


FINE_TUNED_SIZE = 96
"""Side in pixels of what trains the backbone: what two cores can do."""


@dataclass(frozen=True)
class Cell:
    """One algorithm on one task, from one start, with one oracle."""

    algorithm: str
    task: str
    start: str
    oracle: str

    def path(self, runs: Path, draw: int) -> Path:
        """Where the rows of a draw are."""
        words = [self.task, self.algorithm, self.start, self.oracle, str(draw)]
        return runs / ("-".join("".join(c if c.isalnum() or c in "+_" else "_" for c in w) for w in words) + ".csv")


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments/benchmark"), help="one CSV a draw")
    parser.add_argument("--results", type=Path, help="folder of the table and plots (default: experiments/results)")
    parser.add_argument("--algorithms", nargs="+", default=CHEAP, choices=RECIPES)
    parser.add_argument("--tasks", nargs="+", choices=PROBLEMS, help="default: all; of what trains the backbone, four")
    parser.add_argument("--starts", nargs="+", default=["5"], choices=STARTS)
    parser.add_argument("--oracles", nargs="+", default=["top_k"], choices=ORACLES)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="the demo alone, small, one draw, two rounds of labels")
    options = parser.parse_args()
    set_up_logging("warning")
    if options.quick:
        options.runs, options.tasks, options.draws = options.runs / "quick", ["demo lenses"], 1
    options.results = options.results or (options.runs / "results" if options.quick else HERE / "results")
    restore(options.results / RESULTS, options.runs)
    for algorithm in options.algorithms:
        for names in product(options.tasks or tasks_of(algorithm), options.starts, options.oracles):
            fill(Cell(algorithm, *names), options)
    rows = [row for path in sorted(options.runs.glob("*.csv")) for row in read(path)]
    write_text(options.results / RESULTS, to_csv(rows))
    draw_plots(rows, options.results)
    print(summary(rows))


def tasks_of(algorithm: str) -> list[str]:
    """On which tasks it is measured where none is named: training the backbone takes minutes."""
    return [name for name, problem in PROBLEMS.items() if problem.fine_tuned or not RECIPES[algorithm].fine_tunes]


def restore(results: Path, runs: Path) -> None:
    """Write the draws of a table that are not in `runs`, as in a fresh clone none is."""
    draws: dict[Path, list[Row]] = {}
    for row in read(results) if results.exists() else []:
        cell = Cell(**{field.name: str(row[field.name]) for field in fields(Cell)})
        draws.setdefault(cell.path(runs, int(row["draw"])), []).append(row)
    for path, rows in draws.items():
        if not path.exists():
            write_text(path, to_csv(rows))


def fill(cell: Cell, options: argparse.Namespace) -> None:
    """Measure the draws of a cell that are missing, in a process of its own."""
    draws = [draw for draw in range(options.draws) if not cell.path(options.runs, draw).exists()]
    if not draws:
        return
    console.print(f"benchmark: {cell.algorithm} on {cell.task}, from {cell.start}, {cell.oracle}", highlight=False)
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(cell, draws, options))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def measure(cell: Cell, draws: list[int], options: argparse.Namespace) -> None:
    """Write the rows of these draws, one for each round."""
    set_up_logging("warning")
    recipe, problem = RECIPES[cell.algorithm], PROBLEMS[cell.task]
    size = min(problem.size, FINE_TUNED_SIZE) if recipe.fine_tunes else problem.size
    rounds = 2 if options.quick else 0 if recipe.fine_tunes and not recipe.searches else ROUNDS
    for draw in draws:
        words = [f"dataset={problem.dataset}", *problem.words, f"seed={draw}"]
        words += [*(QUICK if options.quick else (f"model.image_size={size}",)), "model.crops=0", "probe.orientations=2"]
        task = open_task(problem.dataset, *words[1:])
        learner = make_learner(recipe.algorithm, task, *words, *recipe.words)
        probe = make_learner("probe", task, *words, *(recipe.backbone if recipe.fine_tunes else ()))
        config = compose(*words, *recipe.words)
        oracle = ORACLES[cell.oracle](task, build_strategy(config, learner.embedding))
        if recipe.head is not None:
            learner = recipe.head(learner.embedding)
        named = {**asdict(cell), "size": config.model.image_size, "draw": draw}
        anomalies, normals = STARTS[cell.start]
        start = anomalies, config.dataset.start.normals if normals is None else normals
        rows = [named | row for row in search(task, learner, probe, oracle, start, draw, rounds)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        write_text(cell.path(options.runs, draw), to_csv([row | {"peak_mb": peak} for row in rows]))


def search(
    task: Task,
    learner: Learner,
    probe: Learner,
    oracle: Oracle,
    start: tuple[int, int],
    draw: int,
    rounds: int,
) -> Iterator[Row]:
    """Train, rank, measure, let the oracle label, and again; the probe on the same labels is measured beside it."""
    first = Shuffled(probe.embedding, seed=draw)
    for each in (learner, probe):
        each.embedding.features  # noqa: B018 (computed once and kept on disk: not what a round costs)
    learner, probe = ColdStart(learner, first), ColdStart(probe, first)
    anomalies, normals = start
    if anomalies:
        labels = initial_labels(task, anomalies=anomalies, normals=normals, seed=draw)
    else:
        labels = {id_: task.label(id_) for id_ in first.rank(task.pool).top(ROUND)}
    last: dict[str, Label] = {}
    given = sum(label == Label.ANOMALY for label in labels.values())
    for number in range(rounds + 1):
        rest = [id_ for id_ in task.pool if id_ not in labels]
        began = time.monotonic()
        learner.fit(labels, pool=rest, cycle=number + 1)
        ranking = learner.rank([*task.pool, *task.holdout])
        seconds = round(time.monotonic() - began, 2)
        beside = None
        if not number:  # later, the two would have found other images
            probe.fit(labels, pool=rest, cycle=1)
            beside = probe.rank(rest)
        row = cycle_row(number + 1, task, labels, ranking, beside)
        row |= promises(ranking.restrict(rest), task)
        yield row | {"spent": number * ROUND, "found": int(row["found"]) - given, "seconds": seconds}
        rng = np.random.default_rng([draw, number])
        last = oracle(ranking.restrict(rest), frozenset(rest), ROUND, rng=rng, last=last)
        labels |= last


def promises(ranking: Ranking, task: Task) -> Row:
    """How many anomalies the scores, taken as probabilities, say there are, how many there are, and the log loss."""
    truth = task.truth(ranking.ids)
    loss = np.logaddexp(0.0, np.where(truth, -ranking.logits, ranking.logits)).mean()
    return {"promised": float(ranking.scores.sum()), "there": int(truth.sum()), "log_loss": float(loss)}


def read(path: Path) -> list[Row]:
    """The rows of a draw, or of all."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
