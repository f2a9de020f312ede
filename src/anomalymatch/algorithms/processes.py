"""What the processes that train together tell each other; with one process there is nothing to tell."""

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def several() -> bool:
    """Whether there is more than this process."""
    return dist.is_available() and dist.is_initialized()


def over_processes(values: Shaped[Tensor, " n"]) -> Shaped[Tensor, " n"]:
    """Mean over the processes that train together; the values themselves where there is one."""
    if not several():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def gathered(values: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "n ..."]:
    """The rows of all processes, which have equally many, one process after the other; no gradient flows back."""
    values = values.detach()
    if not several():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
