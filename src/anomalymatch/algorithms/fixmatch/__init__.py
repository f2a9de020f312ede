"""FixMatch and its variants: semi-supervised training from a probe (arXiv 2001.07685, 2505.03509)."""
