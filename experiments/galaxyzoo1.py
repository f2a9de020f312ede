"""Mergers and oddities among real galaxies, probe and FixMatch (README: table 3)."""

from bench import DATA, Job, arguments, measure, table

MEASURES = ("auroc", "ap", "precision_at_1pct", "heldout_auroc", "heldout_ap", "found", "seconds")


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__ or "")
    jobs = [
        Job(
            {"anomaly": anomaly, "oracle": oracle, "algorithm": algorithm, "seed": seed},
            [
                "dataset=galaxyzoo1",
                f"data.root={DATA / 'galaxyzoo1'}",
                f"dataset.anomaly={anomaly}",
                f"seed={seed}",
                f"oracle={oracle}",
                f"algorithm={algorithm}",
                "augment.vertical_flip=0.5",
                f"trainer.iterations={2 if options.quick else 30}",
                *(["algorithm.learner.batch.labelled=8"] if algorithm == "fixmatch" else []),
                f"model.image_size={64 if options.quick else 128}",
                "model.crops=0",
                "probe.orientations=2",
            ],
        )
        for algorithm, seeds in (("probe", 3), ("fixmatch", 1))
        for anomaly in ("merger", "dont_know")
        for oracle in (("top_k",) if algorithm == "fixmatch" else ("paper_oracle", "top_k"))
        for seed in range(1 if options.quick else seeds)
    ]
    rows = measure("galaxyzoo1", jobs, options.runs)
    print(table(rows, ("anomaly", "oracle", "algorithm", "cycle"), MEASURES))


if __name__ == "__main__":
    main()
