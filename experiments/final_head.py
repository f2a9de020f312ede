"""What should rank after a fine-tuning: the head that was trained, a probe on the features it has learnt, or both.

One training gives all of them. What the table of the results has already is not measured again.
"""

import argparse
import copy
import csv
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from bench import HERE, Row, table
from recipes import OF_200, PROBLEMS

from anomalymatch import compose, initial_labels, make_learner, open_task
from anomalymatch.active.run_folder import to_csv
from anomalymatch.algorithms.base import WEIGHTS
from anomalymatch.algorithms.fixmatch.loss import anomaly_logit
from anomalymatch.algorithms.fixmatch.refit import refit_head
from anomalymatch.backbones.checkpoint import load_network
from anomalymatch.backbones.network import Head
from anomalymatch.build import build
from anomalymatch.evaluation.metrics import ranking_metrics
from anomalymatch.files import write_text
from anomalymatch.terminal import console, set_up_logging

RESULTS = HERE / "results" / "final_head.csv"
MEASURES = ("probe", "trained", "refitted", "mean")
ALONE = (*OF_200, "algorithm.learner.refit=false", "algorithm.learner.guard=off")
"""What trains is `fixmatch of 200`, as in all rows of the table."""


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=[n for n, p in PROBLEMS.items() if p.fine_tuned])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--iterations", type=int, default=100)
    options = parser.parse_args()
    set_up_logging("warning")
    rows: list[Row] = list(_read(options.results)) if options.results.exists() else []
    for task in options.tasks:
        for draw in range(options.draws):
            name = {"task": task, "size": str(options.size), "draw": str(draw)}
            if not any(name.items() <= row.items() for row in rows):
                console.print(f"final_head: {name}", highlight=False)
                rows.append(name | measure(task, draw, options.size, options.iterations))
                write_text(options.results, to_csv(rows))
    print(table(rows, ("task", "size"), MEASURES))


def measure(name: str, draw: int, size: int, iterations: int) -> Row:
    """Average precision of each head on the unlabelled images, after one training."""
    problem = PROBLEMS[name]
    words = [f"dataset={problem.dataset}", *problem.words, f"seed={draw}", f"model.image_size={size}"]
    words += ["model.crops=0", "probe.orientations=2"]
    task = open_task(problem.dataset, *words[1:])
    config = compose(*words)
    labels = initial_labels(task, anomalies=5, normals=config.dataset.start.normals, seed=draw)
    rest = [id_ for id_ in task.pool if id_ not in labels]
    probe = make_learner("probe", task, *words)
    learner = make_learner("fixmatch", task, *words, *ALONE, f"trainer.iterations={iterations}")
    for each in (probe, learner):
        each.fit(labels, pool=rest)
    with TemporaryDirectory() as folder:
        learner.save(Path(folder))
        network = load_network(Path(folder) / WEIGHTS)
    embedding, trained = learner.embedding, copy.deepcopy(network.head)
    refit_head(network, embedding, labels, build(config.probe))
    forward = embedding.inference.prepared(network.backbone, size=size, count=len(rest))
    batches = list(embedding.inference.run(forward, task.source, rest, size=size))
    features = torch.from_numpy(np.concatenate([batch.outputs for batch in batches]))
    truth = task.truth([id_ for batch in batches for id_ in batch.ids])
    ranking = probe.rank(rest)
    heads = {"trained": trained, "refitted": network.head, "mean": mean_of(trained, network.head)}
    with torch.inference_mode():
        logits = {key: anomaly_logit(head(features)).double().numpy() for key, head in heads.items()}
    aps = {key: ranking_metrics(values, truth).ap for key, values in logits.items()}
    return {"probe": ranking_metrics(ranking.logits, task.truth(ranking.ids)).ap} | aps


def mean_of(one: Head, other: Head) -> Head:
    """A head whose logits are the means of theirs."""
    head, weights = copy.deepcopy(one), other.state_dict()
    head.load_state_dict({key: (value + weights[key]) / 2 for key, value in one.state_dict().items()})
    return head


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
