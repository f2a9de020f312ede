"""Exchange of tensors between training processes; a single process keeps its own values."""

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def is_distributed() -> bool:
    """Return whether several processes train together."""
    return dist.is_available() and dist.is_initialized()


def mean_over_processes(values: Shaped[Tensor, " n"]) -> Shaped[Tensor, " n"]:
    """Average `values` over all processes."""
    if not is_distributed():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def gather(values: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "n ..."]:
    """Concatenate the rows of all processes, which have equally many; no gradient flows back."""
    values = values.detach()
    if not is_distributed():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
