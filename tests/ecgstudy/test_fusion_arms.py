"""Fusion as runs: members, comparators, trained fusions, fine-tuning."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ecglib.encoders.vit1d import vit1d_small
from ecglib.errors import DataError
from ecglib.evaluate.metrics import macro_auroc
from ecglib.fusion import stack_logits
from ecglib.probe import probe_subsets
from ecglib.records import Records
from ecglib.supervised import Training
from ecgstudy.analysis.gains import fusion_gains
from ecgstudy.arms.fusion import (
    FusionData,
    FusionSettings,
    TunedFusion,
    as_member,
    fused_classifier,
    supervised_member,
)
from ecgstudy.arms.pretrain import Encode
from ecgstudy.arms.supervised import FromScratch
from ecgstudy.methods import TrainedFusion, fuse, names_of
from ecgstudy.runs import Result, Run, RunSpec, run_or_load, tidy
from ecgstudy.study import LabelSubset, Study
from toolkit import labelled_records

SUBSETS = [LabelSubset(*cell, (0.2, 1.0)) for cell in ((0.2, 0), (0.2, 1), (1.0, 0))]
NETWORKS = names_of(TrainedFusion)
SETTINGS = FusionSettings(
    width=8,
    heads=2,
    hidden=6,
    dropout=0.1,
    token_dropout=0.2,
    steps=6,
    batch_size=8,
    learning_rates=[0.0001, 0.003],
)
TRAINING = Training("xresnet1d_narrow", 3, 8, 1.0, 0.003, 0.01)


def member(records: Records, folder: Path, name: str, seed: int, noise: float) -> Run:
    """A run with features that tell the class B through noise."""
    generator = np.random.default_rng(seed)
    features = records.targets[:, [1]] + noise * generator.normal(size=(len(records), 6 + seed))
    settings = {"encoder": "xresnet1d_narrow", "crop_seconds": 1.0}
    spec = RunSpec(name, records.name, records.fingerprint, "unlabelled", 0.0, seed, settings)
    return run_or_load(
        spec, lambda *_: Result([], {"features": features.astype(np.float32)}), folder
    )


@pytest.fixture(scope="module")
def data(records: Records, folder: Path) -> FusionData:
    members = {
        name: member(records, folder, name, seed, 1.0 + seed) for seed, name in enumerate("pqr")
    }
    return FusionData(records, SUBSETS, members)


@pytest.fixture(scope="module")
def runs(data: FusionData, folder: Path) -> list[Run]:
    methods = (*NETWORKS, "best_single", "concatenation", "mean_of_logits")
    found = [
        run
        for method in methods
        for run in fuse(Study(data.records, folder), data, method, SETTINGS)
    ]
    return found + [
        run
        for name in data.members
        for run in fuse(Study(data.records, folder), data, "alone", SETTINGS, [name])
    ]


def test_comparators_are_the_probes_of_the_package(data, runs, records):
    found = {
        (run.spec.method, run.spec.settings["members"], run.spec.fraction, run.spec.seed): run
        for run in runs
    }
    logits = {}
    for name, each in data.members.items():
        probes = probe_subsets(
            each[data.subsets[0]].predictions()["features"],
            records.targets,
            data.positions,
            data.split,
        )
        for subset in data.subsets:
            cell = subset.fraction, subset.seed
            kept = found["alone", name, *cell]
            expected = probes[subset]["test/probabilities"]
            np.testing.assert_allclose(
                kept.predictions()["test/probabilities"], expected, atol=1e-4
            )
            logits[name, cell] = np.log(expected / (1 - expected))
    mean = found["mean_of_logits", "p+q+r", 0.2, 1].predictions()["test/probabilities"]
    by_hand = np.mean([logits[name, (0.2, 1)] for name in "pqr"], axis=0)
    np.testing.assert_allclose(mean, 1 / (1 + np.exp(-by_hand)), atol=1e-4)
    best, validation = (
        found["best_single", "p+q+r", 0.2, 0],
        records.targets[data.split["validation"]],
    )
    chosen = best.about["notes"]["member"]
    scores = {
        name: macro_auroc(
            validation, found["alone", name, 0.2, 0].predictions()["validation/probabilities"]
        )
        for name in "pqr"
    }
    assert scores[chosen] == max(scores.values())
    expected = found["alone", chosen, 0.2, 0].predictions()["test/probabilities"]
    np.testing.assert_allclose(best.predictions()["test/probabilities"], expected, atol=1e-6)


def test_runs_tell_members_and_protocol_and_keep_token_weights(runs):
    rows = tidy((row for run in runs for row in run.rows()), extra=("protocol", "members"))
    assert set(rows["protocol"]) == {"frozen"} and {"p+q+r", "p"} <= set(rows["members"])
    dvme = next(run for run in runs if run.spec.method == "dvme")
    arrays = dvme.predictions()
    assert arrays["tokens/attention"].shape == arrays["tokens/gradient_input"].shape == (2, 3)
    assert dvme.about["notes"]["learning_rate"] in SETTINGS.learning_rates
    assert set(dvme.spec.settings["member_keys"]) == set("pqr")
    assert (
        "tokens/attention"
        not in next(run for run in runs if run.spec.method == "perceptron").predictions()
    )


def test_a_lost_run_is_made_again_and_the_others_are_opened(data, runs, tmp_path):
    first = fuse(Study(data.records, tmp_path), data, "dvme", SETTINGS)
    lost, written = (
        first[1],
        {run.folder: (run.folder / "run.json").stat().st_mtime_ns for run in first},
    )
    numbers = lost.predictions()
    shutil.rmtree(lost.folder)
    again = fuse(Study(data.records, tmp_path), data, "dvme", SETTINGS)
    changed = [
        run.folder
        for run in again
        if (run.folder / "run.json").stat().st_mtime_ns != written[run.folder]
    ]
    assert changed == [lost.folder]
    for name, values in again[1].predictions().items():
        assert np.array_equal(values, numbers[name]), name


def test_a_lone_cell_gives_the_same_numbers(data, runs, tmp_path):
    before = {(run.spec.method, run.spec.fraction, run.spec.seed): run for run in runs}
    for subsets in (data.subsets, data.subsets[1:2]):
        for again in fuse(
            Study(data.records, tmp_path / str(len(subsets))), data, "dvme", SETTINGS, [], subsets
        ):
            kept = before["dvme", again.spec.fraction, again.spec.seed]
            assert again.spec == kept.spec
            for name, values in kept.predictions().items():
                tolerance = 0 if subsets is data.subsets else 1e-5
                np.testing.assert_allclose(
                    again.predictions()[name], values, atol=tolerance, rtol=0
                )


def test_gains_are_over_every_other_method(data, runs, records, folder):
    without = fuse(
        Study(data.records, folder), data, "dvme", SETTINGS, ["p", "q"], data.subsets[:2]
    )
    gains = fusion_gains(runs + without, records)
    assert set(gains["over"]) == {
        "alone",
        "best_single",
        "concatenation",
        "mean_of_logits",
        *NETWORKS,
    }
    assert gains[gains["over"] == "dvme"][["over_members", "fraction"]].to_numpy().tolist() == [
        ["p+q", 0.2]
    ]
    assert (gains["low"] <= gains["gain"]).all() and (gains["gain"] <= gains["high"]).all()


def test_a_member_that_differs_by_cell_is_taken_by_cell(data, records, folder):
    subset = SUBSETS[0]
    own = {subset: member(records, folder, f"own{subset.fraction:g}", subset.seed, 2.0)}
    shared = data.members["p"][subset]
    both = FusionData(records, [subset], {"p": shared, "own": own})
    (run,) = fuse(Study(records, folder), both, "dvme", SETTINGS)
    assert run.spec.settings["member_keys"] == {
        "p": shared.spec.key,
        "own": own[subset].spec.key,
    }
    assert run.predictions()["tokens/attention"].shape == (2, 2)


def test_bad_members_are_named(data, records, folder):
    with pytest.raises(DataError, match="^p: a single member cannot be fused; add"):
        FusionData(records, SUBSETS, {"p": data.members["p"]})
    with pytest.raises(DataError, match="^q: a single member cannot be fused"):
        fuse(Study(data.records, folder), data, "dvme", SETTINGS, ["q"])
    others = records.select(np.arange(110))
    said = "^p: its features were computed on other records .* for 110 records.*run the notebook"
    with pytest.raises(DataError, match=said):
        FusionData(others, SUBSETS, data.members)
    moved = labelled_records()
    moved.table["fold"] = 1 + (moved.table["fold"] + 3) % 10
    with pytest.raises(DataError, match="^p: .*another split"):
        FusionData(moved, SUBSETS, data.members)
    with pytest.raises(
        DataError, match="^supervised: no xresnet1d_narrow was trained .* run notebook 09"
    ):
        supervised_member(Study(records, folder), [], SUBSETS[:1], "xresnet1d_narrow")
    with pytest.raises(ValueError, match="no fusion 'dvm'"):
        fuse(Study(records, folder), data, "dvm", SETTINGS)


@pytest.fixture(scope="module")
def encoded(records: Records, folder: Path) -> dict[str, Run]:
    """Real encoders, never trained."""
    study = Study(records, folder)
    jobs = [Encode("random", "xresnet1d_narrow", 1.0, seed) for seed in range(2)]
    return {f"random{job.seed}": study.run(job) for job in jobs}


def test_fine_tuning_starts_as_the_frozen_fusion_and_moves_the_encoders(records, folder, encoded):
    data = FusionData(records, SUBSETS[:1], encoded)
    frozen = fuse(Study(data.records, folder), data, "dvme", SETTINGS)
    classifier = fused_classifier(frozen[0], list(encoded.values()), records).eval()
    positions = data.split["test"][:4]
    raw = [torch.from_numpy(run.predictions()["features"]) for run in encoded.values()]
    for encoder, each in zip(
        classifier.encoders, raw, strict=True
    ):  # the kept features in place of its own
        encoder.forward = lambda signals, each=each: each[positions]
    expected = stack_logits(classifier.head, list(data.features.values()), positions)[0]
    torch.testing.assert_close(classifier(torch.zeros(4, 12, 100)), expected, atol=1e-4, rtol=1e-4)
    job = TunedFusion(SUBSETS[0], frozen[0], encoded, TRAINING, 0.1)
    tuned = Study(records, folder).run(job)
    assert tuned.spec.value("protocol") == "fine-tuned" and tuned.spec.settings["steps"] == 3
    own = {key.removeprefix("encoders.0."): value for key, value in tuned.weights().items()}
    name = next(key for key, value in encoded["random0"].weights().items() if value.ndim > 1)
    assert not torch.equal(own[name], encoded["random0"].weights()[name])


def test_a_supervised_member_has_the_encoder_of_each_cell(records, folder):
    study = Study(records, folder)
    trained = [study.run(FromScratch(subset, TRAINING)) for subset in SUBSETS[:2]]
    found = supervised_member(study, trained, SUBSETS[:2], "xresnet1d_narrow")
    assert list(found) == SUBSETS[:2]
    for subset, run in found.items():
        for name, value in run.weights().items():
            assert torch.equal(value, trained[subset.seed].weights()[f"encoder.{name}"])
    assert not np.allclose(*[run.predictions()["features"] for run in found.values()])


def test_a_transformer_gives_the_class_tokens_of_its_last_four_blocks(records, folder, encoded):
    study = Study(records, folder)
    run = study.run(Encode("dino", "vit1d_small", 1.0))
    tokens = as_member(study, run)
    assert tokens.predictions()["features"].shape == (120, 4 * 96)
    assert as_member(study, run).folder == tokens.folder
    encoder = vit1d_small().eval()
    encoder.load_state_dict(run.weights())
    windows = [
        encoder.class_tokens(
            torch.from_numpy(records.millivolts([3])[:, :, start : start + 100]).float()
        )
        for start in (0, 50, 100)
    ]
    expected = torch.stack(windows).mean(dim=0)[0].detach()
    np.testing.assert_allclose(tokens.predictions()["features"][3], expected, atol=1e-4)
    assert as_member(study, encoded["random0"]) is encoded["random0"]
