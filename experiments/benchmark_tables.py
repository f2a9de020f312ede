"""The tables of the benchmark: a line for each task, a column for each algorithm, and the gain over the probe."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from statistics import fmean

from bench import Row
from recipes import PROBLEMS, RECIPES
from scipy.stats import ttest_1samp, ttest_rel

from anomalymatch.evaluation.confidence import Interval, mean_interval, paired_difference

Cells = dict[tuple[str, str], list[Row]]
MISSING, PLAIN = "not run", "plain probe"
CHANGED = ("fixmatch", "fixmatch of 200")
"""Of which one setting at a time is changed: "fixmatch, cold"."""
TRAINED = [name for name, r in RECIPES.items() if r.fine_tunes and not r.searches and ", " not in name]
FROZEN = (PLAIN, "probe, labels alone", "probe, 1 round", "probe")
"""What a training may be set against. None touches the backbone; the third is where it starts, the last the default."""


def summary(rows: Sequence[Row]) -> str:
    """All tables, as Markdown."""
    parts = []
    for start, oracle in sorted({(str(row["start"]), str(row["oracle"])) for row in rows}):
        some = [row for row in rows if (row["start"], row["oracle"]) == (start, oracle)]
        first = [row for row in some if int(row["spent"]) == 0]
        spent = max(int(row["spent"]) for row in some)
        last = [row for row in some if int(row["spent"]) == spent]
        parts += [f"Start {start}, {oracle}"]
        parts += ["AP before any label is spent", by_task(first, "ap")]
        if spent and oracle == "top_k":
            parts += [f"Anomalies found with {spent} labels", by_task(last, "found"), times_plain(last)]
        parts += ["What the scores promise", promised(first, *([last] if spent else []))]
        drawn = [row for row in first if not trains_elsewhere(row)]
        parts += ["Against the probe on the same labels, before any is spent", against_probe(drawn)]
        wide = {row["algorithm"] for row in first if trains_elsewhere(row)}
        once = [row for row in first if row["algorithm"] in wide and int(row["draw"]) == 0]
        parts += ["The first draw of every task", against_probe(once)] if once else []
        parts += ["What training the backbone adds to what is frozen, at the same size", over_frozen(drawn)]
        parts += ["What one change does to fixmatch", ablations(first)]
    return "\n\n".join(parts)


def trains_elsewhere(row: Row) -> bool:
    """Whether it is a training on a task that has fewer draws of trainings than others."""
    return RECIPES[str(row["algorithm"])].fine_tunes and not PROBLEMS[str(row["task"])].fine_tuned


def by_task(rows: Sequence[Row], measure: str) -> str:
    """One line a task, one column an algorithm: means over the draws with 95 % intervals; the mean of all last."""
    cells, algorithms, tasks = _cells(rows)
    values = {(a, t): [float(row[measure]) for row in cells.get((a, t), [])] for a, t in product(algorithms, tasks)}
    lines = [[task, *(_cell(values[algorithm, task]) for algorithm in algorithms)] for task in tasks]
    overall = []
    for algorithm in algorithms:
        means = [fmean(v) if (v := values[algorithm, task]) else math.nan for task in tasks]
        overall.append(MISSING if any(math.isnan(m) for m in means) else f"{fmean(means):.3f}")
    return _markdown(["task", *algorithms], [*lines, ["all", *overall]])


def times_plain(rows: Sequence[Row]) -> str:
    """What each algorithm finds, over what the plain probe does: the mean of the tasks' ratios, on draws of both."""
    cells, algorithms, tasks = _cells(rows)
    lines = []
    for algorithm in algorithms:
        ratios, draws = [], 0
        for task in tasks:
            own, plain = (
                {row["draw"]: float(row["found"]) for row in cells.get((name, task), [])} for name in (algorithm, PLAIN)
            )
            both = [draw for draw in own if draw in plain]
            if sum(plain[draw] for draw in both):
                ratios.append(sum(own[draw] for draw in both) / sum(plain[draw] for draw in both))
                draws += len(both)
        mean = f"{fmean(ratios):.2f}" if ratios else MISSING
        lines.append([algorithm, str(len(ratios)), str(draws), mean])
    return _markdown(["algorithm", "tasks", "draws", "times the plain probe's"], lines)


def promised(*moments: Sequence[Row]) -> str:
    """Anomalies that the scores promise for each one there is, and the log loss: means over tasks and draws."""
    lines = []
    for rows in moments:
        cells, algorithms, _ = _cells(row for row in rows if float(row.get("there") or 0))
        for algorithm in algorithms:
            every = [row for (name, _), some in cells.items() if name == algorithm for row in some]
            ratio = _mean(every, lambda row: float(row["promised"]) / float(row["there"]))
            loss = _mean(every, lambda row: float(row["log_loss"]))
            tasks = str(len({row["task"] for row in every}))
            lines.append([algorithm, str(every[0]["spent"]), tasks, f"{ratio:.1f}", f"{loss:.4f}"])
    return _markdown(["algorithm", "labels spent", "tasks", "promised for each anomaly", "log loss"], lines)


def against_probe(rows: Sequence[Row]) -> str:
    """The gain in AP over the probe: its mean over the draws, a paired t test, the worst task, time and memory.

    The draws of a task are alike, for they share its images and its kind of anomaly: the second p is that of the tasks'
    mean gains, which tells whether another task would gain, too.
    """
    cells, algorithms, tasks = _cells(rows)
    lines = []
    for algorithm in algorithms:
        own = {task: cells[algorithm, task] for task in tasks if (algorithm, task) in cells}
        every = [row for task_rows in own.values() for row in task_rows]
        ap, probe = ([float(row[key]) for row in every] for key in ("ap", "probe_ap"))
        gain = paired_difference(ap, probe)
        worst = min(own, key=lambda task: _mean(own[task], _gain))
        p = ttest_rel(ap, probe).pvalue if len(ap) > 1 and ap != probe else math.nan
        gains = [_mean(some, _gain) for some in own.values()]
        p_tasks = ttest_1samp(gains, 0.0).pvalue if len(gains) > 1 and any(gains) else math.nan
        told = (MISSING if math.isnan(value) else f"{value:.2g}" for value in (p, p_tasks))
        lines.append([
            algorithm, str(len(own)), str(len(every)), _with_interval(gain, "+.3f"), *told,
            f"{worst}: {_mean(own[worst], _gain):+.3f}",
            f"{_mean(every, lambda row: float(row['seconds'])):.1f}", str(max(int(row["peak_mb"]) for row in every)),
        ])  # fmt: skip
    head = ["algorithm", "tasks", "draws", "gain in AP", "p", "p of tasks", "worst task", "seconds", "peak MB"]
    return _markdown(head, lines)


def over_frozen(rows: Sequence[Row]) -> str:
    """The gain in AP of each of `TRAINED` over each of `FROZEN` at its size, on the tasks and draws that both have."""
    frozen: dict[str, dict[object, float]] = {name: {} for name in FROZEN}
    trained: dict[str, list[Row]] = {}
    for row in rows:
        algorithm = str(row["algorithm"])
        if (name := re.sub(r", \d+ px$", "", algorithm)) in frozen:
            frozen[name][_scene(row)] = float(row["ap"])
        elif algorithm in TRAINED:
            trained.setdefault(algorithm, []).append(row)
    lines = []
    for algorithm, some in trained.items():
        line = [algorithm]
        for known in frozen.values():
            both = [row for row in some if _scene(row) in known]
            gain = paired_difference([float(row["ap"]) for row in both], [known[_scene(row)] for row in both])
            line.append(f"{_with_interval(gain, '+.3f')} ({len(both)})" if both else MISSING)
        lines.append(line)
    return _markdown(["algorithm", *(f"gain over {name} (draws)" for name in FROZEN)], lines)


def unchanged(row: Row) -> str:
    """The one of `CHANGED` that a row of "fixmatch, cold" is a change to; empty for all other rows."""
    base, _, change = str(row["algorithm"]).partition(", ")
    return base if change and base in CHANGED else ""


def ablations(rows: Sequence[Row]) -> str:
    """What each change of one setting does to the AP of `CHANGED`, on the tasks and draws that both have."""
    whole = {(row["algorithm"], row["task"], row["draw"]): row for row in rows if row["algorithm"] in CHANGED}
    changes: dict[str, list[Row]] = {}
    for row in rows:
        if (unchanged(row), row["task"], row["draw"]) in whole:
            changes.setdefault(str(row["algorithm"]), []).append(row)
    lines = []
    for change, some in changes.items():
        same = [whole[unchanged(row), row["task"], row["draw"]] for row in some]
        ap, before = ([float(row["ap"]) for row in each] for each in (some, same))
        slower = _mean(some, lambda row: float(row["seconds"])) / _mean(same, lambda row: float(row["seconds"]))
        by_task = ", ".join(
            f"{row['task']} {float(row['ap']) - float(other['ap']):+.3f}" for row, other in zip(some, same, strict=True)
        )
        lines.append([change, f"{fmean(before):.3f}", f"{fmean(ap):.3f}", by_task, f"{slower:.2f}"])
    return _markdown(["change", "AP without it", "AP with it", "difference by draw", "times the time"], lines)


def _cells(rows: Iterable[Row]) -> tuple[Cells, list[str], list[str]]:
    cells: Cells = {}
    for row in rows:
        cells.setdefault((str(row["algorithm"]), str(row["task"])), []).append(row)
    return cells, list(dict.fromkeys(a for a, _ in cells)), list(dict.fromkeys(t for _, t in cells))


def _scene(row: Row) -> tuple[object, ...]:
    """What two rows share whose ranking may be compared: the images as they are seen, and the labels."""
    return row["task"], int(row["size"]), int(row["draw"])


def _gain(row: Row) -> float:
    return float(row["ap"]) - float(row["probe_ap"])


def _mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return sum(map(value, rows)) / len(rows)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    return _with_interval(mean_interval(values), ".3f")


def _with_interval(interval: Interval, form: str) -> str:
    half = (interval.high - interval.low) / 2
    return f"{interval.mean:{form}}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
