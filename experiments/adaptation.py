"""Compare the probe on adapted features with the probe on pretrained ones.

`merger` and `don't know` of Galaxy Zoo 1: average precision with the first labels (five anomalies), and anomalies found
with 200 more, for each method and number of epochs. Every draw has other first labels; all draws of a method
share its weights. Further words are settings of the adaptation: `adapt.image_size=128 augment.zoom=[0.75,1.3]`.
"""

from pathlib import Path

from bench import Row, make_parser, parse_options, run_once, table, write_csv
from benchmark import BATCH, ROUNDS, search
from recipes import PROBLEMS, Problem

from anomalymatch import adapt, compose, make_learner
from anomalymatch.active.oracles import TopKOracle
from anomalymatch.build import build_strategy
from anomalymatch.terminal import console


def main() -> None:
    """Adapt, search and print the table."""
    parser = make_parser(__doc__, quick="one epoch and one draw on the demo")
    parser.add_argument("--methods", nargs="+", default=["simclr"], choices=["simclr", "vicreg", "byol", "dino"])
    parser.add_argument("--epochs", nargs="+", type=int, default=[0, 2, 5, 10, 20], help="0: pretrained features")
    parser.add_argument("--tasks", nargs="+", default=["merger", "don't know"], choices=PROBLEMS)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--crops", type=int, default=0)
    parser.add_argument("--name", default="adaptation", help="name of the table, for other settings of the adaptation")
    parser.add_argument("overrides", nargs="*", help="settings of the adaptation")
    options = parse_options(parser)
    if options.quick:
        options.tasks, options.epochs, options.draws = ["demo lenses"], [0, 1], 1
    rows: list[Row] = []
    for name in options.tasks:
        problem, folder = PROBLEMS[name], options.runs / options.name
        for method, epochs in [("pretrained", 0)] * (0 in options.epochs) + [
            (method, epochs) for method in options.methods for epochs in options.epochs if epochs
        ]:
            weights = _weights(problem, method, epochs, folder, options.overrides)
            for draw in range(options.first, options.first + options.draws):
                path = folder / f"{problem.anomaly}-{method}-{epochs}-{options.crops}-{draw}.csv"
                common = [f"model.weights={weights}", f"model.crops={options.crops}", *_network(options.overrides)]
                rows += [
                    {"task": name, "method": method, "epochs": epochs, "draw": draw, **row}
                    for row in run_once(path, measure, problem, draw, common)
                ]
    write_csv(options.results / f"{options.name}.csv", rows)
    print(table(rows, ("task", "method", "epochs"), ("ap", "found")))


def _weights(problem: Problem, method: str, epochs: int, folder: Path, overrides: list[str]) -> str | Path:
    """Adapt to all images of a data set, once for its tasks; 0 epochs are the pretrained weights."""
    if not epochs:
        return next((word.partition("=")[2] for word in overrides if word.startswith("model.weights=")), "auto")
    console.print(f"adaptation: {problem.dataset} by {method}, {epochs} epochs", highlight=False)
    output = folder / f"{problem.dataset}-{method}-{epochs}"
    words = [f"adapt={method}", f"adapt.epochs={epochs}", f"output={output}", "logger=none", *overrides]
    images = [w for w in problem.overrides if not w.startswith(("dataset.anomaly=", "dataset.prevalence="))]
    return adapt(*images, *words)


def _network(overrides: list[str]) -> list[str]:
    """Return the settings of images and network, which the search must share with the adaptation."""
    return [w for w in overrides if w.startswith(("model.", "dataset.")) and not w.startswith("model.weights=")]


def measure(problem: Problem, draw: int, overrides: list[str]) -> list[Row]:
    """Search with 200 labels; return the average precision at the start and the anomalies found at the end."""
    words = [f"seed={draw}", *overrides]
    task = problem.open_task(*words)
    learner, probe = (make_learner("probe", task, *problem.overrides, *words) for _ in range(2))
    config = compose(*problem.overrides, *words)
    oracle = TopKOracle(task, build_strategy(config, learner.embedding))
    rows = list(search(task, learner, probe, oracle, (5, config.dataset.start.normals), draw, ROUNDS))
    assert BATCH * ROUNDS == 200
    return [{"ap": rows[0]["ap"], "found": rows[-1]["found"]}]


if __name__ == "__main__":
    main()
