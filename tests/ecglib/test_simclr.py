"""SimCLR: NT-Xent against a slow version and closed forms, two processes as one, learning,
determinism and resume.
"""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ecglib.batches import CropBatches, step_generator
from ecglib.checkpoints import CHECKPOINT, load_tensors
from ecglib.errors import DataError
from ecglib.selfsup.simclr import SimCLR, nt_xent
from ecglib.train import fit
from toolkit import tiny_records

ROOT = Path(__file__).resolve().parents[2]


class TinyEncoder(nn.Module):
    """Eight features of a small convolution, with batch norm."""

    feature_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(12, 8, 5, stride=4),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
        )

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        return self.layers(signals)


def noisy(signals: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return signals + 0.3 * torch.randn(signals.shape, generator=generator)


def slow_nt_xent(
    z1: np.ndarray, z2: np.ndarray, temperature: float, same: np.ndarray | None = None
) -> float:
    z = np.concatenate([z1, z2])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    count, losses = len(z1), []
    for i in range(2 * count):
        partner = (i + count) % (2 * count)
        total = 0.0
        for k in range(2 * count):
            if k != i and (k == partner or same is None or not same[i, k]):
                total += math.exp(z[i] @ z[k] / temperature)
        losses.append(math.log(total) - z[i] @ z[partner] / temperature)
    return float(np.mean(losses))


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0])
def test_nt_xent_equals_a_slow_version(temperature):
    z1, z2 = np.random.default_rng(0).normal(size=(2, 9, 5))
    ours = nt_xent(torch.from_numpy(z1), torch.from_numpy(z2), temperature).item()
    assert ours == pytest.approx(slow_nt_xent(z1, z2, temperature), rel=1e-5)
    assert ours == pytest.approx(
        nt_xent(torch.from_numpy(z2), torch.from_numpy(z1), temperature).item(), rel=1e-6
    )
    assert ours == pytest.approx(
        nt_xent(torch.from_numpy(3 * z1), torch.from_numpy(z2), temperature).item(), rel=1e-6
    )


def test_pairs_that_are_no_negatives_leave_the_denominator():
    z1, z2 = np.random.default_rng(1).normal(size=(2, 6, 4))
    patients = np.array([0, 1, 0, 2, 3, 1] * 2)
    same = patients[:, None] == patients
    ours = nt_xent(torch.from_numpy(z1), torch.from_numpy(z2), 0.3, torch.from_numpy(same)).item()
    assert ours == pytest.approx(slow_nt_xent(z1, z2, 0.3, same), rel=1e-5)
    assert ours < slow_nt_xent(z1, z2, 0.3)


@pytest.mark.parametrize("count", [2, 32])
def test_closed_forms(count):
    alike = torch.ones(count, 3)
    assert nt_xent(alike, alike, 0.5).item() == pytest.approx(math.log(2 * count - 1), rel=1e-6)
    own = torch.eye(
        count
    )  # each pair in a direction of its own: 1 positive against 2N - 2 at a right angle
    expected = math.log(math.exp(2.0) + 2 * count - 2) - 2.0
    assert nt_xent(own, own, 0.5).item() == pytest.approx(expected, rel=1e-5)
    published = math.log(2 * math.exp(2.0) + 2 * count - 2 - math.e) - 2.0
    assert abs(nt_xent(own, own, 0.5).item() - published) > 0.01, (
        "e is subtracted in place of the self pair"
    )


def test_lightly_agrees():
    lightly = pytest.importorskip("lightly.loss")
    z1, z2 = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    assert nt_xent(z1, z2, 0.2).item() == pytest.approx(
        lightly.NTXentLoss(0.2)(z1, z2).item(), rel=1e-4
    )


def test_a_batch_of_one_is_one_sentence():
    with pytest.raises(DataError, match="at least two records in a batch; raise the batch size"):
        nt_xent(torch.ones(1, 4), torch.ones(1, 4))


def train(
    folder: Path | None = None, steps: int = 20, stop: int | None = None
) -> tuple[SimCLR, list[float]]:
    torch.manual_seed(0)
    objective = SimCLR(TinyEncoder(), [noisy], hidden=16, outputs=8)
    records = tiny_records()

    def watch(step: int) -> dict:
        if step == stop:
            raise KeyboardInterrupt
        return {}

    history = fit(
        objective,
        CropBatches(records, np.arange(40), 16, 1.0, 0),
        steps,
        learning_rate=0.02,
        folder=folder,
        log_every=1,
        checkpoint_every=5,
        dtype="float32",
        watch=watch,
    )
    return objective, history["loss"].tolist()


def test_it_learns_and_repeats_itself():
    first, losses = train(steps=60)
    assert np.mean(losses[-5:]) < losses[0] - 0.3
    again, repeated = train(steps=60)
    assert losses == repeated
    for ours, theirs in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_killed_pretraining_goes_on_to_the_same_weights(tmp_path):
    straight, losses = train()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop=13)
    assert int(load_tensors(tmp_path / CHECKPOINT)[1]["step"]) == 10
    resumed, continued = train(tmp_path)
    assert continued == losses
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_both_views_come_from_the_steps_generator():
    records = tiny_records()
    batch = CropBatches(records, np.arange(40), 8, 1.0, 0)(3)
    objective = SimCLR(TinyEncoder(), [noisy])
    values = []
    for _ in range(2):
        batch.generator = step_generator(0, 3)
        torch.rand(7)  # the global generator has no say
        values.append(objective.loss(batch).item())
    assert values[0] == values[1]


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from torch import nn
from ecglib.selfsup.simclr import nt_xent

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
# No batch norm: its statistics are those of one process.
network = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
views = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(1))
module = nn.parallel.DistributedDataParallel(network)
own = views[:, rank::2]
loss = nt_xent(module(own[0]), module(own[1]), 0.3)
loss.backward()
shared = loss.detach().clone()
dist.all_reduce(shared)
gradients = [parameter.grad.clone() for parameter in network.parameters()]
dist.destroy_process_group()

network.zero_grad()
joint = nt_xent(network(views[0]), network(views[1]), 0.3)
joint.backward()
assert torch.allclose(shared / 2, joint, atol=1e-6), (shared / 2, joint)
for ours, parameter in zip(gradients, network.parameters()):
    assert torch.allclose(ours, parameter.grad, atol=1e-6), (ours - parameter.grad).abs().max()
"""


def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path):
    (tmp_path / "loss.py").write_text(SCRIPT.format(root=str(ROOT)))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(tmp_path / "loss.py"),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
