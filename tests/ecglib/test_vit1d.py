"""The one-dimensional transformer: its size, its patches, positions of crops, attention, and what
it refuses.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ecglib.encoders.transformer import DropPath, TransformerBlock, set_drop_path
from ecglib.encoders.vit1d import ViT1d, vit1d_small
from ecglib.errors import DataError


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny_vit(**settings) -> ViT1d:
    return ViT1d(**{"patch": 10, "width": 24, "depth": 3, "heads": 3, "length": 100, **settings})


def test_default_size_and_features():
    encoder = ViT1d()
    block = 12 * 192**2 + 13 * 192  # qkv, mix, the two of the mlp with their biases, two norms
    assert (
        sum(p.numel() for p in encoder.parameters())
        == 12 * block + (240 + 1) * 192 + 192 + 50 * 192 + 2 * 192
    )
    assert encoder(torch.randn(2, 12, 1000)).shape == (2, encoder.feature_size) == (2, 384)
    assert encoder.class_tokens(torch.randn(2, 12, 400)).shape == (2, 768)


def test_patches_are_a_strided_convolution_over_all_leads():
    encoder, signals = tiny_vit(), torch.randn(2, 12, 60)
    convolution = nn.Conv1d(12, 24, kernel_size=10, stride=10)
    convolution.weight.data = encoder.embed.weight.data.unflatten(1, (12, 10))
    convolution.bias.data = encoder.embed.bias.data
    expected = convolution(signals).transpose(1, 2) + encoder.positions[:6]
    tokens = encoder.tokens(signals)
    torch.testing.assert_close(tokens[:, 1:], expected)
    torch.testing.assert_close(tokens[:, 0], encoder.class_token.expand(2, -1))


def test_block_equals_torch_attention():
    block, x = TransformerBlock(24, 3), torch.randn(2, 7, 24)
    twin = nn.MultiheadAttention(24, 3, batch_first=True)
    twin.in_proj_weight.data, twin.in_proj_bias.data = block.qkv.weight.data, block.qkv.bias.data
    twin.out_proj.weight.data, twin.out_proj.bias.data = block.mix.weight.data, block.mix.bias.data
    normed = block.norm1(x)
    taken, weights = twin(normed, normed, normed, average_attn_weights=False)
    expected = x + taken
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block.attention(x), weights)
    fused = F.scaled_dot_product_attention(
        *block.queries_keys_values(x)
    )  # the branch that a GPU takes
    torch.testing.assert_close(block.attention(x) @ block.queries_keys_values(x)[2], fused)


def test_a_crop_takes_the_positions_of_its_place():
    encoder, signals = tiny_vit(), torch.randn(3, 12, 40)
    start = torch.tensor([0, 20, 60])
    tokens = encoder.tokens(signals, start)
    for i, first in enumerate((0, 2, 6)):
        expected = encoder.tokens(signals[i : i + 1])[0, 1:] - encoder.positions[:4]
        expected = expected + encoder.positions[first : first + 4]
        torch.testing.assert_close(tokens[i, 1:], expected)
    nn.init.normal_(encoder.positions)
    with_start, without = encoder(signals, start), encoder(signals)
    torch.testing.assert_close(with_start[0], without[0])
    assert not torch.allclose(with_start[1], without[1], atol=1e-2)


def test_features_are_class_tokens_and_the_mean_of_the_patches():
    encoder, signals = tiny_vit().eval(), torch.randn(2, 12, 100)
    tokens, states = encoder.tokens(signals), []
    for block in encoder.blocks:
        tokens = block(tokens)
        states.append(encoder.norm(tokens))
    expected = torch.cat([states[1][:, 0], states[2][:, 0], states[2][:, 1:].mean(dim=1)], dim=1)
    torch.testing.assert_close(encoder(signals), expected[:, 24:])
    assert encoder.feature_size == 48
    torch.testing.assert_close(encoder.class_tokens(signals, blocks=2), expected[:, :48])


def test_attention_is_that_of_the_network_that_is_scored():
    encoder, signals = tiny_vit().eval(), torch.randn(2, 12, 100)
    block, tokens = encoder.blocks[0], encoder.tokens(signals)
    weights = block.attention(tokens)
    assert weights.shape == (2, 3, 11, 11)
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(2, 3, 11))
    with torch.no_grad():
        block.qkv.weight.normal_()
    assert not torch.allclose(block.attention(tokens), weights, atol=1e-2)


def test_drop_path_drops_whole_records_in_training_alone():
    path, x = DropPath(0.25), torch.ones(4000, 3, 2)
    dropped = path(x)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (dropped == dropped[:, :1, :1]).all() and dropped.mean().item() == pytest.approx(
        1, abs=0.05
    )
    assert torch.equal(path.eval()(x), x)
    encoder = tiny_vit()
    set_drop_path(encoder, 0.2)
    rates = [block.drop_path.p for block in encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_laptop_encoder_does_not_see_where_the_baseline_stands():
    encoder, signals = vit1d_small().eval(), torch.randn(2, 12, 250)
    assert encoder(signals).shape == (2, encoder.feature_size)
    shifted = signals + torch.randn(2, 12, 1)
    torch.testing.assert_close(encoder(shifted), encoder(signals), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(
        tiny_vit()(shifted[:, :, :100]), tiny_vit()(signals[:, :, :100]), atol=1e-3
    )


def test_gradients_reach_every_parameter():
    encoder = tiny_vit()
    encoder(torch.randn(4, 12, 100), torch.zeros(4, dtype=torch.long)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("shape", [(2, 12, 95), (2, 12, 110), (2, 8, 100), (2, 12, 0)])
def test_signals_that_do_not_fit_are_one_sentence(shape):
    with pytest.raises(
        DataError, match=rf"patch of 10; the signals have {shape[1]} leads and {shape[2]} samples"
    ):
        tiny_vit()(torch.zeros(shape))


@pytest.mark.parametrize("start", [5, -10, 70])
def test_starts_that_do_not_fit_are_one_sentence(start):
    with pytest.raises(DataError, match=r"must start at a multiple of the patch \(10\)"):
        tiny_vit()(torch.zeros(1, 12, 40), torch.tensor([start]))


@pytest.mark.parametrize("settings", [{"length": 95}, {"heads": 5}])
def test_impossible_sizes_are_refused(settings):
    with pytest.raises(ValueError, match="A ViT1d needs a length"):
        tiny_vit(**settings)
