"""Low-rank adaptation: what changes, what stays, what is trained, and what is stored."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ecglib.encoders import make_encoder
from ecglib.encoders.conv_transformer import ConvTransformer
from ecglib.encoders.transformer import FusedLinear
from ecglib.errors import DataError
from ecglib.lora import (
    LowRankLayer,
    adaptable_layers,
    add_lora,
    backbone_checksum,
    load_adapter,
    low_rank_layers,
    merge_lora,
    save_adapter,
    trainable_parameters,
)
from ecglib.supervised import Classifier

LAYERS = [nn.Linear(6, 10), FusedLinear(6, 3), nn.Conv1d(4, 8, 5, stride=3, padding=2, dilation=2)]


def network_of(classes: int = 4, seed: int = 0) -> ConvTransformer:
    torch.manual_seed(seed)
    return ConvTransformer("tinylight", classes)


def stirred(network: nn.Module, seed: int = 1) -> nn.Module:
    """The network with low-rank pairs that differ from their starts."""
    generator = torch.Generator().manual_seed(seed)
    for layer in low_rank_layers(network).values():
        layer.B.data.copy_(0.05 * torch.randn(layer.B.shape, generator=generator))
    return network


def input_of(layer: nn.Module) -> Tensor:
    return torch.randn(3, 4, 40) if isinstance(layer, nn.Conv1d) else torch.randn(3, 7, 6)


def plain(layer: nn.Module) -> nn.Module:
    """A copy of the layer whose weight is frozen."""
    layer = copy.deepcopy(layer)
    layer.weight.requires_grad = False
    return layer


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_layer_computes_its_definition_and_its_gradients(layer: nn.Module) -> None:
    adapted, x = LowRankLayer(plain(layer), 2), input_of(layer).requires_grad_()
    nn.init.normal_(adapted.B)
    dense = plain(layer)
    pairs = zip(adapted.A.chunk(adapted.parts), adapted.B.chunk(adapted.parts), strict=True)
    difference = torch.cat([b @ a for a, b in pairs]).view_as(dense.weight)
    other = x.detach().clone().requires_grad_()
    wanted = torch.func.functional_call(
        dense, {"weight": dense.weight + difference, "bias": dense.bias}, (other,)
    )
    found, direction = adapted(x), torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted)
    found = torch.autograd.grad(found, [x, adapted.A, adapted.B, adapted.base.bias], direction)
    wanted = torch.autograd.grad(wanted, [other, adapted.A, adapted.B, dense.bias], direction)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("train", [True, False])
def test_at_its_start_nothing_changes(train: bool) -> None:
    network, x = network_of().train(train), torch.randn(4, 12, 300)
    before = copy.deepcopy(network)(x)
    torch.testing.assert_close(add_lora(network, 4)(x), before, rtol=0, atol=0)


def test_merged_equals_unmerged_and_has_no_low_rank_layers_left() -> None:
    network, x = (
        stirred(add_lora(network_of(), 4, deactivation=0.2)).eval(),
        torch.randn(4, 12, 300),
    )
    before = network(x)
    layer = network.blocks[0].second
    wanted = layer.base.weight + 0.8 * layer.difference()
    head = network.head[0].base.weight + network.head[0].difference()
    merged = merge_lora(network)
    torch.testing.assert_close(merged(x), before, rtol=0, atol=1e-5)
    assert not low_rank_layers(merged) and torch.equal(merged.blocks[0].second.weight, wanted)
    assert torch.equal(merged.head[0].weight, head), "the head is never deactivated"
    assert set(merged.state_dict()) == set(network_of().state_dict())


@pytest.mark.parametrize(("rank", "millions"), [(4, 0.222), (8, 0.413), (16, 0.795), (32, 1.559)])
def test_trains_the_published_number_of_parameters(rank: int, millions: float) -> None:
    with torch.device("meta"):
        network = add_lora(ConvTransformer("base", 18), rank)
    assert len(low_rank_layers(network)) == 34
    assert sum(p.numel() for p in trainable_parameters(network)) / 1e6 == pytest.approx(
        millions, abs=5e-4
    )


def test_only_what_is_meant_to_be_trained_changes() -> None:
    network = stirred(add_lora(network_of(), 4))
    before = {name: value.clone() for name, value in network.named_parameters()}
    optimizer = torch.optim.AdamW(trainable_parameters(network), lr=0.1)
    network.train()(torch.randn(8, 12, 300)).square().mean().backward()
    optimizer.step()
    changed = {
        name for name, value in network.named_parameters() if not torch.equal(value, before[name])
    }
    wanted = {
        name for name in before if name.endswith(("bias", ".A", ".B")) or name == "head.1.weight"
    }
    # A softmax does not see what is added to all of its inputs: the keys' biases have no gradient,
    # and share a tensor.
    assert changed == wanted
    frozen = {name for name in before if name not in wanted}
    assert {
        "transformer.0.mix.weight",
        "blocks.0.norm1.weight",
        "transformer.0.norm1.weight",
    } <= frozen
    assert not any(network.get_parameter(name).requires_grad for name in frozen)


def test_a_deactivated_layer_gets_no_gradient_and_keeps_no_input() -> None:
    network, x = stirred(add_lora(network_of(), 4)).train(), torch.randn(4, 12, 512)
    for layer in low_rank_layers(network).values():
        layer.deactivation = 1.0
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.update({tensor.data_ptr(): tensor.nbytes}) or tensor,
        lambda tensor: tensor,
    ):
        output = network(x)
    output.square().mean().backward()
    for name, layer in low_rank_layers(network).items():
        assert layer.A.grad is None and layer.B.grad is None, name
        assert layer.base.weight.grad is None and layer.base.bias.grad is not None, name
    assert x.data_ptr() not in kept, "a frozen convolution has no use for its input"
    active = stirred(add_lora(network_of(), 4)).train()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.update({-tensor.data_ptr(): tensor.nbytes}) or tensor,
        lambda tensor: tensor,
    ):
        active(x).square().mean().backward()
    assert -x.data_ptr() in kept, "an adapted one needs it"


def test_coins_are_tossed_in_training_only_and_repeat_with_the_seed() -> None:
    network, x = stirred(add_lora(network_of(), 4, deactivation=0.5)), torch.randn(4, 12, 300)
    network.train()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(network(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    network.eval()
    assert torch.equal(network(x), network(x))


def test_the_share_of_deactivated_passes_is_p() -> None:
    layer = LowRankLayer(plain(nn.Linear(2, 2)), 1).train()
    nn.init.ones_(layer.B)
    layer.deactivation, x = 0.2, torch.randn(1, 2)
    torch.manual_seed(0)
    without = layer.base(x)
    share = sum(torch.equal(layer(x), without) for _ in range(4000)) / 4000
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5


def test_a_nested_layer_uses_its_first_ranks_while_training() -> None:
    layer = LowRankLayer(plain(nn.Linear(6, 10)), 4, nested=True).train()
    nn.init.normal_(layer.B)
    x, seen = torch.randn(3, 6), set()
    torch.manual_seed(0)
    for _ in range(60):
        found = layer(x) - layer.base(x)
        fits = [
            r
            for r in range(1, 5)
            if torch.allclose(found, 4 / r * x @ layer.A[:r].T @ layer.B[:, :r].T, atol=1e-5)
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert seen == {1, 2, 3, 4}
    torch.testing.assert_close(layer.eval()(x), layer.base(x) + x @ layer.A.T @ layer.B.T)


def test_an_adapter_is_small_and_comes_back_on_its_backbone(tmp_path: Path) -> None:
    network, x = stirred(add_lora(network_of(), 4, deactivation=0.2)), torch.randn(4, 12, 300)
    network.train()(x)  # moves batch norm's statistics, which belong to the adapter
    path = save_adapter(network.eval(), tmp_path / "adapter.safetensors")
    again = load_adapter(network_of(), path).eval()
    assert torch.equal(again(x), network(x))
    stored = sum(value.nbytes for value in trainable_parameters(network)) + 4 * 2 * 6 * 64
    assert stored <= path.stat().st_size < stored + 8000


def test_a_stored_adapter_of_the_base_backbone_takes_less_than_2300_kb(tmp_path: Path) -> None:
    network = ConvTransformer("base", 18)
    layers = adaptable_layers(network)
    # The share of the laptop's config, 0.2, and the layers for which the full rank costs most.
    heaviest = sorted(layers, key=lambda name: layers[name].weight.numel(), reverse=True)[
        : round(0.2 * len(layers))
    ]
    add_lora(network, {name: 16 if name in heaviest else 8 for name in layers}, 0.2)
    assert save_adapter(network, tmp_path / "adapter.safetensors").stat().st_size < 2_300_000


def test_an_adapter_never_lands_on_another_backbone(tmp_path: Path) -> None:
    path = save_adapter(stirred(add_lora(network_of(), 4)), tmp_path / "adapter.safetensors")
    with pytest.raises(
        DataError, match="adapter.safetensors: an adapter for another backbone.*load it onto"
    ):
        load_adapter(network_of(seed=5), path)
    with pytest.raises(DataError, match="does not fit this network.*head.1.bias.*the same classes"):
        load_adapter(network_of(classes=7), path)
    with pytest.raises(DataError, match="no low-rank layers.*add_lora"):
        save_adapter(network_of(), path)


def test_checksum_knows_the_backbone_alone() -> None:
    network = network_of()
    before = backbone_checksum(network)
    assert backbone_checksum(stirred(add_lora(network, 4))) == before
    network.head[1].weight.data.zero_()
    assert backbone_checksum(network) == before
    network.blocks[1].first.base.weight.data[0, 0, 0] += 1e-6
    assert backbone_checksum(network) != before


@pytest.mark.parametrize("name", ["xresnet1d_narrow", "cpc_lstm_small", "vit1d_small"])
def test_other_encoders_can_be_adapted(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Classifier(make_encoder(name), 5).eval()
    x = torch.randn(2, 12, 250)
    before, plain = network(x), copy.deepcopy(network)
    add_lora(network, 2)
    torch.testing.assert_close(network(x), before)
    after = stirred(network)(x)
    if low_rank_layers(network):  # the xresnet's convolutions are two-dimensional
        path = save_adapter(network, tmp_path / "adapter.safetensors")
        assert torch.equal(load_adapter(plain, path)(x), after)
    torch.testing.assert_close(merge_lora(network)(x), after, rtol=1e-4, atol=1e-5)


def test_bad_ranks_and_probabilities_are_told() -> None:
    with pytest.raises(DataError, match="rank of 500 does not fit the layer .* choose 1 to"):
        add_lora(network_of(), 500)
    with pytest.raises(DataError, match="rank of 0 does not fit"):
        add_lora(network_of(), 0)
    with pytest.raises(DataError, match="ranks do not fit the network.*blocks.0.first"):
        add_lora(network_of(), {})
    for p in (-0.1, 1.0):
        with pytest.raises(DataError, match=r"not in \[0, 1\)"):
            add_lora(network_of(), 2, p)
    grouped = nn.Sequential(
        nn.Conv1d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 2), nn.Linear(2, 2)
    )
    with pytest.raises(DataError, match="convolution 0 has 2 groups.*groups=1"):
        add_lora(grouped, 1)
    with pytest.raises(DataError, match="no linear layer"):
        add_lora(nn.Sequential(nn.Conv1d(4, 8, 3)), 1)


def test_peft_agrees() -> None:
    """Low-rank layers of the library `peft` with the same pairs give the same answers."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    ours, x = add_lora(copy.deepcopy(model), 2), torch.randn(4, 6)
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"])
    )
    nn.init.normal_(ours[0].B)
    layer = theirs.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(ours[0].A)
    layer.lora_B["default"].weight.data.copy_(ours[0].B)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
