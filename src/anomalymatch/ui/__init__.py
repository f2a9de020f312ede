"""The labelling page: a service without web imports, and the page on it."""
