"""FixMatch and its three thresholds: the loss against numpy, closed forms, their state against
loops, and resuming.
"""

import math
from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ecglib.batches import step_generator
from ecglib.errors import DataError
from ecglib.semisup import fixmatch
from ecglib.semisup.fixmatch import (
    FixedThreshold,
    FixMatch,
    FlexThreshold,
    SoftThreshold,
    pseudo_label_loss,
)
from ecglib.supervised import Classifier
from toolkit import (
    CLASSES,
    Linear,
    TinyEncoder,
    check_semi_resume,
    cross_entropy,
    semi_batch,
    sigmoid,
    tiny_batch,
)


@pytest.fixture
def plain_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views without randomness: a labelled or weak one is the signal, a strong one 0.7 of it minus
    0.1.
    """
    monkeypatch.setattr(fixmatch, "cutmix", lambda signals, targets, generator: (signals, targets))
    monkeypatch.setattr(fixmatch, "weak_view", lambda signals, generator: signals)
    monkeypatch.setattr(fixmatch, "strong_view", lambda signals, generator: 0.7 * signals - 0.1)


# The loss


def test_pseudo_label_loss_equals_loops():
    logits, probabilities, weights = (
        torch.randn(7, CLASSES),
        torch.rand(7, CLASSES),
        torch.rand(7, CLASSES),
    )
    total = 0.0
    for i in range(7):
        for c in range(CLASSES):
            label = 1.0 if probabilities[i, c] > 0.5 else 0.0
            total += float(weights[i, c]) * cross_entropy(float(logits[i, c]), label)
    assert pseudo_label_loss(logits, probabilities, weights).item() == pytest.approx(
        total / 7 / CLASSES, rel=1e-5
    )
    assert pseudo_label_loss(logits, probabilities, torch.zeros_like(weights)) == 0
    assert pseudo_label_loss(logits.bfloat16(), probabilities, weights).dtype == torch.float32


@pytest.mark.parametrize("threshold", [0.5, 0.7, 1.0])
def test_the_objective_equals_a_slow_numpy_version(plain_views, threshold):
    network, batch = Linear(), semi_batch()
    objective = FixMatch(network, FixedThreshold(threshold))
    p = sigmoid(network.slow(batch.unlabelled))
    passed = np.maximum(p, 1 - p) >= threshold
    supervised = cross_entropy(network.slow(batch.signals), batch.targets.numpy()).mean()
    asked = cross_entropy(network.slow(0.7 * batch.unlabelled - 0.1), p > 0.5)
    assert objective.loss(batch).item() == pytest.approx(
        supervised + (passed * asked).mean(), rel=1e-5
    )
    assert network.sizes == [4 + 6 + 6], "one pass of labelled, weak and strong views"
    assert passed.all() == (threshold == 0.5) and passed.any() == (threshold < 1)
    report = objective.report()
    assert report["passed"] == pytest.approx(passed.mean())
    assert report["passed_positive"] == pytest.approx(passed[p > 0.5].mean())


def test_above_every_confidence_the_loss_is_the_supervised_one(plain_views):
    network, batch = Linear(), semi_batch()
    alone = nn.functional.binary_cross_entropy_with_logits(network(batch.signals), batch.targets)
    objective = FixMatch(network, FixedThreshold(1.0))
    assert objective.loss(batch).item() == pytest.approx(alone.item(), rel=1e-6)
    assert objective.report() == {"passed": 0.0, "passed_positive": 0.0}


@pytest.mark.parametrize("thresholds", [FixedThreshold(0.5), FlexThreshold(CLASSES, 10, 0.5)])
def test_with_one_half_everything_passes(thresholds):
    objective = FixMatch(Linear(), thresholds)
    for step in range(3):
        objective.loss(semi_batch(step=step))
    assert objective.report() == {"passed": 1.0, "passed_positive": 1.0}


def test_no_gradient_flows_through_pseudo_labels_and_weights(plain_views):
    network, batch = Linear(scale=3.0), semi_batch()
    fixed = deepcopy(network)
    FixMatch(network, SoftThreshold(CLASSES, momentum=0.0)).loss(batch).backward()
    with torch.no_grad():
        p = torch.sigmoid(fixed(batch.unlabelled))
        weights = SoftThreshold(CLASSES, momentum=0.0)(p, batch.unlabelled_indices)
    loss = nn.functional.binary_cross_entropy_with_logits(fixed(batch.signals), batch.targets)
    (loss + pseudo_label_loss(fixed(0.7 * batch.unlabelled - 0.1), p, weights)).backward()
    torch.testing.assert_close(network[1].weight.grad, fixed[1].weight.grad)
    assert 0 < weights.mean() < 1


def test_views_are_drawn_from_the_batch(monkeypatch):
    drawn = []
    for name in ("weak_view", "strong_view"):
        monkeypatch.setattr(
            fixmatch, name, lambda signals, generator: drawn.append(generator) or signals
        )
    batch = semi_batch()
    FixMatch(Linear(), FixedThreshold()).loss(batch)
    assert drawn == [batch.generator] * 2
    monkeypatch.undo()
    losses = []
    for global_seed, step in ((0, 0), (1, 0), (0, 1)):
        torch.manual_seed(3)
        objective, batch = FixMatch(Linear(), FixedThreshold(0.6)), semi_batch()
        torch.manual_seed(global_seed)
        batch.generator = step_generator(5, step)
        losses.append(objective.loss(batch).item())
    assert losses[0] == losses[1] != losses[2]


def test_probabilities_are_float32_under_autocast():
    class Asks(FixedThreshold):
        def forward(self, probabilities: Tensor, indices: Tensor) -> Tensor:
            assert probabilities.dtype == torch.float32 and not probabilities.requires_grad
            return super().forward(probabilities, indices)

    with torch.autocast("cpu", torch.bfloat16):
        loss = FixMatch(Linear(), Asks()).loss(semi_batch())
    assert loss.dtype == torch.float32


# FlexMatch


def slow_levels(decided: list[list[int]], threshold: float) -> np.ndarray:
    """Levels `(2, classes)` of a table of latest decisions `[record][class]`."""
    classes, levels = range(len(decided[0])), np.empty((2, len(decided[0])))
    count = {(s, c): sum(row[c] == s for row in decided) for s in (-1, 0, 1) for c in classes}
    for s in (0, 1):
        for c in classes:
            largest = max([count[s, k] for k in classes] + [count[-1, c]])
            beta = count[s, c] / largest if largest else 0.0
            levels[s, c] = 0.5 + (threshold - 0.5) * beta / (2 - beta)
    return levels


def steps_of_probabilities(
    steps: int = 25, count: int = 8, pool: int = 12
) -> Iterator[tuple[Tensor, Tensor]]:
    """Probabilities of classes of unlike prevalence, more and more extreme; some records come twice
    in a batch.
    """
    generator = torch.Generator().manual_seed(4)
    base = torch.tensor([0.5, -0.5, -2.0])
    for step in range(steps):
        logits = (0.3 + 0.2 * step) * (base + torch.randn(count, CLASSES, generator=generator))
        yield torch.sigmoid(logits), torch.randint(pool, (count,), generator=generator)


def test_flexmatch_state_and_weights_equal_loops():
    thresholds, decided = FlexThreshold(CLASSES, 12, 0.9), [[-1] * CLASSES for _ in range(12)]
    repeated = 0
    for probabilities, indices in steps_of_probabilities():
        levels = slow_levels(decided, 0.9)
        weights = thresholds(probabilities, indices)
        p = probabilities.numpy()
        for i in range(len(p)):
            for c in range(CLASSES):
                side = int(p[i, c] > 0.5)
                assert weights[i, c] == float(max(p[i, c], 1 - p[i, c]) >= levels[side, c])
        last = {int(index): row for row, index in enumerate(indices)}
        repeated += len(indices) - len(last)
        for index, row in last.items():
            for c in range(CLASSES):
                if max(p[row, c], 1 - p[row, c]) >= 0.9:
                    decided[index][c] = int(p[row, c] > 0.5)
        assert thresholds.decisions.tolist() == decided
        np.testing.assert_allclose(thresholds.levels(), slow_levels(decided, 0.9), rtol=1e-6)
    assert repeated and thresholds.levels().unique().numel() > 4


def test_flexmatch_levels_rise_from_one_half_to_the_threshold():
    thresholds = FlexThreshold(2, 100, 0.9)
    assert (thresholds.levels() == 0.5).all(), "nothing is known: everything passes"
    thresholds.decisions[:20] = 1
    beta = 20 / 80  # eighty records were never decided about: the warm-up
    np.testing.assert_allclose(thresholds.levels()[1], 0.5 + 0.4 * beta / (2 - beta), rtol=1e-6)
    thresholds.decisions[:, 0] = torch.tensor([1] * 60 + [0] * 40)
    thresholds.decisions[:, 1] = torch.tensor([1] * 30 + [0] * 70)
    expected = [[0.5 + 0.4 * (4 / 7) / (2 - 4 / 7), 0.9], [0.9, 0.5 + 0.4 * (1 / 2) / (2 - 1 / 2)]]
    np.testing.assert_allclose(thresholds.levels(), expected, rtol=1e-6)


def test_flexmatch_lets_the_first_positive_decisions_pass():
    thresholds = FlexThreshold(2, 30, 0.9)
    thresholds.decisions.zero_()
    np.testing.assert_allclose(thresholds.levels(), [[0.9, 0.9], [0.5, 0.5]], rtol=1e-6)


def test_one_fully_decided_class_has_flexmatch_equal_fixmatch():
    thresholds = FlexThreshold(1, 50, 0.9)
    thresholds.decisions[:, 0] = torch.arange(50) % 2
    p = torch.rand(200, 1)
    assert torch.equal(thresholds.eval()(p, torch.zeros(200).long()), FixedThreshold(0.9)(p, None))


# SoftMatch


def test_softmatch_state_and_weights_equal_loops():
    thresholds = SoftThreshold(CLASSES, momentum=0.8)
    share, mean, variance = np.full(CLASSES, 0.5), np.full(CLASSES, 0.5), np.ones(CLASSES)
    for probabilities, indices in steps_of_probabilities():
        p = probabilities.double().numpy()
        q = np.empty_like(p)
        for c in range(CLASSES):
            share[c] = 0.8 * share[c] + 0.2 * p[:, c].mean()
            for i in range(len(p)):
                yes, no = p[i, c] / share[c], (1 - p[i, c]) / (1 - share[c])
                q[i, c] = (yes if p[i, c] > 0.5 else no) / (yes + no)
            mean[c] = 0.8 * mean[c] + 0.2 * q[:, c].mean()
            variance[c] = 0.8 * variance[c] + 0.2 * q[:, c].var(ddof=1)
        sigma = np.sqrt(variance) / 2
        expected = np.where(q < mean, np.exp(-((q - mean) ** 2) / (2 * sigma**2)), 1.0)
        np.testing.assert_allclose(
            thresholds(probabilities, indices), expected, rtol=2e-4, atol=1e-6
        )
        for ours, theirs in (
            (thresholds.mean, mean),
            (thresholds.variance, variance),
            (thresholds.positive, share),
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert expected.min() < 0.5 and (expected == 1).any()


def test_alignment_gives_rare_findings_their_weight():
    p = torch.cat([torch.full((95, 1), 0.02), torch.full((5, 1), 0.7)])
    aligned = SoftThreshold(1, momentum=0.0)(p, None)
    assert aligned[-1] == 1 and aligned[0] > 0.5
    doubtful = torch.cat([p, torch.tensor([[0.4]])])
    assert SoftThreshold(1, momentum=0.0)(doubtful, None)[-1] < 0.01, (
        "negative by a little, for a class of 5 %"
    )


def test_softmatch_starts_with_everything_and_survives_one_record_and_certainty():
    thresholds = SoftThreshold(CLASSES)
    assert (thresholds(torch.rand(1, CLASSES), None) > 0.5).all()
    for p in (torch.zeros(1, CLASSES), torch.ones(4, CLASSES)):
        for momentum in (0.0, 0.999):
            assert torch.isfinite(SoftThreshold(CLASSES, momentum=momentum)(p, None)).all()


# What all share


def every_threshold() -> list[nn.Module]:
    return [
        FixedThreshold(0.6),
        FlexThreshold(CLASSES, 10, 0.6),
        SoftThreshold(CLASSES, momentum=0.9),
    ]


@pytest.mark.parametrize(
    "thresholds", every_threshold(), ids=lambda thresholds: type(thresholds).__name__
)
def test_nothing_is_learnt_or_counted_in_evaluation(thresholds):
    objective = FixMatch(Linear(), thresholds)
    objective.loss(semi_batch())
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.eval().loss(semi_batch(step=1))
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert {name for name in before if "thresholds" in name} == {
        f"thresholds.{name}" for name, _ in thresholds.named_buffers()
    }, "all state is in the checkpoint"


@pytest.mark.parametrize(
    "thresholds", every_threshold()[1:], ids=lambda thresholds: type(thresholds).__name__
)
def test_the_state_is_that_of_all_processes(thresholds, monkeypatch):
    (p, indices), alone = next(steps_of_probabilities(pool=8)), deepcopy(thresholds)
    alone(p, indices)
    others = {torch.float32: p[4:], torch.int64: indices[4:]}
    monkeypatch.setattr(fixmatch, "gathered", lambda values: [values, others[values.dtype]])
    thresholds(p[:4], indices[:4])
    for (name, ours), theirs in zip(thresholds.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_the_report_runs_since_the_last_one(plain_views):
    objective = FixMatch(Linear(), FixedThreshold(0.7))
    assert all(math.isnan(value) for value in objective.report().values())
    objective.loss(semi_batch(step=0))
    first = objective.report()
    objective.loss(semi_batch(step=1, unlabelled=9))
    second = objective.report()
    for step, unlabelled in ((0, 6), (1, 9)):
        objective.loss(semi_batch(step=step, unlabelled=unlabelled))
    assert objective.report()["passed"] == pytest.approx(
        (6 * first["passed"] + 9 * second["passed"]) / 15
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedThreshold(0.6),
        lambda: FlexThreshold(2, 32, 0.6),
        lambda: SoftThreshold(2, momentum=0.9),
    ],
    ids=["fixed", "flex", "soft"],
)
def test_resumed_equals_undisturbed(make, tmp_path):
    trained = check_semi_resume(
        lambda: FixMatch(Classifier(TinyEncoder(), 2, dropout=0.1), make()), tmp_path
    )
    start = make().state_dict()
    for name, value in trained.thresholds.state_dict().items():
        assert not torch.equal(value, start[name]), f"{name} was in play"


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (
            lambda: FixedThreshold(0.4),
            "No two-way decision has a confidence threshold of 0.4; choose one from 0.5",
        ),
        (lambda: FlexThreshold(2, 10, 1.2), "threshold of 1.2; choose"),
        (lambda: FixedThreshold(float("nan")), "threshold of nan; choose"),
        (
            lambda: FixMatch(Linear(), FixedThreshold()).loss(tiny_batch(time=20)),
            "FixMatch also learns from unlabelled records and this batch has none; make the "
            "batches with SemiBatches",
        ),
    ],
)
def test_bad_input_is_one_sentence(action, message):
    with pytest.raises(DataError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0
