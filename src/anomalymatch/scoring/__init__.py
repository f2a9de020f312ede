"""Ranking an archive of any size with a trained run."""
