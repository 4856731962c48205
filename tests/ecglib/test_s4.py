"""The state-space encoder: its convolution against the recurrence that it stands for."""

import math

import numpy as np
import pytest
import torch

from ecglib.encoders.s4 import LONGEST, SHORTEST, S4Encoder, StateSpace, s4_small
from ecglib.train import autocast, parameter_groups


@pytest.mark.parametrize("time", [1, 2, 37, 250, 1000])
def test_convolution_equals_the_recurrence(time):
    torch.manual_seed(0)
    layer, inputs = StateSpace(6, 8), torch.randn(3, time, 6)
    torch.testing.assert_close(layer(inputs), layer.recurrent(inputs), rtol=1e-4, atol=1e-4)


def test_gradients_of_convolution_and_recurrence_agree():
    torch.manual_seed(0)
    layer, inputs = StateSpace(4, 3), torch.randn(2, 40, 4)

    def gradients(form) -> torch.Tensor:
        layer.zero_grad()
        form(inputs).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in layer.parameters()])

    torch.testing.assert_close(gradients(layer), gradients(layer.recurrent), rtol=1e-3, atol=1e-5)


def test_impulse_response_equals_a_slow_sum_over_the_states():
    torch.manual_seed(0)
    layer = StateSpace(3, 5)
    step = layer.log_step.detach().double().exp().numpy()
    pole = (
        (-layer.log_decay.exp() + 1j * layer.frequency)
        .detach()
        .numpy()
        .astype(complex)
        .reshape(3, 5)
    )
    readout = torch.view_as_complex(layer.readout.detach()).numpy().astype(complex)
    expected = np.zeros((3, 70))
    for filter in range(3):
        for lag in range(70):
            factor = np.exp(pole[filter] * step[filter])
            held = (factor - 1) / pole[filter]  # zero-order hold of B = 1
            expected[filter, lag] = 2 * (readout[filter] * held * factor**lag).sum().real
    np.testing.assert_allclose(
        layer.impulse_response(70).detach().numpy(), expected, rtol=1e-4, atol=1e-5
    )


def test_a_constant_input_settles_where_the_continuous_system_does():
    layer = StateSpace(1, 1)
    with torch.no_grad():
        layer.log_step.fill_(math.log(0.05)), layer.skip.zero_(), layer.frequency.zero_()
        layer.readout.copy_(torch.tensor([[[0.7, 0.0]]]))
    settled = layer(torch.ones(1, 1000, 1))[0, -1, 0].item()
    assert settled == pytest.approx(2 * 0.7 / 0.5, rel=1e-4), (
        "2 C / decay: the steady state of x' = -x / 2 + 1"
    )


def test_starts_are_those_of_s4d_lin():
    layer = StateSpace(200, 4)
    assert torch.allclose(
        layer.frequency.view(200, 4)[17], math.pi * torch.arange(4)
    ) and layer.skip.shape == (200,)
    assert torch.allclose(layer.log_decay.exp(), torch.tensor(0.5))
    steps = layer.log_step.exp()
    assert SHORTEST <= steps.min() < 2 * SHORTEST and LONGEST / 2 < steps.max() <= LONGEST
    undecayed = {id(p) for p in parameter_groups(layer, 0.1)[1]["params"]}
    assert {id(layer.log_step), id(layer.log_decay), id(layer.frequency)} <= undecayed, (
        "poles are not to decay"
    )


def test_causal_output_ignores_the_future_and_the_end_does_not_come_round():
    torch.manual_seed(0)
    layer, inputs = StateSpace(5, 8), torch.randn(2, 100, 5)
    changed = inputs.clone()
    changed[:, 60:] += 10.0
    first, second = layer(inputs), layer(changed)
    torch.testing.assert_close(first[:, :60], second[:, :60], rtol=1e-4, atol=1e-4)
    assert (first[:, 60:] - second[:, 60:]).abs().min(dim=1).values.max() > 1e-3


def test_encoder_shapes_and_sizes():
    encoder = S4Encoder()
    per_block = 512 * (1 + 4 * 8 + 1) + 2 * 512 + 512 * 1024 + 1024  # filter, norm, mixing layer
    assert sum(p.numel() for p in encoder.blocks.parameters()) == 4 * per_block + 2 * 512
    assert sum(p.numel() for p in encoder.latents.parameters()) == 796_672, (
        "the same layers as the LSTM encoder's"
    )
    assert encoder(torch.zeros(2, 12, 50)).shape == (2, encoder.feature_size) == (2, 1536)
    three = S4Encoder(leads=3, width=16, layers=1, standardised=False)
    assert three(torch.zeros(2, 3, 50)).shape == (2, three.feature_size) == (2, 48)
    small = s4_small().eval()
    signals = torch.randn(3, 12, 250)
    assert small.context(small.latents(signals)).shape == (
        3,
        250 // small.latents.samples,
        small.context_size,
    )
    torch.testing.assert_close(small(signals + 1.5), small(signals), rtol=1e-3, atol=1e-3)


def test_block_is_the_identity_where_its_mixing_layer_is_zero():
    encoder = s4_small().eval()
    block = encoder.blocks[0]
    torch.nn.init.zeros_(block.mix.weight), torch.nn.init.zeros_(block.mix.bias)
    x = torch.randn(2, 30, encoder.latent_size)
    assert torch.equal(block(x), x)


def test_bfloat16_leaves_the_filter_in_float32():
    torch.manual_seed(0)
    layer, inputs = StateSpace(6, 8), torch.randn(2, 250, 6)
    with autocast("cpu", "bfloat16"):
        low = layer(inputs)
    assert low.dtype == torch.float32 and torch.equal(low, layer(inputs))
    encoder, signals = s4_small().eval(), torch.randn(4, 12, 250)
    with autocast("cpu", "bfloat16"):
        features = encoder(signals)
    assert (features - encoder(signals)).norm() / encoder(signals).norm() < 0.03
