"""Compare `fixmatch`, which starts from the probe, with the paper's recipe: one class, 128 px (README, 2)."""

from bench import ALONE, Job, dataset_overrides, make_parser, parse_options, run_jobs, table

MEASURES = ("auroc", "ap", "precision_at_1pct", "probe_ap", "heldout_ap", "seconds")


def main() -> None:
    """Run the jobs and print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--algorithms", nargs="+", default=["fixmatch", "fixmatch_reference"])
    options = parse_options(parser)
    jobs = [
        Job(
            {"algorithm": algorithm, "seed": 0},
            [
                *dataset_overrides("miniimagenet"),
                "seed=0",
                f"algorithm={algorithm}",
                ALONE,
                "al.cycles=1",
                f"trainer.iterations={2 if options.quick else 100}",
                f"model.image_size={64 if options.quick else 128}",
            ],
        )
        for algorithm in options.algorithms
    ]
    print(table(run_jobs("warm_start", jobs, options), ("algorithm", "cycle"), MEASURES))


if __name__ == "__main__":
    main()
