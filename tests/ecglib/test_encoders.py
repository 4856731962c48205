"""xresnet1d against a plain Conv1d twin, and its published size."""

import sys

import pytest
import torch
from torch import nn

from ecglib.encoders import ENCODERS, encoder_maker, make_encoder
from ecglib.encoders.xresnet1d import XResNet1d, xresnet1d50
from ecglib.train import autocast
from toolkit import plain_conv1d


def small_encoder() -> XResNet1d:
    """The paper's form with narrow stages, on signals as they are."""
    return XResNet1d(stem=(32, 32, 32), width=32, blocks=(2, 2, 2, 2))


def test_laptop_encoder_does_not_see_where_the_baseline_stands():
    torch.manual_seed(0)
    encoder, signals = make_encoder("xresnet1d_narrow").eval(), torch.randn(4, 12, 250)
    shifted = signals + torch.randn(4, 12, 1)
    torch.testing.assert_close(encoder(shifted), encoder(signals), rtol=1e-4, atol=1e-4)
    assert encoder(signals).shape == (4, encoder.feature_size) == (4, 256)
    paper = xresnet1d50().eval()
    assert not torch.allclose(paper(shifted), paper(signals), atol=1e-2), (
        "the published encoder takes raw millivolts"
    )


def test_paper_encoder_has_the_published_size_and_shapes():
    encoder = xresnet1d50()
    assert sum(p.numel() for p in encoder.parameters()) == 886_432
    with_head = sum(p.numel() for p in nn.Linear(encoder.feature_size, 71).parameters()) + 886_432
    assert with_head == 922_855
    assert encoder.stages(encoder.stem(torch.zeros(2, 12, 1, 250))).shape == (2, 256, 1, 8)
    assert encoder(torch.zeros(3, 12, 1000)).shape == (3, 512)


def test_blocks_start_as_the_identity():
    encoder = small_encoder().eval()
    x = torch.rand(2, 128, 1, 40)
    block = encoder.stages[1]
    assert torch.allclose(
        block(x), torch.relu(x + block.path[-1][1].bias[:, None, None]), atol=1e-6
    )


def test_forward_and_gradients_equal_plain_conv1d():
    torch.manual_seed(0)
    encoder = small_encoder()
    for module in (
        encoder.modules()
    ):  # the last norms start at zero, which would hide the blocks from this test
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    twin = plain_conv1d(encoder)
    signals = torch.randn(8, 12, 250)
    first, second = encoder(signals), twin(signals)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    first.square().mean().backward()
    second.square().mean().backward()
    for ours, theirs in zip(encoder.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad.reshape(theirs.shape), theirs.grad, rtol=1e-2, atol=1e-3
        )


def test_bfloat16_gradients_differ_by_rounding_alone():
    torch.manual_seed(0)
    encoder, head = xresnet1d50(), nn.Linear(512, 5)
    twin = plain_conv1d(encoder)
    signals, targets = (
        torch.randn(32, 12, 250).cumsum(dim=2) / 10,
        torch.randint(0, 2, (32, 5)).float(),
    )

    def gradient(network: nn.Module, dtype: str) -> torch.Tensor:
        network.zero_grad()
        with autocast("cpu", dtype):
            loss = nn.functional.binary_cross_entropy_with_logits(
                head(network(signals)).float(), targets
            )
        loss.backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    exact = gradient(twin, "float32")
    ours, plain, single = (
        (gradient(*form) - exact).norm() / exact.norm()
        for form in ((encoder, "bfloat16"), (twin, "bfloat16"), (encoder, "float32"))
    )
    assert single < 1e-2 and ours < 0.25 and ours < 1.5 * plain, (single, ours, plain)


def test_unknown_encoder_is_named():
    with pytest.raises(ValueError, match="no encoder 'resnet9000'.*xresnet1d50"):
        make_encoder("resnet9000")


def test_an_encoder_from_elsewhere_is_one_entry(monkeypatch, tmp_path):
    (tmp_path / "own_encoder.py").write_text(
        "from torch import nn\ndef make(leads=12, width=3): return nn.Linear(leads, width)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ENCODERS, "mine", "own_encoder:make")
    assert "own_encoder" not in sys.modules, "a file is imported when its encoder is asked for"
    assert encoder_maker("mine").__module__ == "own_encoder"
    assert make_encoder("mine", leads=2, width=5).weight.shape == (5, 2)


@pytest.mark.parametrize("name", ["xresnet1d_narrow", "cpc_lstm_small", "s4_small", "vit1d_small"])
def test_every_laptop_encoder_fits_the_study(name):
    encoder = make_encoder(name)
    for samples in (250, 1000):
        assert encoder(torch.randn(2, 12, samples)).shape == (2, encoder.feature_size)
    inside = {id(parameter) for layer in encoder.layers() for parameter in layer.parameters()}
    outside = {
        label for label, parameter in encoder.named_parameters() if id(parameter) not in inside
    }
    assert outside <= {"class_token", "positions"}
