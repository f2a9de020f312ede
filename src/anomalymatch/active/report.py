"""Figures, contact sheets and report.html of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from omegaconf import ListConfig, OmegaConf

from anomalymatch.active.audit import advise
from anomalymatch.active.run_folder import CONFIG, REPORT, RunFolder
from anomalymatch.algorithms.base import WEIGHTS
from anomalymatch.backbones.checkpoint import load_network
from anomalymatch.backbones.evidence import write_evidence_sheet
from anomalymatch.data.stream import read_images
from anomalymatch.data.task import Task
from anomalymatch.evaluation import plots
from anomalymatch.evaluation.advice import StoppingRule
from anomalymatch.evaluation.confidence import proportion_interval
from anomalymatch.evaluation.contact_sheet import FRAME_COLOURS, contact_sheet, save_sheet
from anomalymatch.evaluation.metrics import Curves, ascending, curves, yield_per_label
from anomalymatch.evaluation.plots import left_figure, training_figure
from anomalymatch.evaluation.report import Report, ReportFigure, write_report
from anomalymatch.ranking import Ranking
from anomalymatch.text import printable
from anomalymatch.types import Image, Label, Row

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
"""Values that training logs at each step: by panel of the plot, and by name of the curve.

The pass rate of anomalies has a panel of its own, because it is much lower.
"""
COLD_NOTE = (
    "The labels do not include both an anomaly and a normal yet: the last ranking is that of the cold start. Label "
    "images from its top, and some normal ones, then resume this run."
)
TOP, EVIDENCE, FALSE_POSITIVES = "top64.png", "top_evidence.png", "false_positives.png"
EVIDENCE_CAPTION = (
    "What made their scores high: warm places speak for an anomaly, blue ones against it. The parts of all places add "
    "up to the log-odds; colours are relative to the strongest place of each image."
)
LEFT_COLUMNS = ("left", "left_low", "left_high")
REPORTED = ("cycle", "labels", "found", *LEFT_COLUMNS, "discovery_yield", "auroc", "ap", "auprc", "precision_at_0_1pct",
            "precision_at_1pct", "recall_at_1pct", "probe_auroc", "probe_ap", "heldout_anomalies", "heldout_auroc",
            "heldout_ap", "heldout_precision_at_1pct", "heldout_recall_at_1pct", "probe_heldout_auroc",
            "probe_heldout_ap", "seconds")  # fmt: skip


def write_sheets(path: Path, task: Task, labels: Mapping[str, Label], ranking: Ranking) -> None:
    """Write contact sheets of the top-ranked unlabelled images and, if the truth is known, of the false positives.

    If `path` has the weights of the network that ranked, another sheet shows the evidence in the top-ranked images.
    """
    rest = task.unlabelled(ranking, labels)
    images, captions, frames = _top_tiles(task, rest, rest.top(SHEET_IMAGES))
    save_sheet(contact_sheet(images, captions, frames=frames), path / TOP)
    if (path / WEIGHTS).exists():
        network = load_network(path / WEIGHTS)
        write_evidence_sheet(path / EVIDENCE, network, images, captions, task.source.rendering.fit, frames)
    if task.anomalies is not None:
        normals = rest.top(SHEET_IMAGES, without=task.anomalies)
        images, captions, frames = _top_tiles(task, rest, normals)
        save_sheet(contact_sheet(images, captions, frames=frames), path / FALSE_POSITIVES)


class RunReport:
    """Figures and report.html of a run, written again after each cycle.

    It keeps the curves and training steps of finished cycles, so that it reads the scores of each cycle once.
    """

    def __init__(self, folder: RunFolder, task: Task, stopping: StoppingRule) -> None:
        self.folder, self.task, self.stopping = folder, task, stopping
        self._curves: dict[int, Curves] = {}
        self._steps: dict[int, list[dict[str, str]]] = {}

    def write(self) -> Path:
        """Draw all figures and write report.html; return its path."""
        folder, task, rows = self.folder, self.task, self.folder.rows()
        last = len(rows)
        figures = self._draw(rows)
        frames = "" if task.anomalies is None else "; orange frames are true anomalies, blue ones normal"
        top = f"Highest-scored unlabelled images of cycle {last}{frames}."
        figures.append(ReportFigure("The top 64", top, folder.cycle(last) / TOP))
        if (folder.cycle(last) / EVIDENCE).exists():
            figures.append(ReportFigure("Evidence in the top 24", EVIDENCE_CAPTION, folder.cycle(last) / EVIDENCE))
        if task.anomalies is not None:
            worst = f"Highest-scored normal images of cycle {last}."
            figures.append(ReportFigure("Worst false positives", worst, folder.cycle(last) / FALSE_POSITIVES))
        path = folder.path / REPORT
        notes = _left_notes(rows, advise(folder, rows, self.stopping)) + _notes(task, rows)
        notes += _candidate_notes(folder, rows) + _guard_notes(folder, rows)
        write_report(path, _report(folder, task, rows, figures, notes))
        return path

    def curves(self, cycle: int) -> Curves:
        """Return precision, recall and ROC of a cycle on the unlabelled images, without points if not all were ranked.

        The task must have a truth.
        """
        if cycle not in self._curves:
            if self.folder.ranked_candidates(cycle):
                self._curves[cycle] = Curves.unknown()
            else:
                rest = unlabelled_rest(self.folder, self.task, cycle)
                self._curves[cycle] = curves(*ascending(rest, self.task))
        return self._curves[cycle]

    def panels(self, cycles: int) -> dict[str, dict[str, list[float]]]:
        """Return the logged values of all training steps, by panel and curve; curves without values are left out."""
        for cycle in range(1, cycles + 1):
            if cycle not in self._steps:
                self._steps[cycle] = self.folder.steps(cycle)
        steps = [step for cycle in range(1, cycles + 1) for step in self._steps[cycle]]
        found: dict[str, dict[str, list[float]]] = {}
        for title, keys in STEP_PANELS.items():
            for name, key in keys.items():
                values = [float(step.get(key) or "nan") for step in steps]
                if not np.isnan(values).all():
                    found.setdefault(title, {})[name] = values
        return found

    def _draw(self, rows: list[Row]) -> list[ReportFigure]:
        """Draw all plots of the run, in the order of the report."""
        folder, task, last = self.folder, self.task, len(rows)
        figures: dict[str, tuple[plots.Figure, str, str]] = {}
        if task.anomalies is not None:
            points = {cycle: self.curves(cycle) for cycle in range(1, last + 1)}
            spent, found = [int(row["labels"]) for row in rows], [int(row["found"]) for row in rows]
            discovery = plots.discovery_figure(spent, found, total=task.rare, images=len(task.pool))
            each = "On the unlabelled images, one curve for each cycle."
            figures |= {
                "pr": (plots.pr_figure(points), "Precision and recall", each),
                "roc": (plots.roc_figure(points), "ROC", each),
                "metrics": (plots.metrics_figure(rows), "Metrics by cycle", "On the unlabelled images."),
                "discovery": (discovery, "Discovery", "Anomalies found by number of labels."),
            }
        if not np.isnan([float(row.get("left_high", np.nan)) for row in rows]).all():
            caption = "Anomalies found, and with those that remain by the random audit (90 % interval)."
            figures["left"] = (left_figure(rows, total=task.rare), "Remaining anomalies", caption)
        figures["scores"] = (_histogram(folder, task, last), "Scores", f"Cycle {last}; counts are logarithmic.")
        panels = self.panels(last)
        if panels:
            caption = "Losses, and number and (if the truth is known) precision of the pseudo-labels, by training step."
            figures["training"] = (training_figure(panels), "Training", caption)
        for name, (figure, _, _) in figures.items():
            plots.save(figure, folder.plots / f"{name}.png")
        return [ReportFigure(t, c, folder.plots / f"{n}.png", kind="plot") for n, (_, t, c) in figures.items()]


def _report(folder: RunFolder, task: Task, rows: list[Row], figures: list[ReportFigure], notes: list[str]) -> Report:
    config = OmegaConf.load(folder.path / CONFIG)
    yields = yield_per_label(rows)
    table = [
        {k: v for k, v in (row | {"discovery_yield": y}).items() if k in REPORTED}
        for row, y in zip(rows, yields, strict=True)
    ]
    crops = f", {config.model.crops} crops" if config.model.get("crops") else ""
    tiles = f", model.tiles={config.model.tiles}" if config.model.get("tiles", 1) != 1 else ""
    facts = {
        "Dataset": f"{task.source.name}: {len(task.pool):,} images in the pool, {len(task.holdout):,} held out",
        "Algorithm": str(config.algorithm.name),
        "Backbone": f"{config.model.name} at {config.model.image_size} px{crops}{tiles}",
        "Labels": f"{rows[-1]['labels']:,}, of them {rows[-1]['found']:,} anomalies",
        "Unreadable images": f"{rows[-1]['rejects']:,}",
        "Seed": str(config.seed),
    }
    if task.rare is not None:
        normal = config.dataset.get("normal")
        named = _names(config.dataset.anomaly) if normal is None else f"all but {_names(normal)}"
        facts["Anomaly"] = f"{named}: {task.rare:,} of the pool ({task.rare / len(task.pool):.2%})"
    further = f" al.cycles={len(rows) + 1}" if len(rows) >= config.al.cycles else ""  # all configured cycles are done
    return Report(
        title=f"{task.source.name}, {config.algorithm.name}",
        subtitle=f"{len(rows)} of {config.al.cycles} cycles, {config.oracle.name if task.anomalies else 'own labels'}",
        facts=facts,
        metrics=[{c: row[c] for c in _columns(table) if c in row} for row in table],
        figures=figures,
        notes=notes,
        config=OmegaConf.to_yaml(config, resolve=True),
        details=_intervals(rows[-1]),
        command=f"python -m anomalymatch.run resume={folder.path}{further}",
    )


def _names(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, ListConfig) else str(value)


def _intervals(row: Row) -> dict[str, str]:
    """Write the uncertainty of the held-out metrics of a cycle, which follows from the number of anomalies."""
    anomalies = int(row.get("heldout_anomalies", 0))
    if not anomalies:
        return {}
    values = {f"heldout_{key}": float(row[f"heldout_{key}"]) for key in ("auroc", "ap", "recall_at_1pct")}
    intervals = {key: proportion_interval(value, anomalies) for key, value in values.items() if value == value}
    return {
        key: f"95\N{NO-BREAK SPACE}%: {low:.2f} to {high:.2f}, by {anomalies:,} anomalies"
        for key, (low, high) in intervals.items()
    }


def _columns(table: list[Row]) -> list[str]:
    """Return the columns of the table of cycles; estimates of the remaining anomalies only with an audit."""
    known = [c for c in LEFT_COLUMNS if not np.isnan([float(row.get(c, np.nan)) for row in table]).all()]
    return [c for c in REPORTED if c in known or c not in LEFT_COLUMNS]


def _left_notes(rows: list[Row], todo: str) -> list[str]:
    audited = rows[-1].get("audited", 0)
    return [f"By a random audit ({audited:,} images that are still unlabelled): {todo}."] if todo else []


def _candidate_notes(folder: RunFolder, rows: list[Row]) -> list[str]:
    cycles = enumerate(rows, 1)
    partial = [f"{cycle} ({row['images']:,} images)" for cycle, row in cycles if folder.ranked_candidates(cycle)]
    if not partial:
        return []
    return [
        f"Only neighbours of labelled anomalies were ranked in cycle {', '.join(partial)}: metrics and curves of all "
        "unlabelled images are unknown there."
    ]


def _guard_notes(folder: RunFolder, rows: list[Row]) -> list[str]:
    cycles = range(1, len(rows) + 1)
    notes = [f"Training, cycle {cycle}: {note}." for cycle in cycles for note in folder.guard_notes(cycle)]
    return notes + ([COLD_NOTE] if folder.began_cold(len(rows)) else [])


def _notes(task: Task, rows: list[Row]) -> list[str]:
    notes = []
    if task.anomalies is None:
        notes.append("The truth is unknown, so there are no metrics: look at the contact sheet and the histogram.")
    else:
        notes.append(
            "Measured on the unlabelled images of the pool. Found anomalies leave it, so later cycles look worse than "
            "they are; the held-out columns are comparable between cycles."
        )
    if rows[-1]["rejects"]:
        notes.append("Some images could not be read: rejects.parquet lists them with the reasons.")
    if _loss_to_probe(rows) > 0.02:
        notes.append("The ranking is worse than the probe's: prefer algorithm=probe here.")
    return notes


def _loss_to_probe(rows: list[Row]) -> float:
    """Return by how much the probe's average precision is higher, on average over the cycles; NaN if it is unknown.

    It is that of held-out images, and without them that of the first cycle. Later pools are no fair comparison: the
    anomalies that the ranking had put on top have left them, and those that the probe would have found have not.
    """
    pairs = [(row.get("heldout_ap", np.nan), row.get("probe_heldout_ap", np.nan)) for row in rows]
    losses = np.array([float(probe) - float(own) for own, probe in pairs])
    if np.isfinite(losses).any():
        return float(np.nanmean(losses))
    return float(rows[0].get("probe_ap", np.nan)) - float(rows[0].get("ap", np.nan))


def unlabelled_rest(folder: RunFolder, task: Task, cycle: int) -> Ranking:
    """Return the ranking of a finished cycle without the images labelled before it and the held-out split."""
    labelled = folder.labels.current(until_cycle=cycle - 1)
    return task.unlabelled(folder.ranking(cycle), labelled)


def _histogram(folder: RunFolder, task: Task, cycle: int) -> plots.Figure:
    ranking, labels = folder.ranking(cycle), folder.labels.current(until_cycle=cycle - 1)
    rest, scores = task.unlabelled(ranking, labels), ranking.score_of(labels)

    def labelled(label: Label) -> np.ndarray:
        return np.array([score for id_, score in scores.items() if labels[id_] == label])

    return plots.histogram_figure(
        rest.scores,
        labelled_anomalies=labelled(Label.ANOMALY),
        labelled_normals=labelled(Label.NORMAL),
        true_anomalies=None if task.anomalies is None else rest.scores[task.truth(rest.ids)],
    )


def _top_tiles(task: Task, ranking: Ranking, ids: Sequence[str]) -> tuple[list[Image], list[str], list[str]]:
    """Return images with their captions and, if the truth is known, their frames."""
    scores = ranking.score_of(ids)
    shown = read_images(task.source, ids)
    truth = None if task.anomalies is None else task.truth(shown.ids)
    frames = [] if truth is None else [FRAME_COLOURS[Label.ANOMALY if rare else Label.NORMAL] for rare in truth]
    classes = task.source.truth or {}
    captions = [f"{printable(id_)}\n{scores[id_]:.3f} {printable(classes.get(id_, ''))}" for id_ in shown.ids]
    return shown.images, captions, frames
