"""Compare settings of the probe on cached features (README, The probe, once more).

Photographs of miniImageNet have 84 px, other images their configured size. Before any label is spent: self-training by
its confidence, against the fit gap of the labels, and the mean of unlike probes. In a search of 200 labels: whitening.
A draw that the table contains is not measured again.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from bench import DATA, Row, format_interval, group_by, make_parser, markdown, parse_options, read_csv, write_csv
from recipes import PROBLEMS
from scipy.special import logit
from scipy.stats import spearmanr
from whitening import WhitenedProbe

from anomalymatch import Label, compose, initial_labels, make_learner, open_task
from anomalymatch.algorithms.probe.learner import fit_probe, rank_by_probe
from anomalymatch.algorithms.probe.regression import Probe, ProbeSpec, fit_gap
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.build_images import build
from anomalymatch.data.task import Task
from anomalymatch.evaluation.confidence import mean_interval
from anomalymatch.evaluation.metrics import ranking_metrics
from anomalymatch.ranking import Ranking
from anomalymatch.terminal import console

STEEL = ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches")
TILES = ("blowhole", "break", "crack", "fray", "uneven")
DEFECTS = {
    **{f"steel {name}": ("neu_steel", name, ("dataset.prevalence=0.05",)) for name in STEEL},
    **{f"tile {name}": ("magnetic_tile", name, ()) for name in TILES},
}
"""Data set, class and further settings of the tasks on industrial surfaces, which have 100 labelled normals."""
FAMILIES = {"galaxyzoo1": "galaxies", "miniimagenet": "photographs", "cifar10": "cifar10", "demo": "demo"}
ROUNDS, BATCH = 10, 20
ALWAYS = {"fit_gap": None}
STARTS: dict[str, Mapping[str, object]] = {
    "configured": {},
    "labels": {"rounds": 0},
    "0.8": {**ALWAYS, "confidence": 0.8},
    "0.9": {**ALWAYS, "confidence": 0.9},
}
"""Changes to the configured probe that are measured before any label is spent."""
WHITENED = "whitened"
"""Probe on the labels alone, with features whitened by half of the covariance's power."""
MEANS = {
    "labels + whitened": ("labels", "whitened"),
    "0.9 + labels": ("0.9", "labels"),
    "0.9 + whitened": ("0.9", "whitened"),
    "all three": ("0.9", "labels", "whitened"),
}
"""Means of standardised log-odds."""
POWERS, LEAST = (0.0, 0.25, 0.5), 20
"""Powers of whitening that are compared in a search, and the labelled anomalies from which they are."""
SEARCHES = ("plain", WHITENED)


def main() -> None:
    """Measure the missing draws and print the tables."""
    parser = make_parser(__doc__, quick="the demo alone, small, one draw")
    parser.add_argument("--tasks", nargs="+", default=[*PROBLEMS, *DEFECTS], choices=[*PROBLEMS, *DEFECTS])
    parser.add_argument("--parts", nargs="+", default=["start", "search"], choices=["start", "search"])
    parser.add_argument("--draws", type=int, default=5)
    options = parse_options(parser)
    small: list[str] = []
    if options.quick:
        options.tasks, options.draws = ["demo lenses"], 1
        small = ["dataset.source.count=300", "dataset.source.size=32", "dataset.source.rare_fraction=0.1"]
        small += ["dataset.start.normals=20", "dataset.image_size=32"]
    path = options.results / "probe_variants.csv"
    rows = read_csv(path) if path.exists() else []
    for name in options.tasks:
        for draw in range(options.draws):
            for part in options.parts:
                key = {"task": name, "draw": str(draw), "part": part}
                if any(key.items() <= row.items() for row in rows):
                    continue
                console.print(f"probe_variants: {key}", highlight=False)
                task, embedding, spec, normals = open_problem(name, draw, small)
                labels = initial_labels(task, anomalies=5, normals=normals, seed=draw)
                own = key | {"family": family(name)}
                measure = measure_start if part == "start" else measure_search
                rows += [own | row for row in measure(task, embedding, spec, labels)]
                write_csv(path, rows)
    print(gate_table(rows))
    print(start_table(rows))
    print(search_table(rows))


def family(name: str) -> str:
    """Return the family of images of a task."""
    return name.split()[0] if name in DEFECTS else FAMILIES[PROBLEMS[name].dataset]


def open_problem(name: str, draw: int, small: list[str]) -> tuple[Task, Embedding, ProbeSpec, int]:
    """Open a task at its configured size; return also its backbone, its probe and the number of labelled normals."""
    if name in DEFECTS:
        root, anomaly, more = DEFECTS[name]
        own = [f"data.root={DATA / root}", f"dataset.anomaly={anomaly}", "dataset.holdout=0", *more]
        dataset, overrides = "parquet", ["dataset=parquet", *own, "dataset.start.normals=100", f"seed={draw}"]
    else:
        dataset = PROBLEMS[name].dataset
        size = ["dataset.image_size=84"] if dataset == "miniimagenet" else []
        overrides = [*PROBLEMS[name].overrides, f"seed={draw}", *size, *small]
    task = open_task(dataset, *overrides[1:])
    config = compose(*overrides)
    return task, make_learner("probe", task, *overrides).embedding, build(config.probe), config.dataset.start.normals


def measure_start(task: Task, embedding: Embedding, spec: ProbeSpec, labels: dict[str, Label]) -> Iterator[Row]:
    """Yield the average precision of each setting and each mean, and what the fit gap knows."""
    rest = [id_ for id_ in task.pool if id_ not in labels]
    logits = {}
    for name, change in STARTS.items():
        fit = fit_probe(embedding, labels, rest, replace(spec, **change))
        ranking = rank_by_probe(embedding.probe_features, fit.last, rest)
        logits[name] = ranking.logits
        row: Row = {"kind": name}
        if name == "0.8":
            row |= gate(task, embedding, fit.rounds[0], labels, rest)
        yield row | {"ap": ranking_metrics(ranking.logits, task.truth(ranking.ids)).ap}
    truth = task.truth(ranking.ids)
    whitened = WhitenedProbe(embedding, replace(spec, rounds=0), (0.5,), least=1)
    logits[WHITENED] = whitened.logits(labels, ranking.ids)
    yield {"kind": WHITENED, "ap": ranking_metrics(logits[WHITENED], truth).ap}
    for name, members in MEANS.items():
        mean = np.sum([(logits[each] - logits[each].mean()) / logits[each].std() for each in members], axis=0)
        yield {"kind": name, "ap": ranking_metrics(mean, truth).ap}


def gate(task: Task, embedding: Embedding, first: Probe, labels: dict[str, Label], rest: list[str]) -> Row:
    """Return the fit gap, and number and precision of the first pseudo-labels at a confidence of 0.8."""
    ranking = rank_by_probe(embedding.probe_features, first, rest)
    anomalies = [id_ for id_ in labels if labels[id_] == Label.ANOMALY]
    gap = fit_gap(first.logits(embedding.probe_features.take(anomalies)), ranking.logits)
    sure = ranking.order[:200]
    sure = sure[ranking.logits[sure] >= logit(0.8)]
    precision = float(task.truth([ranking.ids[i] for i in sure]).mean()) if len(sure) else float("nan")
    return {"gap": gap, "passed": len(sure), "precision": precision}


def measure_search(task: Task, embedding: Embedding, spec: ProbeSpec, labels: dict[str, Label]) -> Iterator[Row]:
    """Label the top of each ranking; yield the anomalies found with 200 labels, and the seconds of the last fit."""
    whitened = WhitenedProbe(embedding, spec, POWERS, LEAST)
    for name in SEARCHES:
        known = dict(labels)
        for _ in range(ROUNDS):
            rest = [id_ for id_ in task.pool if id_ not in known]
            began = time.monotonic()
            if name == WHITENED:
                ranking = Ranking(rest, whitened.logits(known, rest))
            else:
                ranking = rank_by_probe(embedding.probe_features, fit_probe(embedding, known, rest, spec).last, rest)
            seconds = time.monotonic() - began
            known |= {id_: task.label(id_) for id_ in ranking.top(BATCH)}
        found = sum(known[id_] == Label.ANOMALY for id_ in known) - 5
        yield {"kind": name, "found": found, "seconds": round(seconds, 2)}


def gate_table(rows: list[Row]) -> str:
    """Format the fit gap and the first pseudo-labels for each family."""
    gated = [row for row in rows if row.get("gap", "") not in ("", "nan") and float(row["passed"])]
    lines = []
    for (name,), some in group_by(gated, ("family",)).items():
        gaps, precisions = (np.array([float(row[key]) for row in some]) for key in ("gap", "precision"))
        own = [name, str(len(some)), f"{gaps.min():.1f} to {gaps.max():.1f}", f"{spearmanr(gaps, precisions)[0]:.2f}"]
        for side in (gaps < 5.9, gaps >= 5.9):
            own.append(f"{precisions[side].mean():.2f} ({side.sum()})" if side.any() else "none")
        lines.append(own)
    return markdown(["family", "draws", "gap", "rank correlation", "precision below 5.9", "from 5.9"], lines)


def start_table(rows: list[Row]) -> str:
    """Format the average precision of each setting for each family, and the gain over the configured probe."""
    return _table([row for row in rows if row["part"] == "start"], [*STARTS, WHITENED, *MEANS], "ap", ".3f")


def search_table(rows: list[Row]) -> str:
    """Format the anomalies found for each family, and the gain over the plain probe."""
    return _table([row for row in rows if row["part"] == "search"], [*SEARCHES], "found", ".1f")


def _table(rows: list[Row], kinds: list[str], measure: str, spec: str) -> str:
    lines = []
    if not rows:
        return ""
    groups = {"all": rows, **{name: some for (name,), some in group_by(rows, ("family",)).items()}}
    groups |= {name: some for (name,), some in group_by(rows, ("task",)).items()}
    for name, some in groups.items():
        value = {(row["task"], row["draw"], row["kind"]): float(row[measure]) for row in some}
        draws = list(dict.fromkeys((task, draw) for task, draw, _ in value))
        of: Callable[[str], np.ndarray] = partial(_column, value, draws)
        cells = [f"{of(kinds[0]).mean():{spec}}"]
        for kind in kinds[1:]:
            cells.append(format_interval(mean_interval(list(of(kind) - of(kinds[0]))), f"+{spec}"))
        lines.append([name, str(len(draws)), *cells])
    return markdown(["tasks", "draws", kinds[0], *(f"{kind}, gain" for kind in kinds[1:])], lines)


def _column(
    value: Mapping[tuple[object, object, object], float], draws: list[tuple[object, object]], kind: str
) -> np.ndarray:
    return np.array([value[task, draw, kind] for task, draw in draws])


if __name__ == "__main__":
    main()
