"""Batch norm with its rectifier, kept in one tensor, against torch's two layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ecglib.encoders.in_place_norm import norm_leaky


def stirred(channels: int, dtype: torch.dtype = torch.float64) -> nn.BatchNorm1d:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(channels).to(dtype)
    nn.init.normal_(norm.weight, 0.0, 0.5)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("gain_trained", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_values_gradients_and_statistics_are_those_of_the_two_layers(
    gain_trained: bool, training: bool
) -> None:
    ours = stirred(6).train(training)
    ours.weight.requires_grad = gain_trained
    theirs = copy.deepcopy(ours)
    x = torch.randn(5, 6, 40, dtype=torch.float64)
    found, wanted = [], []
    for norm, results, apply in (
        (ours, found, norm_leaky),
        (theirs, wanted, lambda n, v: F.leaky_relu(n(v), 0.01)),
    ):
        leaf = x.clone().requires_grad_()
        y = apply(norm, leaf)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results += [y.detach(), leaf.grad, norm.bias.grad, norm.running_mean, norm.running_var]
        results += [norm.weight.grad] if gain_trained else []
    torch.testing.assert_close(found, wanted)
    assert ours.num_batches_tracked == theirs.num_batches_tracked


def test_its_input_is_not_kept() -> None:
    kept = set()
    x = torch.randn(4, 6, 100, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.add(t.data_ptr()) or t, lambda t: t
    ):
        y = norm_leaky(stirred(6, torch.float32), x)
    assert x.data_ptr() not in kept and y.data_ptr() in kept


def test_a_gain_of_zero_still_gives_the_right_gradient() -> None:
    norm = stirred(3)
    norm.weight.data[1] = 0.0
    x = torch.randn(4, 3, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: norm_leaky(norm, v), (x,))
