"""CPC's loss against its definition, where its negatives come from and its gradients go, and the
encoder's size.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ecglib.batches import Batch, CropBatches, step_generator
from ecglib.checkpoints import CHECKPOINT, load_tensors
from ecglib.encoders.cpc_lstm import PTB_XL_DEVIATIONS, CPCEncoder, Latents, cpc_lstm_small, pool
from ecglib.encoders.s4 import S4Encoder, s4_small
from ecglib.errors import DataError
from ecglib.selfsup.cpc import CPC, draw_negatives, info_nce
from ecglib.train import autocast, fit
from toolkit import tiny_records


def drawn(seed: int = 0) -> torch.Generator:
    return step_generator(seed, 0)


def slow_info_nce(
    context: np.ndarray, latents: np.ndarray, steps: int, chosen: np.ndarray
) -> float:
    """The published loop: for each position and record a softmax over the positive and the chosen
    others.
    """
    total = 0.0
    for position in range(latents.shape[1] - steps):
        for record in range(len(latents)):
            candidates = [position + steps, *chosen[record, position]]
            scores = [context[record, position] @ latents[record, time] for time in candidates]
            total -= math.log(math.exp(scores[0]) / sum(math.exp(score) for score in scores)) / len(
                latents
            )
    return total


def test_loss_equals_the_published_loop_over_positions():
    torch.manual_seed(0)
    context, latents = torch.randn(3, 20, 6), torch.randn(3, 20, 6)
    chosen = draw_negatives(3, 20, 4, 7, drawn()).numpy()
    expected = slow_info_nce(context.double().numpy(), latents.double().numpy(), 4, chosen)
    assert info_nce(context, latents, 4, 7, drawn()).item() == pytest.approx(expected, rel=1e-5)
    mean = info_nce(context, latents, 4, 7, drawn(), "mean").item()
    assert mean == pytest.approx(expected / 16, rel=1e-5), (
        "over positions: the sum divided by time - steps"
    )


@pytest.mark.parametrize(("steps", "negatives"), [(1, 1), (12, 128)])
def test_candidates_that_are_all_alike_give_the_logarithm_of_their_number(steps, negatives):
    latents = torch.randn(2, 1, 5).expand(2, 30, 5)
    loss = info_nce(torch.randn(2, 30, 5), latents, steps, negatives, drawn()).item()
    assert loss == pytest.approx((30 - steps) * math.log(1 + negatives), rel=1e-5)


def test_a_perfect_prediction_costs_nothing():
    latents = 20 * torch.eye(24).expand(2, 24, 24)
    assert info_nce(latents.roll(-3, dims=1), latents, 3, 64, drawn()).item() == pytest.approx(
        0.0, abs=1e-4
    )
    assert info_nce(latents.roll(-4, dims=1), latents, 3, 64, drawn()).item() > 20, (
        "the wrong horizon does"
    )


def test_negatives_are_every_time_of_the_record_but_the_positives_equally_often():
    steps, time = 3, 10
    chosen = draw_negatives(200, time, steps, 90, drawn())
    for position in range(time - steps):
        counts = torch.bincount(chosen[:, position].flatten(), minlength=time).double()
        assert counts[position + steps] == 0
        others = counts[torch.arange(time) != position + steps]
        assert (
            len(others) == time - 1 and (others / 2000 - 1).abs().max() < 0.12
        )  # 2,000 expected, deviation 42
    assert torch.equal(
        draw_negatives(2, time, steps, 9, drawn()), draw_negatives(2, time, steps, 9, drawn())
    )
    assert not torch.equal(
        draw_negatives(2, time, steps, 9, drawn()), draw_negatives(2, time, steps, 9, drawn(1))
    )


def test_negatives_come_from_the_same_record():
    torch.manual_seed(0)
    context, latents = torch.randn(4, 20, 6), torch.randn(4, 20, 6, requires_grad=True)
    one = torch.cat(
        [context[:1], torch.zeros(3, 20, 6)]
    )  # the other records predict nothing: no gradient from them
    info_nce(one, latents, 4, 8, drawn()).backward()
    assert latents.grad[0].abs().sum() > 0 and torch.all(latents.grad[1:] == 0)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    context, latents = (
        torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    for reduction in ("sum", "mean"):
        # The loss is computed in float32, so differences of 1e-2 and a tolerance to match.
        assert torch.autograd.gradcheck(
            lambda c, z, r=reduction: info_nce(c, z, 2, 5, drawn(), r),
            (context, latents),
            eps=1e-2,
            atol=2e-3,
            rtol=2e-2,
            nondet_tol=0.0,
        )


def test_last_positions_have_no_target_and_get_no_gradient():
    context, latents = torch.randn(2, 20, 6, requires_grad=True), torch.randn(2, 20, 6)
    info_nce(context, latents, 5, 8, drawn()).backward()
    moved = context.grad.abs().sum(dim=(0, 2)) > 0
    assert moved[:15].all() and not moved[15:].any()


def test_no_tensor_holds_every_candidate():
    """No tensor kept for the way back is near (batch, positions, candidates, width) in size."""
    batch, time, width, negatives = 2, 60, 64, 32
    context, latents = (torch.randn(batch, time, width, requires_grad=True) for _ in range(2))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        info_nce(context, latents, 12, negatives, drawn()).backward()
    assert max(kept) <= batch * time * max(time, width, negatives + 1)


def test_sizes_are_the_published_ones():
    encoder = CPCEncoder()
    objective = CPC(encoder)
    counts = [
        sum(p.numel() for p in module.parameters())
        for module in (encoder.latents, encoder.lstm, objective.predictors, objective)
    ]
    assert counts == [796_672, 4_202_496, 262_144, 5_261_312]
    assert (
        sum(p.numel() for p in CPC(encoder, all_horizons=True).predictors.parameters())
        == 12 * 262_144
    )
    assert encoder.feature_size == 1536 and encoder(torch.zeros(2, 12, 30)).shape == (2, 1536)


@pytest.mark.parametrize("make", [cpc_lstm_small, s4_small, lambda: S4Encoder(width=16, layers=1)])
def test_context_sees_no_later_sample_and_latents_only_their_own(make):
    torch.manual_seed(0)
    encoder = make().eval()
    signals = torch.randn(2, 12, 120)
    encoder.latents.centred = (
        False  # the mean over the crop is the one thing that all latents share
    )
    changed = signals.clone()
    changed[:, :, 60:] = torch.randn(2, 12, 60)
    first, second = encoder.latents(signals), encoder.latents(changed)
    steps = first.shape[1] // 2
    assert torch.equal(first[:, :steps], second[:, :steps]) and not torch.allclose(
        first[:, steps:], second[:, steps:]
    )
    one, two = encoder.context(first), encoder.context(second)
    torch.testing.assert_close(one[:, :steps], two[:, :steps], rtol=1e-4, atol=1e-4)
    assert (one[:, steps:] - two[:, steps:]).abs().mean() > 1e-3
    assert first.shape[2] == encoder.latent_size and one.shape[2] == encoder.context_size


def test_pooling_is_mean_maximum_last():
    context = torch.tensor([[[1.0, 5.0], [4.0, 2.0], [1.0, -1.0]]])
    assert pool(context).tolist() == [[2.0, 2.0, 4.0, 5.0, 1.0, -1.0]]


def test_latents_are_fully_connected_layers_on_each_time_step():
    torch.manual_seed(0)
    latents, signals = Latents(12, 16, 2, samples=2, standardised=True), torch.randn(3, 12, 31)
    expected = signals / torch.tensor(PTB_XL_DEVIATIONS)[:, None]
    expected = torch.stack(
        [expected[:, :, 2 * i : 2 * i + 2].flatten(1) for i in range(15)], dim=1
    )  # (3, 15, 24)
    for layer in latents.layers:
        values = expected @ layer[0].weight.flatten(1).T
        spread = (values - values.mean(dim=(0, 1))) / (
            values.var(dim=(0, 1), unbiased=False) + 1e-5
        ).sqrt()
        expected = spread.relu()
    torch.testing.assert_close(latents(signals), expected, rtol=1e-4, atol=1e-4)


def test_standardisation_knows_the_lead_order_and_12_leads():
    assert PTB_XL_DEVIATIONS[3:6] == (0.140, 0.146, 0.147), "the augmented leads are the small ones"
    assert min(PTB_XL_DEVIATIONS[6:]) > max(PTB_XL_DEVIATIONS[:6]), (
        "the chest leads are the large ones"
    )
    with pytest.raises(ValueError, match="12 leads, not 2.*standardised=False"):
        CPCEncoder(leads=2)
    assert CPCEncoder(leads=2, width=8, hidden=8, standardised=False)(
        torch.zeros(2, 2, 30)
    ).shape == (2, 24)


def test_small_encoder_does_not_see_where_the_baseline_stands():
    torch.manual_seed(0)
    encoder, signals = cpc_lstm_small().eval(), torch.randn(4, 12, 250)
    torch.testing.assert_close(
        encoder(signals + torch.randn(4, 12, 1)), encoder(signals), rtol=1e-4, atol=1e-4
    )


def waves(batch: int = 8, seed: int = 0) -> Batch:
    """Sine waves of many rates on all leads: predictable from their past, and different at most
    other times.
    """
    generator = torch.Generator().manual_seed(seed)
    rate, phase = (
        0.1 + 0.2 * torch.rand(batch, 1, generator=generator),
        6 * torch.rand(batch, 12, generator=generator),
    )
    signals = torch.sin(rate[..., None] * torch.arange(120) + phase[..., None])
    return Batch(signals, torch.zeros(batch, 1), torch.arange(batch), step_generator(seed, 0))


def small_objective(**options) -> CPC:
    torch.manual_seed(0)
    encoder = CPCEncoder(
        width=24, layers=2, hidden=24, lstm_layers=1, samples=2, standardised=False
    )
    return CPC(encoder, **{"steps": 4, "negatives": 16, "reduction": "mean", **options})


@pytest.mark.parametrize("all_horizons", [False, True])
def test_training_learns_to_predict(all_horizons):
    objective = small_objective(all_horizons=all_horizons)
    history = fit(objective, waves_of_step, 80, learning_rate=0.02, dtype="float32", log_every=20)
    assert history["loss"].iloc[-1] < 0.85 * math.log(17), history["loss"].tolist()


def waves_of_step(step: int) -> Batch:
    return waves(seed=step)


def test_all_horizons_are_the_mean_of_the_single_ones():
    objective = small_objective(all_horizons=True)
    batch = waves()
    latents = objective.encoder.latents(batch.signals)
    context, generator = objective.encoder.context(latents), step_generator(0, 0)
    single = [
        info_nce(predict(context), latents, horizon, 16, generator, "mean")
        for horizon, predict in enumerate(objective.predictors, start=1)
    ]
    assert objective.loss(batch).item() == pytest.approx(
        torch.stack(single).mean().item(), rel=1e-5
    )
    assert len(single) == 4


def test_every_weight_gets_a_gradient_and_one_record_will_do():
    objective = small_objective()
    objective.loss(waves(batch=1)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())
    assert all(p.grad.abs().sum() > 0 for p in objective.encoder.latents.parameters())


def test_bfloat16_gradients_point_the_same_way():
    objective = small_objective()

    def gradient(dtype: str) -> Tensor:
        objective.zero_grad()
        with autocast("cpu", dtype):
            loss = objective.loss(waves())
        assert loss.dtype == torch.float32
        loss.backward()
        return torch.cat([p.grad.flatten() for p in objective.parameters()])

    exact, rounded = gradient("float32"), gradient("bfloat16")
    assert (rounded - exact).norm() / exact.norm() < 0.1


class _Stop(Exception):
    pass


@pytest.mark.parametrize(
    "make", [lambda: small_objective().encoder, lambda: S4Encoder(width=16, layers=1, samples=2)]
)
def test_interrupted_and_resumed_equals_undisturbed(tmp_path, make):
    records = tiny_records()

    def train(folder: str, **options) -> nn.Module:
        torch.manual_seed(0)
        objective = CPC(make(), steps=4, negatives=8)
        batches = CropBatches(records, np.arange(len(records)), 4, 1.0, 0)
        fit(
            objective,
            batches,
            12,
            folder=tmp_path / folder,
            checkpoint_every=5,
            log_every=1,
            dtype="float32",
            **options,
        )
        return objective

    def interrupt(step: int) -> dict:
        if step == 8:
            raise _Stop
        return {}

    straight = train("straight").state_dict()
    with pytest.raises(_Stop):
        train("broken", watch=interrupt)
    assert load_tensors(tmp_path / "broken" / CHECKPOINT)[1]["step"] == "5"
    resumed = train("broken").state_dict()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_bad_inputs_are_one_sentence_each():
    with pytest.raises(
        DataError, match="13 latents is too short to predict 12 ahead; take at least 14"
    ):
        info_nce(torch.zeros(1, 13, 4), torch.zeros(1, 13, 4), 12, 8, drawn())
    assert info_nce(torch.zeros(1, 14, 4), torch.zeros(1, 14, 4), 12, 8, drawn()) == pytest.approx(
        2 * math.log(9)
    )
    with pytest.raises(ValueError, match="'sum' or 'mean', not 'total'"):
        CPC(cpc_lstm_small(), reduction="total")
