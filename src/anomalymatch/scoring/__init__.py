"""Scoring of an archive of any size with a trained model: jobs, local and Ray engines; `crossmatch` is a command."""

from anomalymatch.scoring.job import ScoringSpec, run_job
from anomalymatch.scoring.model import TrainedModel, find_model

__all__ = ["ScoringSpec", "TrainedModel", "find_model", "run_job"]
