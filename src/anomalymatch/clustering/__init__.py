"""Anomaly Clustering: grouping of images by the kind of anomaly they show."""

from anomalymatch.clustering.analysis import Clusters, ClusterSpec, ImageGrouper, cluster_images
from anomalymatch.clustering.groups import UNGROUPED, Grouping, choose_count, clustering_metrics
from anomalymatch.clustering.patches import Bags, PatchEmbedding, PatchSpec

__all__ = [
    "UNGROUPED",
    "Bags",
    "ClusterSpec",
    "Clusters",
    "Grouping",
    "ImageGrouper",
    "PatchEmbedding",
    "PatchSpec",
    "choose_count",
    "cluster_images",
    "clustering_metrics",
]
