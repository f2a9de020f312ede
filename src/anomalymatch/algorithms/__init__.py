"""Learners: one folder for each method, named as `algorithm=` names it."""
