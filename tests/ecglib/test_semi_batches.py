"""Batches of labelled and unlabelled records: which come, how many, that they are repeatable, and
what is refused.
"""

import numpy as np
import pytest
import torch

import ecglib.batches
from ecglib.batches import Batch, CropBatches, SemiBatch, SemiBatches, need_unlabelled
from ecglib.errors import DataError
from ecglib.records import Records
from toolkit import tiny_records

LABELLED, UNLABELLED = np.arange(0, 8), np.arange(8, 40)


def semi(
    records: Records | None = None, batch_size: int = 4, ratio: float = 2, seed: int = 1, **options
) -> SemiBatches:
    options = {"labelled": LABELLED, "unlabelled": UNLABELLED, "crop_seconds": 0.5} | options
    return SemiBatches(
        records or tiny_records(), batch_size=batch_size, ratio=ratio, seed=seed, **options
    )


@pytest.mark.parametrize(
    ("batch_size", "ratio", "count"), [(4, 1, 4), (4, 2, 8), (4, 7, 28), (4, 0.5, 2), (30, 0.1, 3)]
)
def test_shapes_follow_the_ratio(batch_size, ratio, count):
    batch = semi(batch_size=batch_size, ratio=ratio)(0)
    assert isinstance(batch, SemiBatch) and isinstance(batch, Batch)
    assert batch.signals.shape == (batch_size, 12, 50) and batch.targets.shape == (batch_size, 2)
    assert batch.unlabelled.shape == (count, 12, 50) and batch.unlabelled_indices.shape == (count,)
    assert batch.unlabelled.dtype == torch.float32


def test_the_labelled_part_is_that_of_the_supervised_control():
    records = tiny_records()
    alone = CropBatches(records, LABELLED, 4, 0.5, seed=1)
    batches = semi(records)
    assert list(batches.record_ids) == list(alone.record_ids) == [f"r{i}" for i in LABELLED]
    for step in range(5):
        one, other = batches(step), alone(step)
        assert torch.equal(one.signals, other.signals) and torch.equal(one.targets, other.targets)
        assert torch.equal(one.indices, other.indices)
        draws = [torch.rand(3, generator=batch.generator) for batch in (one, other)]
        assert torch.equal(*draws)


def test_each_pool_goes_round_by_itself_and_indices_are_positions_in_it():
    records, batches = tiny_records(), semi()
    drawn = [batches(step) for step in range(4)]
    unlabelled = torch.cat([batch.unlabelled_indices for batch in drawn])
    assert torch.bincount(unlabelled, minlength=len(UNLABELLED)).tolist() == [1] * len(UNLABELLED)
    assert torch.bincount(torch.cat([batch.indices for batch in drawn])).tolist() == [2] * len(
        LABELLED
    )
    whole = torch.from_numpy(records.millivolts(UNLABELLED[drawn[2].unlabelled_indices.numpy()]))
    windows = whole.unfold(2, 50, 1).permute(0, 2, 1, 3)
    distance = (windows - drawn[2].unlabelled[:, None]).abs().amax(dim=(2, 3)).amin(dim=1)
    assert distance.max() < 1e-6


def test_batches_are_repeatable_and_the_seed_counts():
    first, second, third = semi()(3), semi()(3), semi(seed=2)(3)
    assert torch.equal(first.unlabelled, second.unlabelled)
    assert not torch.equal(first.unlabelled, third.unlabelled)


def test_pools_of_one_size_are_not_drawn_alike():
    batches = semi(ratio=1, labelled=np.arange(16), unlabelled=np.arange(16, 32))
    assert any(
        not torch.equal(batches(step).indices, batches(step).unlabelled_indices)
        for step in range(3)
    )


def test_labels_of_unlabelled_records_go_nowhere():
    records = tiny_records()
    targets = records.targets.copy()
    targets[UNLABELLED] = 1 - targets[UNLABELLED]
    changed = Records(
        records.signals,
        records.scale,
        records.sampling_rate,
        records.table,
        targets,
        records.classes,
    )
    one, other = semi(records)(0), semi(changed)(0)
    for name in ("signals", "targets", "indices", "unlabelled", "unlabelled_indices"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_two_processes_share_one_batch(monkeypatch):
    whole, parts = semi()(2), []
    for rank in range(2):
        monkeypatch.setattr(ecglib.batches, "rank_and_world", lambda rank=rank: (rank, 2))
        parts.append(semi()(2))
    for name in ("signals", "targets", "indices", "unlabelled", "unlabelled_indices"):
        pieces = [getattr(part, name) for part in parts]
        assert len(pieces[0]) == len(pieces[1]) == len(getattr(whole, name)) // 2
        assert torch.equal(torch.stack(pieces, dim=1).flatten(0, 1), getattr(whole, name)), name
    assert not torch.equal(*(torch.rand(3, generator=part.generator) for part in parts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"unlabelled": np.array([], dtype=int)},
            "no unlabelled record to learn from; choose a label fraction below 1",
        ),
        ({"labelled": np.array([], dtype=int)}, "no record to train on; check the label fraction"),
        (
            {"unlabelled": np.array([9, 5])},
            "Record r5 is both labelled and unlabelled; leave it out of one",
        ),
        (
            {"ratio": 0.3},
            "batch of 4 labelled records with a ratio of 0.3 needs 1.2 unlabelled ones; choose "
            "the two",
        ),
        ({"ratio": 0.1}, "needs 0.4 unlabelled ones; choose"),
        ({"ratio": 0}, "needs 0 unlabelled ones; choose"),
        ({"ratio": -1}, "needs -4 unlabelled ones; choose"),
        ({"ratio": float("nan")}, "needs nan unlabelled ones; choose"),
        ({"ratio": float("inf")}, "needs inf unlabelled ones; choose"),
        ({"crop_seconds": 5.0}, "crop of 5.0 s does not fit into records of 2.0 s"),
    ],
)
def test_what_gives_no_batch_is_refused_in_one_sentence(options, message):
    with pytest.raises(DataError, match=message) as caught:
        semi(**options)
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0


def test_a_batch_without_unlabelled_records_is_refused():
    need_unlabelled(semi()(0), "FixMatch")
    plain = CropBatches(tiny_records(), LABELLED, 4, 0.5, seed=1)(0)
    empty = SemiBatch(*vars(plain).values(), plain.signals[:0], plain.indices[:0])
    for batch in (plain, empty):
        with pytest.raises(
            DataError,
            match="FixMatch also learns from unlabelled records and this batch has none; make",
        ):
            need_unlabelled(batch, "FixMatch")
