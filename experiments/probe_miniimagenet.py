"""The probe on miniImageNet, five paper classes x three draws, both oracles (README: table 1)."""

from bench import DATA, Job, make_parser, measure, table

CLASSES = {
    "hourglass": "n03544143",
    "piano": "n04515003",
    "electric guitar": "n03272010",
    "photocopier": "n03924679",
    "orange": "n07747607",
}
OTHERS = {
    "house finch": "n01532829",
    "golden retriever": "n02099601",
    "frying pan": "n03400231",
    "school bus": "n04146614",
    "cliff": "n09246464",
}
ORACLES = ["paper_oracle", "top_k"]
MEASURES = ("auroc", "ap", "precision_at_1pct", "heldout_auroc", "heldout_ap", "found")


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__ or "")
    parser.add_argument("words", nargs="*", help="other settings, as on the command line: model.crops=5")
    parser.add_argument("--name", default="", help="of the table, with other settings: 5_crops")
    parser.add_argument("--oracles", nargs="+", default=ORACLES, choices=ORACLES)
    parser.add_argument("--others", action="store_true", help="five other classes")
    options = parser.parse_args()
    if bool(options.words) != bool(options.name):
        parser.error("other settings need a name, and a name needs other settings")
    classes = OTHERS if options.others else CLASSES
    jobs = [
        Job(
            {"oracle": oracle, "class": name, "seed": seed},
            [
                "dataset=miniimagenet",
                f"data.root={DATA / 'miniimagenet'}",
                f"dataset.anomaly={word_net_id}",
                f"seed={seed}",
                f"oracle={oracle}",
                "algorithm=probe",
                f"model.image_size={84 if options.quick else 224}",
                *options.words,
            ],
        )
        for oracle in options.oracles
        for name, word_net_id in list(classes.items())[: 1 if options.quick else None]
        for seed in range(1 if options.quick else 3)
    ]
    which = [word for word in ("others" if options.others else "", options.name) if word]
    rows = measure("_".join(["probe_miniimagenet", *which]), jobs, options.runs)
    print(table(rows, ("oracle", "cycle"), MEASURES))
    print(table([row for row in rows if row["cycle"] == 3], ("oracle", "class"), MEASURES))


if __name__ == "__main__":
    main()
