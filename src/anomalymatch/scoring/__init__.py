"""Scoring of an archive of any size with a trained model: jobs, local and Ray engines; `crossmatch` is a command."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomalymatch.scoring.job import ScoringSpec, run_job
    from anomalymatch.scoring.model import TrainedModel, find_model

__all__ = ["ScoringSpec", "TrainedModel", "find_model", "run_job"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: the cross-match does not need PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "model" if name in ("TrainedModel", "find_model") else "job"
    return getattr(import_module(f"{__name__}.{module}"), name)
