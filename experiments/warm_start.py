"""The paper's recipe against the warm start, one class, 128 px, 100 iterations (README: table 2)."""

from bench import DATA, Job, make_parser, measure, table

MEASURES = ("auroc", "ap", "precision_at_1pct", "probe_ap", "heldout_ap", "seconds")


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("--algorithms", nargs="+", default=["fixmatch", "fixmatch_reference"])
    options = parser.parse_args()
    jobs = [
        Job(
            {"algorithm": algorithm, "seed": 0},
            [
                "dataset=miniimagenet",
                f"data.root={DATA / 'miniimagenet'}",
                "seed=0",
                f"algorithm={algorithm}",
                "al.cycles=1",
                f"trainer.iterations={2 if options.quick else 100}",
                f"model.image_size={64 if options.quick else 128}",
            ],
        )
        for algorithm in options.algorithms
    ]
    rows = measure("warm_start", jobs, options.runs)
    print(table(rows, ("algorithm", "cycle"), MEASURES))


if __name__ == "__main__":
    main()
