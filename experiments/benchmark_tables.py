"""Format the benchmark's tables: one line for each task or algorithm, and gains over the probe."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from statistics import fmean

from bench import Row, format_interval, group_by, markdown
from recipes import LAST_LOOK, PROBLEMS, RECIPES
from scipy.stats import ttest_1samp, ttest_rel

from anomalymatch.evaluation.confidence import mean_interval, paired_difference

Cells = dict[tuple[str, ...], list[Row]]
MISSING, PLAIN = "not run", "plain probe"
ABLATED = ("fixmatch", "fixmatch of 200")
"""Algorithms with ablations, which change one setting each: "fixmatch, cold"."""
TRAINED = [name for name, r in RECIPES.items() if r.fine_tunes and not r.searches and ", " not in name]
FROZEN = (PLAIN, "probe, labels alone", "probe, 1 round", "probe")
"""Probes on frozen features that trainings are compared with; `fixmatch` starts from the third."""


def summary(rows: Sequence[Row]) -> str:
    """Format all tables as Markdown."""
    parts = []
    for (start, oracle), some in sorted(group_by(rows, ("start", "oracle")).items()):
        first = [row for row in some if int(row["spent"]) == 0]
        spent = max(int(row["spent"]) for row in some)
        last = [row for row in some if int(row["spent"]) == spent]
        parts += [f"Start {start}, {oracle}", "AP before any label is spent", by_task(first, "ap")]
        if spent and oracle == "top_k":
            parts += [f"Anomalies found with {spent} labels", by_task(last, "found"), relative_to_plain(last)]
        parts += [
            "Calibration: anomalies predicted by the scores",
            calibration_table(first, *([last] if spent else [])),
        ]
        main_rows = [row for row in first if not on_other_task(row)]
        parts += ["Gain over the probe on the same labels, before any is spent", gain_over_probe(main_rows)]
        wide = {row["algorithm"] for row in first if on_other_task(row)}
        first_draws = [row for row in first if row["algorithm"] in wide and int(row["draw"]) == 0]
        parts += ["First draw of every task", gain_over_probe(first_draws)] if first_draws else []
        parts += ["Gain of training the backbone over frozen features at the same size", gain_over_frozen(main_rows)]
        parts += ["Ablations of fixmatch", ablation_table(first)]
    return "\n\n".join(parts)


def on_other_task(row: Row) -> bool:
    """Tell whether a row is a training on a task outside the four that have several draws of every training."""
    return RECIPES[str(row["algorithm"])].fine_tunes and not (PROBLEMS | LAST_LOOK)[str(row["task"])].fine_tuned


def by_task(rows: Sequence[Row], measure: str) -> str:
    """Format means over draws with 95 % intervals: one line for each task, one column for each algorithm."""
    cells, algorithms, tasks = _cells(rows)
    values = {(a, t): [float(row[measure]) for row in cells.get((a, t), [])] for a, t in product(algorithms, tasks)}
    lines = [[task, *(_interval_cell(values[algorithm, task]) for algorithm in algorithms)] for task in tasks]
    overall = []
    for algorithm in algorithms:
        mean = fmean(fmean(v) if (v := values[algorithm, task]) else math.nan for task in tasks)
        overall.append(MISSING if math.isnan(mean) else f"{mean:.3f}")
    return markdown(["task", *algorithms], [*lines, ["all", *overall]])


def relative_to_plain(rows: Sequence[Row]) -> str:
    """Format the anomalies found relative to the plain probe: the mean of the tasks' ratios, over common draws."""
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
        lines.append([algorithm, str(len(ratios)), str(draws), f"{fmean(ratios):.2f}" if ratios else MISSING])
    return markdown(["algorithm", "tasks", "draws", "found relative to the plain probe"], lines)


def calibration_table(*moments: Sequence[Row]) -> str:
    """Format the predicted anomalies for each true one, and the log loss: means over tasks and draws."""
    lines = []
    for rows in moments:
        present = [row for row in rows if float(row.get("there") or 0)]
        for (algorithm,), own in group_by(present, ("algorithm",)).items():
            ratio = _mean(own, lambda row: float(row["promised"]) / float(row["there"]))
            loss = _mean(own, lambda row: float(row["log_loss"]))
            tasks = len({row["task"] for row in own})
            lines.append([algorithm, str(own[0]["spent"]), str(tasks), f"{ratio:.1f}", f"{loss:.4f}"])
    return markdown(["algorithm", "labels spent", "tasks", "predicted for each anomaly", "log loss"], lines)


def gain_over_probe(rows: Sequence[Row]) -> str:
    """Format the gain in AP over the probe: intervals and t tests over draws and over tasks, worst task, time, memory.

    The draws of a task are not independent, because they share its images and its kind of anomaly. The second interval
    and the second p value are those of the tasks' mean gains; they say whether another task would gain, too.
    """
    cells, algorithms, tasks = _cells(rows)
    lines = []
    for algorithm in algorithms:
        own = {task: cells[algorithm, task] for task in tasks if (algorithm, task) in cells}
        every = [row for task_rows in own.values() for row in task_rows]
        ap, probe = ([float(row[key]) for row in every] for key in ("ap", "probe_ap"))
        gain = paired_difference(ap, probe)
        gains = {task: _mean(task_rows, _gain) for task, task_rows in own.items()}
        worst = min(gains, key=gains.__getitem__)
        over_tasks = mean_interval([*gains.values()])
        p = ttest_rel(ap, probe).pvalue if len(ap) > 1 and ap != probe else math.nan
        p_tasks = ttest_1samp([*gains.values()], 0.0).pvalue if len(gains) > 1 and any(gains.values()) else math.nan
        lines.append([
            algorithm, str(len(own)), str(len(every)), format_interval(gain, "+.3f"),
            format_interval(over_tasks, "+.3f"),
            *(MISSING if math.isnan(value) else f"{value:.2g}" for value in (p, p_tasks)),
            f"{worst}: {gains[worst]:+.3f}", f"{_mean(every, _seconds):.1f}",
            str(max(int(row["peak_mb"]) for row in every)),
        ])  # fmt: skip
    head = [
        "algorithm",
        "tasks",
        "draws",
        "gain in AP, ± over draws",
        "± over tasks",
        "p",
        "p of tasks",
        "worst task",
        "seconds",
        "peak MB",
    ]
    return markdown(head, lines)


def gain_over_frozen(rows: Sequence[Row]) -> str:
    """Format the gain in AP of each training over each probe of `FROZEN` at its size, on common tasks and draws."""
    frozen: dict[str, dict[object, float]] = {name: {} for name in FROZEN}
    trained: dict[str, list[Row]] = {}
    for row in rows:
        algorithm = str(row["algorithm"])
        if (name := re.sub(r", \d+ px$", "", algorithm)) in frozen:
            frozen[name][_conditions(row)] = float(row["ap"])
        elif algorithm in TRAINED:
            trained.setdefault(algorithm, []).append(row)
    lines = []
    for algorithm, own in trained.items():
        line = [algorithm]
        for known in frozen.values():
            both = [row for row in own if _conditions(row) in known]
            gain = paired_difference([float(row["ap"]) for row in both], [known[_conditions(row)] for row in both])
            line.append(f"{format_interval(gain, '+.3f')} ({len(both)})" if both else MISSING)
        lines.append(line)
    return markdown(["algorithm", *(f"gain over {name} (draws)" for name in FROZEN)], lines)


def ablation_base(row: Row) -> str:
    """Return the algorithm of `ABLATED` that a row is an ablation of, or an empty string."""
    base, _, change = str(row["algorithm"]).partition(", ")
    return base if change and base in ABLATED else ""


def ablation_table(rows: Sequence[Row]) -> str:
    """Format the effect of each ablation on AP and time, on common tasks and draws."""
    whole = {(row["algorithm"], row["task"], row["draw"]): row for row in rows if row["algorithm"] in ABLATED}
    changed = [row for row in rows if (ablation_base(row), row["task"], row["draw"]) in whole]
    lines = []
    for (change,), own in group_by(changed, ("algorithm",)).items():
        same = [whole[ablation_base(row), row["task"], row["draw"]] for row in own]
        ap, before = ([float(row["ap"]) for row in each] for each in (own, same))
        differences = ", ".join(f"{row['task']} {a - b:+.3f}" for row, a, b in zip(own, ap, before, strict=True))
        slower = _mean(own, _seconds) / _mean(same, _seconds)
        lines.append([change, f"{fmean(before):.3f}", f"{fmean(ap):.3f}", differences, f"{slower:.2f}"])
    return markdown(["change", "AP without it", "AP with it", "difference by draw", "relative time"], lines)


def _cells(rows: Iterable[Row]) -> tuple[Cells, list[str], list[str]]:
    cells = group_by(rows, ("algorithm", "task"))
    return cells, list(dict.fromkeys(a for a, _ in cells)), list(dict.fromkeys(t for _, t in cells))


def _conditions(row: Row) -> tuple[object, ...]:
    """Return what two rows must share for their rankings to be compared: task, image size and labels."""
    return row["task"], int(row["size"]), int(row["draw"])


def _gain(row: Row) -> float:
    return float(row["ap"]) - float(row["probe_ap"])


def _seconds(row: Row) -> float:
    return float(row["seconds"])


def _mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return sum(map(value, rows)) / len(rows)


def _interval_cell(values: Sequence[float]) -> str:
    return format_interval(mean_interval(values)) if values else MISSING
