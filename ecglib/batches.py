"""Batches of random crops, cut on the device from int16 counts."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from ecglib.errors import DataError
from ecglib.records import MISSING, Records


@dataclass
class Batch:
    """signals `(batch, leads, time)` mV float32, targets `(batch, classes)`, record positions, the step's generator."""

    signals: Tensor
    targets: Tensor
    indices: Tensor
    generator: Generator


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> Generator:
    """The random numbers of one step: a function of seed and step alone, so a resumed run draws the same ones."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return Generator(device).manual_seed(int(mixed >> 1))


def to_millivolts(counts: Tensor, scale: float) -> Tensor:
    """Counts as float32 mV on their device; missing samples become 0."""
    return counts.to(torch.float32).mul_(scale).masked_fill_(counts == int(MISSING), 0.0)


class CropBatches:
    """`batches(step)` gives random crops of the records at `indices`; each record comes equally often.

    In a process group every process gets its own part of the same batch. Raises DataError where there is no record or
    the crop is longer than the records.
    """

    def __init__(self, records: Records, indices: np.ndarray, batch_size: int, crop_seconds: float, seed: int,
                 device: torch.device | str = "cpu") -> None:  # fmt: skip
        self.indices = np.asarray(indices)
        if len(self.indices) == 0:
            raise DataError("There is no record to train on; check the label fraction and the folds.")
        self.length = round(crop_seconds * records.sampling_rate)
        self.time = records.signals.shape[2]
        if not 1 <= self.length <= self.time:
            raise DataError(
                f"A crop of {crop_seconds} s does not fit into records of {self.time / records.sampling_rate} s."
            )
        self.batch_size, self.seed, self.device, self.scale = batch_size, seed, torch.device(device), records.scale
        self.counts = torch.from_numpy(np.asarray(records.signals[self.indices])).to(self.device)
        self.targets = torch.from_numpy(records.targets[self.indices].astype(np.float32)).to(self.device)
        self.record_ids = records.table["record_id"].to_numpy()[self.indices]
        self._order: tuple[int, np.ndarray] | None = None

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The order of one pass through the records."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.indices)))
        return self._order[1]

    def __call__(self, step: int) -> Batch:
        """The batch of one step, the same whenever it is asked for."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        chosen = np.array([self._shuffled(place // len(self.indices))[place % len(self.indices)] for place in places])
        generator = step_generator(self.seed, step, self.device)
        starts = torch.randint(
            0, self.time - self.length + 1, (self.batch_size,), generator=generator, device=self.device
        )
        picked = torch.from_numpy(chosen).to(self.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
            picked, starts = picked[rank::world], starts[rank::world]
            generator = step_generator(self.seed + 1_000_003 * (rank + 1), step, self.device)
        window = starts[:, None] + torch.arange(self.length, device=self.device)
        counts = self.counts[picked[:, None], :, window].transpose(1, 2)
        return Batch(to_millivolts(counts, self.scale), self.targets[picked], picked, generator)
