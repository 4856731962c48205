"""Pretraining as a run: what is watched, that no label leaks, what is kept, and what is refused."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from ecglib.checkpoints import load_state
from ecglib.encoders import make_encoder
from ecglib.errors import DataError
from ecglib.evaluate.windows import encode_windows
from ecglib.records import Records
from ecgstudy.analysis.training_curves import plot_pretraining
from ecgstudy.arms.pretrain import (
    Encode,
    Watch,
    alignment,
    effective_rank,
    keep_pretrained,
    pretrained_runs,
    uniformity,
)
from ecgstudy.study import Study
from toolkit import labelled_records, pretrain


def test_alignment_and_uniformity_have_their_closed_forms():
    same = torch.randn(10, 4)
    assert alignment(same, 3 * same) == pytest.approx(0, abs=1e-6)
    assert alignment(same, -same) == pytest.approx(4, rel=1e-5)
    assert uniformity(same[:1].expand(6, -1)) == pytest.approx(0, abs=1e-5), "one point: collapse"
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite) == pytest.approx(-2 * 4, rel=1e-5)
    slow = [
        math.exp(-2 * float((a / a.norm() - b / b.norm()).square().sum()))
        for i, a in enumerate(same)
        for b in same[i + 1 :]
    ]
    assert uniformity(same) == pytest.approx(math.log(np.mean(slow)), rel=1e-4)


def test_effective_rank_counts_directions():
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(200, 1, generator=generator) @ torch.randn(1, 16, generator=generator)
    assert effective_rank(line + 5) == pytest.approx(1, abs=0.01)
    assert effective_rank(torch.ones(20, 16)) == pytest.approx(1, abs=0.01), (
        "all alike is collapse too"
    )
    plane = torch.cat([torch.eye(3), -torch.eye(3)])
    assert effective_rank(plane) == pytest.approx(3, rel=1e-3)
    assert effective_rank(torch.randn(5000, 16, generator=generator)) > 15.5


def test_the_watch_looks_without_touching():
    records = labelled_records()
    torch.manual_seed(0)
    encoder = make_encoder("xresnet1d_narrow").train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    watch = Watch(encoder, records, 1.0, "cpu")
    first, second = watch(0), watch(10)
    assert first == second and encoder.training, "the same records and views at every look"
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert first["online_probe"] > 0.8, (
        "amplitude is what tells these classes apart, and random filters see it"
    )
    assert 0 <= first["alignment"] < 2 and first["uniformity"] < 0 and first["effective_rank"] > 1


def test_labels_and_held_out_signals_do_not_reach_the_encoder(tmp_path):
    records = labelled_records()
    first = pretrain(records, tmp_path / "first").weights()
    split = records.split
    signals, targets = np.array(records.signals), 1 - records.targets
    held_out = np.concatenate([split["validation"], split["test"]])
    signals[held_out] = signals[held_out, :, ::-1]
    changed = Records(
        signals, records.scale, records.sampling_rate, records.table, targets, records.classes
    )
    second = pretrain(changed, tmp_path / "second").weights()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = pretrain(records, tmp_path / "first", seed=1).weights()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_run_keeps_weights_features_and_what_was_watched(tmp_path):
    records = labelled_records()
    run = pretrain(records, tmp_path)
    encoder = make_encoder("xresnet1d_narrow")
    load_state(encoder, run.weights(), "here")
    features = run.predictions()["features"]
    assert features.shape == (len(records), encoder.feature_size)
    again = encode_windows(encoder.eval(), records, np.arange(len(records)), 1.0)
    np.testing.assert_allclose(again, features, atol=1e-5)
    history = pd.DataFrame(run.about["notes"]["history"])
    assert history["step"].tolist() == [0, 1, 2, 3, 4, 5, 6] and np.isnan(history["loss"].iloc[0])
    assert run.about["notes"]["effective_rank"] > 1
    figure = plot_pretraining(history, "SimCLR")
    assert len(figure.axes) == 5 and figure.axes[0].get_title() == "Loss"


def test_the_random_control_is_the_start_of_the_pretraining(tmp_path):
    records = labelled_records()
    study = Study(records, tmp_path)
    control = study.run(Encode("random", "xresnet1d_narrow", crop_seconds=1.0))
    torch.manual_seed(0)
    untrained = make_encoder("xresnet1d_narrow")
    assert all(
        torch.equal(control.weights()[name], value)
        for name, value in untrained.state_dict().items()
    )


def test_what_was_kept_is_found_and_what_is_wrong_is_named(tmp_path):
    records = labelled_records()
    with pytest.raises(DataError, match="holds no pretrained encoder; run notebooks 03 to 08"):
        pretrained_runs(Study(records, tmp_path))
    run = pretrain(records, tmp_path)
    keep_pretrained(run, tmp_path)
    assert pretrained_runs(Study(records, tmp_path))["simclr"].spec.key == run.spec.key
    with pytest.raises(DataError, match="simclr.json: lists runs on other records"):
        pretrained_runs(Study(records.select(np.arange(100)), tmp_path))
    listed = tmp_path / "run_lists" / "pretrained_encoders" / "simclr.json"
    listed.write_text(json.dumps({"runs": ["gone"]}))
    with pytest.raises(DataError, match="its run gone is gone; run notebooks 03 to 08 again"):
        pretrained_runs(Study(records, tmp_path))
