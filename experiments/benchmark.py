"""Compare algorithms on many tasks: average precision, anomalies found with 200 labels, time and memory (README, 12).

A cell is one algorithm on one task with one start and one oracle. Each draw of a cell is stored in a CSV file of its
own, and draws that the published table contains are not measured again. Each cell runs in its own process, so that its
peak memory can be measured.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import numpy as np
from bench import NO_CROPS, Row, make_parser, parse_options, read_csv, write_csv
from benchmark_plots import save_plots
from benchmark_tables import summary
from recipes import CHEAP, LAST_LOOK, LAST_LOOK_DRAW, PROBLEMS, RECIPES

from anomalymatch import Label, compose, initial_labels, make_learner
from anomalymatch.active.cold_start import ColdStart, RandomOrder
from anomalymatch.active.oracles import Oracle, PaperOracle, TopKOracle
from anomalymatch.algorithms.base import Learner
from anomalymatch.build import build_strategy
from anomalymatch.data.task import Task
from anomalymatch.evaluation.metrics import cycle_metrics
from anomalymatch.ranking import Ranking
from anomalymatch.terminal import console, set_up_logging

BATCH, ROUNDS = 20, 10
"""Labels in a round, and rounds: 200 labels in all."""
STARTS: dict[str, tuple[int, int | None]] = {
    "5": (5, None),
    "10": (10, None),
    "0+20": (0, None),
    "5 of 100": (5, 95),
    "25 of 500": (25, 475),
    "50 of 1000": (50, 950),
}
"""Labelled anomalies and normals at the start (None: the data set's default); without anomalies, 20 random labels."""
QUICK = (
    *("dataset.source.count=300", "dataset.source.size=32", "dataset.source.rare_fraction=0.1"),
    *("dataset.start.normals=20", "model.image_size=32", "trainer.iterations=2"),
)
ORACLES = {"top_k": TopKOracle, "paper_oracle": PaperOracle}
FINE_TUNED_SIZE = 96
"""Largest image side in pixels for algorithms that train the backbone; two cores can do no more."""


@dataclass(frozen=True)
class Cell:
    """One algorithm on one task with one start and one oracle."""

    algorithm: str
    task: str
    start: str
    oracle: str

    def path(self, runs: Path, draw: int) -> Path:
        """Return the file of a draw."""
        words = [self.task, self.algorithm, self.start, self.oracle, str(draw)]
        return runs / ("-".join("".join(c if c.isalnum() or c in "+_" else "_" for c in w) for w in words) + ".csv")


def main() -> None:
    """Measure the missing draws, write the table and plots, and print all tables."""
    parser = make_parser(__doc__, quick="the demo task alone, small, one draw, two rounds of labels")
    parser.add_argument("--algorithms", nargs="+", default=CHEAP, choices=RECIPES)
    parser.add_argument("--tasks", nargs="+", choices=PROBLEMS, help="default: all; four if the backbone is trained")
    parser.add_argument("--starts", nargs="+", default=["5"], choices=STARTS)
    parser.add_argument("--oracles", nargs="+", default=["top_k"], choices=ORACLES)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--last-look", action="store_true", help="measure the tasks that are set aside, once")
    options = parse_options(parser)
    name = "last_look" if options.last_look else "benchmark"
    options.runs /= name
    options.first_draw = LAST_LOOK_DRAW if options.last_look else 0
    if options.last_look:
        options.tasks = [*LAST_LOOK]
    if options.quick:
        options.tasks, options.draws = ["demo lenses"], 1
    restore(options.results / f"{name}.csv", options.runs)
    for algorithm in options.algorithms:
        for names in product(options.tasks or default_tasks(algorithm), options.starts, options.oracles):
            fill(Cell(algorithm, *names), options)
    rows = [row for path in sorted(options.runs.glob("*.csv")) for row in read_csv(path)]
    write_csv(options.results / f"{name}.csv", rows)
    if not options.last_look:
        save_plots(rows, options.results)
    print(summary(rows))


def default_tasks(algorithm: str) -> list[str]:
    """Return the default tasks of an algorithm: few if it trains the backbone, which takes minutes."""
    return [name for name, problem in PROBLEMS.items() if problem.fine_tuned or not RECIPES[algorithm].fine_tunes]


def restore(results: Path, runs: Path) -> None:
    """Write the draws of a published table to `runs`, where they are missing."""
    draws: dict[Path, list[Row]] = {}
    for row in read_csv(results) if results.exists() else []:
        cell = Cell(**{field.name: str(row[field.name]) for field in fields(Cell)})
        draws.setdefault(cell.path(runs, int(row["draw"])), []).append(row)
    for path, rows in draws.items():
        if not path.exists():
            write_csv(path, rows)


def fill(cell: Cell, options: argparse.Namespace) -> None:
    """Measure the missing draws of a cell in its own process."""
    wanted = range(options.first_draw, options.first_draw + options.draws)
    draws = [draw for draw in wanted if not cell.path(options.runs, draw).exists()]
    if not draws:
        return
    console.print(f"benchmark: {cell.algorithm} on {cell.task}, start {cell.start}, {cell.oracle}", highlight=False)
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(cell, draws, options))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def measure(cell: Cell, draws: list[int], options: argparse.Namespace) -> None:
    """Measure draws of a cell and write one row for each round of labels."""
    set_up_logging("warning")
    recipe, problem = RECIPES[cell.algorithm], (PROBLEMS | LAST_LOOK)[cell.task]
    size = min(problem.size, FINE_TUNED_SIZE) if recipe.fine_tunes else problem.size
    rounds = 2 if options.quick else 0 if recipe.fine_tunes and not recipe.searches else ROUNDS
    for draw in draws:
        own = [f"seed={draw}", *(QUICK if options.quick else (f"model.image_size={size}",)), *NO_CROPS]
        overrides = [*problem.overrides, *own]
        task = problem.open_task(*own)
        learner = make_learner(recipe.algorithm, task, *overrides, *recipe.overrides)
        probe = make_learner("probe", task, *overrides, *(recipe.backbone if recipe.fine_tunes else ()))
        config = compose(*overrides, *recipe.overrides)
        oracle = ORACLES[cell.oracle](task, build_strategy(config, learner.embedding))
        if recipe.head is not None:
            learner = recipe.head(learner.embedding)
        named = {**asdict(cell), "size": config.model.image_size, "draw": draw}
        anomalies, normals = STARTS[cell.start]
        start = anomalies, config.dataset.start.normals if normals is None else normals
        rows = [named | row for row in search(task, learner, probe, oracle, start, draw, rounds)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        write_csv(cell.path(options.runs, draw), [row | {"peak_mb": peak} for row in rows])


def search(
    task: Task,
    learner: Learner,
    probe: Learner,
    oracle: Oracle,
    start: tuple[int, int],
    draw: int,
    rounds: int,
) -> Iterator[Row]:
    """Train, rank, measure and label in rounds; the first row also has the metrics of the probe on the same labels."""
    first = RandomOrder(probe.embedding, seed=draw)
    for each in (learner, probe):
        each.embedding.features  # noqa: B018 (compute the cached features now: they are not part of a round's time)
    learner, probe = ColdStart(learner, first), ColdStart(probe, first)
    anomalies, normals = start
    if anomalies:
        labels = initial_labels(task, anomalies=anomalies, normals=normals, seed=draw)
    else:
        labels = {id_: task.label(id_) for id_ in first.rank(task.pool).top(BATCH)}
    last: dict[str, Label] = {}
    given = sum(label == Label.ANOMALY for label in labels.values())
    for number in range(rounds + 1):
        rest = [id_ for id_ in task.pool if id_ not in labels]
        began = time.monotonic()
        learner.fit(labels, pool=rest, cycle=number + 1)
        ranking = learner.rank([*task.pool, *task.holdout])
        seconds = round(time.monotonic() - began, 2)
        probe_ranking = None
        if not number:  # in later rounds the probe would have labelled other images
            probe.fit(labels, pool=rest, cycle=1)
            probe_ranking = probe.rank(rest)
        row = cycle_metrics(number + 1, task, labels, ranking, probe_ranking)
        row |= calibration(ranking.restrict(rest), task)
        yield row | {"spent": number * BATCH, "found": int(row["found"]) - given, "seconds": seconds}
        rng = np.random.default_rng([draw, number])
        remaining = (rounds - number - 1) * BATCH  # the last labels only serve the last row
        last = oracle(ranking.restrict(rest), frozenset(rest), BATCH, rng=rng, last=last, remaining=max(0, remaining))
        labels |= last


def calibration(ranking: Ranking, task: Task) -> Row:
    """Return the number of anomalies that the scores predict (their sum), the true number, and the log loss."""
    truth = task.truth(ranking.ids)
    loss = np.logaddexp(0.0, np.where(truth, -ranking.logits, ranking.logits)).mean()
    return {"promised": float(ranking.scores.sum()), "there": int(truth.sum()), "log_loss": float(loss)}


if __name__ == "__main__":
    main()
