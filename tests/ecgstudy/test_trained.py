"""The network behind a run gives again what the run kept."""

import numpy as np
import pytest
import torch

from ecglib.errors import DataError
from ecglib.evaluate.windows import predict_windows
from ecgstudy.arms.pretrain import encode_run, pretraining_spec
from ecgstudy.arms.self_evolving import evolve
from ecgstudy.arms.supervised import supervised_run
from ecgstudy.arms.trained import trained_classifier
from ecgstudy.arms.transfer import frozen_run, transfer_spec
from ecgstudy.runs import Result, RunSpec, run_or_load

SETTINGS = {
    "encoder": "xresnet1d_narrow",
    "steps": 2,
    "batch_size": 8,
    "crop_seconds": 1.0,
    "learning_rate": 0.01,
    "weight_decay": 0.0,
    "dropout": 0.0,
    "transforms": {},
    "fractions": [1.0],
}


def spec_of(records, method="supervised", **settings):
    return RunSpec(
        method, records.name, records.fingerprint, "ab", 1.0, 0, {**SETTINGS, **settings}
    )


def test_a_trained_network_scores_as_its_run_did(records, folder):
    run = run_or_load(spec_of(records), supervised_run(records, [1.0]), folder)
    network, window = trained_classifier(run, records, folder)
    again = predict_windows(network, records, records.split["test"], window)
    np.testing.assert_allclose(again, run.predictions()["test/probabilities"], atol=1e-6)


def test_a_frozen_run_becomes_encoder_and_probe(records, folder):
    settings = {"encoder": "xresnet1d_narrow", "crop_seconds": 1.0}
    start = run_or_load(
        pretraining_spec("random", records, 0, settings), encode_run(records), folder
    )
    spec = transfer_spec(records, start, "frozen", 1.0, 0, {"fractions": [1.0]})
    run = run_or_load(spec, frozen_run(records, [1.0], {1.0: 1}, start), folder)
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


def test_a_stage_gives_its_student(records, folder):
    settings = {
        **SETTINGS,
        "encoder": "vit1d_small",
        "stages": 1,
        "first_steps": 2,
        "first_learning_rate": 0.01,
        "crop_seconds": 2.0,
        "drop_path": 0.0,
        "correction_every": 8,
        "threshold": 0.9,
        "options": {
            "pretext": 0.5,
            "prototypes": 8,
            "hidden": 8,
            "bottleneck": 4,
            "norm": True,
            "local_views": 1,
            "turnover": 2.0,
        },
    }
    runs = evolve(records, ["distl", "dino"], 0.5, 1, settings, folder)
    distl = next(run for run in runs if run.spec.method == "distl")
    network, window = trained_classifier(distl, records, folder)
    again = predict_windows(network, records, records.split["test"], window)
    np.testing.assert_allclose(again, distl.predictions()["test/probabilities"], atol=1e-6)
    with pytest.raises(
        DataError, match="not the network that was fine-tuned to be scored; choose another arm"
    ):
        trained_classifier(next(run for run in runs if run.spec.method == "dino"), records, folder)


def test_what_has_no_network_is_said(records, folder):
    run = run_or_load(spec_of(records), supervised_run(records, [1.0]), folder)
    with pytest.raises(DataError, match="was made on other records"):
        trained_classifier(run, records.select(np.arange(8)), folder)
    table = run_or_load(
        spec_of(records, "concatenation"),
        lambda spec, workspace: Result([], {"a": np.zeros(1)}),
        folder,
    )
    with pytest.raises(DataError, match="keeps no network of its own"):
        trained_classifier(table, records, folder)
    lost = spec_of(records, "swav", protocol="frozen", pretraining="0123456789ab")
    probe = run_or_load(
        lost, lambda spec, workspace: Result([], {"a": np.zeros(1)}, torch.nn.Linear(1, 1)), folder
    )
    with pytest.raises(
        DataError, match="its pretraining 0123456789ab is gone; run the notebook of swav again"
    ):
        trained_classifier(probe, records, folder)
