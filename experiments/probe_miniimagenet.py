"""Search miniImageNet by the probe: five classes, three draws, two oracles (README, 1)."""

from bench import Job, dataset_overrides, make_parser, parse_options, run_jobs, table

CLASSES = {
    "hourglass": "n03544143",
    "piano": "n04515003",
    "electric guitar": "n03272010",
    "photocopier": "n03924679",
    "orange": "n07747607",
}
"""Classes of the paper, with their WordNet ids."""
OTHER_CLASSES = {
    "house finch": "n01532829",
    "golden retriever": "n02099601",
    "frying pan": "n03400231",
    "school bus": "n04146614",
    "cliff": "n09246464",
}
ORACLES = ["paper_oracle", "top_k"]
MEASURES = ("auroc", "ap", "precision_at_1pct", "heldout_auroc", "heldout_ap", "found")


def main() -> None:
    """Run the jobs and print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("overrides", nargs="*", help="further settings, such as model.crops=5")
    parser.add_argument("--name", default="", help="suffix of the result file; required with further settings")
    parser.add_argument("--oracles", nargs="+", default=ORACLES, choices=ORACLES)
    parser.add_argument("--others", action="store_true", help="use five classes that the paper does not use")
    options = parse_options(parser)
    if bool(options.overrides) != bool(options.name):
        parser.error("give --name together with further settings, or neither")
    classes = OTHER_CLASSES if options.others else CLASSES
    jobs = [
        Job(
            {"oracle": oracle, "class": name, "seed": seed},
            [
                *dataset_overrides("miniimagenet"),
                f"dataset.anomaly={wordnet_id}",
                f"seed={seed}",
                f"oracle={oracle}",
                "algorithm=probe",
                f"model.image_size={84 if options.quick else 224}",
                *options.overrides,
            ],
        )
        for oracle in options.oracles
        for name, wordnet_id in list(classes.items())[: 1 if options.quick else None]
        for seed in range(1 if options.quick else 3)
    ]
    suffixes = [word for word in ("others" if options.others else "", options.name) if word]
    rows = run_jobs("_".join(["probe_miniimagenet", *suffixes]), jobs, options)
    print(table(rows, ("oracle", "cycle"), MEASURES))
    print(table([row for row in rows if row["cycle"] == 3], ("oracle", "class"), MEASURES))


if __name__ == "__main__":
    main()
