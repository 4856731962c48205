"""Fusion: tokens, stacks of models, token weights, similarity."""

import numpy as np
import pytest
import torch
from torch import nn

from ecglib.batches import Batch, step_generator
from ecglib.errors import DataError
from ecglib.fusion import (
    FusionBatches,
    FusionNetwork,
    FusionPerceptron,
    count_parameters,
    draw_tokens,
    linear_cka,
    matched_hidden,
    model_of,
    token_weights,
    train_stack,
)

SIZES, CLASSES = (6, 5, 9), 3


def network(models: int = 1, seeds: list[int] | None = None, **options) -> FusionNetwork:
    shape = {"width": 8, "heads": 2, "hidden": 6}
    return FusionNetwork(seeds or range(models), SIZES, CLASSES, **{**shape, **options})


def dropping(mixing: str, **options) -> tuple[FusionNetwork, torch.Tensor]:
    """A network that drops members while it trains, and which it keeps of four records with the
    random numbers of seed 5.
    """
    model = network(mixing=mixing, dropout=0.0, token_dropout=0.4, **options).train()
    return model, draw_tokens(4, 3, 0.4, generator=torch.Generator().manual_seed(5))


def draw(models: int = 1, records: int = 4) -> torch.Tensor:
    return torch.randn(models, records, sum(SIZES), generator=torch.Generator().manual_seed(3))


def norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize("mixing", ["attention", "uniform"])
def test_a_fusion_is_what_numpy_says(mixing):
    model, x = network(mixing=mixing, votes=False).eval(), draw()
    with torch.no_grad():  # biases, scales and shifts too
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(8)
            )
    weights = {
        name: value[0].detach().double().numpy() for name, value in model.state_dict().items()
    }
    expected = []
    for record in x[0].double().numpy():
        parts = np.split(record, np.cumsum(SIZES)[:-1])
        tokens = [
            part @ weights[f"project.{k}.weight"] + weights[f"project.{k}.bias"]
            for k, part in enumerate(parts)
        ]
        tokens = (
            norm(np.concatenate(tokens)) * weights["norm.scale"][0]
            + weights["norm.shift"][0]
            + weights["names"][0]
        )
        inner = norm(tokens) * weights["inner_norm.scale"][0] + weights["inner_norm.shift"][0]
        q, k, v = np.split(inner @ weights["qkv.weight"] + weights["qkv.bias"], 3, axis=1)
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = (
                np.exp(q[:, head] @ k[:, head].T / 2.0)
                if mixing == "attention"
                else np.ones((3, 3))
            )
            heads.append(scores / scores.sum(axis=1, keepdims=True) @ v[:, head])
        tokens = (
            tokens + np.concatenate(heads, axis=1) @ weights["mix.weight"] + weights["mix.bias"]
        )
        hidden = torch.from_numpy(
            tokens.ravel() @ weights["hidden.weight"] + weights["hidden.bias"][0]
        )
        expected.append(
            nn.functional.gelu(hidden).numpy() @ weights["head.weight"] + weights["head.bias"][0]
        )
    np.testing.assert_allclose(model(x)[0].detach(), expected, atol=1e-5)


def test_every_matrix_is_drawn_anew():
    model = FusionNetwork([0, 1], (6, 6), CLASSES, width=8, heads=2, hidden=6, votes=False)
    matrices = [
        value.flatten(1) for name, value in model.named_parameters() if name.endswith("weight")
    ]
    for place, one in enumerate(matrices):
        for other in matrices[:place]:
            size = min(one.shape[1], other.shape[1])
            alike = torch.nn.functional.cosine_similarity(one[:, :size], other[:, :size])
            assert (alike.abs() < 0.6).all()
        assert not torch.equal(one[0], one[1])


def test_a_gate_gives_the_weights_of_dropped_tokens_to_the_others():
    model = network(mixing="gate", votes=False).eval()
    model.gate.weight.data.zero_()  # all tokens weigh alike
    keep = torch.tensor([[True, True, False]]).expand(4, 3)
    tokens = model.tokens(draw())
    mixed = model.mixed(tokens, keep, None)
    torch.testing.assert_close(mixed[:, :, :2], 1.5 * tokens[:, :, :2])
    assert not mixed[:, :, 2].any()
    model, keep = dropping("gate", votes=False)
    mixed = model.mixed(model.tokens(draw()), keep, None)
    hidden = nn.functional.gelu(model.hidden(mixed.flatten(2)))
    found = model(draw(), torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, model.head(hidden))


def test_a_gate_weighs_whole_tokens():
    model, x = network(mixing="gate").eval(), draw()
    gates = model.mixing_weights(model.tokens(x))
    torch.testing.assert_close(gates.sum(dim=4), torch.ones(1, 4, 1, 1))
    model.gate.weight.data.zero_()
    torch.testing.assert_close(model.mixed(model.tokens(x), None, None), model.tokens(x))


def test_attention_rows_sum_to_one_and_dropped_tokens_get_none():
    model, x = network(), draw()
    keep = torch.tensor([[True, False, True]]).expand(4, -1)
    weights = model.mixing_weights(model.tokens(x), keep)
    torch.testing.assert_close(weights.sum(dim=4), torch.ones(weights.shape[:4]))
    assert (weights[..., 1] == 0).all()
    model, keep = dropping("attention")
    assert not keep.all()
    changed = x + 7.0 * (~keep).repeat_interleave(torch.tensor(SIZES), dim=1)
    model.start_from(torch.randn(1, 20, 3), torch.zeros(1, 3, 3))
    first, second = (model(each, torch.Generator().manual_seed(5)) for each in (x, changed))
    torch.testing.assert_close(second, first, msg="a dropped member has no say")
    model.eval()
    assert not torch.allclose(model(changed), model(x))


def test_attention_does_not_depend_on_the_order_of_the_tokens():
    model, x = network(), draw()
    tokens, order = model.tokens(x), torch.tensor([2, 0, 1])
    model.eval()
    torch.testing.assert_close(
        model.mixed(tokens[:, :, order], None, None), model.mixed(tokens, None, None)[:, :, order]
    )


def test_a_fusion_starts_as_the_mean_of_the_votes():
    generator = torch.Generator().manual_seed(0)
    weights, bias = (
        torch.randn(2, 20, 3, generator=generator),
        torch.randn(2, 3, 3, generator=generator),
    )
    x = draw(2)
    parts = zip(x.split(SIZES, dim=2), weights.split(SIZES, dim=1), bias.unbind(1), strict=True)
    expected = torch.stack([part @ own + each[:, None] for part, own, each in parts]).mean(dim=0)
    for model in (network(2), FusionPerceptron([0, 1], SIZES, CLASSES, hidden=5)):
        model.start_from(weights, bias)
        torch.testing.assert_close(model.eval()(x), expected)
    with pytest.raises(DataError, match="no votes to start from"):
        network(votes=False).start_from(weights, bias)


def test_never_are_all_tokens_dropped_and_the_share_is_right():
    keep = draw_tokens(20_000, 3, 0.5, generator=torch.Generator().manual_seed(0))
    assert keep.any(dim=1).all()
    assert (~keep).float().mean().item() == pytest.approx(0.5 - 0.5**3 / 3, abs=0.01)
    assert draw_tokens(50, 3, 1.0).sum(dim=1).eq(1).all()
    assert draw_tokens(50, 3, 0.0).all()


def stack_batches(seeds: list[int], subsets: list[np.ndarray], steps: int = 5) -> FusionBatches:
    """Batches of one member that is alike for every model and of two that are not."""
    generator = torch.Generator().manual_seed(0)
    shared, *own = (torch.randn(1, 40, size, generator=generator) for size in SIZES)
    own = [torch.cat([each + seed for seed in seeds]) for each in own]
    targets = np.random.default_rng(0).integers(0, 2, (40, CLASSES))
    return FusionBatches([shared, *own], targets, subsets, seeds, steps, 8)


@pytest.mark.parametrize("mixing", ["attention", "uniform", "gate"])
def test_a_model_in_a_stack_learns_as_it_would_alone(mixing):
    subsets = [np.arange(5), np.arange(10, 40)]
    together, alone = network(2, [4, 9], mixing=mixing), network(1, [9], mixing=mixing)
    train_stack(together, stack_batches([4, 9], subsets), 0.01)
    train_stack(alone, stack_batches([9], subsets[1:]), 0.01)
    x = draw(records=20)
    # Answers, not weights: the keys' bias has no gradient but rounding, which AdamW makes as large
    # as any other.
    torch.testing.assert_close(
        together.eval()(x.expand(2, -1, -1))[1:], alone.eval()(x), atol=1e-3, rtol=1e-3
    )
    assert not torch.allclose(alone(x), network(1, [9], mixing=mixing).eval()(x), atol=0.01)
    torch.testing.assert_close(model_of(together, 1)(x), together(x.expand(2, -1, -1))[1:])


def test_gradients_do_not_pass_from_one_model_to_another():
    objective = network(2, [0, 1], votes=False)
    batch = stack_batches([0, 1], [np.arange(40)] * 2)(0)
    objective.loss(batch).backward()
    before = {name: parameter.grad[0].clone() for name, parameter in objective.named_parameters()}
    objective.zero_grad()
    other = Batch(batch.signals.clone(), batch.targets.clone(), batch.indices, step_generator(0, 0))
    other.signals[1], other.targets[1] = 5.0, 1 - other.targets[1]
    objective.loss(other).backward()
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(parameter.grad[0], before[name], atol=1e-6, rtol=1e-5)


def test_every_record_of_a_subset_comes_equally_often():
    batches = stack_batches([1, 2], [np.arange(4), np.arange(20, 36)], steps=8)
    first, second = torch.stack([batches(step).indices for step in range(8)]).unbind(1)
    assert np.bincount(first.flatten()).tolist() == [16] * 4
    assert np.bincount(second.flatten())[20:].tolist() == [4] * 16
    batch = batches(3)
    torch.testing.assert_close(batch.signals[1, 0, :6], batches.features[0][0, batch.indices[1, 0]])
    torch.testing.assert_close(
        batch.signals[1, 0, 6:11], batches.features[1][1, batch.indices[1, 0]]
    )


def test_the_perceptron_has_as_many_parameters():
    sizes, shape = (256, 256, 384, 256), {"width": 64, "heads": 4, "hidden": 128}
    fusion = count_parameters(FusionNetwork([0], sizes, 5, **shape))
    perceptron = count_parameters(
        FusionPerceptron([0], sizes, 5, hidden=matched_hidden(sizes, 5, **shape))
    )
    assert abs(perceptron / fusion - 1) < 0.02, (perceptron, fusion)


def test_token_weights_find_the_member_that_decides():
    model, x = network(), draw(records=50)
    weights = torch.zeros(1, 20, 3)
    weights[:, 6:11] = 1.0  # only the second member votes
    model.start_from(weights, torch.zeros(1, 3, 3))
    found = token_weights(model, x, torch.ones(1, 50, 3))
    assert found["attention"].shape == found["gradient_input"].shape == (1, 3, 3)
    torch.testing.assert_close(found["attention"].sum(dim=2), torch.ones(1, 3))
    torch.testing.assert_close(
        found["gradient_input"], torch.tensor([0.0, 1.0, 0.0]).expand(1, 3, 3)
    )


def test_cka_is_the_slow_form_and_knows_no_turn_or_scale():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(30, 4)) + 5, generator.normal(size=(30, 7))
    centring = np.eye(30) - 1 / 30
    k, m = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    slow = np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))
    assert linear_cka(x, y) == pytest.approx(slow) == pytest.approx(linear_cka(y, x))
    turn = np.linalg.qr(generator.normal(size=(4, 4)))[0]
    assert linear_cka(x, 3 * x @ turn - 8) == pytest.approx(1)
    assert linear_cka(x, x * [1, 1, 1, 40]) < 0.9
    with pytest.raises(DataError, match="not of 30 and 29"):
        linear_cka(x, y[:29])
    with pytest.raises(DataError, match="features that vary"):
        linear_cka(x, np.ones((30, 2)))
