"""Batches of random crops, cut on the device from int16 counts."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor

from ecglib.distributed import rank_and_world
from ecglib.errors import DataError
from ecglib.records import MISSING, Records


@dataclass
class Batch:
    """signals `(batch, leads, time)` mV float32, targets `(batch, classes)`, record positions, the
    step's generator.
    """

    signals: Tensor
    targets: Tensor
    indices: Tensor
    generator: Generator


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> Generator:
    """The random numbers of one step: a function of seed and step alone, so a resumed run draws the
    same ones.
    """
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)
    return Generator(device).manual_seed(int(mixed[0] >> 1))


def to_millivolts(counts: Tensor, scale: float) -> Tensor:
    """Counts as float32 mV on their device; missing samples become 0."""
    return counts.float().mul_(scale).masked_fill_(counts == int(MISSING), 0.0)


@dataclass
class PairBatch(Batch):
    """A batch of pairs: signals, targets and indices hold every first view, then every second one,
    in the same order.

    `patients` `(pairs,)` is the number of each pair's patient.
    """

    patients: Tensor


@dataclass
class SemiBatch(Batch):
    """A labelled batch and with it `unlabelled` `(n, leads, time)` mV, whose labels nobody may see.

    `unlabelled_indices` `(n,)` are positions within the unlabelled pool.
    """

    unlabelled: Tensor
    unlabelled_indices: Tensor


def need_unlabelled(batch: Batch, method: str) -> None:
    """DataError where a batch has no unlabelled records for a method that learns from them."""
    if not isinstance(batch, SemiBatch) or len(batch.unlabelled) == 0:
        raise DataError(
            f"{method} also learns from unlabelled records and this batch has none; make the "
            "batches with SemiBatches, with at least one unlabelled record per process."
        )


@lru_cache(maxsize=8)
def _order(seed, epoch, units):
    """The order in which one pass goes through `units`."""
    return np.random.default_rng([seed, epoch]).permutation(units)


@dataclass(eq=False, repr=False)
class CropBatches:
    """`batches(step)` gives random crops of the records at `indices`; each record comes equally
    often.

    In a process group every process gets its own part of the same batch. Raises DataError where
    there is no record or the crop is longer than the records.
    """

    records: Records
    indices: np.ndarray
    batch_size: int
    crop_seconds: float
    seed: int
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        records = self.records
        self.indices = np.asarray(self.indices)
        self.units = len(self.indices)  # what one pass goes through
        if not self.units:
            raise DataError(
                "There is no record to train on; check the label fraction and the folds."
            )
        self.length = round(self.crop_seconds * records.sampling_rate)
        self.time = records.signals.shape[2]
        self.seconds = self.time / records.sampling_rate
        if not 1 <= self.length <= self.time:
            raise DataError(
                f"A crop of {self.crop_seconds} s does not fit into records of {self.seconds} s."
            )
        self.record_ids = records.table["record_id"].to_numpy()[self.indices]
        self.counts = torch.as_tensor(records.signals[self.indices], device=self.device)
        targets = records.targets[self.indices]
        self.targets = torch.as_tensor(targets, dtype=torch.float32, device=self.device)

    def __call__(self, step: int) -> Batch:
        """The batch of one step, the same whenever it is asked for."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        units = [_order(self.seed, k // self.units, self.units)[k % self.units] for k in places]
        generator = step_generator(self.seed, step, self.device)
        draws = self._draw(generator)
        rank, world = rank_and_world()
        if world > 1:  # all processes drew the same; from here on each has its own numbers
            generator = step_generator(self.seed + 1_000_003 * (rank + 1), step, self.device)
        units = torch.as_tensor(np.array(units[rank::world]), device=self.device)
        return self._batch(units, draws[..., rank::world], generator)

    def _draw(self, generator):
        """The first sample of each crop."""
        places = self.time - self.length + 1
        return torch.randint(places, (self.batch_size,), generator=generator, device=self.device)

    def _batch(self, picked, starts, generator):
        """Crops `(batch, leads, time)` in mV of the records `picked` from `starts` on."""
        window = starts[:, None] + torch.arange(self.length, device=self.device)
        counts = self.counts[picked[:, None], :, window].mT
        signals = to_millivolts(counts, self.records.scale)
        return Batch(signals, self.targets[picked], picked, generator)


class PatientBatches(CropBatches):
    """`batches(step)` gives a PairBatch: two crops of each of `batch_size` patients; every patient
    comes equally often.

    The two come from two different records of the patient, drawn anew at each pass, or from two
    segments of the one record that do not overlap. Raises DataError where that record is too short
    for them, where a record has no patient number, and where there are fewer than two patients, for
    then nothing is left to push apart.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        patients = self.records.table["patient_id"].to_numpy()[self.indices]
        number, self.patient_ids = pd.factorize(patients)
        nobody = number < 0
        if nobody.any():
            raise DataError(
                f"Record {self.record_ids[nobody.argmax()]} has no patient_id; give it one, "
                "or leave it out of the pairs."
            )
        sizes = np.bincount(number)
        self.units = len(sizes)
        if self.units < 2:
            raise DataError(
                f"All records come from one patient ({self.patient_ids[0]}); pairs need at least "
                "two."
            )
        single = sizes == 1
        if 2 * self.length > self.time and single.any():
            raise DataError(
                f"Patient {self.patient_ids[single.argmax()]} has a single record, of "
                f"{self.seconds} s, in which two crops of {self.crop_seconds} s "
                "overlap; shorten the crop to at most half the record or leave such patients out."
            )
        # The records of patient p are members[first[p] : first[p] + sizes[p]].
        self.members = torch.as_tensor(np.argsort(number, kind="stable"), device=self.device)
        self.sizes = torch.as_tensor(sizes, device=self.device)
        self.first = self.sizes.cumsum(0) - self.sizes

    def _draw(self, generator):
        """For each patient which two records, and the places of the two crops, in [0, 1)."""
        shape = (4, self.batch_size)
        return torch.rand(shape, generator=generator, device=self.device, dtype=torch.float64)

    def _batch(self, patients, draws, generator):
        """The pairs of `patients`."""
        size = self.sizes[patients]
        first = (draws[0] * size).long()
        # The same record where there is only one.
        second = (first + 1 + (draws[1] * (size - 1)).long()) % size
        picked = self.members[self.first[patients] + torch.stack([first, second])].flatten()
        places = draws[2:]
        # Two crops of one record do not overlap; either may be the earlier one.
        single = size == 1
        later = places.argsort(dim=0)
        room = self.time - self.length + 1 - self.length * single
        starts = (places * room).long() + self.length * later * single
        crops = super()._batch(picked, starts.flatten(), generator)
        return PairBatch(**vars(crops), patients=patients)


class SemiBatches:
    """`batches(step)` gives a SemiBatch: `batch_size` labelled crops and `ratio` times as many
    unlabelled ones.

    `labelled` and `unlabelled` are positions in `records`. The labelled part is the batch that
    CropBatches gives alone, so that a supervised control sees the same crops. The two pools go
    round independently, each record of a pool equally often. Raises DataError where a pool is
    empty, a record is in both, or `batch_size` x `ratio` is not a whole number of at least 1.
    """

    def __init__(
        self,
        records: Records,
        labelled: np.ndarray,
        unlabelled: np.ndarray,
        batch_size: int,
        ratio: float,
        crop_seconds: float,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(unlabelled) == 0:
            raise DataError(
                "There is no unlabelled record to learn from; choose a label fraction below 1 or "
                "train supervised."
            )
        need_disjoint(records, labelled, unlabelled)
        count = batch_size * ratio
        if not (0.5 <= count < np.inf and abs(count - round(count)) < 1e-6):  # refuses a NaN, too
            raise DataError(
                f"A batch of {batch_size} labelled records with a ratio of {ratio:g} needs "
                f"{count:g} unlabelled ones; choose the two so that this is a whole number of at "
                "least 1."
            )
        self.labelled = CropBatches(records, labelled, batch_size, crop_seconds, seed, device)
        self.unlabelled = replace(
            self.labelled,
            indices=unlabelled,
            batch_size=round(count),
            seed=unlabelled_seed(seed),
        )
        self.record_ids = self.labelled.record_ids

    def __call__(self, step: int) -> SemiBatch:
        """The batch of one step, the same whenever it is asked for."""
        unlabelled = self.unlabelled(step)
        return SemiBatch(
            **vars(self.labelled(step)),
            unlabelled=unlabelled.signals,
            unlabelled_indices=unlabelled.indices,
        )


def unlabelled_seed(seed: int) -> int:
    """The seed of the unlabelled pool: with that of the labelled one, pools of one size would be
    shuffled and cropped alike.
    """
    return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])


def need_disjoint(records: Records, labelled: np.ndarray, unlabelled: np.ndarray) -> None:
    """DataError where a record is in both pools, naming it."""
    both = np.intersect1d(labelled, unlabelled)
    if len(both):
        raise DataError(
            f"Record {records.table['record_id'].iloc[both[0]]} is both labelled and unlabelled; "
            "leave it out of one of the two."
        )
