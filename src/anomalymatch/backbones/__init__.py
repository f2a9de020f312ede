"""Pretrained backbones: networks and weights, features and their cache, inference, and checkpoints."""

from anomalymatch.backbones.checkpoint import InputSpec, load_network, save_network
from anomalymatch.backbones.embedding import Embedding
from anomalymatch.backbones.features import Features, Scaling, Shard
from anomalymatch.backbones.inference import Inference, OutputBatch
from anomalymatch.backbones.network import Backbone, Head, Network, NetworkSpec, build_backbone
from anomalymatch.backbones.weights import fingerprint, pretrained_model

__all__ = [
    "Backbone",
    "Embedding",
    "Features",
    "Head",
    "Inference",
    "InputSpec",
    "Network",
    "NetworkSpec",
    "OutputBatch",
    "Scaling",
    "Shard",
    "build_backbone",
    "fingerprint",
    "load_network",
    "pretrained_model",
    "save_network",
]
