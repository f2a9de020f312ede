"""Algorithms: one folder for each method, with the name that `algorithm=` takes, and what they share.

`base.py` has the protocol of all learners, `lightning.py` trainers and step listeners, `layer_groups.py` layer-wise
learning, and `processes.py` the exchange between training processes.
"""

from anomalymatch.algorithms.base import Learner

__all__ = ["Learner"]
