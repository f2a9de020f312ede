"""How much the five first examples matter: the probe's first cycle over twelve draws (README: below table 1)."""

from bench import DATA, HERE, Row, arguments, table
from probe_miniimagenet import CLASSES

from anomalymatch import compose, evaluate, initial_labels, make_learner, make_task
from anomalymatch.active.run_folder import to_csv
from anomalymatch.build import build_task
from anomalymatch.files import write_text


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__ or "")
    words = (f"data.root={DATA / 'miniimagenet'}", f"model.image_size={84 if options.quick else 224}")
    source = build_task(compose("dataset=miniimagenet", *words)).source
    rows: list[Row] = []
    for holdout in (0.2, 0.0):
        for name, word_net_id in CLASSES.items():
            task = make_task(source, anomaly=word_net_id, holdout=holdout)
            learner = make_learner("probe", task, "dataset=miniimagenet", *words)
            for seed in range(2 if options.quick else 12):
                labels = initial_labels(task, anomalies=5, normals=495, seed=seed)
                learner.fit(labels)
                rest = learner.rank([id_ for id_ in task.pool if id_ not in labels])
                measured = evaluate(rest, task).as_dict()
                rows.append({"held out": str(holdout), "class": name, "seed": seed, **measured})
    write_text(HERE / "results" / "probe_draws.csv", to_csv(rows))
    print(table(rows, ("held out",), ("auroc", "ap", "precision_at_1pct")))


if __name__ == "__main__":
    main()
