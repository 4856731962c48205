"""Stages that go on from each other: who sees which labels, what goes on, and what is kept."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ecglib.errors import DataError
from ecglib.records import Records
from ecglib.train import TrainingError, fit
from ecgstudy.analysis.gains import self_evolving_gains
from ecgstudy.analysis.self_evolving import stage_summary
from ecgstudy.arms.self_evolving import LABELS_ALONE, Evolution, Evolved, evolve, stage_pools
from ecgstudy.methods import SelfEvolving, evolving, names_of
from ecgstudy.runs import MODEL, Run, tidy
from ecgstudy.study import LabelSubset, Study, label_grid

EVOLUTION = Evolution(
    encoder="vit1d_small",
    stages=2,
    first_steps=3,
    first_learning_rate=0.004,
    steps=4,
    learning_rate=0.002,
    batch_size=8,
    crop_seconds=2.0,
    weight_decay=0.01,
    dropout=0.0,
    drop_path=0.1,
    correction_every=16,
    threshold=0.6,
    transforms={"gaussian_noise": {"scale": 0.1}},
    options={"prototypes": 16, "hidden": 24, "bottleneck": 8, "local_views": 2},
)
ARMS = evolving(names_of(SelfEvolving))
TAUGHT = [name for name, arm in ARMS.items() if arm.taught]
SUBSETS = label_grid([0.2], 2, 2)


def stage_run(runs: list[Run], method: str, stage: int, seed: int) -> Run:
    """One of the runs."""
    key = (method if stage else "supervised_noised", stage, seed)
    return next(
        run for run in runs if (run.spec.method, run.spec.settings["stage"], run.spec.seed) == key
    )


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
        evolve(Study(records, tmp_path), evolving(["distl"]), label_grid([1.0], 2, 2), EVOLUTION)


@pytest.fixture(scope="module")
def runs(records: Records, folder: Path) -> list[Run]:
    return evolve(Study(records, folder), ARMS, SUBSETS, EVOLUTION)


def test_every_arm_has_every_stage_and_is_opened_again(
    records: Records, folder: Path, runs: list[Run]
):
    assert len(runs) == 2 + 2 * 2 * len(ARMS)
    written = {run.folder: (run.folder / "run.json").stat().st_mtime_ns for run in runs}
    again = evolve(Study(records, folder), ARMS, SUBSETS, EVOLUTION)
    assert {run.folder: (run.folder / "run.json").stat().st_mtime_ns for run in again} == written
    taught = {run.spec.method for run in runs if "teacher/test/probabilities" in run.predictions()}
    assert taught == set(TAUGHT)


def test_a_stage_goes_on_from_the_one_before(records: Records, folder: Path, runs: list[Run]):
    for name, arm in ARMS.items():
        start, first, second = (stage_run(runs, name, stage, 1) for stage in (0, 1, 2))
        assert second.spec.settings["previous"] == first.spec.key
        assert first.spec.settings["previous"] == start.spec.key
        # With a learning rate of nothing, a stage ends where the one before ended.
        still = replace(EVOLUTION, learning_rate=0.0, weight_decay=0.0)
        ended = Study(records, folder).run(Evolved(SUBSETS[1], name, arm, still, first)).weights()
        for key, value in first.weights().items():
            if key.startswith("network") and "running" not in key and "batches_tracked" not in key:
                assert torch.equal(value, ended[key]), (name, key)


def test_teacher_heads_and_centre_go_on_as_well(
    records: Records, folder: Path, runs: list[Run], monkeypatch
):
    seen = {}

    def stop(objective, *arguments, **options):
        seen.update({name: value.clone() for name, value in objective.state_dict().items()})
        raise TrainingError("seen enough")

    monkeypatch.setattr("ecgstudy.arms.self_evolving.fit", stop)
    for name in (*TAUGHT, "dino_fine_tuned"):
        first = stage_run(runs, name, 1, 1)
        settings = replace(EVOLUTION, weight_decay=0.02)
        with pytest.raises(TrainingError):
            Study(records, folder).run(Evolved(SUBSETS[1], name, ARMS[name], settings, first))
        for key, value in first.weights().items():
            if key == "progress":
                assert seen[key] == 0 and value == 1
            else:
                assert torch.equal(seen[key], value), (name, key)


@pytest.mark.parametrize("name", ARMS)
def test_labels_are_seen_by_the_oracle_alone(
    records: Records, folder: Path, runs: list[Run], name: str, tmp_path: Path
):
    """With all other labels turned round an arm must learn the same, but for the oracle."""
    kept = stage_run(runs, name, 1, 0)
    pools = stage_pools(records, 0.2, 0, 2)
    assert np.array_equal(
        kept.predictions()["labelled"], pools[1] if name == "oracle" else pools[0]
    )
    targets = records.targets.copy()
    targets[np.setdiff1d(pools[2], pools[0])] = 1 - targets[np.setdiff1d(pools[2], pools[0])]
    turned = dataclasses.replace(records, targets=targets)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:  # the pools too are dealt by labels
        patched.setattr("ecgstudy.arms.self_evolving.stage_pools", lambda *arguments: pools)
        job = Evolved(SUBSETS[0], name, ARMS[name], EVOLUTION, stage_run(runs, name, 0, 0))
        result = job.compute(Study(turned, tmp_path), tmp_path)
    learnt = {
        key: value for key, value in result.model.state_dict().items() if key.startswith("network.")
    }
    same = all(torch.equal(value, kept.weights()[key]) for key, value in learnt.items())
    assert same == (name != "oracle")


def test_every_arm_takes_as_many_steps(runs: list[Run]):
    for run in runs:
        stage = run.spec.settings["stage"]
        last = [row["step"] for row in run.about["notes"]["history"]]
        taken = sum(step for step, after in zip(last, [*last[1:], 0]) if after <= step)
        assert taken == (EVOLUTION.steps if stage else EVOLUTION.first_steps), run.spec.name


def test_a_missing_predecessor_and_an_unknown_arm_are_named(records: Records, tmp_path: Path):
    study = Study(records, tmp_path)
    subset = LabelSubset(0.2, 0, (0.2,))
    first = None
    for name in ("supervised_noised", "distl"):
        arm = ARMS[name] if first else LABELS_ALONE
        first = study.run(Evolved(subset, name, arm, EVOLUTION, first))
    (first.folder / MODEL).unlink()
    with pytest.raises(
        DataError, match=r"stage 2 goes on from distl-stage1.*not there; run stage 1 first"
    ):
        study.run(Evolved(subset, "distl", ARMS["distl"], EVOLUTION, first))
    with pytest.raises(ValueError, match="no arm 'dstl'"):
        evolving(["dstl"])


@pytest.mark.parametrize("name", ["distl", "dino_fine_tuned", "fixmatch_noised"])
def test_a_killed_stage_ends_in_the_same_weights(
    records: Records, folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(EVOLUTION, steps=12)
    study, other = Study(records, folder), Study(records, tmp_path)
    start = study.run(Evolved(SUBSETS[0], "supervised_noised", LABELS_ALONE, settings))
    job = Evolved(SUBSETS[0], name, ARMS[name], settings, start)
    straight = study.run(job)
    # A loss that is not a number at the fifth step stops the run.
    with monkeypatch.context() as patched:
        patched.setattr("ecgstudy.arms.self_evolving.fit", _stopping)
        with pytest.raises(TrainingError):
            other.run(job)
    resumed = other.run(job)
    for (key, ours), theirs in zip(
        resumed.weights().items(), straight.weights().values(), strict=True
    ):
        assert torch.equal(ours, theirs), key
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


def test_tables_have_stage_and_network_and_arms_start_together(records: Records, runs: list[Run]):
    rows = tidy((row for run in runs for row in run.rows()), extra=("network", "stage"))
    assert set(rows["network"]) == {"student", "teacher"} and set(rows["stage"]) == {0, 1, 2}
    assert not rows["stage"].isna().any()
    summary = stage_summary(runs, records)
    assert len(summary) == 3 * (len(ARMS) + len(TAUGHT))
    assert summary[summary["stage"] == 0]["value"].nunique() == 1
    own = rows[(rows["method"] == "distl") & (rows["stage"] == 2) & (rows["network"] == "teacher")]
    own = own[(own["split"] == "test") & (own["metric"] == "expected_calibration_error")]
    shown = summary.set_index(["method", "network", "stage"]).loc[
        ("distl", "teacher", 2), "calibration_error"
    ]
    assert shown == pytest.approx(own["value"].mean())


def test_gains_are_paired_with_the_start_and_with_each_arm(records: Records, runs: list[Run]):
    gains = self_evolving_gains(runs, records)
    sides = len(ARMS) + len(TAUGHT)
    assert len(gains) == 2 * (
        2 * sides + 2 * (sides - 1)
    )  # metrics x (since the start, over each other)
    assert not gains.duplicated(
        [name for name in gains if name not in ("gain", "low", "high")]
    ).any()
    summary = stage_summary(runs, records).set_index(["method", "network", "stage"])
    row = gains[
        (gains["stage"] == 2)
        & (gains["over"] == "fixmatch_noised")
        & (gains["metric"] == "macro_auroc")
    ].iloc[0]
    expected = (
        summary.loc[("distl", "student", 2), "value"]
        - summary.loc[("fixmatch_noised", "student", 2), "value"]
    )
    assert row["gain"] == pytest.approx(expected) and row["low"] <= row["gain"] <= row["high"]
    fewer = [
        run for run in runs if not (run.spec.method == "fixmatch_noised" and run.spec.seed == 1)
    ]
    said = "fixmatch_noised student 1 0.2 and supervised_noised student 0 0.2 were not run with"
    with pytest.raises(DataError, match=f"{said} the same seeds"):
        self_evolving_gains(fewer, records)
