"""Image sources, benchmark sets, augmentations, labels, splits and the DataModule."""
