"""The views of semi-supervised learning: what CutMix and mixup do to targets, and what a weak and a
strong view are.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

import ecglib.augment
from ecglib.augment import (
    beta,
    burst_dropout,
    cutmix,
    lead_permutation,
    mixup,
    relative_noise,
    strong_view,
    time_reversal,
    weak_view,
)
from ecglib.errors import DataError

BATCH, LEADS, TIME = 6, 12, 50
VIEW_STEPS = (time_reversal, burst_dropout, relative_noise, lead_permutation)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def signals() -> Tensor:
    return torch.randn(BATCH, LEADS, TIME, generator=generator(7))


@pytest.fixture
def targets() -> Tensor:
    return torch.eye(BATCH)


def what_was_done(view: Tensor, signals: Tensor) -> set[str]:
    """Which of the four steps turn `signals`, a ramp in time in each lead, into `view`."""
    kept = view != 0
    done = set() if kept.all() else {"burst_dropout"}
    if not torch.equal(view, view.round()):
        done.add("relative_noise")
    rising = view.where(kept, torch.nan)[0].diff(dim=1)
    if rising.nanmean() < 0:
        done.add("time_reversal")
    order = [round(float(lead[lead != 0].mean()) / 1000) for lead in view[0] if (lead != 0).any()]
    if order != sorted(order):
        done.add("lead_permutation")
    return done


def ramps() -> Tensor:
    """Signals whose lead l at time t is 1000 (l + 1) + t: one can see what was done to them."""
    return (
        (1000.0 * torch.arange(1, LEADS + 1)[:, None] + torch.arange(TIME))
        .expand(2, -1, -1)
        .clone()
    )


@pytest.mark.parametrize("transform", [*VIEW_STEPS, weak_view, strong_view])
def test_steps_and_views_keep_shape_and_input_and_are_repeatable(transform, signals):
    before = signals.clone()
    for seed in range(5):
        view = transform(signals, generator(seed))
        assert (
            view.shape == signals.shape
            and view.dtype == signals.dtype
            and torch.isfinite(view).all()
        )
        assert torch.equal(signals, before)
        assert torch.equal(view, transform(signals, generator(seed)))
    if transform is not time_reversal:
        assert any(not torch.equal(transform(signals, generator(seed)), view) for seed in range(4))


@pytest.mark.parametrize("mix", [cutmix, mixup])
def test_mixing_keeps_its_input_and_is_repeatable(mix, signals, targets):
    before = signals.clone(), targets.clone()
    mixed = mix(signals, targets, generator(1))
    assert torch.equal(signals, before[0]) and torch.equal(targets, before[1])
    assert all(
        torch.equal(a, b) for a, b in zip(mixed, mix(signals, targets, generator(1)), strict=True)
    )
    assert not torch.equal(mixed[0], mix(signals, targets, generator(2))[0])
    with pytest.raises(DataError, match="cannot be mixed with alpha = 0; choose a value above 0"):
        mix(signals, targets, generator(), alpha=0)


def test_cutmix_targets_are_the_pasted_area_exactly(signals, targets):
    shares = []
    for seed in range(60):
        mixed, labels = cutmix(signals, targets, generator(seed))
        pasted = mixed != signals
        shares.append(pasted.any(dim=0).float().mean().item())
        for row in range(BATCH):
            other = int(labels[row].clone().index_fill_(0, torch.tensor([row]), 0).argmax())
            source = signals[other] if labels[row, row] < 1 else signals[row]
            assert torch.equal(torch.where(pasted[row], source, signals[row]), mixed[row])
            area = int(pasted[row].sum()) / (LEADS * TIME)
            expected = np.zeros(BATCH)
            expected[row] += 1 - area
            expected[other] += area
            np.testing.assert_allclose(labels[row], expected, atol=1e-6)
        changed = pasted.any(dim=0)
        assert torch.equal(changed, changed.any(1)[:, None] & changed.any(0)), "one rectangle"
        for line in (changed.any(1), changed.any(0)):
            assert line.int().diff().abs().sum() <= 2, "without gaps"
    assert min(shares) < 0.05 and max(shares) > 0.5, "areas of all sizes"


def test_the_rectangle_has_the_side_that_was_drawn(monkeypatch, signals, targets):
    monkeypatch.setattr(ecglib.augment, "beta", lambda *_: torch.tensor(0.75))
    sizes = []
    for seed in range(60):
        pasted = (cutmix(signals, targets, generator(seed))[0] != signals).any(dim=0)
        sizes.append((int(pasted.any(dim=1).sum()), int(pasted.any(dim=0).sum())))
    # sqrt(1 - 0.75) = 0.5 of 12 leads and of 50 samples, in whole samples to both sides of the
    # centre; less at an edge.
    assert max(lead for lead, _ in sizes) == 6 and max(time for _, time in sizes) == 24
    assert (
        min(lead for lead, _ in sizes if lead) < 6 and min(time for _, time in sizes if time) < 24
    )


def test_mixup_is_the_average_of_two_records_mostly_the_first(signals, targets):
    mixed, labels = mixup(signals, targets, generator(3))
    np.testing.assert_allclose(labels.sum(dim=1), 1, atol=1e-6)
    expected = np.einsum("ij,jlt->ilt", labels.numpy(), signals.numpy())
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
    assert (labels.diagonal() >= 0.5).all() and labels.diagonal().unique().numel() > 2, (
        "a share of its own each"
    )


def test_beta_draws_have_their_distribution(signals):
    draws = beta(signals, generator(), 0.75, 20000).double()
    assert draws.mean().item() == pytest.approx(0.5, abs=0.01)
    assert draws.var().item() == pytest.approx(1 / (4 * (2 * 0.75 + 1)), rel=0.02)
    assert draws.min() >= 0 and draws.max() <= 1


def test_each_step_does_what_it_says(signals):
    assert torch.equal(time_reversal(signals, generator())[..., 0], signals[..., -1])
    mixed = lead_permutation(signals, generator(1))
    order = [int((mixed[0, lead] == signals[0]).all(dim=1).nonzero()) for lead in range(LEADS)]
    assert sorted(order) == list(range(LEADS)) != order
    assert torch.equal(mixed, signals[:, order]), "alike in every record"


def test_bursts_are_one_window_a_lead_the_same_in_every_record(signals):
    lengths = []
    for seed in range(40):
        hidden = burst_dropout(signals, generator(seed)) == 0
        assert torch.equal(hidden, hidden[:1].expand_as(hidden))
        assert (hidden[0].int().diff(dim=1).abs().sum(dim=1) <= 2).all()
        lengths.append(hidden[0].sum(dim=1))
    lengths = torch.stack(lengths)
    assert all(len(row.unique()) > 3 for row in lengths), "each lead has its own"
    assert (lengths % 2 == 0).all() and lengths.min() == 0 and lengths.max() == TIME - 2
    assert lengths.float().mean().item() == pytest.approx(TIME / 2 - 1, rel=0.1)


def test_noise_follows_each_lead(signals):
    louder = signals * torch.arange(LEADS)[:, None]
    added = relative_noise(louder.expand(BATCH, -1, -1), generator(), noise=0.5) - louder
    ratio = added.std(dim=(0, 2))[1:] / louder.std(dim=2).mean(dim=0)[1:]
    np.testing.assert_allclose(ratio, 0.5, rtol=0.2)
    assert (added[:, 0] == 0).all(), "a silent lead stays silent"


def test_a_weak_view_is_one_of_the_four_and_all_come():
    seen = [what_was_done(weak_view(ramps(), generator(seed)), ramps()) for seed in range(60)]
    assert all(len(done) == 1 for done in seen)
    counts = {
        name: sum(name in done for done in seen) for name in (step.__name__ for step in VIEW_STEPS)
    }
    assert min(counts.values()) >= 8, counts


def test_a_strong_view_is_what_four_draws_hit():
    seen = [what_was_done(strong_view(ramps(), generator(seed)), ramps()) for seed in range(150)]
    sizes = np.bincount([len(done) for done in seen], minlength=5) / len(seen)
    # Four draws from four with replacement: 4, 84, 144 and 24 of the 256 results have 1, 2, 3 and 4
    # distinct values.
    np.testing.assert_allclose(sizes, np.array([0, 4, 84, 144, 24]) / 256, atol=0.1)


def test_the_noise_of_a_view_is_set_by_the_caller(signals):
    quiet = [strong_view(signals, generator(seed), noise=0.0) for seed in range(30)]
    values = signals.unique()
    assert all(torch.isin(view[view != 0], values).all() for view in quiet), (
        "nothing but moved and hidden samples"
    )
