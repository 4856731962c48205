"""Several processes that train together, started by torchrun: who am I, and what do the others
have?
"""

import torch
import torch.distributed
from torch import Tensor


def distributed() -> bool:
    """Whether this process trains together with others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) for one alone."""
    return (
        (torch.distributed.get_rank(), torch.distributed.get_world_size())
        if distributed()
        else (0, 1)
    )


def gathered(values: Tensor) -> list[Tensor]:
    """`values` of every process, in the order of their ranks and equal in shape; gradients flow
    back to each.
    """
    if not distributed():
        return [values]
    if not values.requires_grad:
        parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, values.contiguous())
        return parts
    from torch.distributed.nn.functional import all_gather

    return list(all_gather(values))
