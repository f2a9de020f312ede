"""Pooled features of vision transformers: the class token, and the mean of the patch tokens."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn


def has_class_token(body: nn.Module) -> bool:
    """Tell whether a timm model without classifier is a transformer whose first token stands for the whole image."""
    return (
        getattr(body, "num_classes", None) == 0
        and getattr(body, "num_prefix_tokens", 0) > 0
        and getattr(body, "cls_token", None) is not None
    )


def feature_width(body: nn.Module) -> int:
    """Return the number of pooled features of a timm model, after its last hidden layer if it has one."""
    width = int(cast(int, getattr(body, "head_hidden_size", None) or body.num_features))
    return 2 * width if has_class_token(body) else width


def pooled_features(body: nn.Module, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Compute the pooled features of a timm model; see `pool`."""
    return pool(body, cast(Any, body).forward_features(images)) if has_class_token(body) else body(images)


def pool(body: nn.Module, final: Float[Tensor, "..."]) -> Float[Tensor, "b d"]:
    """Pool the final feature map or tokens of a timm model.

    With a class token, its features are followed by the mean of those of the patches, as DINOv2 is evaluated (arXiv
    2304.07193); register tokens are left out. Any other model pools as its weights were trained.
    """
    model = cast(Any, body)
    if not has_class_token(body):
        return model.forward_head(final)
    norm = getattr(model, "fc_norm", None) or nn.Identity()  # of models that normalise after pooling
    return torch.cat([norm(final[:, 0]), norm(final[:, model.num_prefix_tokens :].mean(dim=1))], dim=1)
