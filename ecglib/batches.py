"""Batches of random crops, cut on the device from int16 counts."""

from dataclasses import dataclass

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
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return Generator(device).manual_seed(int(mixed >> 1))


def to_millivolts(counts: Tensor, scale: float) -> Tensor:
    """Counts as float32 mV on their device; missing samples become 0."""
    return counts.to(torch.float32).mul_(scale).masked_fill_(counts == int(MISSING), 0.0)


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


class CropBatches:
    """`batches(step)` gives random crops of the records at `indices`; each record comes equally
    often.

    In a process group every process gets its own part of the same batch. Raises DataError where
    there is no record or the crop is longer than the records.
    """

    def __init__(
        self,
        records: Records,
        indices: np.ndarray,
        batch_size: int,
        crop_seconds: float,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.indices = np.asarray(indices)
        if len(self.indices) == 0:
            raise DataError(
                "There is no record to train on; check the label fraction and the folds."
            )
        self.length = round(crop_seconds * records.sampling_rate)
        self.time = records.signals.shape[2]
        if not 1 <= self.length <= self.time:
            raise DataError(
                f"A crop of {crop_seconds} s does not fit into records of "
                f"{self.time / records.sampling_rate} s."
            )
        self.batch_size, self.seed = batch_size, seed
        self.device, self.scale = torch.device(device), records.scale
        counts = np.asarray(records.signals[self.indices])
        targets = records.targets[self.indices].astype(np.float32)
        self.counts = torch.from_numpy(counts).to(self.device)
        self.targets = torch.from_numpy(targets).to(self.device)
        self.record_ids = records.table["record_id"].to_numpy()[self.indices]
        self.units = len(self.indices)  # what one pass goes through
        self._order: tuple[int, np.ndarray] | None = None

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The order of one pass."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.units))
        return self._order[1]

    def _chosen(self, step: int) -> Tensor:
        """The numbers of the units in the batch of one step, for all processes together."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        chosen = [self._shuffled(place // self.units)[place % self.units] for place in places]
        return torch.from_numpy(np.array(chosen)).to(self.device)

    def _share(
        self, step: int, generator: Generator, *drawn: Tensor
    ) -> tuple[Generator, tuple[Tensor, ...]]:
        """This process's part of what was drawn for all, along the last axis, and its own random
        numbers from there.
        """
        rank, world = rank_and_world()
        if world == 1:
            return generator, drawn
        own = step_generator(self.seed + 1_000_003 * (rank + 1), step, self.device)
        return own, tuple(values[..., rank::world] for values in drawn)

    def _cut(self, picked: Tensor, starts: Tensor) -> Tensor:
        """Crops `(batch, leads, time)` in mV of the records `picked` from `starts` on."""
        window = starts[:, None] + torch.arange(self.length, device=self.device)
        return to_millivolts(self.counts[picked[:, None], :, window].transpose(1, 2), self.scale)

    def __call__(self, step: int) -> Batch:
        """The batch of one step, the same whenever it is asked for."""
        picked = self._chosen(step)
        generator = step_generator(self.seed, step, self.device)
        places, shape = self.time - self.length + 1, (self.batch_size,)
        starts = torch.randint(places, shape, generator=generator, device=self.device)
        generator, (picked, starts) = self._share(step, generator, picked, starts)
        return Batch(self._cut(picked, starts), self.targets[picked], picked, generator)


class PatientBatches(CropBatches):
    """`batches(step)` gives a PairBatch: two crops of each of `batch_size` patients; every patient
    comes equally often.

    The two come from two different records of the patient, drawn anew at each pass, or from two
    segments of the one record that do not overlap. Raises DataError where that record is too short
    for them, where a record has no patient number, and where there are fewer than two patients, for
    then nothing is left to push apart.
    """

    def __init__(
        self,
        records: Records,
        indices: np.ndarray,
        batch_size: int,
        crop_seconds: float,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(records, indices, batch_size, crop_seconds, seed, device)
        patients = records.table["patient_id"].to_numpy()[self.indices]
        number, self.patient_ids = pd.factorize(patients)
        if (number < 0).any():
            raise DataError(
                f"Record {self.record_ids[(number < 0).argmax()]} has no patient_id; give it one, "
                "or leave it out of the pairs."
            )
        sizes = np.bincount(number)
        self.units = len(sizes)
        if self.units < 2:
            raise DataError(
                f"All records come from one patient ({self.patient_ids[0]}); pairs need at least "
                "two."
            )
        if 2 * self.length > self.time and (sizes == 1).any():
            raise DataError(
                f"Patient {self.patient_ids[(sizes == 1).argmax()]} has a single record, of "
                f"{self.time / records.sampling_rate} s, in which two crops of {crop_seconds} s "
                "overlap; shorten the crop to at most half the record or leave such patients out."
            )
        # The records of patient p are members[first[p] : first[p] + sizes[p]].
        self.members = torch.from_numpy(np.argsort(number, kind="stable")).to(self.device)
        self.sizes = torch.from_numpy(sizes).to(self.device)
        self.first = self.sizes.cumsum(0) - self.sizes

    def __call__(self, step: int) -> PairBatch:
        """The pairs of one step, the same whenever they are asked for."""
        patients = self._chosen(step)
        generator = step_generator(self.seed, step, self.device)
        options = {"generator": generator, "device": self.device, "dtype": torch.float64}
        draws = torch.rand((4, len(patients)), **options)
        generator, (patients, draws) = self._share(step, generator, patients, draws)
        size = self.sizes[patients]
        first = (draws[0] * size).long()
        # The same record where there is only one.
        second = (first + 1 + (draws[1] * (size - 1)).long()) % size
        picked = self.members[self.first[patients] + torch.stack([first, second])].flatten()
        starts = torch.where(size == 1, self._apart(draws[2:]), self._anywhere(draws[2:]))
        signals = self._cut(picked, starts.flatten())
        return PairBatch(signals, self.targets[picked], picked, generator, patients)

    def _anywhere(self, draws: Tensor) -> Tensor:
        """Starts of two crops, each anywhere in its record; `draws` `(2, pairs)` lie in [0, 1)."""
        return (draws * (self.time - self.length + 1)).long()

    def _apart(self, draws: Tensor) -> Tensor:
        """Starts of two crops of one record that do not overlap; either may be the earlier one."""
        room = max(self.time - 2 * self.length + 1, 0)
        later = torch.stack([draws[0] > draws[1], draws[1] >= draws[0]])
        return (draws * room).long() + self.length * later


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
        count = _unlabelled_count(batch_size, ratio)
        self.labelled = CropBatches(records, labelled, batch_size, crop_seconds, seed, device)
        seed = unlabelled_seed(seed)
        self.unlabelled = CropBatches(records, unlabelled, count, crop_seconds, seed, device)
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


def _unlabelled_count(batch_size: int, ratio: float) -> int:
    """Unlabelled records in a batch; DataError where that is not a whole number of at least 1."""
    count = batch_size * ratio
    if not (0.5 <= count < np.inf and abs(count - round(count)) < 1e-6):  # refuses a NaN, too
        raise DataError(
            f"A batch of {batch_size} labelled records with a ratio of {ratio:g} needs {count:g} "
            "unlabelled ones; choose the two so that this is a whole number of at least 1."
        )
    return round(count)
