"""Image sources: one module for each family of formats."""
