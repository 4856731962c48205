"""MixedTeacher: its loss against numpy, who gets a gradient, how the teacher follows, and that a
run resumes.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ecglib.batches import step_generator
from ecglib.ema import momentum_at, momentum_for_steps
from ecglib.errors import DataError
from ecglib.semisup import mixed_teacher
from ecglib.semisup.mixed_teacher import MixedTeacher, mixed_loss, sharpen
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


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def slow_sharpen(p: np.ndarray, temperature: float) -> np.ndarray:
    yes, no = p ** (1 / temperature), (1 - p) ** (1 / temperature)
    return yes / (yes + no)


def test_sharpening_is_the_published_formula():
    logits = torch.randn(50)
    for temperature in (0.25, 0.5, 1.0):
        expected = slow_sharpen(sigmoid(logits.double().numpy()), temperature)
        np.testing.assert_allclose(sharpen(logits, temperature), expected, rtol=1e-5)
    torch.testing.assert_close(sharpen(logits, 1.0), torch.sigmoid(logits))
    np.testing.assert_allclose(sharpen(logits, 0.001), (logits > 0).float(), atol=1e-4)


def test_loss_equals_a_slow_numpy_version():
    logits, targets = torch.randn(7, CLASSES), torch.rand(7, CLASSES)
    supervised = cross_entropy(logits[:3].numpy(), targets[:3].numpy()).mean()
    squared = np.mean((sigmoid(logits[3:].numpy()) - targets[3:].numpy()) ** 2)
    assert mixed_loss(logits, targets, 3, 4.0).item() == pytest.approx(
        supervised + 4 * squared, rel=1e-5
    )
    assert mixed_loss(logits, targets, 3, 0.0).item() == pytest.approx(supervised, rel=1e-5)
    perfect = torch.logit(targets, eps=1e-6)
    assert mixed_loss(perfect, targets, 3, 1e3) - mixed_loss(
        perfect, targets, 3, 0.0
    ) == pytest.approx(0, abs=1e-3)


class Mix:
    """Mixup with partner and share that numpy knows."""

    def __init__(self, rows: int) -> None:
        self.partner, self.share = np.arange(rows)[::-1].copy(), np.linspace(0.5, 1, rows)

    def mixed(self, values: np.ndarray) -> np.ndarray:
        share = self.share.reshape(-1, *[1] * (values.ndim - 1))
        return share * values + (1 - share) * values[self.partner]

    def __call__(
        self, signals: Tensor, targets: Tensor, generator: torch.Generator
    ) -> list[Tensor]:
        return [
            torch.from_numpy(self.mixed(values.numpy())).float() for values in (signals, targets)
        ]


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.2, 0.7])
def test_the_objective_equals_a_slow_numpy_version(monkeypatch, progress):
    mix, views = Mix(10), []
    monkeypatch.setattr(mixed_teacher, "mixup", mix)
    monkeypatch.setattr(
        mixed_teacher, "weak_view", lambda s, g: views.append(1) or s + 0.1 * len(views)
    )
    network, batch = Linear(), semi_batch()
    objective = MixedTeacher(network, 100)
    nn.init.normal_(objective.teacher[1].bias)
    objective.progress.fill_(progress)
    asked, learnt = batch.unlabelled + 0.1, batch.unlabelled + 0.2
    p = sigmoid(objective.teacher.slow(asked))
    targets = mix.mixed(np.concatenate([batch.targets.numpy(), slow_sharpen(p, 0.5)]))
    signals = mix.mixed(torch.cat([batch.signals, learnt]).numpy())
    logits = network.slow(torch.from_numpy(signals).float())
    expected = cross_entropy(logits[:4], targets[:4]).mean()
    expected += min(progress / 0.25, 1) * np.mean((sigmoid(logits[4:]) - targets[4:]) ** 2)
    assert objective.loss(batch).item() == pytest.approx(expected, rel=1e-5)
    assert network.sizes == [10] and objective.teacher.sizes == [6], (
        "two thirds of FixMatch's 16 rows get a gradient"
    )
    report = objective.report()
    assert report["confidence"] == pytest.approx(np.maximum(p, 1 - p).mean())
    assert report["positive"] == pytest.approx((p > 0.5).mean())
    assert all(math.isnan(value) for value in objective.report().values())


def test_gradients_reach_the_student_alone():
    objective = MixedTeacher(Classifier(TinyEncoder(), CLASSES), 100)
    objective.progress.fill_(1.0)
    objective.loss(semi_batch()).backward()
    for name, parameter in objective.named_parameters():
        student = name.startswith("network.")
        assert parameter.requires_grad == student and (parameter.grad is not None) == student, name


def test_the_teachers_answers_are_constants():
    objective, batch = MixedTeacher(Linear(), 100), semi_batch()
    objective.teacher = (
        objective.network
    )  # if its gradient flowed anywhere, it would be into these weights
    objective.progress.fill_(1.0)
    objective.loss(batch).backward()
    got = objective.network[1].weight.grad.clone()
    objective.zero_grad()
    frozen = Linear()
    frozen.load_state_dict(objective.network.state_dict())
    objective.teacher, batch.generator = frozen.requires_grad_(False), step_generator(0, 0)
    objective.loss(batch).backward()
    torch.testing.assert_close(got, objective.network[1].weight.grad)


def test_the_teacher_follows_at_the_speed_of_the_run():
    objective = MixedTeacher(Classifier(TinyEncoder(), CLASSES, dropout=0.3), 50)
    first = objective.teacher.head[1].bias.clone()
    objective.network.head[1].bias.data += 1.0
    objective.after_step(0.25)
    moved = 1 - momentum_at(0.25, momentum_for_steps(50, 10.0))
    torch.testing.assert_close(
        objective.teacher.head[1].bias - first, torch.full((CLASSES,), moved)
    )
    assert objective.progress == 0.25
    for step in range(1, 51):
        objective.after_step(step / 50)
    left = 1 - (objective.teacher.head[1].bias - first)
    assert (left < 1e-3).all(), "nothing of the start is left"
    dropouts = [
        [m.p for m in part.modules() if isinstance(m, nn.Dropout)]
        for part in (objective.teacher, objective.network)
    ]
    assert set(dropouts[0]) == {0.0} and set(dropouts[1]) == {0.1, 0.3}, (
        "the teacher alone has no dropout"
    )


def test_randomness_comes_from_the_batch():
    losses = []
    for global_seed, step in ((0, 0), (1, 0), (0, 1)):
        torch.manual_seed(3)
        objective, batch = MixedTeacher(Linear(), 100), semi_batch()
        torch.manual_seed(global_seed)
        batch.generator = step_generator(5, step)
        losses.append(objective.loss(batch).item())
    assert losses[0] == losses[1] != losses[2]


def test_nothing_is_counted_in_evaluation():
    objective = MixedTeacher(Linear(), 100).eval()
    objective.loss(semi_batch())
    assert math.isnan(objective.report()["confidence"])


def test_resumed_equals_undisturbed(tmp_path):
    check_semi_resume(lambda: MixedTeacher(Classifier(TinyEncoder(), 2, dropout=0.1), 40), tmp_path)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (
            lambda: MixedTeacher(Linear(), 10).loss(tiny_batch(time=20)),
            "MixedTeacher also learns from unlabelled records and this batch has none; make the "
            "batches with SemiBatches",
        ),
    ],
)
def test_bad_input_is_one_sentence(action, message):
    with pytest.raises(DataError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0
