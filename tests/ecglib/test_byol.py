"""BYOL's loss, its moving average, where gradients go, and that a stopped run resumes to the same
weights.
"""

import numpy as np
import pytest
import torch
from torch import nn

from ecglib.batches import CropBatches
from ecglib.ema import average_of, momentum_at, momentum_for_steps, update_average
from ecglib.errors import DataError
from ecglib.selfsup.byol import BYOL, byol_loss
from ecglib.selfsup.heads import projection_head
from ecglib.train import fit
from toolkit import (
    TRANSFORMS,
    Louder,
    TinyEncoder,
    check_determinism,
    check_resume,
    tiny_batch,
    tiny_records,
)


def slow_byol(p: np.ndarray, z: np.ndarray) -> float:
    distances = [
        np.sum((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2)
        for a, b in zip(p, z, strict=True)
    ]
    return float(np.mean(distances))


def test_loss_equals_a_slow_numpy_version_and_its_closed_forms():
    p, z = torch.randn(7, 5), torch.randn(7, 5)
    assert byol_loss(p, z).item() == pytest.approx(slow_byol(p.numpy(), z.numpy()), rel=1e-5)
    assert byol_loss(p, 3 * p).item() == pytest.approx(0, abs=1e-6), "lengths do not count"
    assert byol_loss(p, -p).item() == pytest.approx(4)
    assert byol_loss(torch.eye(4)[:2], torch.eye(4)[2:]).item() == pytest.approx(2)
    torch.testing.assert_close(byol_loss(p, z), byol_loss(z, p))
    assert byol_loss(p.bfloat16(), z.bfloat16()).dtype == torch.float32


def test_loss_agrees_with_lightly():
    lightly = pytest.importorskip("lightly.loss")
    p, z = torch.randn(6, 4), torch.randn(6, 4)
    torch.testing.assert_close(byol_loss(p, z), 2 + 2 * lightly.NegativeCosineSimilarity()(p, z))


def test_the_objective_is_the_sum_over_both_directions():
    objective, batch = BYOL(TinyEncoder(), [Louder()]).eval(), tiny_batch()
    nn.init.normal_(objective.target_projector[3].bias)  # else target and online are alike
    views = [batch.signals, 2 * batch.signals]
    p = [
        objective.predictor(objective.projector(objective.encoder(view))).detach().numpy()
        for view in views
    ]
    z = [objective.target_projector(objective.target_encoder(view)).numpy() for view in views]
    assert objective.loss(batch).item() == pytest.approx(
        slow_byol(p[0], z[1]) + slow_byol(p[1], z[0]), rel=1e-5
    )


def test_gradients_reach_the_online_network_alone():
    objective = BYOL(TinyEncoder(), TRANSFORMS)
    objective.loss(tiny_batch()).backward()
    for name, parameter in objective.named_parameters():
        online = not name.startswith("target_")
        assert parameter.requires_grad == online and (parameter.grad is not None) == online, name
    z = torch.randn(3, 2, requires_grad=True)
    byol_loss(torch.randn(3, 2, requires_grad=True), z).backward()
    assert z.grad is None


def test_every_parameter_of_the_target_follows_by_the_formula():
    objective = BYOL(TinyEncoder(), momentum=0.9)
    for parameter in objective.parameters():
        nn.init.normal_(parameter)
    objective.loss(tiny_batch())  # moves the running statistics
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    objective.after_step(0.25)
    momentum = 1 - 0.1 * (np.cos(np.pi / 4) + 1) / 2
    for name, value in objective.state_dict().items():
        if not name.startswith("target_"):
            assert torch.equal(value, before[name]), name
            continue
        online = before[name.removeprefix("target_")]
        expected = (
            momentum * before[name] + (1 - momentum) * online if "running" not in name else online
        )
        if "num_batches" not in name:
            torch.testing.assert_close(value, expected, msg=name)
            assert not torch.equal(value, before[name]), name
    kept = objective.target_encoder[0].bias.clone()
    objective.after_step(1.0)
    assert torch.equal(objective.target_encoder[0].bias, kept), (
        "at the end of a run the target stands still"
    )


def test_momentum_rises_to_one_and_its_size_follows_the_number_of_steps():
    assert momentum_at(0.0, 0.996) == pytest.approx(0.996) and momentum_at(1.0, 0.996) == 1.0
    assert momentum_at(0.5, 0.9) == pytest.approx(0.95)
    for steps in (50, 405, 1225):
        start = momentum_for_steps(steps, 1.7)
        assert sum(1 - momentum_at((k + 1) / steps, start) for k in range(steps)) == pytest.approx(
            1.7
        )
    assert momentum_for_steps(405, 1.7) == pytest.approx(0.9916, abs=1e-4)
    assert momentum_for_steps(1) == momentum_for_steps(3) == 0.0, "too short a run follows closely"


def test_an_average_of_a_still_network_goes_the_stated_share_of_the_way():
    online = projection_head(3, 4, 2, norm=True)
    average = average_of(online)
    start = [parameter.clone() for parameter in average.parameters()]
    for parameter in online.parameters():
        parameter.data += 1.0
    steps = 400
    for k in range(steps):
        update_average(
            average, online, momentum_at((k + 1) / steps, momentum_for_steps(steps, 2.0))
        )
    for value, first in zip(average.parameters(), start, strict=True):
        torch.testing.assert_close(
            value - first, torch.full_like(first, 1 - np.exp(-2)), atol=0.005, rtol=0
        )
        assert not value.requires_grad


def test_heads_have_the_published_sizes():
    def size(head: nn.Module) -> int:
        return sum(p.numel() for p in head.parameters())

    assert size(projection_head(512, 512, 16)) == 270_864
    byol = projection_head(512, 512, 16, norm=True)
    assert byol[0].bias is None and size(byol) == 512 * 512 + 2 * 512 + 512 * 16 + 16
    assert size(projection_head(512, 256, 128, bias=False)) == 512 * 256 + 256 * 128


def test_training_lowers_the_loss_without_collapse():
    objective, records = (
        BYOL(TinyEncoder(), TRANSFORMS, momentum=momentum_for_steps(60)),
        tiny_records(),
    )
    batches = CropBatches(records, np.arange(40), 16, 1.0, 0)
    history = fit(objective, batches, 60, learning_rate=0.01, dtype="float32")
    assert history["loss"].iloc[-1] < 0.5 * history["loss"].iloc[0]
    features = objective.encoder.eval()(torch.from_numpy(records.millivolts(np.arange(40))))
    assert features.std(dim=0).mean() > 0.01


def test_resumed_equals_undisturbed(tmp_path):
    check_resume(lambda: BYOL(TinyEncoder(), TRANSFORMS, hidden=8, outputs=4), tmp_path)


def test_randomness_comes_from_the_batch():
    check_determinism(lambda: BYOL(TinyEncoder(), TRANSFORMS, hidden=8, outputs=4))


def test_a_batch_of_one_is_refused():
    with pytest.raises(DataError, match="BYOL needs at least two records"):
        BYOL(TinyEncoder()).loss(tiny_batch(1))
