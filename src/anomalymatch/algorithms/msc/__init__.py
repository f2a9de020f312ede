"""Mean-Shifted Contrastive one-class training (arXiv 2106.03844)."""
