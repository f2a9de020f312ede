"""Pretrained networks: weights, features, inference and checkpoints."""
