"""Labelling page: `LabelService` and its parts without web code, and in `web` the NiceGUI page on top of it."""

from anomalymatch.ui.features import FeatureStore, build_feature_store
from anomalymatch.ui.live import LiveRanking, compute_novelty
from anomalymatch.ui.service import LabelService
from anomalymatch.ui.views import ColumnOrder, ColumnRange, FirstOrder, Query, Show, Sort

__all__ = [
    "ColumnOrder",
    "ColumnRange",
    "FeatureStore",
    "FirstOrder",
    "LabelService",
    "LiveRanking",
    "Query",
    "Show",
    "Sort",
    "build_feature_store",
    "compute_novelty",
]
