"""The loop: learners, oracles, query strategies, the run folder and resume."""
