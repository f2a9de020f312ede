"""Backbones, heads, the probe, FixMatch as a LightningModule, features and checkpoints."""
