"""How much the first examples, the prevalence and self-training matter: the probe's first cycle over twelve draws."""

from bench import DATA, HERE, Row, arguments, table
from probe_miniimagenet import CLASSES

from anomalymatch import compose, evaluate, initial_labels, make_learner, make_task
from anomalymatch.active.run_folder import to_csv
from anomalymatch.build import build_task
from anomalymatch.files import write_text

PROTOCOLS = ((0.2, None), (0.0, None), (0.0, 0.003), (0.0, 0.001))
"""Share held out, and prevalence to which the pool is thinned; None keeps 1 %."""


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__ or "")
    words = (f"data.root={DATA / 'miniimagenet'}", f"model.image_size={84 if options.quick else 224}")
    source = build_task(compose("dataset=miniimagenet", *words)).source
    rows: list[Row] = []
    for holdout, prevalence in PROTOCOLS[:: 3 if options.quick else 1]:
        for name, word_net_id in CLASSES.items():
            task = make_task(source, anomaly=word_net_id, holdout=holdout, prevalence=prevalence)
            for rounds in (0, 3):
                learner = make_learner("probe", task, "dataset=miniimagenet", *words, f"probe.rounds={rounds}")
                for seed in range(2 if options.quick else 12):
                    labels = initial_labels(task, anomalies=5, normals=495, seed=seed)
                    rest = [id_ for id_ in task.pool if id_ not in labels]
                    learner.fit(labels, pool=rest)
                    protocol = {"held out": str(holdout), "prevalence": str(prevalence or 0.01), "rounds": rounds}
                    measured = evaluate(learner.rank(rest), task).as_dict()
                    rows.append({**protocol, "class": name, "seed": seed, **measured})
    write_text(HERE / "results" / "probe_draws.csv", to_csv(rows))
    print(table(rows, ("held out", "prevalence", "rounds"), ("auroc", "ap", "precision_at_1pct")))


if __name__ == "__main__":
    main()
