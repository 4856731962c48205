"""Semi-supervised methods as runs: what they keep, where they start, what they cost and gain."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ecglib.batches import SemiBatch
from ecglib.errors import DataError
from ecglib.labels import label_subsets
from ecglib.records import Records
from ecglib.semisup import Adaptation
from ecglib.sources.simulate import simulate_records
from ecglib.supervised import Training
from ecglib.train import fit
from ecgstudy.analysis.cost import measure, saved_bytes
from ecgstudy.analysis.gains import semi_supervised_gains
from ecgstudy.arms.semi_supervised import Start, make_network
from ecgstudy.arms.starts import keep_start, kept_starts, without_real_labels
from ecgstudy.arms.supervised import FromScratch
from ecgstudy.methods import METHODS, SemiSupervised, adapted, names_of
from ecgstudy.runs import Run
from ecgstudy.study import LabelSubset, Study, label_grid

ADAPTATION = Adaptation(
    backbone="conv_transformer_small",
    steps=4,
    batch_size=6,
    ratio=2,
    crop_seconds=2.5,
    learning_rate=1e-3,
    low_rank_learning_rate=3e-3,
    weight_decay=0.01,
    rank=4,
    share=0.5,
    score="corrected",
    deactivation=0.2,
    threshold=0.8,
)
SUBSET = LabelSubset(0.1, 0, (0.1,))


@pytest.fixture(scope="module")
def records() -> Records:
    return simulate_records(120, seed=3)


@pytest.mark.parametrize("method", names_of(SemiSupervised))
def test_every_method_runs_and_keeps_what_it_should(
    records: Records, method: str, tmp_path: Path
) -> None:
    (job,) = adapted([method], Start("random"), [SUBSET], ADAPTATION)
    run = Study(records, tmp_path).run(job)
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
        method in ("supervised_cutmix", "fixmatch", "flexmatch", "softmatch", "mixed_teacher")
    )


@pytest.mark.parametrize("method", ["ce_ssl", "fixmatch_adalora"])
def test_a_stopped_run_ends_in_the_same_weights(
    records: Records, method: str, tmp_path: Path
) -> None:
    def trained(folder: Path | None, stops: bool) -> dict[str, torch.Tensor]:
        labelled = label_subsets(records, [0.1], 0)[0.1]
        others = np.setdiff1d(records.split["train"], labelled)
        network = make_network("conv_transformer_small", 5, 0)
        settings = replace(ADAPTATION, steps=8, ratio=1)
        recipe = METHODS[method].recipe
        objective, batches, _ = recipe.prepare(network, records, (labelled, others), settings)

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
    training = Training("conv_transformer_small", 2, 8, 2.5, 1e-3, 0.01)
    with pytest.raises(DataError, match="no pretrained backbone; run notebook 11"):
        kept_starts(tmp_path)
    job = FromScratch(LabelSubset(1.0, 0, (1.0,)), training, "backbone")
    run = Study(cohort, tmp_path).run(job)
    keep_start(Start("simulated", run), tmp_path)
    found = kept_starts(tmp_path)["simulated"]
    weights = found.weights()
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
    (found.run.folder / "run.json").unlink()
    with pytest.raises(DataError, match="simulated.json: its run .* is gone"):
        kept_starts(tmp_path)


def test_unknown_names_are_told() -> None:
    with pytest.raises(ValueError, match="no backbone 'x'"):
        make_network("x", 5, 0)
    with pytest.raises(ValueError, match="no semi-supervised method 'ce_sl'"):
        adapted(["ce_sl"], Start("random"), [SUBSET], ADAPTATION)


def test_saved_bytes_counts_each_storage_once_and_no_parameters() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(16, 8, requires_grad=True)
    total = saved_bytes(
        lambda: F.relu(layer(x)).square().sum() + layer(x).sum(), list(layer.parameters())
    )
    assert total == x.nbytes + 2 * 16 * 4 * 4 - 16 * 4 * 4, (
        "the input, and the rectifier's result, once each"
    )


def test_deactivation_saves_activations_and_low_rank_trains_less() -> None:
    settings = replace(ADAPTATION, ratio=1, deactivation=0.6)
    cost = {
        method: measure(method, METHODS[method].recipe, settings, 5, 256, iterations=2)
        for method in ("ce_ssl", "ce_ssl_without_deactivation", "fixmatch")
    }
    bytes_kept = {method: row["saved_activation_bytes"] for method, row in cost.items()}
    assert bytes_kept["ce_ssl"] < bytes_kept["ce_ssl_without_deactivation"] < bytes_kept["fixmatch"]
    assert cost["ce_ssl"]["trained_parameters"] < cost["fixmatch"]["trained_parameters"]
    assert cost["ce_ssl"]["stored_bytes"] < cost["fixmatch"]["stored_bytes"]
    assert cost["ce_ssl"]["rank_pass_seconds"] > 0 == cost["fixmatch"]["rank_pass_seconds"]
    assert all(row["seconds_per_iteration"] > 0 and row["peak_bytes"] > 0 for row in cost.values())


def test_gains_are_paired_and_need_the_same_seeds(records: Records, tmp_path: Path) -> None:
    subsets = label_grid([0.1], 2)
    jobs = adapted(["ce_ssl", "supervised_cutmix"], Start("random"), subsets, ADAPTATION)
    runs = Study(records, tmp_path).grid(jobs, progress_bar=False)
    gains = semi_supervised_gains(runs, records)
    assert gains["metric"].tolist() == ["macro_auroc", "mean_average_precision", "macro_f2"]
    assert set(gains["over"]) == {"supervised_cutmix"} and (gains["low"] <= gains["high"]).all()
    same = [Run(replace(run.spec, method="copy"), run.folder, run.about) for run in runs[:2]]
    none = semi_supervised_gains([*runs[:2], *same], records)
    assert (none[["gain", "low", "high"]] == 0).all(axis=None)
    with pytest.raises(
        DataError, match="ce_ssl .* and supervised_cutmix .* were not run with the same seeds"
    ):
        semi_supervised_gains(runs[:3], records)
