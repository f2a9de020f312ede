"""What a person looks at: figures, contact sheets and report.html, made anew from the run folder after each cycle."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from anomalymatch.active.audit import advise
from anomalymatch.active.evaluate import yield_per_label
from anomalymatch.active.run_folder import CONFIG, STEPS, Row, RunFolder
from anomalymatch.data.task import Task
from anomalymatch.evaluation import plots
from anomalymatch.evaluation.contact_sheet import FRAME_COLOURS, contact_sheet
from anomalymatch.evaluation.metrics import curves
from anomalymatch.evaluation.plots import left_figure, training_figure
from anomalymatch.evaluation.report import Report, ReportFigure, write_report
from anomalymatch.files import atomic_file
from anomalymatch.ranking import Ranking
from anomalymatch.types import Label, Reject

SHEET_IMAGES = 64
STEP_PANELS = {
    "labelled\nloss": {"": "loss_lb"},
    "unlabelled\nloss": {"": "loss_ulb"},
    "fairness\nterm": {"": "loss_penalty"},
    "contrastive\nloss": {"": "loss_contrast"},
    "angular\nterm": {"": "loss_angular"},
    "pass rate": {"all": "pass_rate", "normal": "pass_rate_normal"},
    "pass rate,\nanomaly": {"anomaly": "pass_rate_anomaly"},
    "precision of\npseudo-labels": {"normal": "pseudo_precision_normal", "anomaly": "pseudo_precision_anomaly"},
    "threshold": {"normal": "threshold_normal", "anomaly": "threshold_anomaly"},
    "confidence": {"mean": "confidence_mean"},
}
"""What training logs at each step: by panel, and by the name that the plot gives the curve.

Anomalies are few: the share of images that pass as such needs an axis of its own.
"""
COLD_NOTE = (
    "The labels do not hold an anomaly and a normal yet: the last ranking is that of the cold start. Label images from "
    "its top, and some that are normal, then resume this run."
)
TOP, FALSE_POSITIVES = "top64.png", "false_positives.png"
LEFT_COLUMNS = ("left", "left_low", "left_high")
REPORTED = ("cycle", "labels", "found", *LEFT_COLUMNS, "discovery_yield", "auroc", "ap", "auprc", "precision_at_0_1pct",
            "precision_at_1pct", "recall_at_1pct", "probe_auroc", "probe_ap", "heldout_auroc", "heldout_ap",
            "heldout_precision_at_1pct", "seconds")  # fmt: skip


def write_sheets(path: Path, task: Task, labels: Mapping[str, Label], ranking: Ranking) -> None:
    """Contact sheets of the top-ranked unlabelled images and, with truth, of the worst false positives."""
    rest = ranking.restrict(id_ for id_ in task.pool if id_ not in labels)
    _write_sheet(path / TOP, task, rest, rest.top(SHEET_IMAGES))
    if task.anomalies is not None:
        normals = rest.restrict(id_ for id_ in rest.ids if id_ not in task.anomalies)
        _write_sheet(path / FALSE_POSITIVES, task, normals, normals.top(SHEET_IMAGES))


def publish(folder: RunFolder, task: Task) -> Path:
    """Draw all figures and write report.html from what the run folder holds; return its path."""
    rows = folder.rows()
    last = len(rows)
    figures = _draw(folder, task, rows)
    frames = "" if task.anomalies is None else "; orange frames are true anomalies, blue ones normal"
    figures.append(
        ReportFigure(
            "The top 64", f"Highest-scored unlabelled images of cycle {last}{frames}.", folder.cycle(last) / TOP
        )
    )
    if task.anomalies is not None:
        figures.append(
            ReportFigure("Worst false positives", f"Highest-scored normal images of cycle {last}.",
                         folder.cycle(last) / FALSE_POSITIVES)
        )  # fmt: skip
    path = folder.path / "report.html"
    write_report(path, _report(folder, task, rows, figures))
    return path


def _report(folder: RunFolder, task: Task, rows: list[Row], figures: list[ReportFigure]) -> Report:
    config = OmegaConf.load(folder.path / CONFIG)
    yields = yield_per_label(rows)
    table = [
        {k: v for k, v in (row | {"discovery_yield": y}).items() if k in REPORTED}
        for row, y in zip(rows, yields, strict=True)
    ]
    crops = f", {config.model.crops} crops" if config.model.get("crops") else ""
    facts = {
        "Dataset": f"{task.source.name}: {len(task.pool):,} images in the pool, {len(task.holdout):,} held out",
        "Algorithm": str(config.algorithm.name),
        "Backbone": f"{config.model.name} at {config.model.image_size} px{crops}",
        "Labels": f"{rows[-1]['labels']:,}, of them {rows[-1]['found']:,} anomalies",
        "Unreadable images": f"{rows[-1]['rejects']:,}",
        "Seed": str(config.seed),
    }
    if task.anomalies is not None:
        rare = sum(id_ in task.anomalies for id_ in task.pool)
        facts["Anomaly"] = f"{config.dataset.anomaly}: {rare:,} of the pool ({rare / len(task.pool):.2%})"
    further = f" al.cycles={len(rows) + 1}" if len(rows) >= config.al.cycles else ""  # as it is, nothing is left to do
    return Report(
        title=f"{task.source.name}, {config.algorithm.name}",
        subtitle=f"{len(rows)} of {config.al.cycles} cycles, {config.oracle.name if task.anomalies else 'own labels'}",
        facts=facts,
        metrics=[{c: row[c] for c in _columns(table) if c in row} for row in table],
        figures=figures,
        notes=_left_notes(folder, rows) + _notes(task, rows) + _guard_notes(folder, rows),
        config=OmegaConf.to_yaml(config, resolve=True),
        command=f"python -m anomalymatch.run resume={folder.path}{further}",
    )


def _columns(table: list[Row]) -> list[str]:
    """What is told of the cycles: without an audit nothing is known of what is left."""
    known = [c for c in LEFT_COLUMNS if not np.isnan([float(row.get(c, np.nan)) for row in table]).all()]
    return [c for c in REPORTED if c in known or c not in LEFT_COLUMNS]


def _left_notes(folder: RunFolder, rows: list[Row]) -> list[str]:
    todo, audited = advise(folder, rows), rows[-1].get("audited", 0)
    return [f"By a random audit (of {audited:,} images that count now): {todo}."] if todo else []


def _guard_notes(folder: RunFolder, rows: list[Row]) -> list[str]:
    cycles = range(1, len(rows) + 1)
    notes = [f"Training, cycle {cycle}: {note}." for cycle in cycles for note in folder.guard_notes(cycle)]
    return notes + ([COLD_NOTE] if folder.began_cold(len(rows)) else [])


def _notes(task: Task, rows: list[Row]) -> list[str]:
    notes = []
    if task.anomalies is None:
        notes.append("The truth is not known, so nothing is measured: look at the contact sheet and the histogram.")
    else:
        notes.append(
            "Measured on the images of the pool that are still unlabelled; anomalies that were found leave it, so late "
            "cycles look worse than they are. The held-out columns are comparable between cycles."
        )
    if rows[-1]["rejects"]:
        notes.append("Some images could not be read: rejects.parquet lists them with the reasons.")
    if any("probe_ap" in row and float(row["ap"]) < float(row["probe_ap"]) - 0.02 for row in rows):
        notes.append("The ranking is worse than the probe's in at least one cycle: prefer algorithm=probe here.")
    return notes


def _draw(folder: RunFolder, task: Task, rows: list[Row]) -> list[ReportFigure]:
    """All plots of the run, in the order of the report."""
    rankings = {number: unlabelled_rest(folder, task, number) for number in range(1, len(rows) + 1)}
    figures: dict[str, tuple[plots.Figure, str, str]] = {}
    if task.anomalies is not None:
        points = {n: curves(r.logits, task.truth(r.ids)) for n, r in rankings.items()}
        spent, found = [int(row["labels"]) for row in rows], [int(row["found"]) for row in rows]
        total = _anomalies(task)
        figures |= {
            "pr": (plots.pr_figure(points), "Precision and recall", "On the unlabelled rest, one curve a cycle."),
            "roc": (plots.roc_figure(points), "ROC", "On the unlabelled rest, one curve a cycle."),
            "metrics": (plots.metrics_figure(rows), "Metrics by cycle", "On the unlabelled rest."),
            "discovery": (
                plots.discovery_figure(spent, found, total=total, images=len(task.pool)),
                "Discovery",
                "Anomalies found against labels spent.",
            ),
        }
    if not np.isnan([float(row.get("left_high", np.nan)) for row in rows]).all():
        figures["left"] = (
            left_figure(rows, total=_anomalies(task)),
            "What is left",
            "Anomalies found, and with those that a random audit says are left (90 % interval).",
        )
    figures["scores"] = (_histogram(folder, task, len(rows)), "Scores", f"Cycle {len(rows)}; counts are logarithmic.")
    panels = _panels(folder, len(rows))
    if panels:
        caption = "Losses, and the pseudo-labels that teach: how many and, with truth, how right. Steps of all cycles."
        figures["training"] = (training_figure(panels), "Training", caption)
    for name, (figure, _, _) in figures.items():
        plots.save(figure, folder.plots / f"{name}.png")
    return [ReportFigure(t, c, folder.plots / f"{n}.png", kind="plot") for n, (_, t, c) in figures.items()]


def _anomalies(task: Task) -> int | None:
    """True anomalies of the pool, where they are known."""
    return None if task.anomalies is None else sum(id_ in task.anomalies for id_ in task.pool)


def unlabelled_rest(folder: RunFolder, task: Task, cycle: int) -> Ranking:
    """The ranking of a finished cycle, without the images that were labelled before it and the held-out split."""
    labelled = folder.labels.current(until_cycle=cycle - 1)
    return folder.ranking(cycle).restrict(id_ for id_ in task.pool if id_ not in labelled)


def _histogram(folder: RunFolder, task: Task, cycle: int) -> plots.Figure:
    ranking, labels = folder.ranking(cycle), folder.labels.current(until_cycle=cycle - 1)
    rest = unlabelled_rest(folder, task, cycle)

    def labelled(label: Label) -> np.ndarray:
        return ranking.restrict(id_ for id_, said in labels.items() if said == label).scores

    return plots.histogram_figure(
        rest.scores,
        labelled_anomalies=labelled(Label.ANOMALY),
        labelled_normals=labelled(Label.NORMAL),
        true_anomalies=None if task.anomalies is None else rest.scores[task.truth(rest.ids)],
    )


def _panels(folder: RunFolder, cycles: int) -> dict[str, dict[str, list[float]]]:
    """What training logged at each step, all cycles one after the other; curves without any value are left out."""
    steps: list[dict[str, str]] = []
    for number in range(1, cycles + 1):
        with (folder.cycle(number) / STEPS).open(encoding="utf-8", newline="") as file:
            steps += csv.DictReader(file)
    panels = {}
    for title, keys in STEP_PANELS.items():
        curves = {name: [float(row.get(key) or "nan") for row in steps] for name, key in keys.items()}
        panels[title] = {name: values for name, values in curves.items() if not np.isnan(values).all()}
    return {title: curves for title, curves in panels.items() if curves}


def _write_sheet(path: Path, task: Task, ranking: Ranking, ids: list[str]) -> None:
    scores = ranking.score_of(ids)
    images = task.source.read(ids)
    shown = [(id_, image) for id_, image in zip(ids, images, strict=True) if not isinstance(image, Reject)]
    truth = None if task.anomalies is None else task.truth([id_ for id_, _ in shown])
    frames = [] if truth is None else [FRAME_COLOURS[Label.ANOMALY if rare else Label.NORMAL] for rare in truth]
    classes = task.source.truth or {}
    captions = [f"{id_}\n{scores[id_]:.3f} {classes.get(id_, '')}" for id_, _ in shown]
    sheet = contact_sheet([image for _, image in shown], captions, frames=frames)
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG")
