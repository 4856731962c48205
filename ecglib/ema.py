"""Exponential moving averages of a network's weights: the target of BYOL, the teacher of DINO."""

import copy
import math

import torch
from torch import nn


def average_of(online: nn.Module) -> nn.Module:
    """A copy of `online` to be kept as its moving average: no gradients, no dropout, no stochastic
    depth.
    """
    average = copy.deepcopy(online).requires_grad_(False)
    for layer in average.modules():
        if isinstance(layer, nn.Dropout):  # stochastic depth is one, too
            layer.p = 0.0
    return average


@torch.no_grad()
def update_average(average: nn.Module, online: nn.Module, momentum: float) -> None:
    """average <- momentum x average + (1 - momentum) x online, for every parameter, biases and
    norms included.

    Buffers are copied: the running statistics of batch norm are moving averages already, and
    counters have no mean.
    """
    torch._foreach_lerp_(list(average.parameters()), list(online.parameters()), 1.0 - momentum)
    for kept, value in zip(average.buffers(), online.buffers(), strict=True):
        kept.copy_(value)


def momentum_at(progress: float, start: float) -> float:
    """Momentum that rises from `start` to 1 along half a cosine: 1 - (1 - start) (cos(pi progress)
    + 1) / 2.
    """
    return 1.0 - (1.0 - start) * (math.cos(math.pi * progress) + 1.0) / 2.0


def momentum_for_steps(steps: int, turnover: float = 2.0) -> float:
    """The `start` of `momentum_at` with which 1 - momentum sums to `turnover` over a run of `steps`
    steps.

    With it the average goes the share 1 - exp(-turnover) of the way to a network that stands still.
    A published momentum belongs to the published number of steps: 0.996 over 23,000 steps (BYOL) is
    a turnover of 46, over 400 steps of 0.8, with which the average would hardly leave its start. A
    run too short for the wanted turnover gets 0, an average that follows closely from the start.
    """
    # The sum of (cos(pi k / steps) + 1) / 2 over k = 1..steps is exactly (steps - 1) / 2.
    return max(0.0, 1.0 - 2.0 * turnover / max(steps - 1, 1))
