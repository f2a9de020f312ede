"""Search Galaxy Zoo 1 for mergers and "don't know" galaxies, by the probe and by FixMatch (README, 3)."""

from bench import ALONE, NO_CROPS, Job, dataset_overrides, make_parser, parse_options, run_jobs, table

MEASURES = ("auroc", "ap", "precision_at_1pct", "heldout_auroc", "heldout_ap", "found", "seconds")


def main() -> None:
    """Run the jobs and print the table."""
    options = parse_options(make_parser(__doc__))
    jobs = [
        Job(
            {"anomaly": anomaly, "oracle": oracle, "algorithm": algorithm, "seed": seed},
            [
                *dataset_overrides("galaxyzoo1"),
                f"dataset.anomaly={anomaly}",
                f"seed={seed}",
                f"oracle={oracle}",
                f"algorithm={algorithm}",
                "augment=objects",
                "augment.vertical_flip=0.5",
                f"trainer.iterations={2 if options.quick else 30}",
                *([ALONE, "algorithm.learner.batch.labelled=8"] if algorithm == "fixmatch" else []),
                f"model.image_size={64 if options.quick else 128}",
                *NO_CROPS,
            ],
        )
        for algorithm, seeds in (("probe", 3), ("fixmatch", 1))
        for anomaly in ("merger", "dont_know")
        for oracle in (("top_k",) if algorithm == "fixmatch" else ("paper_oracle", "top_k"))
        for seed in range(1 if options.quick else seeds)
    ]
    rows = run_jobs("galaxyzoo1", jobs, options)
    print(table(rows, ("anomaly", "oracle", "algorithm", "cycle"), MEASURES))


if __name__ == "__main__":
    main()
