"""Measure the probe's first cycle over twelve draws, by prevalence and with or without self-training (README, 1).

A draw chooses the labels and, at a lower prevalence, the anomalies that stay in the pool.
"""

from bench import Row, dataset_overrides, make_parser, parse_options, table_over_tasks, write_csv
from probe_miniimagenet import CLASSES

from anomalymatch import compose, evaluate, initial_labels, make_learner, make_task
from anomalymatch.build_images import build_task
from anomalymatch.terminal import console

PROTOCOLS = ((0.2, None), (0.0, None), (0.0, 0.003), (0.0, 0.001))
"""Held-out share, and prevalence in the pool (None: 1 %, as in the data set)."""


def main() -> None:
    """Measure all protocols and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--draws", type=int, default=12, help="number of initial label sets of each class")
    options = parse_options(parser)
    overrides = [*dataset_overrides("miniimagenet"), f"model.image_size={84 if options.quick else 224}"]
    source = build_task(compose(*overrides)).source
    rows: list[Row] = []
    for holdout, prevalence in PROTOCOLS[:: 3 if options.quick else 1]:
        for name, wordnet_id in CLASSES.items():
            console.print(f"probe_draws: {holdout}, {prevalence}, {name}", highlight=False)
            for draw in range(2 if options.quick else options.draws):
                task = make_task(source, anomaly=wordnet_id, holdout=holdout, prevalence=prevalence, seed=draw)
                labels = initial_labels(task, anomalies=5, normals=495, seed=draw)
                rest = [id_ for id_ in task.pool if id_ not in labels]
                for rounds in (0, 3):
                    learner = make_learner("probe", task, *overrides, f"probe.rounds={rounds}")
                    learner.fit(labels, pool=rest)
                    protocol = {"held out": str(holdout), "prevalence": str(prevalence or 0.01), "rounds": rounds}
                    metrics = evaluate(learner.rank(rest), task).as_dict()
                    rows.append({**protocol, "class": name, "seed": draw, **metrics})
            write_csv(options.results / "probe_draws.csv", rows)
    print(table_over_tasks(rows, ("held out", "prevalence", "rounds"), "class", ("auroc", "ap", "precision_at_1pct")))


if __name__ == "__main__":
    main()
