"""Fuse batch norms into convolutions, for prediction in fewer steps."""

import copy
import logging
from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

logger = logging.getLogger(__name__)


def fuse_batch_norms(body: nn.Module) -> nn.Module:
    """Return a copy of `body` whose batch norms are fused into the convolutions that feed them, for evaluation only.

    y = gamma (W x - mu) / sigma + beta is again a convolution. A model that cannot be traced is copied unchanged.
    """
    body = copy.deepcopy(body).eval()
    try:
        graph = _Tracer().trace(body)
    except Exception as error:  # tracing runs the model's own code, which may fail in any way
        logger.debug("Batch norms are not fused, the model cannot be traced: %s", error)
        return body
    modules = dict(body.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        norm = modules.get(node.target) if node.op == "call_module" else None
        source = node.args[0] if node.args else None
        if (
            not isinstance(norm, nn.BatchNorm2d)
            or not isinstance(source, fx.Node)
            or source.op != "call_module"
            or len(source.users) != 1
            or calls[node.target] + calls[source.target] != 2  # called elsewhere too: must not change
        ):
            continue
        convolution = modules[str(source.target)]
        if isinstance(convolution, nn.Conv2d):
            _replace(body, str(source.target), fuse_conv_bn_eval(convolution, norm))
            _replace(body, str(node.target), getattr(norm, "act", nn.Identity()))
    return body


class _Tracer(fx.Tracer):
    """Tracer that does not enter timm's convolutions (TensorFlow's padding) and batch norms (with an activation)."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.BatchNorm2d, nn.Conv2d)) or super().is_leaf_module(m, module_qualified_name)


def _replace(body: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(body.get_submodule(parent), child, module)
