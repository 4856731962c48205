"""Patient pairs: which crops are paired, the masked loss, what the segment order is, and what its
probes may see.
"""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ecglib.batches import CropBatches, PairBatch, PatientBatches
from ecglib.checkpoints import CHECKPOINT, load_tensors
from ecglib.errors import DataError
from ecglib.records import Records
from ecglib.selfsup.order_shortcuts import (
    ProbeNetwork,
    drift_only,
    joins_only,
    order_accuracy,
    shortcut_probes,
)
from ecglib.selfsup.patient_pairs import PatientPairs, patient_nt_xent
from ecglib.selfsup.segment_order import (
    SegmentOrder,
    all_orders,
    cut_segments,
    describe_segments,
    join_segments,
    segment_sizes,
    shuffle_segments,
)
from ecglib.selfsup.simclr import nt_xent
from ecglib.train import fit
from toolkit import tiny_records

ROOT = Path(__file__).resolve().parents[2]

PATIENTS = [
    "a",
    "b",
    "c",
    "a",
    "d",
    "e",
    "c",
    "f",
    "c",
    "g",
]  # a has two records, c three, the others one


def patient_records(patients: list[str] = PATIENTS, time: int = 400, seed: int = 0) -> Records:
    """Records whose every sample tells its record and place: lead I counts the samples, lead II
    holds the record.
    """
    count = len(patients)
    signals = np.random.default_rng(seed).normal(size=(count, 12, time)) * 0.1
    signals[:, 0], signals[:, 1] = np.arange(time) / 100, np.arange(count)[:, None] / 10
    table = pd.DataFrame(
        {
            "record_id": [f"r{i}" for i in range(count)],
            "patient_id": patients,
            "fold": 1 + np.arange(count) % 10,
            "source": "test",
        }
    )
    return Records.from_millivolts(
        signals, 100, table, np.eye(2, dtype=int)[np.arange(count) % 2], ("A", "B")
    )


class TinyEncoder(nn.Module):
    """A convolution, batch norm and mean over time."""

    feature_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(12, 8, 7, stride=2),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
        )

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        return self.layers(signals)


def halves(batch: PairBatch, lead: int) -> tuple[np.ndarray, np.ndarray]:
    """First sample of a lead in both views, as whole numbers of its unit."""
    return tuple(
        np.rint(view[:, lead, 0].numpy() * (100 if lead == 0 else 10)).astype(int)
        for view in batch.signals.chunk(2)
    )


# ---- batches


def test_pairs_are_two_records_of_one_patient_or_two_segments_apart():
    batches = PatientBatches(patient_records(), np.arange(10), 7, 1.5, seed=2)
    seen, gaps = set(), set()
    for step in range(60):
        batch = batches(step)
        (record, other), (start, end) = halves(batch, 1), halves(batch, 0)
        assert batch.indices.tolist() == [*record, *other], "the positions are those of the records"
        for k in range(7):
            patient = batches.patient_ids[batch.patients[k]]
            assert PATIENTS[record[k]] == PATIENTS[other[k]] == patient
            if PATIENTS.count(patient) > 1:
                assert record[k] != other[k]
                seen.add((record[k], other[k]))
            else:
                assert record[k] == other[k] and abs(start[k] - end[k]) >= 150
                gaps.add(
                    (start[k] < end[k], min(start[k], end[k]) == 0, abs(start[k] - end[k]) == 150)
                )
    assert seen == {(0, 3), (3, 0), *itertools.permutations((2, 6, 8), 2)}, (
        "every pair comes up, in either order"
    )
    assert {first for first, *_ in gaps} == {True, False} and len(gaps) >= 4, (
        "places and order vary"
    )


def test_views_are_whole_cuts_with_targets_of_their_records():
    records = patient_records()
    batch = PatientBatches(records, np.arange(10), 5, 1.0, seed=1)(3)
    assert (
        batch.signals.shape == (10, 12, 100)
        and batch.targets.shape == (10, 2)
        and batch.patients.shape == (5,)
    )
    whole = records.millivolts(batch.indices.numpy())
    starts = np.concatenate(halves(batch, 0))
    for view, signal, start in zip(batch.signals.numpy(), whole, starts, strict=True):
        np.testing.assert_allclose(view, signal[:, start : start + 100], atol=1e-6)
    np.testing.assert_array_equal(batch.targets.numpy(), records.targets[batch.indices.numpy()])


def test_each_patient_comes_once_a_pass_and_batches_are_repeatable():
    batches, again = (
        PatientBatches(patient_records(), np.arange(10), 7, 1.0, seed=5) for _ in range(2)
    )
    for step in (4, 0, 9):
        assert sorted(batches(step).patients.tolist()) == list(range(7))
        assert torch.equal(batches(step).signals, again(step).signals)
    assert not torch.equal(batches(0).signals, batches(1).signals)
    other = PatientBatches(patient_records(), np.arange(10), 7, 1.0, seed=6)
    assert not torch.equal(other(0).signals, batches(0).signals)


def test_indices_choose_the_records():
    batches = PatientBatches(patient_records(), np.array([6, 1, 2]), 2, 1.0, seed=0)
    records = {k for step in range(20) for k in halves(batches(step), 1)[0].tolist()}
    assert records == {1, 2, 6} and list(batches.record_ids) == ["r6", "r1", "r2"]


def test_segments_of_half_a_record_are_its_two_halves():
    batch = PatientBatches(patient_records(["a", "b", "c"]), np.arange(3), 3, 2.0, seed=0)(0)
    assert {tuple(sorted(pair)) for pair in zip(*halves(batch, 0), strict=True)} == {(0, 200)}


def test_processes_share_one_batch(monkeypatch):
    batches = PatientBatches(patient_records(), np.arange(10), 6, 1.0, seed=3)
    whole = batches(2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append(batches(2))
    for name in ("signals", "targets", "indices"):
        pairs = getattr(whole, name).unflatten(0, (2, 6))
        for rank, part in enumerate(parts):
            assert torch.equal(getattr(part, name).unflatten(0, (2, 3)), pairs[:, rank::2])
    assert [p.patients.tolist() for p in parts] == [
        whole.patients[0::2].tolist(),
        whole.patients[1::2].tolist(),
    ]
    drawn = [torch.rand(3, generator=part.generator) for part in parts]
    assert not torch.equal(*drawn), "each process augments with its own numbers"


def test_batches_refuse_what_gives_no_pairs():
    records = patient_records()
    with pytest.raises(
        DataError, match="Patient b has a single record, of 4.0 s, .* half the record"
    ):
        PatientBatches(records, np.arange(10), 4, 2.5, 0)
    PatientBatches(
        records, np.array([0, 3, 2, 6]), 4, 2.5, 0
    )  # two records each: nothing need be apart
    with pytest.raises(DataError, match="no record to train on"):
        PatientBatches(records, np.array([], dtype=int), 4, 1.0, 0)
    with pytest.raises(DataError, match=r"one patient \(c\)"):
        PatientBatches(records, np.array([2, 6, 8]), 4, 1.0, 0)
    with pytest.raises(DataError, match="Record r1 has no patient_id"):
        PatientBatches(patient_records(["a", None, "b"]), np.arange(3), 2, 1.0, 0)


# ---- the loss


def slow_patient_nt_xent(
    z1: np.ndarray, z2: np.ndarray, patients: np.ndarray, temperature: float
) -> float:
    """The formula, one entry after the other."""
    z, owner, count = np.concatenate([z1, z2]), np.tile(patients, 2), len(z1)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    total = 0.0
    for i in range(2 * count):
        positive = np.exp(z[i] @ z[(i + count) % (2 * count)] / temperature)
        negatives = [
            np.exp(z[i] @ z[k] / temperature) for k in range(2 * count) if owner[k] != owner[i]
        ]
        total -= np.log(positive / (positive + sum(negatives)))
    return total / (2 * count)


@pytest.mark.parametrize("patients", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0], [3, 3, 1, 1, 3]])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_loss_equals_a_slow_numpy_version(patients, temperature):
    z1, z2 = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    ours = patient_nt_xent(z1, z2, torch.tensor(patients), temperature)
    slow = slow_patient_nt_xent(
        z1.double().numpy(), z2.double().numpy(), np.array(patients), temperature
    )
    assert ours.item() == pytest.approx(slow, rel=1e-5)
    swapped = patient_nt_xent(z2, z1, torch.tensor(patients), temperature)
    assert swapped.item() == pytest.approx(ours.item(), rel=1e-5)


def test_different_patients_give_nt_xent_and_like_views_the_closed_form():
    z1, z2 = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    assert patient_nt_xent(z1, z2, torch.arange(6), 0.1).item() == pytest.approx(
        nt_xent(z1, z2, 0.1).item(), rel=1e-6
    )
    alike = torch.ones(6, 4)
    assert patient_nt_xent(alike, alike, torch.tensor([0, 0, 1, 1, 2, 2])).item() == pytest.approx(
        np.log(9), rel=1e-5
    )


def test_same_patients_do_not_push_each_other():
    z1, z2 = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2))
    z1.requires_grad_()
    alone = patient_nt_xent(z1, z2, torch.tensor([4, 4, 4]))
    assert alone.item() == 0 and torch.autograd.grad(alone, z1)[0].abs().max() == 0, (
        "nobody else, nothing to push"
    )
    two = patient_nt_xent(z1, z2, torch.tensor([4, 5, 4]))
    assert torch.autograd.grad(two, z1)[0].abs().min() > 0
    with pytest.raises(DataError, match="at least two records"):
        patient_nt_xent(z1[:1], z2[:1], torch.tensor([0]))


SCRIPT = """
import sys, torch
sys.path.insert(0, {root!r})
from ecglib.selfsup.patient_pairs import patient_nt_xent
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
z = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
patients = torch.tensor([0, 1, 2, 0, 1, 3])
own = z[:, rank::2]
loss = patient_nt_xent(own[0], own[1], patients[rank::2], 0.2)
(gradient,) = torch.autograd.grad(loss, z)
torch.distributed.all_reduce(gradient)
loss = loss.detach()
torch.distributed.all_reduce(loss)
torch.distributed.destroy_process_group()
whole = patient_nt_xent(z[0], z[1], patients, 0.2)
torch.testing.assert_close(loss / 2, whole.detach())
torch.testing.assert_close(gradient / 2, torch.autograd.grad(whole, z)[0])
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


# ---- the segment order


def test_sizes_are_the_design_at_its_own_length_and_scale():
    published = segment_sizes(640)
    assert (published.segment, published.smallest_gap, published.largest_gap, published.taper) == (
        140,
        10,
        26,
        10,
    )
    small = segment_sizes(250)
    assert (small.segment, small.smallest_gap, small.largest_gap, small.taper) == (55, 4, 10, 4)
    for length, segments in itertools.product((64, 250, 640, 1000), (2, 3, 4)):
        sizes = segment_sizes(length, segments)
        assert segments * sizes.segment + (segments - 1) * sizes.largest_gap <= length
    assert "0.55 s" in describe_segments(250, 100) and "less than 109 times" in describe_segments(
        250, 100
    )
    assert "1.40 s" in describe_segments(640, 100) and "less than 43 times" in describe_segments(
        640, 100
    )


def test_segments_are_cuts_in_time_order_with_random_gaps():
    length = 250
    ramp = (
        torch.arange(length, dtype=torch.float32).square().expand(500, 12, -1)
    )  # its slope tells the place
    sizes = segment_sizes(length)
    pieces = cut_segments(ramp, torch.Generator().manual_seed(0))
    assert pieces.shape == (500, 4, 12, sizes.segment)
    middle = sizes.segment // 2
    slope = (
        pieces[..., 0, middle + 1] - pieces[..., 0, middle] - 1
    ) / 2  # of t^2 between t and t + 1 is 2 t + 1
    starts = (slope - middle).round().int()
    gaps = starts.diff(dim=1) - sizes.segment
    assert gaps.min() == sizes.smallest_gap and gaps.max() == sizes.largest_gap
    assert starts.min() == 0 and (starts[:, -1] + sizes.segment).max() <= length
    assert starts[:, 0].unique().numel() > 5


def test_segments_lose_their_mean_and_end_at_zero():
    signals = torch.randn(6, 12, 640, generator=torch.Generator().manual_seed(0))
    offset = signals + torch.linspace(-5, 5, 12)[:, None]
    pieces, shifted = (cut_segments(x, torch.Generator().manual_seed(1)) for x in (signals, offset))
    torch.testing.assert_close(pieces, shifted, atol=1e-5, rtol=0)
    assert pieces[..., 0].abs().max() == 0 and pieces[..., -1].abs().max() == 0
    flat = cut_segments(torch.ones(2, 12, 640), torch.Generator().manual_seed(1))
    assert flat.abs().max() == 0, "a baseline alone leaves nothing, no step at the joins"


def test_the_target_is_the_order_that_was_applied():
    signals = torch.randn(200, 12, 250, generator=torch.Generator().manual_seed(0))
    orders = all_orders(4)
    assert (
        len(orders) == 24
        and orders[0].tolist() == [0, 1, 2, 3]
        and len({tuple(o) for o in orders.tolist()}) == 24
    )
    shuffled, number = shuffle_segments(signals, torch.Generator().manual_seed(4), orders)
    straight = cut_segments(
        signals, torch.Generator().manual_seed(4)
    )  # the cuts come first from the generator
    undone = join_segments(
        shuffled.unflatten(2, (4, -1)).transpose(1, 2), orders[number].argsort(dim=1)
    )
    assert torch.equal(undone, join_segments(straight, orders[torch.zeros_like(number)]))
    assert len(number.unique()) == 24, "every order comes up"


def test_too_short_views_and_strange_segments_are_refused():
    with pytest.raises(DataError, match="too short for 4 segments"):
        segment_sizes(30)
    for segments in (1, 7):
        with pytest.raises(DataError, match="2 to 6 segments"):
            segment_sizes(640, segments)


# ---- the objective


def objective_of(seed: int = 0, **settings) -> PatientPairs:
    torch.manual_seed(seed)
    return PatientPairs(TinyEncoder(), **settings)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    batch = PatientBatches(patient_records(), np.arange(10), 6, 1.5, seed=0)(0)

    def loss(**settings) -> float:
        batch.generator.manual_seed(1)
        return objective_of(**settings).loss(batch).item()

    alone, light, full = (loss(order_weight=weight) for weight in (0, 0.1, 1.0))
    assert full - alone == pytest.approx(10 * (light - alone), rel=1e-3) and full > alone
    batch.generator.manual_seed(1)
    objective = objective_of()
    z = objective.projector(objective.encoder(batch.signals))
    assert alone == pytest.approx(patient_nt_xent(*z.chunk(2), batch.patients).item(), rel=1e-5)
    head = objective.order_head
    shuffled, number = shuffle_segments(batch.signals, batch.generator, head.orders)
    logits = nn.functional.linear(objective.encoder(shuffled), head.weight, head.bias)
    order = nn.functional.cross_entropy(logits, number)
    assert full - alone == pytest.approx(order.item(), rel=1e-4)


def test_pairs_see_whole_views_and_the_order_is_told_from_segments():
    batch = PatientBatches(patient_records(), np.arange(10), 6, 1.5, seed=0)(0)
    lengths = []
    objective = objective_of()
    objective.encoder.register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[2])
    )
    objective.loss(batch).backward()
    assert all(p.grad is not None for p in objective.parameters())
    assert lengths == [150, 4 * segment_sizes(150).segment]


def test_every_parameter_learns_whatever_the_weight():
    batch = PatientBatches(patient_records(), np.arange(10), 6, 1.5, seed=0)(0)
    objective = objective_of(order_weight=0)
    objective.loss(batch).backward()
    assert all(p.grad is not None for p in objective.parameters()), "data parallelism needs this"


def test_the_objective_refuses_single_crops_and_a_batch_of_one():
    records = patient_records()
    with pytest.raises(DataError, match="PatientBatches"):
        objective_of().loss(CropBatches(records, np.arange(10), 4, 1.5, 0)(0))
    with pytest.raises(DataError, match="at least two records"):
        objective_of().loss(PatientBatches(records, np.arange(10), 1, 1.5, 0)(0))


class _Stop(Exception):
    pass


def test_trained_twice_or_resumed_the_weights_are_the_same(tmp_path):
    def train(folder: Path | None, stop: int = 0) -> PatientPairs:
        def watch(step: int) -> dict:
            if step == stop:
                raise _Stop
            return {}

        objective = objective_of(seed=1)
        fit(
            objective,
            PatientBatches(patient_records(), np.arange(10), 5, 1.5, seed=1),
            12,
            seed=1,
            folder=folder,
            checkpoint_every=4,
            log_every=1,
            dtype="float32",
            watch=watch,
        )
        return objective

    straight, twice = train(tmp_path / "straight"), train(None)
    with pytest.raises(_Stop):
        train(tmp_path / "broken", stop=7)
    assert int(load_tensors(tmp_path / "broken" / CHECKPOINT)[1]["step"]) == 4
    resumed = train(tmp_path / "broken")
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]) and torch.equal(
            value, twice.state_dict()[name]
        ), name


def test_patients_are_told_apart_after_training():
    """The leads of each patient have their own sizes, noise otherwise: pairs of records come
    together.
    """
    rng = np.random.default_rng(0)
    patients = [f"p{i // 2}" for i in range(40)]
    records = patient_records(patients, seed=1)
    gain = 0.2 + rng.random((20, 12, 1))[np.arange(40) // 2]
    records = Records.from_millivolts(
        rng.normal(size=(40, 12, 400)) * gain, 100, records.table, records.targets, records.classes
    )
    objective = objective_of(order_weight=0)
    batches = PatientBatches(records, np.arange(40), 20, 1.5, seed=0)
    history = fit(objective, batches, 80, learning_rate=1e-2, dtype="float32")
    assert history["loss"].iloc[-1] < 0.6 * history["loss"].iloc[0]


# ---- the probes


def test_the_joins_probe_sees_the_joins_and_nothing_else():
    torch.manual_seed(0)
    network = ProbeNetwork(36, lambda x: joins_only(x, 4)).eval()
    shuffled = torch.randn(3, 12, 4 * 55)
    seen = network.look(shuffled)
    assert seen.shape == (3, 36, 16)
    for k in range(3):
        join = 55 * (k + 1)
        assert torch.equal(seen[:, 12 * k : 12 * k + 12], shuffled[:, :, join - 8 : join + 8])
    near = (torch.arange(220)[:, None] - torch.tensor([55, 110, 165]) + 0.5).abs().amin(dim=1) < 8
    elsewhere = torch.where(near, shuffled, torch.randn(3, 12, 220))
    assert torch.equal(network(shuffled), network(elsewhere))
    at_the_joins = torch.where(near, torch.randn(3, 12, 220), shuffled)
    assert not torch.equal(network(shuffled), network(at_the_joins))


def test_the_drift_probe_sees_slow_waves_only():
    clock = torch.arange(1000) / 100
    slow, fast = torch.sin(2 * torch.pi * 0.3 * clock), torch.sin(2 * torch.pi * 0.6 * clock)
    torch.testing.assert_close(
        drift_only((slow + fast).expand(1, 12, -1), 100)[0, 0], slow, atol=1e-5, rtol=0
    )
    assert drift_only(fast.expand(1, 12, -1), 100).abs().max() < 1e-5


def test_order_is_learned_where_it_can_be_and_from_the_joins_alone_where_they_tell():
    """A tone that grows with time tells the order of its segments, at the joins as well as
    elsewhere.
    """
    signals = np.random.default_rng(0).normal(size=(64, 12, 400)) * 0.05
    signals += np.sin(2 * np.pi * np.arange(400) / 8) * np.linspace(0.2, 2.0, 400)
    table = tiny_records(64).table
    growing = Records.from_millivolts(signals, 100, table, np.zeros((64, 1), int), ("A",))
    batches = CropBatches(growing, np.arange(64), 32, 4.0, 0)
    for channels, look in ((12, torch.nn.Identity()), (36, lambda x: joins_only(x, 4))):
        torch.manual_seed(0)
        objective = SegmentOrder(ProbeNetwork(channels, look))
        assert order_accuracy(objective, batches, 8) < 0.2
        fit(objective, batches, 40, learning_rate=1e-2, dtype="float32")
        assert order_accuracy(objective, batches, 8) > 0.7
        assert objective.training


def test_the_table_of_the_probes():
    records = tiny_records(60)
    table = shortcut_probes(records, np.arange(40), np.arange(40, 60), steps=3, crop_seconds=1.5)
    assert list(table["input"]) == ["whole view", "joins", "drift"]
    assert list(table) == ["input", "accuracy", "standard_error", "chance", "share_of_gain"]
    assert np.allclose(table["chance"], 1 / 24) and (table["accuracy"] < 0.2).all()
    assert table["share_of_gain"].isna().all(), (
        "a network that learned nothing has no gain to share"
    )
    again = shortcut_probes(records, np.arange(40), np.arange(40, 60), steps=3, crop_seconds=1.5)
    pd.testing.assert_frame_equal(table, again)
    with pytest.raises(DataError, match="A crop of 1000.0 s does not fit"):
        shortcut_probes(records, np.arange(40), np.arange(40, 60), steps=3, crop_seconds=1000.0)
