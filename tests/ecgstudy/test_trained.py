"""The network behind a run gives again what the run kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ecglib.errors import DataError
from ecglib.evaluate.windows import predict_windows
from ecglib.semisup import Adaptation
from ecglib.supervised import Training
from ecgstudy.arms.pretrain import Encode
from ecgstudy.arms.self_evolving import Evolution, evolve
from ecgstudy.arms.semi_supervised import Start
from ecgstudy.arms.supervised import FromScratch
from ecgstudy.arms.trained import trained_classifier
from ecgstudy.arms.transfer import frozen_arms
from ecgstudy.methods import adapted, evolving
from ecgstudy.runs import Result, RunSpec, run_or_load
from ecgstudy.study import Study, label_grid

SUBSETS = label_grid([1.0], 1)
TRAINING = Training("xresnet1d_narrow", 2, 8, 1.0, 0.01, 0.0)
EVOLUTION = Evolution(
    encoder="vit1d_small",
    stages=1,
    first_steps=2,
    first_learning_rate=0.01,
    steps=2,
    learning_rate=0.01,
    batch_size=8,
    crop_seconds=2.0,
    weight_decay=0.0,
    dropout=0.0,
    drop_path=0.0,
    correction_every=8,
    threshold=0.9,
    transforms={},
    options={
        "pretext": 0.5,
        "prototypes": 8,
        "hidden": 8,
        "bottleneck": 4,
        "norm": True,
        "local_views": 1,
        "turnover": 2.0,
    },
)


def test_a_trained_network_scores_as_its_run_did(records, folder):
    run = Study(records, folder).run(FromScratch(SUBSETS[0], TRAINING))
    network, window = trained_classifier(run, records, folder)
    again = predict_windows(network, records, records.split["test"], window)
    np.testing.assert_allclose(again, run.predictions()["test/probabilities"], atol=1e-6)


def test_a_frozen_run_becomes_encoder_and_probe(records, folder):
    study = Study(records, folder)
    start = study.run(Encode("random", "xresnet1d_narrow", 1.0))
    (run,) = study.grid(frozen_arms(study, start, SUBSETS), progress_bar=False)
    network, window = trained_classifier(run, records, folder)
    again = predict_windows(network, records, records.split["test"], window)
    assert window == 1.0
    np.testing.assert_allclose(again, run.predictions()["test/probabilities"], atol=1e-5)


def test_a_frozen_fusion_becomes_its_encoders_and_dvme(records, folder, tmp_path, small_fusion):
    run, members = small_fusion(folder, (1.0, 0.5))
    network, window = trained_classifier(run, records, folder)
    assert window == 1.0 and not network.training
    again = predict_windows(network, records, records.split["test"])
    np.testing.assert_allclose(again, run.predictions()["test/probabilities"], atol=1e-5)
    with torch.no_grad():
        signals = torch.from_numpy(records.millivolts(np.arange(3)))
        apart = [encoder(signals) for encoder in network.encoders]
        torch.testing.assert_close(network.features(signals), torch.cat(apart, dim=1))
        torch.testing.assert_close(network(signals), network.answer(torch.cat(apart, dim=1)))
    with pytest.raises(
        DataError, match="its member random0 .* is gone; run the notebook of dvme again"
    ):
        trained_classifier(run, records, tmp_path)


def test_an_adapted_backbone_scores_as_its_run_did(records, folder):
    adaptation = Adaptation("conv_transformer_small", 2, 6, 1.0, 1e-3, 3e-3, 0.01, rank=4)
    for job in adapted(["ce_ssl", "mixed_teacher"], Start("random"), SUBSETS, adaptation):
        job = replace(job, subset=label_grid([0.5], 1)[0])
        run = Study(records, folder).run(job)
        network, window = trained_classifier(run, records, folder)
        again = predict_windows(network, records, records.split["test"], window)
        np.testing.assert_allclose(again, run.predictions()["test/probabilities"], atol=1e-6)


def test_a_stage_gives_its_student(records, folder):
    arms = evolving(["distl", "dino_fine_tuned"])
    runs = evolve(Study(records, folder), arms, label_grid([0.5], 1), EVOLUTION)
    distl = next(run for run in runs if run.spec.method == "distl")
    network, window = trained_classifier(distl, records, folder)
    again = predict_windows(network, records, records.split["test"], window)
    np.testing.assert_allclose(again, distl.predictions()["test/probabilities"], atol=1e-6)
    with pytest.raises(
        DataError, match="not the network that was fine-tuned to be scored; choose another arm"
    ):
        trained_classifier(
            next(run for run in runs if run.spec.method == "dino_fine_tuned"), records, folder
        )


def test_what_has_no_network_is_said(records, folder):
    run = Study(records, folder).run(FromScratch(SUBSETS[0], TRAINING))
    with pytest.raises(DataError, match="was made on other records"):
        trained_classifier(run, records.select(np.arange(8)), folder)
    identity = ("test", records.fingerprint, "ab", 1.0, 0)
    table = run_or_load(
        RunSpec("concatenation", *identity),
        lambda spec, workspace: Result([], {"a": np.zeros(1)}),
        folder,
    )
    with pytest.raises(DataError, match="keeps no network of its own"):
        trained_classifier(table, records, folder)
    lost = RunSpec("swav", *identity, {"protocol": "frozen", "pretraining": "0123456789ab"})
    notes = {"rebuild": "ecgstudy.arms.trained:probed_encoder"}
    probe = run_or_load(
        lost, lambda spec, workspace: Result([], {"a": np.zeros(1)}, notes=notes), folder
    )
    with pytest.raises(
        DataError, match="its pretraining 0123456789ab is gone; run the notebook of swav again"
    ):
        trained_classifier(probe, records, folder)
