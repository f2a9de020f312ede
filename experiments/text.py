"""Rank by a description instead of labels: anomalies among the first 100 and 200 images, and AP (README, 13).

The weights come from the hub. `text=clip` and the like as further settings measure other models.
"""

from bench import Row, make_parser, parse_options, table, write_csv
from recipes import PROBLEMS

from anomalymatch import make_text_ranker
from anomalymatch.evaluation.metrics import ranking_metrics
from anomalymatch.terminal import console

DESCRIPTIONS = {
    "hourglass": "an hourglass",
    "piano": "a piano",
    "orange": "an orange",
    "merger": "two galaxies that merge",
    "don't know": "an image artefact or a star instead of a galaxy",
    "demo lenses": "a gravitational lens, an arc around a galaxy",
}


def main() -> None:
    """Measure all tasks and print the table."""
    parser = make_parser(__doc__, quick="the demo")
    parser.add_argument("--tasks", nargs="+", default=list(DESCRIPTIONS), choices=list(DESCRIPTIONS))
    parser.add_argument("overrides", nargs="*", help="further settings")
    options = parse_options(parser)
    rows: list[Row] = []
    for name in ["demo lenses"] if options.quick else options.tasks:
        console.print(f"text: {name}", highlight=False)
        task = PROBLEMS[name].open_task(*options.overrides)
        ranking = make_text_ranker(task, DESCRIPTIONS[name], *options.overrides).rank()
        truth = task.truth(ranking.ids)
        found = {f"found_{k}": int(task.truth(ranking.top(k)).sum()) for k in (100, 200)}
        row: Row = {"task": name, "description": DESCRIPTIONS[name], "images": len(ranking), "there": int(truth.sum())}
        rows.append(row | found | {"ap": ranking_metrics(ranking.logits, truth).ap})
        write_csv(options.results / "text.csv", rows)
    print(table(rows, ("task", "description", "there"), ("found_100", "found_200", "ap")))


if __name__ == "__main__":
    main()
