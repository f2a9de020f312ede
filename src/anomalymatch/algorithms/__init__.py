"""Algorithms: one folder for each method, with the name that `algorithm=` takes, and what they share.

`base.py` has the protocol of all learners, `lightning.py` trainers, step listeners and the exchange between training
processes, and `layer_groups.py` layer-wise learning. `augmentation` makes the views of all of them, and `adaptation`
trains a backbone without labels, for any of them.
"""

from anomalymatch.algorithms.base import Learner

__all__ = ["Learner"]
