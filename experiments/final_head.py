"""Compare the heads that can rank after fine-tuning: the trained head, a probe on the learned features, their mean.

One training gives all of them (README, 12). Trainings that the published table contains are not repeated.
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from bench import NO_CROPS, Row, make_parser, parse_options, read_csv, table, write_csv
from recipes import OF_200, PROBLEMS

from anomalymatch import compose, initial_labels, make_learner
from anomalymatch.algorithms.base import WEIGHTS
from anomalymatch.algorithms.fixmatch.learner import refit_head
from anomalymatch.backbones.checkpoint import load_network
from anomalymatch.backbones.network import Head, anomaly_logit
from anomalymatch.build_images import build
from anomalymatch.evaluation.metrics import ranking_metrics
from anomalymatch.terminal import console

MEASURES = ("probe", "trained", "refitted", "mean")
TRAINED_ONLY = (*OF_200, "algorithm.learner.refit=false", "algorithm.learner.guard=off")
"""Settings of `fixmatch of 200` without the steps that follow its training."""


def main() -> None:
    """Measure what is missing and print the table."""
    parser = make_parser(__doc__, quick="one draw at 32 px, two iterations")
    parser.add_argument("--tasks", nargs="+", default=[n for n, p in PROBLEMS.items() if p.fine_tuned])
    parser.add_argument("--size", type=int, default=128, help="image side in pixels")
    parser.add_argument("--draws", type=int, default=2)
    options = parse_options(parser)
    iterations = 100
    if options.quick:
        options.size, options.draws, iterations = 32, 1, 2
    path = options.results / "final_head.csv"
    rows = read_csv(path) if path.exists() else []
    for task in options.tasks:
        for draw in range(options.draws):
            name = {"task": task, "size": str(options.size), "draw": str(draw)}
            if not any(name.items() <= row.items() for row in rows):
                console.print(f"final_head: {name}", highlight=False)
                rows.append(name | measure(task, draw, options.size, iterations))
                write_csv(path, rows)
    print(table(rows, ("task", "size"), MEASURES))


def measure(name: str, draw: int, size: int, iterations: int) -> Row:
    """Train once and return the average precision of each head on the unlabelled images."""
    problem = PROBLEMS[name]
    own = [f"seed={draw}", f"model.image_size={size}", *NO_CROPS]
    overrides = [*problem.overrides, *own]
    task = problem.open_task(*own)
    config = compose(*overrides)
    labels = initial_labels(task, anomalies=5, normals=config.dataset.start.normals, seed=draw)
    rest = [id_ for id_ in task.pool if id_ not in labels]
    probe = make_learner("probe", task, *overrides)
    learner = make_learner("fixmatch", task, *overrides, *TRAINED_ONLY, f"trainer.iterations={iterations}")
    for each in (probe, learner):
        each.fit(labels, pool=rest)
    with TemporaryDirectory() as folder:
        learner.save(Path(folder))
        network = load_network(Path(folder) / WEIGHTS)
    embedding, trained = learner.embedding, copy.deepcopy(network.head)
    refit_head(network, embedding, labels, build(config.probe))
    forward = embedding.inference.prepare(network.backbone, size=size, count=len(rest))
    batches = list(embedding.inference.run(forward, task.source, rest, size=size))
    features = torch.from_numpy(np.concatenate([batch.outputs for batch in batches]))
    truth = task.truth([id_ for batch in batches for id_ in batch.ids])
    ranking = probe.rank(rest)
    heads = {"trained": trained, "refitted": network.head, "mean": mean_head(trained, network.head)}
    with torch.inference_mode():
        logits = {key: anomaly_logit(head(features)).double().numpy() for key, head in heads.items()}
    aps = {key: ranking_metrics(values, truth).ap for key, values in logits.items()}
    return {"probe": ranking_metrics(ranking.logits, task.truth(ranking.ids)).ap} | aps


def mean_head(first: Head, second: Head) -> Head:
    """Return a head whose logits are the means of the logits of two heads."""
    head, weights = copy.deepcopy(first), second.state_dict()
    head.load_state_dict({key: (value + weights[key]) / 2 for key, value in first.state_dict().items()})
    return head


if __name__ == "__main__":
    main()
