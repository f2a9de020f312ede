"""Evaluation: metrics, confidence intervals, estimates of the anomalies left, plots, contact sheets and reports."""

from anomalymatch.evaluation.confidence import Interval, mean_interval, paired_difference, proportion_interval
from anomalymatch.evaluation.contact_sheet import FRAME_COLOURS, as_rgb, contact_sheet
from anomalymatch.evaluation.discovery import Count, anomalies_among, anomalies_in_tops, anomalies_left, audit_order
from anomalymatch.evaluation.metrics import (
    MEASURES,
    Curves,
    RankingMetrics,
    curves,
    cycle_metrics,
    evaluate,
    ranking_metrics,
    yield_per_label,
)
from anomalymatch.evaluation.ranks import interleave, midranks
from anomalymatch.evaluation.report import Report, ReportFigure, write_report

__all__ = [
    "FRAME_COLOURS",
    "MEASURES",
    "Count",
    "Curves",
    "Interval",
    "RankingMetrics",
    "Report",
    "ReportFigure",
    "anomalies_among",
    "anomalies_in_tops",
    "anomalies_left",
    "as_rgb",
    "audit_order",
    "contact_sheet",
    "curves",
    "cycle_metrics",
    "evaluate",
    "interleave",
    "mean_interval",
    "midranks",
    "paired_difference",
    "proportion_interval",
    "ranking_metrics",
    "write_report",
    "yield_per_label",
]
