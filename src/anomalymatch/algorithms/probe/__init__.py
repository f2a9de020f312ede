"""Probe: logistic regression on frozen features."""

from anomalymatch.algorithms.probe.learner import ProbeLearner, fit_probe
from anomalymatch.algorithms.probe.regression import Probe, ProbeSpec, SelfTraining, fit_logistic, self_train

__all__ = ["Probe", "ProbeLearner", "ProbeSpec", "SelfTraining", "fit_logistic", "fit_probe", "self_train"]
