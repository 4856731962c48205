"""Frozen and fine-tuned use of a pretrained encoder: fair starts, layer-wise rates, paired gains,
labels needed.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ecglib.encoders import make_encoder
from ecglib.errors import DataError
from ecglib.evaluate.draws import first_reached, labels_needed, paired_difference
from ecglib.evaluate.metrics import macro_auroc
from ecglib.evaluate.windows import encode_windows
from ecglib.labels import label_subsets
from ecglib.probe import probe_layer, probe_subsets
from ecglib.records import Records
from ecglib.supervised import Classifier, Training
from ecglib.train import fit
from ecgstudy.analysis.gains import transfer_gains
from ecgstudy.analysis.label_curve import frozen_validation, labels_needed_table
from ecgstudy.analysis.summary import seed_summary
from ecgstudy.arms.pretrain import untrained
from ecgstudy.arms.supervised import FromScratch
from ecgstudy.arms.transfer import FineTuned, frozen_arms, layerwise_groups, start_classifier
from ecgstudy.runs import Result, Run, keep_runs, kept_runs, tidy
from ecgstudy.study import Job, LabelSubset, Study
from toolkit import pretrain

FRACTIONS = [0.2, 1.0]
TRAINING = Training(
    encoder="xresnet1d_narrow",
    steps=4,
    batch_size=8,
    crop_seconds=1.0,
    learning_rate=0.003,
    weight_decay=0.01,
    dropout=0.0,
    transforms={},
    layer_factor=0.5,
)
ENCODERS = ["xresnet1d_narrow", "xresnet1d50", "cpc_lstm_small", "s4_small", "vit1d_small"]


@dataclass(frozen=True)
class Failing(Job):
    """A job that fails."""

    method: str = "failing"

    def settings(self) -> dict:
        return {}

    def compute(self, study: Study, workspace: Path) -> Result:
        raise ValueError("no luck")


@pytest.fixture(scope="module")
def simclr(records: Records, folder: Path) -> Run:
    return pretrain(records, folder)


@pytest.fixture(scope="module")
def runs(records: Records, folder: Path, simclr: Run) -> list[Run]:
    """Every arm of a tiny study: two frozen, one fine-tuned, one from scratch."""
    study = Study(records, folder)
    control = study.run(untrained(simclr))
    subsets = [LabelSubset(*cell, tuple(FRACTIONS)) for cell in ((0.2, 0), (0.2, 1), (1.0, 0))]
    arms = [*frozen_arms(study, simclr, subsets), *frozen_arms(study, control, subsets)]
    arms += [FineTuned(subset, simclr, TRAINING) for subset in subsets]
    arms += [FromScratch(subset, TRAINING) for subset in subsets]
    return study.grid(arms, progress_bar=False)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_has_one_rate_and_lower_layers_smaller_ones(name):
    classifier = Classifier(make_encoder(name), 3)
    groups = layerwise_groups(classifier, 0.01, 0.5)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in classifier.parameters())
    factors = {id(p): group["learning_rate_factor"] for group in groups for p in group["params"]}
    layers = classifier.encoder.layers()
    assert all(factors[id(p)] == 1.0 for p in classifier.head.parameters())
    for depth, layer in enumerate(reversed(layers), start=1):
        assert {factors[id(p)] for p in layer.parameters()} == {0.5**depth}, depth


def test_a_factor_of_zero_freezes_all_but_the_head(records, simclr):
    labelled = records.split["train"]
    classifier = start_classifier(records, labelled, simclr, TRAINING, 0)
    before = {name: value.clone() for name, value in classifier.named_parameters()}
    from ecglib.batches import CropBatches
    from ecglib.supervised import Supervised

    fit(
        Supervised(classifier),
        CropBatches(records, labelled, 8, 1.0, 0),
        3,
        groups=layerwise_groups(classifier, 0.0, 0.0),
        dtype="float32",
    )
    changed = {
        name
        for name, value in classifier.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert changed == {"head.1.weight", "head.1.bias"}


def test_fine_tuning_starts_as_the_probe(records, simclr):
    labelled = label_subsets(records, FRACTIONS, 0)[0.2]
    classifier = start_classifier(records, labelled, simclr, TRAINING, 0)
    weights, bias = probe_layer(
        simclr.predictions()["features"], records.targets, labelled, records.split
    )
    logits = encode_windows(classifier, records, np.arange(len(records)), 1.0)
    expected = simclr.predictions()["features"] @ weights.T.numpy() + bias.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_a_checkpoint_of_another_encoder_is_refused(records, simclr):
    with pytest.raises(DataError, match="a checkpoint of another network"):
        start_classifier(
            records, np.arange(40), simclr, replace(TRAINING, encoder="xresnet1d50"), 0
        )


def test_frozen_runs_are_the_probes_of_the_kept_features(records, simclr, runs):
    split = records.split
    run = next(
        run
        for run in runs
        if run.spec.method == "simclr" and run.spec.value("protocol") == "frozen"
    )
    subset = label_subsets(records, FRACTIONS, run.spec.seed)[run.spec.fraction]
    assert run.predictions()["labelled"].tolist() == subset.tolist()
    probe = probe_subsets(
        simclr.predictions()["features"], records.targets, {"own": subset}, split
    )["own"]
    np.testing.assert_allclose(
        run.predictions()["test/probabilities"], probe["test/probabilities"], atol=1e-5
    )
    assert run.about["notes"]["penalty"] == probe["penalty"]


def test_rows_tell_encoder_and_protocol(runs, records):
    rows = tidy((row for run in runs for row in run.rows()), extra=("encoder", "protocol"))
    assert set(rows["protocol"]) == {"frozen", "fine-tuned", "supervised"}
    assert set(rows["encoder"]) == {"xresnet1d_narrow"}
    summary = seed_summary(runs, records, cell=("method", "encoder", "protocol", "fraction"))
    assert summary.groupby(["method", "protocol"]).size().to_dict() == {
        ("random", "frozen"): 2,
        ("simclr", "fine-tuned"): 2,
        ("simclr", "frozen"): 2,
        ("supervised", "supervised"): 2,
    }
    assert summary["seeds"].tolist() == [2, 1] * 4


def test_gains_are_paired_differences_to_the_right_control(runs, records):
    gains = transfer_gains(runs, records)
    assert {(row.method, row.protocol, row.over) for row in gains.itertuples()} == {
        ("simclr", "frozen", "supervised"),
        ("simclr", "frozen", "random"),
        ("random", "frozen", "supervised"),
        ("simclr", "fine-tuned", "supervised"),
    }
    test = records.split["test"]

    def scores(method: str, protocol: str) -> np.ndarray:
        members = [
            run
            for run in runs
            if (run.spec.method, run.spec.value("protocol"), run.spec.fraction)
            == (method, protocol, 0.2)
        ]
        return np.stack(
            [
                run.predictions()["test/probabilities"]
                for run in sorted(members, key=lambda r: r.spec.seed)
            ]
        )

    expected = paired_difference(
        records.targets[test],
        scores("simclr", "frozen"),
        scores("random", "frozen"),
        records.table["patient_id"].iloc[test],
    )
    row = gains[(gains["over"] == "random") & (gains["fraction"] == 0.2)].iloc[0]
    assert (row["gain"], row["low"], row["high"]) == pytest.approx(tuple(expected))


def test_first_reached_is_a_line_over_the_logarithm():
    assert first_reached([0.01, 1.0], [0.7, 0.9], 0.8) == pytest.approx(0.1)
    assert first_reached([0.01, 0.1, 1.0], [0.7, 0.9, 0.8], 0.85) == pytest.approx(10**-1.25)
    assert first_reached([0.01, 1.0], [0.7, 0.9], 0.6) == 0.01, (
        "the smallest fraction means this or fewer"
    )
    assert first_reached([0.01, 1.0], [0.7, 0.9], 0.95) == float("inf")


def test_labels_needed_finds_where_equal_scores_stand():
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 2, (200, 2))
    scores = {
        f: targets + noise * generator.normal(size=(200, 2))
        for f, noise in {0.25: 9, 0.5: 1, 1.0: 0.1}.items()
    }
    needed = labels_needed(targets, scores, scores[0.5], np.arange(200), draws=200)
    assert needed.value == pytest.approx(0.5) and needed.low <= 0.5 <= needed.high
    never = labels_needed(
        targets, {0.25: scores[0.25], 0.5: scores[0.5]}, targets.astype(float), np.arange(200), 50
    )
    assert never.value == float("inf") and never.high == float("inf")


def test_the_table_of_labels_needed_has_its_control(runs, records):
    table = labels_needed_table(runs, records, draws=50)
    control = table[table["method"] == "supervised"].iloc[0]
    test = records.split["test"]
    scratch = next(
        run for run in runs if run.spec.method == "supervised" and run.spec.fraction == 1.0
    )
    assert control["goal"] == pytest.approx(
        macro_auroc(records.targets[test], scratch.predictions()["test/probabilities"])
    )
    assert control["needed"] <= 1.0, "with all labels the control reaches itself"
    assert len(table) == 4


def test_listed_runs_are_found_and_what_is_wrong_is_named(tmp_path, folder, runs, records):
    with pytest.raises(DataError, match="run notebook 09_probe_and_fine_tune first"):
        kept_runs("label_efficiency", tmp_path, records)
    keep_runs(runs, "label_efficiency", folder)
    assert [run.spec.key for run in kept_runs("label_efficiency", folder, records)] == [
        run.spec.key for run in runs
    ]
    with pytest.raises(DataError, match="lists runs on other records"):
        kept_runs("label_efficiency", folder, records.select(np.arange(50)))


def test_workers_give_what_one_process_gives(tmp_path, records):
    jobs = [FromScratch(LabelSubset(1.0, seed, (0.2, 1.0)), TRAINING) for seed in range(2)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single = Study(records, tmp_path / "one").grid(jobs, progress_bar=False)
    finally:
        torch.set_num_threads(threads)
    study = Study(records, tmp_path / "two", workers=2)
    double = study.grid(jobs, progress_bar=False)
    for ours, theirs in zip(single, double, strict=True):
        pd.testing.assert_frame_equal(
            pd.DataFrame(ours.rows()).drop(columns="seconds"),
            pd.DataFrame(theirs.rows()).drop(columns="seconds"),
        )
    with pytest.raises(RuntimeError, match="1 of 3 runs failed.*no luck"):
        study.grid([*jobs, Failing()], progress_bar=False)


def test_a_look_on_fold_9_ranks_features(records):
    informative = np.abs(records.millivolts()).mean(axis=2)
    noise = np.random.default_rng(0).normal(size=informative.shape)
    table = frozen_validation(records, {"loudness": informative, "noise": noise}, FRACTIONS, 2)
    assert table.loc["loudness", 1.0] > 0.95 and 0.2 < table.loc["noise", 1.0] < 0.8
    assert list(table.columns) == FRACTIONS
