"""CE-SSL's backbone: its published sizes, and its forward pass against one written out step by
step.
"""

import math

import pytest
import torch
from torch import Tensor

from ecglib.encoders.conv_transformer import HEADS, ConvTransformer, conv_transformer_small
from ecglib.errors import DataError
from ecglib.lora import add_lora, low_rank_layers, merge_lora


@pytest.mark.parametrize(
    ("size", "classes", "millions"),
    [
        ("base", 6, 9.502),
        ("base", 16, 9.504),
        ("base", 18, 9.505),
        ("base", 23, 9.506),
        ("medium", 18, 50.493),
        ("large", 18, 113.489),
        ("tiny", 6, 1.598),
        ("tinylight", 6, 0.256),
    ],
)
def test_has_the_published_number_of_parameters(size: str, classes: int, millions: float) -> None:
    with torch.device("meta"):
        network = ConvTransformer(size, classes)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=6e-4)


def weight_of(network: ConvTransformer, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer; of an adapted one W0 + 0.8 BA, and W0 + BA in the head, formed
    entry by entry.
    """
    layer = network.get_submodule(name)
    if not hasattr(layer, "base"):
        return layer.weight, layer.bias
    share = 1.0 if name.startswith("head") else 0.8
    rank, rows = layer.rank, len(layer.base.weight) // layer.parts
    blocks = [
        layer.B[part * rows : (part + 1) * rows] @ layer.A[part * rank : (part + 1) * rank]
        for part in range(layer.parts)
    ]
    return layer.base.weight + share * torch.cat(blocks).view_as(layer.base.weight), layer.base.bias


def slow_convolution(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """A convolution as a sum over the taps of the kernel."""
    padded = torch.nn.functional.pad(x, (padding, padding))
    time = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    taps = [
        torch.einsum(
            "oi,bit->bot", weight[:, :, k], padded[:, :, k : k + stride * (time - 1) + 1 : stride]
        )
        for k in range(weight.shape[2])
    ]
    return sum(taps) + bias[:, None]


def slow_batch_norm(x: Tensor, norm: torch.nn.BatchNorm1d) -> Tensor:
    """Batch norm in evaluation, and the leaky rectifier after it."""
    y = (x - norm.running_mean[:, None]) / (norm.running_var[:, None] + 1e-5).sqrt()
    y = y * norm.weight[:, None] + norm.bias[:, None]
    return torch.where(y > 0, y, 0.01 * y)


def slow_layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """Layer norm of one record's tokens `(tokens, width)`."""
    centred = x - x.mean(dim=1, keepdim=True)
    return (
        centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * norm.weight
        + norm.bias
    )


def slow_attention(network: ConvTransformer, name: str, x: Tensor, causal: bool) -> Tensor:
    """What each token of one record takes from the others, head by head and token by token."""
    weight, bias = weight_of(network, f"{name}.qkv")
    queries, keys, values = (x @ weight.T + bias).chunk(3, dim=1)
    size, taken = x.shape[1] // HEADS, torch.zeros_like(x)
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        for token in range(len(x)):
            seen = slice(0, token + 1 if causal else len(x))
            scores = keys[seen, own] @ queries[token, own] / math.sqrt(size)
            weights = scores.exp() / scores.exp().sum()
            taken[token, own] = weights @ values[seen, own]
    weight, bias = weight_of(network, f"{name}.mix")
    return taken @ weight.T + bias


def slow_forward(network: ConvTransformer, signals: Tensor, causal: bool) -> Tensor:
    """Section 1.1 of the method, written out."""
    x = signals
    for i, block in enumerate(network.blocks):
        pooled = torch.stack(
            [x[:, :, 4 * t : 4 * t + 4].mean(dim=2) for t in range(math.ceil(x.shape[2] / 4))],
            dim=2,
        )
        inner = slow_batch_norm(
            slow_convolution(x, *weight_of(network, f"blocks.{i}.first"), 4, 4), block.norm1
        )
        inner = slow_batch_norm(
            slow_convolution(inner, *weight_of(network, f"blocks.{i}.second"), 1, 4), block.norm2
        )
        x = inner + slow_convolution(pooled, *weight_of(network, f"blocks.{i}.shortcut"), 1, 0)
    width = x.shape[1]
    positions = torch.zeros(x.shape[2], width, dtype=x.dtype)
    for token in range(x.shape[2]):
        for pair in range(0, width, 2):
            angle = token / 10_000 ** (pair / width)
            positions[token, pair], positions[token, pair + 1] = math.sin(angle), math.cos(angle)
    features = []
    for tokens in x.transpose(1, 2) + positions:
        for i, layer in enumerate(network.transformer):
            tokens = tokens + slow_attention(
                network, f"transformer.{i}", slow_layer_norm(tokens, layer.norm1), causal
            )
            (up, up_bias), (down, down_bias) = (
                weight_of(network, f"transformer.{i}.mlp.{n}") for n in (0, 2)
            )
            inner = slow_layer_norm(tokens, layer.norm2) @ up.T + up_bias
            tokens = tokens + torch.where(inner > 0, inner, 0.01 * inner) @ down.T + down_bias
        features.append(tokens.max(dim=0).values)
    (first, first_bias), (last, last_bias) = (weight_of(network, f"head.{n}") for n in (0, 1))
    return (torch.stack(features) @ first.T + first_bias) @ last.T + last_bias


def random_network(size: str, causal: bool) -> ConvTransformer:
    """A network in evaluation whose norms are not at their starts."""
    torch.manual_seed(0)
    network = ConvTransformer(size, 18, causal=causal).double().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, 1.0, 0.2)
            torch.nn.init.normal_(module.bias, 0.0, 0.2)
    return network


@pytest.mark.parametrize(("time", "causal"), [(6144, True), (1000, True), (250, False)])
def test_forward_is_the_published_one(time: int, causal: bool) -> None:
    network, signals = (
        random_network("tinylight", causal),
        torch.randn(2, 12, time, dtype=torch.float64),
    )
    with torch.no_grad():
        torch.testing.assert_close(
            network(signals), slow_forward(network, signals, causal), rtol=0, atol=1e-9
        )


def test_adapted_forward_is_the_published_one_merged_and_unmerged() -> None:
    network, signals = random_network("base", True), torch.randn(1, 12, 512, dtype=torch.float64)
    add_lora(network, 16, deactivation=0.2)
    for layer in low_rank_layers(network).values():
        torch.nn.init.normal_(layer.B, std=0.05)
    with torch.no_grad():
        wanted = slow_forward(network, signals, True)
        torch.testing.assert_close(network(signals), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(merge_lora(network)(signals), wanted, rtol=0, atol=1e-5)


def test_a_causal_token_sees_no_later_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 9, 256)
    later = x.clone()
    later[:, 5:] = 0.0
    for causal in (True, False):
        layer = ConvTransformer("base", causal=causal).transformer[0].eval()
        unchanged = torch.equal(layer(x)[:, :5], layer(later)[:, :5])
        assert unchanged == causal
        attention = layer.attention(x)
        assert torch.allclose(attention.sum(dim=3), torch.ones(()))
        assert bool((attention.triu(1) == 0).all()) == causal


@pytest.mark.parametrize("time", [1, 63, 64, 65, 1000, 5000])
def test_any_length_will_do(time: int) -> None:
    network = conv_transformer_small(classes=3).eval()
    assert network(torch.randn(2, 12, time)).shape == (2, 3)
    assert network.local(torch.randn(2, 12, time)).shape == (
        2,
        64,
        math.ceil(math.ceil(math.ceil(time / 4) / 4) / 4),
    )


def test_without_classes_it_is_an_encoder() -> None:
    encoder = ConvTransformer("tinylight").eval()
    assert encoder(torch.randn(3, 12, 500)).shape == (3, encoder.feature_size)
    inner = sum(p.numel() for part in encoder.layers() for p in part.parameters())
    assert inner == sum(p.numel() for p in encoder.parameters())


def test_wrong_input_is_told() -> None:
    with pytest.raises(ValueError, match="no ConvTransformer of the size 'small'.*tinylight"):
        ConvTransformer("small")
    with pytest.raises(DataError, match=r"takes signals \(batch, 12, time\), not \(2, 8, 500\)"):
        ConvTransformer("tinylight")(torch.randn(2, 8, 500))
