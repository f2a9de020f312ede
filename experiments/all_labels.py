"""A yardstick for the search: a probe that knows the labels of nine tenths of the images ranks the last, each in turn.

How many anomalies are among its first 200? The images are seen as configured, and the examples to start from are left
out, as in the benchmark. It is no bound: a search may have luck, and learns from the very images that look alike.
"""

import argparse
from pathlib import Path

import numpy as np
from bench import HERE, Row, table
from benchmark import ROUND, ROUNDS
from recipes import AS_CONFIGURED, PROBLEMS
from sklearn.model_selection import StratifiedKFold

from anomalymatch import compose, initial_labels, make_learner, open_task
from anomalymatch.active.run_folder import to_csv
from anomalymatch.evaluation.metrics import ranking_metrics
from anomalymatch.files import write_text
from anomalymatch.ranking import Ranking
from anomalymatch.terminal import console, set_up_logging

FOLDS = 10


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["merger", "don't know"], choices=PROBLEMS)
    parser.add_argument("--draws", type=int, default=3, help="starts that are left out, one after the other")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "all_labels.csv")
    parser.add_argument("words", nargs="*", help="further settings")
    options = parser.parse_args()
    set_up_logging("warning")
    rows: list[Row] = []
    for name in options.tasks:
        console.print(f"all_labels: {name}", highlight=False)
        rows += measure(name, options.draws, options.words)
        write_text(options.results, to_csv(rows))
    print(table(rows, ("task", "size"), ("there", "found", "ap")))


def measure(name: str, draws: int, words: list[str]) -> list[Row]:
    """For each start: the anomalies that are left, those among the first 200, and the average precision."""
    problem = PROBLEMS[name]
    words = [f"dataset={problem.dataset}", *problem.words, *AS_CONFIGURED, *words]
    config = compose(*words)
    ranking = out_of_fold(problem.dataset, words)
    rows: list[Row] = []
    for draw in range(draws):
        task = open_task(problem.dataset, *words[1:], f"seed={draw}")
        known = initial_labels(task, anomalies=5, normals=config.dataset.start.normals, seed=draw)
        rest = ranking.restrict([id_ for id_ in ranking.ids if id_ not in known])
        found = int(task.truth(rest.top(ROUND * ROUNDS)).sum())
        truth = task.truth(rest.ids)
        row = {"there": int(truth.sum()), "found": found, "ap": ranking_metrics(rest.logits, truth).ap}
        rows.append({"task": name, "size": config.model.image_size, "draw": draw} | row)
    return rows


def out_of_fold(dataset: str, words: list[str]) -> Ranking:
    """Every image, scored by a probe that knows the labels of the other nine tenths."""
    task = open_task(dataset, *words[1:], "seed=0")
    learner = make_learner("probe", task, *words, "seed=0")
    ids = np.array(task.pool)
    parts = []
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(ids, task.truth(task.pool)):
        tenth = ids[test].tolist()
        learner.fit({id_: task.label(id_) for id_ in ids[train].tolist()}, pool=tenth)
        parts.append(learner.rank(tenth))
    return Ranking([id_ for part in parts for id_ in part.ids], np.concatenate([part.logits for part in parts]))


if __name__ == "__main__":
    main()
