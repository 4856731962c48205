"""The training loop: learning, resuming, determinism, what it refuses, and two processes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ecglib.batches import Batch, CropBatches
from ecglib.checkpoints import CHECKPOINT, load_tensors, save_tensors
from ecglib.errors import DataError, StorageError
from ecglib.train import (
    TrainingError,
    cosine_schedule,
    fit,
    parameter_groups,
    precision,
)
from toolkit import tiny_records

ROOT = Path(__file__).resolve().parents[2]


class Tiny(nn.Module):
    """A small objective with dropout, batch norm and an EMA buffer, so that everything a resume
    needs is in play.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv1d(12, 8, 5, stride=4),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.AdaptiveMaxPool1d(1),
            nn.Flatten(),
            nn.Linear(8, 2),
        )
        self.register_buffer("average", torch.zeros(2, 8))

    def loss(self, batch: Batch) -> torch.Tensor:
        noisy = batch.signals + 0.1 * torch.randn(batch.signals.shape, generator=batch.generator)
        return nn.functional.binary_cross_entropy_with_logits(
            self.network(noisy).float(), batch.targets
        )

    def after_step(self, progress: float) -> None:
        self.average.lerp_(self.network[-1].weight.detach(), 0.1 * progress)


def train_tiny(
    steps: int = 40, folder: Path | None = None, seed: int = 3, **options
) -> tuple[Tiny, pd.DataFrame]:
    torch.manual_seed(seed)
    objective = Tiny()
    records = tiny_records()
    batches = CropBatches(records, np.arange(len(records)), 8, 1.0, seed)
    history = fit(
        objective,
        batches,
        steps,
        learning_rate=0.02,
        folder=folder,
        seed=seed,
        checkpoint_every=10,
        dtype="float32",
        **options,
    )
    return objective, history


def test_the_loss_falls_and_the_history_tells():
    _, history = train_tiny(120)
    assert history["loss"].iloc[-1] < 0.6 * history["loss"].iloc[0]
    assert list(history["step"]) == [20, 40, 60, 80, 100, 120]
    assert {"learning_rate", "seconds", "precision"} <= set(history)


def test_same_seed_same_weights_other_seed_others():
    first, second, third = (train_tiny(seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["network.0.weight"], third["network.0.weight"])


class _Stop(Exception):
    pass


def test_interrupted_and_resumed_equals_undisturbed(tmp_path):
    straight, history = train_tiny(folder=tmp_path / "straight")

    def interrupt(step: int) -> dict:
        if step == 25 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise _Stop
        return {}

    with pytest.raises(_Stop):
        train_tiny(folder=tmp_path / "broken", log_every=5, watch=interrupt)
    assert int(load_tensors(tmp_path / "broken" / CHECKPOINT)[1]["step"]) == 20
    resumed, _ = train_tiny(folder=tmp_path / "broken", log_every=5, watch=interrupt)
    for (name, ours), theirs in zip(
        resumed.state_dict().items(), straight.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    logged = [
        train_tiny(folder=tmp_path / name, log_every=5)[1]["loss"].tolist()
        for name in ("broken", "fresh")
    ]
    assert logged[0] == logged[1], "the history, too, is that of an undisturbed run"
    again, repeated = train_tiny(folder=tmp_path / "straight")
    assert repeated["loss"].tolist() == history["loss"].tolist(), (
        "a finished training is opened, not repeated"
    )


def test_a_checkpoint_of_another_run_or_network_is_refused(tmp_path):
    train_tiny(folder=tmp_path)
    with pytest.raises(DataError, match="another run"):
        train_tiny(steps=50, folder=tmp_path)
    save_tensors(
        tmp_path / "other" / CHECKPOINT,
        {"model/strange": torch.zeros(2)},
        {"step": "5", "steps": "40", "seed": "3"},
    )
    with pytest.raises(DataError, match="another network"):
        train_tiny(folder=tmp_path / "other")
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match="delete it and train again"):
        train_tiny(folder=tmp_path)


def test_nan_stops_with_step_rate_and_records_and_keeps_the_checkpoint(tmp_path):
    class Breaks(Tiny):
        def loss(self, batch: Batch) -> torch.Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().loss(batch) * (float("nan") if self.calls == 16 else 1.0)

    records = tiny_records()
    with pytest.raises(
        TrainingError, match=r"step 15 with learning rate .* records r\d+.*last good checkpoint"
    ):
        fit(
            Breaks(),
            CropBatches(records, np.arange(40), 8, 1.0, 0),
            40,
            folder=tmp_path,
            checkpoint_every=10,
        )
    assert int(load_tensors(tmp_path / CHECKPOINT)[1]["step"]) == 10


def test_a_gradient_that_is_not_finite_reaches_neither_weights_nor_checkpoint(tmp_path):
    class Breaks(Tiny):
        def loss(self, batch: Batch) -> torch.Tensor:
            loss = super().loss(batch)
            # The root of 0 is 0, its slope infinite, and 0 times that is NaN: a finite loss with a
            # NaN gradient.
            return loss + (next(self.parameters()).sum() * 0.0).sqrt()

    records, objective = tiny_records(), Breaks()
    before = [value.clone() for value in objective.parameters()]
    with pytest.raises(TrainingError, match="gradient is not finite at step 0") as told:
        fit(
            objective,
            CropBatches(records, np.arange(40), 8, 1.0, 0),
            40,
            folder=tmp_path,
            checkpoint_every=1,
        )
    assert "checkpoint" not in str(told.value) and not (tmp_path / CHECKPOINT).exists()
    assert all(torch.equal(*pair) for pair in zip(objective.parameters(), before, strict=True))


def test_a_record_that_is_not_finite_is_named_alone():
    class Broken(CropBatches):
        def __call__(self, step: int) -> Batch:
            batch = super().__call__(step)
            batch.signals[3, 0, 0] = float("inf")
            self.broken = self.record_ids[batch.indices[3]]
            return batch

    batches = Broken(tiny_records(), np.arange(40), 8, 1.0, 0)
    with pytest.raises(TrainingError) as told:
        fit(Tiny(), batches, 4)
    assert f"on the records {batches.broken};" in str(told.value)


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises((StorageError, DataError), match="file"):
        train_tiny(steps=10, folder=tmp_path / "file" / "run")


def test_schedules():
    rates = [cosine_schedule(p) for p in np.linspace(0, 1, 101)]
    assert (
        rates[0] == 0
        and max(rates) == pytest.approx(1.0)
        and np.argmax(rates) == 10
        and rates[-1] == pytest.approx(0)
    )


def test_biases_and_norms_do_not_decay():
    decayed, free = parameter_groups(Tiny(), 0.1)
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in free["params"])
    assert free["weight_decay"] == 0 and decayed["weight_decay"] == 0.1


def test_groups_scale_their_rate():
    torch.manual_seed(0)
    objective, records = Tiny(), tiny_records()
    start = objective.network[0].weight.clone()
    groups = [
        {"params": list(objective.network[0].parameters()), "learning_rate_factor": 0.0},
        {"params": list(objective.network[-1].parameters())},
    ]
    head = objective.network[-1].weight.clone()
    fit(
        objective,
        CropBatches(records, np.arange(40), 8, 1.0, 0),
        5,
        groups=groups,
        weight_decay=0.0,
    )
    assert torch.equal(objective.network[0].weight, start) and not torch.equal(
        objective.network[-1].weight, head
    )


def test_every_record_comes_equally_often_and_crops_are_cuts():
    records = tiny_records(10)
    batches = CropBatches(records, np.arange(10), 4, 0.5, seed=1)
    seen = torch.cat([batches(step).indices for step in range(5)])
    assert torch.bincount(seen, minlength=10).tolist() == [2] * 10
    batch = batches(3)
    whole = torch.from_numpy(records.millivolts(batch.indices.numpy()))
    windows = whole.unfold(2, 50, 1).permute(0, 2, 1, 3)
    distance = (windows - batch.signals[:, None]).abs().amax(dim=(2, 3)).amin(dim=1)
    assert distance.max() < 1e-6
    assert torch.equal(batch.signals, batches(3).signals)


def test_batches_refuse_nothing_and_too_long_crops():
    records = tiny_records(10)
    with pytest.raises(DataError, match="no record to train on"):
        CropBatches(records, np.array([], dtype=int), 4, 1.0, 0)
    with pytest.raises(DataError, match="does not fit"):
        CropBatches(records, np.arange(10), 4, 5.0, 0)


def test_precision_names_what_the_device_does():
    assert precision("cpu") in ("bfloat16", "float32")


SCRIPT = """
import sys, torch, numpy as np
sys.path[:0] = [{root!r}, {tests!r}, {tests!r} + "/ecglib"]
from test_train import *
torch.set_num_threads(1)
class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 2)
    def loss(self, batch):
        logits = self.layer(batch.signals.std(dim=2))
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.targets)
torch.manual_seed(0)
objective, records = Plain(), tiny_records()
fit(objective, CropBatches(records, np.arange(40), 8, 1.0, 0), 20, folder=sys.argv[1],
    dtype="float32", learning_rate=0.05)
if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
    save_tensors(sys.argv[1] + "/weights.safetensors", objective.state_dict())
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def test_two_processes_train_the_same_weights_as_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--master-port=29513",
    ]
    for name, start in (("one", [sys.executable]), ("two", launcher)):
        done = subprocess.run(
            [*start, str(script), str(tmp_path / name)], capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_tensors(tmp_path / name / "weights.safetensors")[0] for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
