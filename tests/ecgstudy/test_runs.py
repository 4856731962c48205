"""The run store: keyed, atomic, resumable after kills, tidy."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ecglib.errors import StorageError
from ecglib.supervised import Training
from ecgstudy.analysis.summary import seed_summary
from ecgstudy.arms.supervised import FromScratch
from ecgstudy.runs import TABLE_COLUMNS, Result, RunSpec, run_all, run_or_load, table, tidy
from ecgstudy.study import LabelSubset, Study
from toolkit import labelled_records

ROOT = Path(__file__).resolve().parents[2]
TRAINING = Training(
    encoder="xresnet1d_narrow",
    steps=30,
    batch_size=8,
    crop_seconds=1.0,
    learning_rate=0.01,
    weight_decay=0.01,
    dropout=0.1,
    transforms={"gaussian_noise": {"scale": 0.05}},
)


def job(seed: int = 0, steps: int = 30) -> FromScratch:
    """A small training on half of the labels."""
    return FromScratch(LabelSubset(0.5, seed, (0.5, 1.0)), replace(TRAINING, steps=steps))


def constant(spec: RunSpec, workspace: Path) -> Result:
    row = {
        "split": "test",
        "metric": "macro_auroc",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "n_records": 3,
        "n_patients": 2,
    }
    return Result([row], {"scores": np.arange(4.0)}, seconds=1.5)


def test_the_key_ignores_order_and_sees_every_change():
    first = RunSpec("a", "d", "k", "l", 0.1, 0, {"x": 1, "y": {"p": 2, "q": 3}})
    same = RunSpec("a", "d", "k", "l", 0.1, 0, {"y": {"q": 3, "p": 2}, "x": 1})
    assert first.key == same.key and first.name == same.name
    others = [
        RunSpec("a", "d", "k", "l", 0.1, 1, first.settings),
        RunSpec("a", "d", "other", "l", 0.1, 0, first.settings),
        RunSpec("a", "d", "k", "l", 0.1, 0, {"x": 1, "y": {"p": 2, "q": 4}}),
    ]
    assert len({first.key, *(other.key for other in others)}) == 4


def test_a_run_is_computed_once_and_opened_after(tmp_path):
    calls = []

    def counted(spec: RunSpec, workspace: Path) -> Result:
        calls.append(spec)
        return constant(spec, workspace)

    one = RunSpec("m", "d", "k", "l", 0.1, 0)
    first, second = (run_or_load(one, counted, tmp_path) for _ in range(2))
    assert len(calls) == 1 and first.rows() == second.rows()
    np.testing.assert_array_equal(second.predictions()["scores"], np.arange(4.0))
    assert {"spec", "metrics", "machine", "packages", "seconds"} <= set(second.about)
    frame = table(tmp_path)
    assert tuple(frame.columns) == TABLE_COLUMNS and frame["seconds"].tolist() == [1.5]
    assert not list((tmp_path / "runs").glob(".*")), "no half-made folder is left"


def test_a_failed_run_does_not_stop_the_others(tmp_path):
    def fails_once(spec: RunSpec, workspace: Path) -> Result:
        if spec.seed == 1:
            raise ValueError("no luck")
        return constant(spec, workspace)

    grid = [RunSpec("m", "d", "k", "l", 0.1, seed) for seed in range(3)]
    with pytest.raises(RuntimeError, match="1 of 3 runs failed.*no luck"):
        run_all([(spec, fails_once) for spec in grid], tmp_path, progress_bar=False)
    assert sorted(table(tmp_path)["seed"]) == [0, 2]
    assert len(run_all([(spec, constant) for spec in grid], tmp_path, progress_bar=False)) == 3


def test_an_unwritable_results_folder_is_one_sentence(tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(StorageError, match="results"):
        run_or_load(RunSpec("m", "d", "k", "l", 0.1, 0), constant, tmp_path / "results")


def test_a_full_disk_says_so_and_keeps_what_is_finished(tmp_path, monkeypatch):
    finished = run_or_load(RunSpec("m", "d", "k", "l", 0.1, 0), constant, tmp_path)

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ecglib.checkpoints.save_file", full)
    with pytest.raises(StorageError, match="disk is full.*finished work is kept"):
        run_all([(RunSpec("m", "d", "k", "l", 0.1, 1), constant)], tmp_path, progress_bar=False)
    assert table(tmp_path)["seed"].tolist() == [finished.spec.seed]


def test_equal_seeds_give_equal_numbers_and_the_table_is_complete(tmp_path):
    records = labelled_records()
    first = Study(records, tmp_path / "a").run(job())
    second = Study(records, tmp_path / "b").run(job())
    assert [row["value"] for row in first.rows()] == [row["value"] for row in second.rows()]
    rows = tidy(first.rows())
    assert set(rows["split"]) == {"validation", "test"}
    wanted = {
        "macro_auroc",
        "mean_average_precision",
        "ranking_loss",
        "coverage",
        "macro_f2",
        "macro_g2",
        "hamming_loss",
    }
    assert wanted <= set(rows["metric"])
    assert rows.loc[rows["metric"] == "macro_auroc", ["low", "high"]].notna().all(axis=None)
    assert (rows["n_records"] == 48).all()
    other = Study(records, tmp_path / "a").run(job(seed=1))
    assert first.weights()["head.1.weight"].shape == other.weights()["head.1.weight"].shape
    summary = seed_summary([first, other], records)
    one, two = (
        run.rows()[[row["metric"] for row in run.rows()].index("macro_auroc")]
        for run in (first, other)
    )
    assert (
        summary["seeds"].tolist() == [2]
        and summary["low"][0] <= summary["value"][0] <= summary["high"][0]
    )
    test_values = tidy([*first.rows(), *other.rows()]).query(
        "split == 'test' and metric == 'macro_auroc'"
    )["value"]
    assert summary["value"][0] == pytest.approx(test_values.mean()) and one["split"] == two["split"]


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}, {tests!r} + "/ecgstudy"]
import torch
torch.set_num_threads(1)
from test_runs import *
import ecglib.supervised
from functools import partial
ecglib.supervised.fit = partial(ecglib.supervised.fit, checkpoint_every=5)
records = labelled_records()
print("ready", flush=True)
Study(records, sys.argv[1]).run(job(steps=60))
"""


def test_killed_five_times_a_run_ends_in_the_same_metrics(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(root=str(ROOT), tests=str(ROOT / "tests")))

    def start(folder: str) -> subprocess.Popen:
        command = [sys.executable, str(script), str(tmp_path / folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)

    assert start("undisturbed").wait(120) == 0
    training = table(tmp_path / "undisturbed")["seconds"].max()
    moment = random.Random(5)
    kills = 0
    for _ in range(5):
        process = start("killed")
        process.stdout.readline()
        time.sleep(moment.uniform(0.05, 0.6) * training)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 3, "the run was over before it could be killed"
    assert start("killed").wait(120) == 0
    ours, theirs = (
        table(tmp_path / name).drop(columns="seconds") for name in ("killed", "undisturbed")
    )
    pd.testing.assert_frame_equal(ours, theirs)
