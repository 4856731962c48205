"""DISTL: its losses, batches with and without labels, the teacher, and stages that go on from each
other.
"""

import dataclasses
import math
from pathlib import Path

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
from ecglib.selfsup.crops import encode_views, random_views
from ecglib.selfsup.dino import dino_loss
from ecglib.semisup.distl import DISTL, StageBatch, StageBatches, ramp, soft_label_loss
from ecglib.supervised import Classifier
from ecglib.train import TrainingError, fit
from ecgstudy.analysis.gains import self_evolving_gains
from ecgstudy.analysis.self_evolving import stage_summary
from ecgstudy.arms.self_evolving import (
    ARMS,
    WITH_TEACHER,
    evolve,
    previous_weights,
    self_evolving_run,
    stage_pools,
    stage_spec,
)
from ecgstudy.runs import open_run, run_or_load, tidy
from toolkit import TRANSFORMS

OPTIONS = {"prototypes": 16, "hidden": 24, "bottleneck": 8, "local_views": 2}
SETTINGS = {
    "encoder": "vit1d_small",
    "stages": 2,
    "first_steps": 3,
    "steps": 4,
    "batch_size": 8,
    "crop_seconds": 2.0,
    "learning_rate": 0.002,
    "first_learning_rate": 0.004,
    "weight_decay": 0.01,
    "dropout": 0.0,
    "drop_path": 0.1,
    "correction_every": 16,
    "threshold": 0.6,
    "transforms": {"gaussian_noise": {"scale": 0.1}},
    "options": OPTIONS,
}


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
        *random_views(batch.signals, (0.8, 0.4, 0.4), step_generator(0, 0), TRANSFORMS, 10),
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


def test_pools_are_nested_whole_patients_and_grow_to_everything(records: Records):
    pools = stage_pools(records, 0.1, seed=3, stages=3)
    assert [len(pool) for pool in pools] == [10, 38, 67, 96]
    for smaller, larger in zip(pools, pools[1:]):
        assert set(smaller) < set(larger)
    assert np.array_equal(np.sort(pools[-1]), records.split["train"])
    for fraction, stages in ((0.2, 3), (0.08, 5), (0.5, 1)):  # sums of shares are not exactly 1
        assert len(stage_pools(records, fraction, 0, stages)[-1]) == len(pools[-1])
    with pytest.raises(DataError, match="cannot arrive in 0 stages"):
        stage_pools(records, 0.1, 0, 0)


def test_an_empty_unlabelled_fold_is_one_sentence(records: Records, tmp_path: Path):
    with pytest.raises(
        DataError,
        match="^The unlabelled fold that arrives at T = 1 is empty .*label a smaller share",
    ):
        evolve(records, ["distl"], 1.0, 2, SETTINGS, tmp_path)


@pytest.fixture(scope="module")
def study(records: Records, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("results")
    return folder, evolve(records, list(ARMS), 0.2, 2, SETTINGS, folder)


def test_every_arm_has_every_stage_and_is_opened_again(records: Records, study: tuple[Path, list]):
    folder, runs = study
    assert len(runs) == 2 + 2 * 2 * len(ARMS)
    written = {run.folder: (run.folder / "run.json").stat().st_mtime_ns for run in runs}
    again = evolve(records, list(ARMS), 0.2, 2, SETTINGS, folder)
    assert {run.folder: (run.folder / "run.json").stat().st_mtime_ns for run in again} == written
    taught = {run.spec.method for run in runs if "teacher/test/probabilities" in run.predictions()}
    assert taught == set(WITH_TEACHER)


def test_a_stage_goes_on_from_the_one_before(records: Records, study: tuple[Path, list]):
    folder, _ = study
    for arm in ARMS:
        first, second = (stage_spec(records, arm, stage, 0.2, 1, SETTINGS) for stage in (1, 2))
        assert second.settings["previous"] == first.name
        start = stage_spec(records, "supervised", 0, 0.2, 1, SETTINGS)
        assert first.settings["previous"] == start.name
        # With a learning rate of nothing, a stage ends where the one before ended.
        still = stage_spec(
            records, arm, 2, 0.2, 1, {**SETTINGS, "learning_rate": 0.0, "weight_decay": 0.0}
        )
        still.settings["previous"] = first.name
        ended = run_or_load(still, self_evolving_run(records, folder), folder).weights()
        for name, value in previous_weights(second, folder).items():
            if (
                name.startswith("network")
                and "running" not in name
                and "batches_tracked" not in name
            ):
                assert torch.equal(value, ended[name]), (arm, name)


def test_teacher_heads_and_centre_go_on_as_well(
    records: Records, study: tuple[Path, list], monkeypatch
):
    folder, _ = study
    seen = {}

    def stop(objective, *arguments, **options):
        seen.update({name: value.clone() for name, value in objective.state_dict().items()})
        raise TrainingError("seen enough")

    monkeypatch.setattr("ecgstudy.arms.self_evolving.fit", stop)
    for arm in (*WITH_TEACHER, "dino"):
        specification = stage_spec(records, arm, 2, 0.2, 1, {**SETTINGS, "weight_decay": 0.02})
        specification.settings["previous"] = stage_spec(records, arm, 1, 0.2, 1, SETTINGS).name
        with pytest.raises(TrainingError):
            self_evolving_run(records, folder)(specification, folder)
        for name, value in previous_weights(specification, folder).items():
            if name == "progress":
                assert seen[name] == 0 and value == 1
            else:
                assert torch.equal(seen[name], value), (arm, name)


@pytest.mark.parametrize("arm", ARMS)
def test_labels_are_seen_by_the_oracle_alone(
    records: Records, study: tuple[Path, list], arm: str, tmp_path: Path
):
    """With all other labels turned round an arm must learn the same, but for the oracle."""
    folder, _ = study
    specification = stage_spec(records, arm, 1, 0.2, 0, SETTINGS)
    kept = open_run(folder / "runs" / specification.name)
    pools = stage_pools(records, 0.2, 0, 2)
    assert np.array_equal(kept.predictions()["labelled"], pools[1] if arm == "oracle" else pools[0])
    targets = records.targets.copy()
    targets[np.setdiff1d(pools[2], pools[0])] = 1 - targets[np.setdiff1d(pools[2], pools[0])]
    turned = dataclasses.replace(records, targets=targets)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:  # the pools too are dealt by labels
        patched.setattr("ecgstudy.arms.self_evolving.stage_pools", lambda *arguments: pools)
        result = self_evolving_run(turned, folder)(specification, tmp_path)
    learnt = {
        name: value
        for name, value in result.model.state_dict().items()
        if name.startswith("network.")
    }
    same = all(torch.equal(value, kept.weights()[name]) for name, value in learnt.items())
    assert same == (arm != "oracle")


def test_every_arm_takes_as_many_steps(study: tuple[Path, list]):
    for run in study[1]:
        stage = run.spec.settings["stage"]
        last = [row["step"] for row in run.about["notes"]["history"]]
        taken = sum(step for step, after in zip(last, [*last[1:], 0]) if after <= step)
        assert taken == (SETTINGS["steps"] if stage else SETTINGS["first_steps"]), run.spec.name


def test_a_missing_predecessor_and_an_unknown_arm_are_named(records: Records, tmp_path: Path):
    specification = stage_spec(records, "distl", 2, 0.2, 0, SETTINGS)
    with pytest.raises(
        DataError, match=r"stage 2 goes on from distl-stage1.*not there; run stage 1 first"
    ):
        run_or_load(specification, self_evolving_run(records, tmp_path), tmp_path)
    with pytest.raises(ValueError, match="no arm 'dstl'"):
        stage_spec(records, "dstl", 1, 0.2, 0, SETTINGS)


@pytest.mark.parametrize("arm", ["distl", "dino", "fixmatch"])
def test_a_killed_stage_ends_in_the_same_weights(
    records: Records,
    study: tuple[Path, list],
    arm: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = study
    settings = {**SETTINGS, "steps": 12}
    specification = stage_spec(records, arm, 1, 0.2, 0, settings)
    start = stage_spec(records, "supervised", 0, 0.2, 0, settings)
    run_or_load(start, self_evolving_run(records, folder), folder)
    straight = run_or_load(specification, self_evolving_run(records, folder), folder)
    other = tmp_path / "runs" / start.name
    other.parent.mkdir(parents=True)
    other.symlink_to(folder / "runs" / start.name)
    with (
        monkeypatch.context() as patched
    ):  # a loss that is not a number at the fifth step stops the run
        patched.setattr("ecgstudy.arms.self_evolving.fit", _stopping)
        with pytest.raises(TrainingError):
            run_or_load(specification, self_evolving_run(records, tmp_path), tmp_path)
    resumed = run_or_load(specification, self_evolving_run(records, tmp_path), tmp_path)
    for (name, ours), theirs in zip(
        resumed.weights().items(), straight.weights().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert np.array_equal(
        resumed.predictions()["test/probabilities"], straight.predictions()["test/probabilities"]
    )


def _stopping(objective, batches, steps, **options):
    """`fit` that keeps a checkpoint after two steps and stops after four."""

    def broken(step: int):
        batch = batches(step)
        if step == 4:
            batch.signals.fill_(float("nan"))
        return batch

    return fit(objective, broken, steps, **options, checkpoint_every=2)


def test_tables_have_stage_and_network_and_arms_start_together(
    records: Records, study: tuple[Path, list]
):
    _, runs = study
    rows = tidy((row for run in runs for row in run.rows()), extra=("network", "stage"))
    assert set(rows["network"]) == {"student", "teacher"} and set(rows["stage"]) == {0, 1, 2}
    assert not rows["stage"].isna().any()
    summary = stage_summary(runs, records)
    assert len(summary) == 3 * (len(ARMS) + len(WITH_TEACHER))
    assert summary[summary["stage"] == 0]["value"].nunique() == 1
    own = rows[(rows["method"] == "distl") & (rows["stage"] == 2) & (rows["network"] == "teacher")]
    own = own[(own["split"] == "test") & (own["metric"] == "expected_calibration_error")]
    shown = summary.set_index(["method", "network", "stage"]).loc[
        ("distl", "teacher", 2), "calibration_error"
    ]
    assert shown == pytest.approx(own["value"].mean())


def test_gains_are_paired_with_the_start_and_with_each_arm(
    records: Records, study: tuple[Path, list]
):
    _, runs = study
    gains = self_evolving_gains(runs, records)
    sides = len(ARMS) + len(WITH_TEACHER)
    assert len(gains) == 2 * (
        2 * sides + 2 * (sides - 1)
    )  # metrics x (since the start, over each other)
    assert not gains.duplicated(
        [name for name in gains if name not in ("gain", "low", "high")]
    ).any()
    summary = stage_summary(runs, records).set_index(["method", "network", "stage"])
    row = gains[
        (gains["stage"] == 2) & (gains["over"] == "fixmatch") & (gains["metric"] == "macro_auroc")
    ].iloc[0]
    expected = (
        summary.loc[("distl", "student", 2), "value"]
        - summary.loc[("fixmatch", "student", 2), "value"]
    )
    assert row["gain"] == pytest.approx(expected) and row["low"] <= row["gain"] <= row["high"]
    fewer = [run for run in runs if not (run.spec.method == "fixmatch" and run.spec.seed == 1)]
    with pytest.raises(
        DataError,
        match="fixmatch student 1 0.2 and supervised student 0 0.2 were not run with the same seeds",
    ):
        self_evolving_gains(fewer, records)


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
