"""Rank every image by a probe trained on the true labels of the other nine tenths (10-fold cross-validation).

The number of anomalies among the first 200 is a reference for a search with 200 labels. It is not an upper bound: a
search may be lucky, and it trains on the images that are most like those it looks for. The images that a search starts
from are left out, as in the benchmark.
"""

import numpy as np
from bench import Row, make_parser, parse_options, table, write_csv
from benchmark import BATCH, ROUNDS
from recipes import AS_CONFIGURED, PROBLEMS, Problem
from sklearn.model_selection import StratifiedKFold

from anomalymatch import compose, initial_labels, make_learner
from anomalymatch.evaluation.metrics import ranking_metrics
from anomalymatch.ranking import Ranking
from anomalymatch.terminal import console

FOLDS = 10


def main() -> None:
    """Measure all tasks and print the table."""
    parser = make_parser(__doc__, quick="one draw")
    parser.add_argument("--tasks", nargs="+", default=["merger", "don't know"], choices=PROBLEMS)
    parser.add_argument("--draws", type=int, default=3, help="number of initial label sets to leave out, one at a time")
    parser.add_argument("overrides", nargs="*", help="further settings")
    options = parse_options(parser)
    rows: list[Row] = []
    for name in options.tasks:
        console.print(f"all_labels: {name}", highlight=False)
        rows += measure(name, 1 if options.quick else options.draws, [*AS_CONFIGURED, *options.overrides])
        write_csv(options.results / "all_labels.csv", rows)
    print(table(rows, ("task", "size"), ("there", "found", "ap")))


def measure(name: str, draws: int, overrides: list[str]) -> list[Row]:
    """Return, for each draw, the anomalies that remain, those among the first 200, and the average precision."""
    problem = PROBLEMS[name]
    config = compose(*problem.overrides, *overrides)
    ranking = cross_validated_ranking(problem, overrides)
    rows: list[Row] = []
    for draw in range(draws):
        task = problem.open_task(*overrides, f"seed={draw}")
        known = initial_labels(task, anomalies=5, normals=config.dataset.start.normals, seed=draw)
        rest = ranking.restrict([id_ for id_ in ranking.ids if id_ not in known])
        truth = task.truth(rest.ids)
        rows.append(
            {
                "task": name,
                "size": config.model.image_size,
                "draw": draw,
                "there": int(truth.sum()),
                "found": int(task.truth(rest.top(BATCH * ROUNDS)).sum()),
                "ap": ranking_metrics(rest.logits, truth).ap,
            }
        )
    return rows


def cross_validated_ranking(problem: Problem, overrides: list[str]) -> Ranking:
    """Rank every image by a probe that is trained on the other folds."""
    task = problem.open_task(*overrides, "seed=0")
    learner = make_learner("probe", task, *problem.overrides, *overrides, "seed=0")
    ids = np.array(task.pool)
    parts = []
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(ids, task.truth(task.pool)):
        tested = ids[test].tolist()
        learner.fit({id_: task.label(id_) for id_ in ids[train].tolist()}, pool=tested)
        parts.append(learner.rank(tested))
    return Ranking([id_ for part in parts for id_ in part.ids], np.concatenate([part.logits for part in parts]))


if __name__ == "__main__":
    main()
