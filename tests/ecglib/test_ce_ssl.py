"""CE-SSL's loss, its comparators as runs, starts, cost and comparisons."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ecglib.augment import cutmix, weak_view
from ecglib.batches import CropBatches, SemiBatch, SemiBatches, step_generator
from ecglib.encoders import make_encoder
from ecglib.encoders.conv_transformer import ConvTransformer
from ecglib.errors import DataError
from ecglib.evaluate.draws import PatientDraws, f2
from ecglib.labels import label_subsets
from ecglib.lora import add_lora, low_rank_layers
from ecglib.records import Records
from ecglib.semisup.ce_ssl import CESSL, first_features
from ecglib.sources.simulate import simulate_records
from ecglib.supervised import Classifier
from ecglib.train import fit
from ecgstudy.analysis.cost import measure, saved_bytes
from ecgstudy.analysis.gains import semi_supervised_gains
from ecgstudy.arms.semi_supervised import METHODS, make_network, semi_supervised_run
from ecgstudy.arms.starts import (
    cohort_spec,
    keep_start,
    kept_starts,
    start_weights,
    without_real_labels,
)
from ecgstudy.arms.supervised import supervised_run
from ecgstudy.runs import Run, RunSpec, run_grid, run_or_load

SETTINGS = {
    "backbone": "conv_transformer_small",
    "steps": 4,
    "batch_size": 6,
    "ratio": 2,
    "crop_seconds": 2.5,
    "learning_rate": 1e-3,
    "low_rank_learning_rate": 3e-3,
    "weight_decay": 0.01,
    "rank": 4,
    "share": 0.5,
    "score": "corrected",
    "deactivation": 0.2,
    "threshold": 0.8,
    "start": "random",
}


@pytest.fixture(scope="module")
def records() -> Records:
    return simulate_records(120, seed=3)


def semi_batch(labelled: int = 5, unlabelled: int = 9) -> SemiBatch:
    generator = torch.Generator().manual_seed(1)
    signals, others = (torch.randn(n, 12, 256, generator=generator) for n in (labelled, unlabelled))
    targets = (torch.rand(labelled, 3, generator=generator) < 0.5).float()
    return SemiBatch(
        signals,
        targets,
        torch.arange(labelled),
        step_generator(0, 0),
        others,
        torch.arange(unlabelled),
    )


@pytest.mark.parametrize("unlabelled", [1, 5, 9])
def test_the_loss_is_that_of_the_labelled_part_of_a_joint_batch(unlabelled: int) -> None:
    """With any number of unlabelled records; the published code works with as many as labelled ones
    only.
    """
    torch.manual_seed(0)
    network, batch = ConvTransformer("tinylight", 3).train(), semi_batch(unlabelled=unlabelled)
    generator = step_generator(0, 0)
    signals, targets = cutmix(batch.signals, batch.targets, generator)
    joint = torch.cat([signals, weak_view(batch.unlabelled, generator)])
    logits = copy.deepcopy(network)(joint)[:5].double()
    probabilities = torch.sigmoid(logits)
    wanted = -(targets * probabilities.log() + (1 - targets) * (1 - probabilities).log()).mean()
    assert float(CESSL(network).loss(batch)) == pytest.approx(float(wanted), rel=1e-4)


def test_statistics_come_from_both_and_gradients_flow_through_them() -> None:
    torch.manual_seed(0)
    network, batch = ConvTransformer("tinylight", 3).train(), semi_batch()
    both = torch.cat([batch.signals, batch.unlabelled])
    inner = network.blocks[0].first(both)
    first_features(network, both, 5)
    norm = network.blocks[0].norm1
    torch.testing.assert_close(
        norm.running_mean, 0.1 * inner.mean(dim=(0, 2)), rtol=1e-4, atol=1e-6
    )
    leaf = batch.unlabelled.clone().requires_grad_()
    features = first_features(network, torch.cat([batch.signals, leaf]), 5)
    assert features.shape == (5, 64)
    features.square().sum().backward()
    assert leaf.grad.abs().sum() > 0, "mean and variance of the unlabelled half have gradients"


def test_without_the_norm_unlabelled_records_do_not_matter() -> None:
    torch.manual_seed(0)
    network, losses = ConvTransformer("tinylight", 3).train(), []
    for seed in (0, 1):
        batch = semi_batch()
        batch.unlabelled = torch.randn(9, 12, 256, generator=torch.Generator().manual_seed(seed))
        losses.append(float(CESSL(copy.deepcopy(network), semi_supervised_norm=False).loss(batch)))
    assert losses[0] == losses[1]


def test_an_encoder_with_norms_everywhere_takes_part_too() -> None:
    torch.manual_seed(0)
    network = Classifier(make_encoder("xresnet1d_narrow"), 3).train()
    add_lora(network, 2, 0.2)
    CESSL(network).loss(semi_batch()).backward()
    assert all(
        layer.B.grad is None or layer.B.grad.abs().sum() > 0
        for layer in low_rank_layers(network).values()
    )


def spec_of(records: Records, method: str, seed: int = 0, **more: object) -> RunSpec:
    return RunSpec(
        method,
        records.name,
        records.fingerprint,
        records.about["task"],
        0.1,
        seed,
        {**SETTINGS, **more},
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_keeps_what_it_should(
    records: Records, method: str, tmp_path: Path
) -> None:
    run = run_or_load(spec_of(records, method), semi_supervised_run(records, [0.1]), tmp_path)
    values = run.predictions()
    assert values["test/probabilities"].shape == (len(records.split["test"]), 5)
    assert set(run.weights()) == set(make_network("conv_transformer_small", 5, 0).state_dict()), (
        "merged"
    )
    notes = run.about["notes"]
    if method.startswith("ce_ssl"):
        assert len(notes["ranks"]) == 13 and set(notes["ranks"].values()) <= {2, 4}
        assert (set(notes["ranks"].values()) == {4}) == (method == "ce_ssl_without_allocation")
    if method in (
        "fixmatch",
        "flexmatch",
        "softmatch",
        "fixmatch_lora",
        "fixmatch_adalora",
        "fixmatch_dylora",
    ):
        assert 0 <= notes["history"][-1]["passed"] <= 1
    full = sum(p.numel() for p in make_network("conv_transformer_small", 5, 0).parameters())
    assert (notes["trained_parameters"] == full) == (
        method in ("supervised", "fixmatch", "flexmatch", "softmatch", "mixed_teacher")
    )


@pytest.mark.parametrize("method", ["ce_ssl", "fixmatch_adalora"])
def test_a_stopped_run_ends_in_the_same_weights(
    records: Records, method: str, tmp_path: Path
) -> None:
    from ecgstudy.arms.semi_supervised import adapt, make_objective

    def trained(folder: Path | None, stops: bool) -> dict[str, torch.Tensor]:
        labelled = label_subsets(records, [0.1], 0)[0.1]
        others = np.setdiff1d(records.split["train"], labelled)
        batches = SemiBatches(records, labelled, others, 6, 1, 2.5, 0)
        network = make_network("conv_transformer_small", 5, 0)
        adapt(method, network, batches.labelled, SETTINGS)
        objective = make_objective(method, network, 5, len(others), 8, SETTINGS)

        def interrupted(step: int) -> SemiBatch:
            if stops and step == 5:
                raise KeyboardInterrupt
            return batches(step)

        fit(objective, interrupted, 8, folder=folder, checkpoint_every=2)
        return objective.state_dict()

    whole = trained(None, False)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, True)
    again = trained(tmp_path, False)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_starts_are_kept_found_and_loaded(records: Records, tmp_path: Path) -> None:
    cohort = simulate_records(80, seed=5, task="all")
    settings = {
        "encoder": "conv_transformer_small",
        "batch_size": 8,
        "crop_seconds": 2.5,
        "steps": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "dropout": 0.0,
        "transforms": {},
    }
    with pytest.raises(DataError, match="no pretrained backbone; run notebook 11"):
        kept_starts(tmp_path)
    run = run_or_load(cohort_spec(cohort, 0, settings), supervised_run(cohort, [1.0]), tmp_path)
    keep_start(run, "simulated", tmp_path)
    found = kept_starts(tmp_path)["simulated"]
    weights = start_weights(found)
    network = make_network("conv_transformer_small", 5, 0, weights)
    assert torch.equal(network.blocks[0].first.weight, weights["blocks.0.first.weight"])
    fresh = make_network("conv_transformer_small", 5, 0)
    assert torch.equal(network.head[1].weight, fresh.head[1].weight), "the last layer stays random"
    test = records.split["test"]
    told = without_real_labels(found, records, test)
    assert told.shape == (len(test), 5) and (told >= 0).all() and (told <= 1).all()
    own = Records(
        records.signals,
        records.scale,
        records.sampling_rate,
        records.table,
        records.targets,
        ("CD", "HYP", "MI", "NORM", "unheard of"),
    )
    with pytest.raises(DataError, match="no statement of the class unheard of"):
        without_real_labels(found, own, test)
    with pytest.raises(DataError, match="does not fit the backbone .* pretrain this backbone"):
        make_network(
            "conv_transformer_small",
            5,
            0,
            {**weights, "blocks.0.first.weight": torch.zeros(2, 12, 9)},
        )
    del weights["blocks.1.first.weight"]
    with pytest.raises(DataError, match="first difference at blocks.1.first.weight"):
        make_network("conv_transformer_small", 5, 0, weights)
    (found.folder / "run.json").unlink()
    with pytest.raises(DataError, match="simulated.json: its run .* is gone"):
        kept_starts(tmp_path)


def test_unknown_names_are_told() -> None:
    with pytest.raises(ValueError, match="no backbone 'x'"):
        make_network("x", 5, 0)


def test_saved_bytes_counts_each_storage_once_and_no_parameters() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(16, 8, requires_grad=True)
    total = saved_bytes(
        lambda: F.relu(layer(x)).square().sum() + layer(x).sum(), list(layer.parameters())
    )
    assert total == x.nbytes + 2 * 16 * 4 * 4 - 16 * 4 * 4, (
        "the input, and the rectifier's result, once each"
    )


def test_deactivation_saves_activations_and_low_rank_trains_less() -> None:
    settings = {**SETTINGS, "ratio": 1, "deactivation": 0.6}
    cost = {
        method: measure(method, "conv_transformer_small", 5, 256, settings, iterations=2)
        for method in ("ce_ssl", "ce_ssl_without_deactivation", "fixmatch")
    }
    bytes_kept = {method: row["saved_activation_bytes"] for method, row in cost.items()}
    assert bytes_kept["ce_ssl"] < bytes_kept["ce_ssl_without_deactivation"] < bytes_kept["fixmatch"]
    assert cost["ce_ssl"]["trained_parameters"] < cost["fixmatch"]["trained_parameters"]
    assert cost["ce_ssl"]["stored_bytes"] < cost["fixmatch"]["stored_bytes"]
    assert cost["ce_ssl"]["rank_pass_seconds"] > 0 == cost["fixmatch"]["rank_pass_seconds"]
    assert all(row["seconds_per_iteration"] > 0 and row["peak_bytes"] > 0 for row in cost.values())


def test_gains_are_paired_and_need_the_same_seeds(records: Records, tmp_path: Path) -> None:
    specs = [
        spec_of(records, method, seed) for method in ("ce_ssl", "supervised") for seed in (0, 1)
    ]
    runs = run_grid(specs, semi_supervised_run(records, [0.1]), tmp_path, progress_bar=False)
    gains = semi_supervised_gains(runs, records)
    assert gains["metric"].tolist() == ["macro_auroc", "mean_average_precision", "macro_f2"]
    assert set(gains["over"]) == {"supervised"} and (gains["low"] <= gains["high"]).all()
    same = [Run(replace(run.spec, method="copy"), run.folder, run.about) for run in runs[:2]]
    none = semi_supervised_gains([*runs[:2], *same], records)
    assert (none[["gain", "low", "high"]] == 0).all(axis=None)
    with pytest.raises(
        DataError, match="ce_ssl .* and supervised .* were not run with the same seeds"
    ):
        semi_supervised_gains(runs[:3], records)


def test_paired_f2_against_a_loop() -> None:
    generator = np.random.default_rng(0)
    targets = generator.random((60, 3)) < 0.3
    a, b = ((generator.random((2, 60, 3)) < 0.4).astype(float) for _ in range(2))
    b[1, :, 2] = np.nan  # one model has no threshold for a class
    groups = np.repeat(np.arange(30), 2)

    def slow(chosen: np.ndarray, predicted: np.ndarray) -> float:
        means = []
        for one in predicted:
            values = []
            for c in range(3):
                truth, said = targets[chosen, c], one[chosen, c]
                if truth.any() and not np.isnan(said).any():
                    hits = (truth * said).sum()
                    values.append(
                        5
                        * hits
                        / (5 * hits + (said * ~truth).sum() + 4 * (truth * (1 - said)).sum())
                    )
            means.append(np.mean(values))
        return float(np.mean(means))

    whole = np.arange(60)
    interval = PatientDraws(groups, 200).difference(f2(targets, a), f2(targets, b))
    assert interval.value == pytest.approx(slow(whole, a) - slow(whole, b))
    draws = []
    for seed in range(400):
        patients = np.random.default_rng(seed).integers(30, size=30)
        chosen = np.concatenate([np.flatnonzero(groups == patient) for patient in patients])
        draws.append(slow(chosen, a) - slow(chosen, b))
    assert interval.low == pytest.approx(np.quantile(draws, 0.025), abs=0.05)
    assert interval.high == pytest.approx(np.quantile(draws, 0.975), abs=0.05)


def test_a_rank_pass_uses_the_labelled_batches_alone(records: Records) -> None:
    labelled = label_subsets(records, [0.1], 0)[0.1]
    batches = CropBatches(records, labelled, 6, 2.5, 0)
    assert set(batches(0).indices.tolist()) <= set(range(len(labelled)))
