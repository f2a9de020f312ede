"""Metrics, confidence intervals, plots, contact sheets and the report of a run."""
