"""One-shot rank allocation against dense gradients, and AdaLoRA's budget."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ecglib.batches import Batch, step_generator
from ecglib.encoders.conv_transformer import ConvTransformer
from ecglib.errors import DataError
from ecglib.lora import adaptable_layers, add_lora, low_rank_layers
from ecglib.ranks import AdaptiveRanks, allocate_ranks, importance, ranks_by_importance


def batch_of(step: int, size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(step)
    signals = torch.randn(size, 12, 256, generator=generator)
    targets = (torch.rand(size, 3, generator=generator) < 0.4).float()
    return Batch(signals, targets, torch.arange(size), step_generator(0, step))


def network_of() -> ConvTransformer:
    torch.manual_seed(0)
    return ConvTransformer("tinylight", 3)


def dense_reference(
    network: nn.Module, batches: list[Batch], rank: int, seed: int
) -> dict[str, float]:
    """(W0 * G A'A)^2 with the gradient G of every weight from autograd, entry by entry, for the
    same A.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        starts = {
            name: layer.A.detach()
            for name, layer in low_rank_layers(add_lora(copy.deepcopy(network), rank)).items()
        }
    network, scores = copy.deepcopy(network).train(), dict.fromkeys(starts, 0.0)
    for batch in batches:
        network.zero_grad()
        F.binary_cross_entropy_with_logits(network(batch.signals), batch.targets).backward()
        for name, a in starts.items():
            layer = network.get_submodule(name)
            parts = getattr(layer, "parts", 1)
            blocks = zip(
                layer.weight.flatten(1).chunk(parts),
                layer.weight.grad.flatten(1).chunk(parts),
                a.chunk(parts),
            )
            means = [((w * (g @ own.T @ own)) ** 2).mean() for w, g, own in blocks]
            scores[name] += float(sum(means) / parts) / len(batches)
    return scores


def test_importance_is_that_of_the_dense_gradient() -> None:
    network, batches = network_of(), [batch_of(step) for step in range(3)]
    found = importance(network, batches, rank=4, seed=7)
    wanted = dense_reference(network, batches, rank=4, seed=7)
    assert list(found.index) == list(adaptable_layers(network)) == list(wanted)
    for name, value in wanted.items():
        assert found["published"][name] == pytest.approx(value, rel=1e-3), name


def test_the_corrected_score_estimates_the_true_gradient_whatever_the_start() -> None:
    """The corrected score over many starts is near that of the gradient; a fused layer's published
    one is not.
    """
    network, batches = network_of(), [batch_of(0)]
    scores = [importance(network, batches, rank=32, seed=seed) for seed in range(20)]
    mean = sum(scores) / len(scores)
    whole = copy.deepcopy(network).train()
    F.binary_cross_entropy_with_logits(whole(batches[0].signals), batches[0].targets).backward()
    ratio = {}
    for name in ("blocks.1.second", "transformer.0.qkv", "transformer.0.mlp.2"):
        layer = whole.get_submodule(name)
        ratio[name] = mean.loc[name] / float(((layer.weight * layer.weight.grad) ** 2).mean())
    corrected = [values["corrected"] for values in ratio.values()]
    # Besides G itself, G A'A holds what A'A has off its diagonal, about in / rank times as much;
    # that is alike in layers of like size, while the published score of the fused layer is
    # (sigma_qkv / 0.02)^4 times larger.
    assert ratio["transformer.0.qkv"]["corrected"] / ratio["transformer.0.mlp.2"]["corrected"] < 2
    assert ratio["transformer.0.qkv"]["published"] / ratio["transformer.0.mlp.2"]["published"] > 50
    assert all(1 <= value < 40 for value in corrected)


def test_the_order_of_batches_does_not_matter_and_nothing_changes() -> None:
    network, batches = network_of(), [batch_of(step) for step in range(4)]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    forth, back = importance(network, batches, 4), importance(network, batches[::-1], 4)
    assert forth.to_numpy() == pytest.approx(back.to_numpy(), rel=1e-9)
    assert allocate_ranks(network, batches, 4, 0.5) == allocate_ranks(
        network, batches[::-1], 4, 0.5
    )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())


def test_ranks_follow_the_scores() -> None:
    scores = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 0.5}
    assert ranks_by_importance(scores, 16, 0.5) == {"a": 16, "b": 8, "c": 16, "d": 8}
    assert ranks_by_importance(scores, 4, 0.25) == {"a": 4, "b": 2, "c": 2, "d": 2}
    assert set(ranks_by_importance(scores, 16, 0.0).values()) == {8}
    assert set(ranks_by_importance(scores, 16, 1.0).values()) == {16}
    network = network_of()
    ranks = allocate_ranks(network, [batch_of(0)], 8, 0.4, score="published")
    assert sorted(ranks.values(), reverse=True)[: round(0.4 * len(ranks))] == [8] * round(
        0.4 * len(ranks)
    )
    add_lora(network, ranks)
    assert {name: layer.rank for name, layer in low_rank_layers(network).items()} == ranks


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_0_to_1_is_told(share: float) -> None:
    with pytest.raises(DataError, match=r"share of important layers of .* is not in \[0, 1\]"):
        allocate_ranks(network_of(), [batch_of(0)], 4, share)


def test_without_a_labelled_batch_there_is_nothing_to_measure() -> None:
    with pytest.raises(DataError, match="no labelled batch"):
        allocate_ranks(network_of(), [], 4, 0.5)


class Plain(nn.Module):
    """Cross-entropy of one network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, batch: Batch) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(self.network(batch.signals), batch.targets)

    def report(self) -> dict:
        return {}


def adaptive() -> tuple[AdaptiveRanks, nn.Module]:
    network = add_lora(network_of(), 6, singular_values=True)
    return AdaptiveRanks(Plain(network), network, 4), network


def test_adalora_starts_unchanged_and_shrinks_to_its_budget() -> None:
    batch = batch_of(0)
    plain = network_of().eval()(batch.signals)
    objective, network = adaptive()
    torch.testing.assert_close(network.eval()(batch.signals), plain)
    optimizer, used = torch.optim.AdamW(network.parameters(), lr=1e-2), []
    for step in range(20):
        optimizer.zero_grad()
        objective.loss(batch_of(step)).backward()
        optimizer.step()
        objective.after_step((step + 1) / 20)
        used.append(objective.report()["ranks_in_use"])
    layers = low_rank_layers(network).values()
    assert used[0] == sum(6 * layer.parts for layer in layers)
    assert used[-1] == sum(4 * layer.parts for layer in layers)
    assert used == sorted(used, reverse=True)
    assert len({int((layer.values != 0).sum()) / layer.parts for layer in layers}) > 1, (
        "every layer kept as much"
    )


def test_adaloras_importance_against_a_loop() -> None:
    objective, network = adaptive()
    name, layer = next(
        (n, layer) for n, layer in low_rank_layers(network).items() if layer.parts == 3
    )
    index = objective.layers.index(layer)
    nn.init.normal_(layer.values)
    history = {part: [] for part in ("A", "B", "values")}
    for step in range(3):
        network.zero_grad()
        objective.loss(batch_of(step)).backward()
        found = objective.triple_importance(index)
        for part in history:
            history[part].append((getattr(layer, part) * getattr(layer, part).grad).abs().detach())
    score = {}
    for part, values in history.items():
        mean, spread = torch.zeros_like(values[0]), torch.zeros_like(values[0])
        for now in values:
            mean = 0.85 * mean + 0.15 * now
            spread = 0.85 * spread + 0.15 * (now - mean).abs()
        score[part] = mean * spread
    rows = len(layer.B) // 3
    for triple in range(len(layer.values)):
        part, rank = divmod(triple, layer.rank)
        wanted = (
            score["values"][triple]
            + score["A"][triple].mean()
            + score["B"][part * rows : (part + 1) * rows, rank].mean()
        )
        assert float(found[triple]) == pytest.approx(float(wanted), rel=1e-4)


def test_adaloras_penalty_is_zero_for_orthonormal_vectors() -> None:
    objective, network = adaptive()
    batch, plain = batch_of(0), objective.objective
    assert float(objective.loss(batch) - plain.loss(batch)) > 0
    for layer in objective.layers:
        for values in (layer.A, layer.B):
            for block in values.data.chunk(layer.parts):
                nn.init.orthogonal_(block)
    assert float(objective.loss(batch) - plain.loss(batch)) == pytest.approx(0.0, abs=1e-3)
