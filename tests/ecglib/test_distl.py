"""DISTL: its losses, batches with and without labels, and the teacher."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ecglib.batches import step_generator
from ecglib.ema import average_of
from ecglib.encoders.transformer import DropPath, set_drop_path
from ecglib.encoders.vit1d import ViT1d
from ecglib.errors import DataError
from ecglib.evaluate.draws import Interval, PatientDraws, calibration_error
from ecglib.evaluate.metrics import expected_calibration_error
from ecglib.records import Records
from ecglib.selfsup.crops import MultiCrop, encode_views
from ecglib.selfsup.dino import dino_loss
from ecglib.semisup.distl import DISTL, StageBatch, StageBatches, ramp, soft_label_loss
from ecglib.supervised import Classifier
from toolkit import TRANSFORMS

OPTIONS = {"prototypes": 16, "hidden": 24, "bottleneck": 8, "local_views": 2}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny_network() -> Classifier:
    return Classifier(ViT1d(patch=10, width=24, depth=2, heads=3, length=100), 2)


def tiny_distl(**settings) -> DISTL:
    transforms = settings.pop("transforms", TRANSFORMS)
    return DISTL(tiny_network(), transforms, **{"unlabelled_steps": 20, **OPTIONS, **settings})


def batch_of(labelled: bool, count: int = 6, step: int = 0) -> StageBatch:
    generator = torch.Generator().manual_seed(1)
    signals = torch.randn(count, 12, 100, generator=generator)
    targets = (torch.rand(count, 2, generator=generator) < 0.5).float()
    return StageBatch(
        signals,
        targets if labelled else targets[:, :0],
        torch.arange(count),
        step_generator(0, step),
        labelled,
    )


def test_soft_labels_equal_a_slow_version_and_teach_the_student_only():
    logits, answers = torch.randn(5, 3, requires_grad=True), torch.rand(5, 3, requires_grad=True)
    terms = []
    for z, q in zip(
        logits.detach().flatten().tolist(), answers.detach().flatten().tolist(), strict=True
    ):
        p = 1 / (1 + math.exp(-z))
        terms.append(-q * math.log(p) - (1 - q) * math.log(1 - p))
    loss = soft_label_loss(logits, answers)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-5)
    loss.backward()
    assert logits.grad.abs().sum() > 0 and answers.grad is None
    least = -(answers * answers.log() + (1 - answers) * (1 - answers).log()).mean()
    assert soft_label_loss(torch.logit(answers), answers).item() == pytest.approx(
        least.item(), rel=1e-5
    )


def test_ramp_has_the_published_five_steps():
    asked = [ramp(progress) for progress in (0.0, 0.1, 0.25, 0.5, 0.7, 0.99, 1.0)]
    assert asked == pytest.approx([0.4, 0.4, 0.8, 1.2, 1.6, 2.0, 2.0])


def stage_batches(
    records: Records, batch_size: int = 8, every: float = 16, unlabelled: int = 60
) -> StageBatches:
    return StageBatches(
        records, np.arange(20), np.arange(20, 20 + unlabelled), batch_size, 1.0, every, 0
    )


def test_corrections_are_counted_in_unlabelled_records_not_in_steps(records: Records):
    for batch_size in (4, 8, 16):
        batches = stage_batches(records, batch_size)
        kinds = [batches(step).labelled for step in range(60)]
        rounds = math.ceil(20 / batch_size)
        assert kinds[: 16 // batch_size + rounds] == [False] * (16 // batch_size) + [True] * rounds
        assert batches.unlabelled_steps(60) == kinds.count(False)
    assert not any(stage_batches(records, every=math.inf)(step).labelled for step in range(30))
    assert all(stage_batches(records, unlabelled=0)(step).labelled for step in range(30))
    with pytest.raises(DataError, match="cannot come after every 0 unlabelled"):
        stage_batches(records, every=0)
    with pytest.raises(DataError, match="Record 019 is both labelled and unlabelled"):
        StageBatches(records, np.arange(20), np.arange(19, 40), 8, 1.0, 16, 0)


def test_batches_hide_labels_and_go_through_both_pools_evenly(records: Records):
    batches = stage_batches(records, every=8)  # one unlabelled step, then three labelled ones
    seen: dict[bool, list[str]] = {True: [], False: []}
    for step in range(60):
        batch = batches(step)
        seen[batch.labelled] += list(batches.record_ids[batch.indices.numpy()])
        assert batch.targets.shape[1] == (2 if batch.labelled else 0)
    assert set(seen[True]) == {f"{place:03d}" for place in range(20)}
    assert set(seen[False]) == {f"{place:03d}" for place in range(20, 80)}
    counts = [seen[True].count(name) for name in set(seen[True])]
    assert max(counts) - min(counts) <= 1
    assert torch.equal(batches(7).signals, stage_batches(records, every=8)(7).signals)


def by_hand(model: DISTL, batch: StageBatch, pretext: float) -> torch.Tensor:
    """The loss put together view by view, for a model in evaluation mode."""
    whole = (batch.signals, torch.zeros_like(batch.indices))
    views = [
        whole,
        *MultiCrop(model.network.encoder, (0.8, 0.4, 0.4), TRANSFORMS)(
            batch.signals, step_generator(0, 0)
        ),
    ]
    student = [model.network_head(encode_views(model.network.encoder, [view])) for view in views]
    teacher = [
        model.teacher_head(encode_views(model.teacher.encoder, [view])) for view in views[:2]
    ]
    logits = model.network.head(encode_views(model.network.encoder, views[1:2]))
    if batch.labelled:
        classes = F.binary_cross_entropy_with_logits(logits, batch.targets)
    else:
        classes = ramp(float(model.progress)) * soft_label_loss(
            logits, torch.sigmoid(model.teacher(batch.signals))
        )
    return pretext * dino_loss(student, teacher, model.center) + (1 - pretext) * classes


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("pretext", [0.0, 0.3, 1.0])
def test_loss_is_the_sum_of_its_parts(pretext: float, labelled: bool):
    model = tiny_distl(pretext=pretext).eval()
    model.progress.fill_(0.5)
    batch = batch_of(labelled)
    torch.testing.assert_close(model.loss(batch), by_hand(model, batch_of(labelled), pretext))


def test_without_noise_the_class_head_sees_the_clean_crop():
    model = tiny_distl(pretext=0.0, noised=False, transforms=[])
    expected = F.binary_cross_entropy_with_logits(
        model.network(batch_of(True).signals), batch_of(True).targets
    )
    torch.testing.assert_close(model.loss(batch_of(True)), expected)
    noised = tiny_distl(pretext=0.0, transforms=[])
    noised.load_state_dict(model.state_dict())
    assert not torch.isclose(noised.loss(batch_of(True)), expected)


def test_gradients_reach_the_student_alone_and_the_heads_that_are_asked():
    for pretext, silent in ((0.0, "network_head"), (1.0, "network.head")):
        model = tiny_distl(pretext=pretext)
        model.loss(batch_of(False)).backward()
        given = {
            name
            for name, value in model.named_parameters()
            if value.grad is not None and value.grad.any()
        }
        assert given and all(name.startswith("network") for name in given)
        assert not any(name.startswith(silent) for name in given)


def test_the_teacher_moves_after_unlabelled_batches_only():
    model = tiny_distl()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.1
    for labelled in (True, False):
        before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
        model.loss(batch_of(labelled))
        model.after_step(0.5)
        moved = any(
            not torch.equal(value, before[name])
            for name, value in model.teacher.state_dict().items()
        )
        assert moved == (not labelled)


def test_an_average_has_neither_dropout_nor_stochastic_depth():
    network = Classifier(ViT1d(patch=10, width=24, depth=3, heads=3, length=100), 2, dropout=0.5)
    set_drop_path(network.encoder, 0.4)
    assert [m.p for m in network.modules() if isinstance(m, DropPath)] == pytest.approx(
        [0.0, 0.2, 0.4]
    )
    average, signals = average_of(network).train(), torch.randn(8, 12, 100)
    assert torch.equal(average(signals), average(signals)) and not torch.equal(
        network(signals), network(signals)
    )


def test_bad_settings_are_one_sentence():
    with pytest.raises(DataError, match="pretext cannot weigh 1.5"):
        tiny_distl(pretext=1.5)


def paired_calibration_error(targets, first, second, patients, draws=1000, bins=15) -> Interval:
    sides = calibration_error(targets, first, bins), calibration_error(targets, second, bins)
    return PatientDraws(patients, draws).difference(*sides).basic()


def test_paired_calibration_error_equals_a_slow_version():
    generator = np.random.default_rng(0)
    targets = (generator.random((60, 3)) < 0.4).astype(int)
    first, second = generator.random((2, 60, 3)), generator.random((2, 60, 3))
    patients = np.repeat(np.arange(30), 2)

    def slow(probabilities: np.ndarray) -> float:
        total = 0.0
        for column in range(3):
            for low in np.arange(5) / 5:
                inside = (probabilities[:, column] >= low) & (probabilities[:, column] < low + 0.2)
                total += (
                    abs(targets[inside, column].sum() - probabilities[inside, column].sum())
                    / 60
                    / 3
                )
        return total

    assert expected_calibration_error(targets, first[0], bins=5) == pytest.approx(slow(first[0]))
    found = paired_calibration_error(targets, first, second, patients, draws=200, bins=5)
    assert found.value == pytest.approx(
        np.mean([slow(one) for one in first]) - np.mean([slow(one) for one in second])
    )
    assert found.low < found.value < found.high

    # A calibrated model against one that is not: the difference lies in the middle of its interval.
    likely = generator.random((1, 300, 3))
    truth = (generator.random((300, 3)) < likely[0]).astype(int)
    honest = paired_calibration_error(truth, likely, (likely > 0.5) * 1.0, np.arange(300))
    assert (
        abs((honest.low + honest.high) / 2 - honest.value) < 0.1 * (honest.high - honest.low) + 0.02
    )
    same = paired_calibration_error(targets, first, first, patients, draws=50)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    perfect = paired_calibration_error(
        targets, targets[None].astype(float), first, patients, draws=50
    )
    assert perfect.high < 0
    with pytest.raises(DataError, match="between 0 and 1"):
        paired_calibration_error(targets, first + 1, second, patients)
