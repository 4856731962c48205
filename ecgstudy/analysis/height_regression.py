"""A network whose answer is known to rest on one wave: a gate that attributions must pass."""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import nn

from ecglib.batches import Batch, CropBatches
from ecglib.encoders import make_encoder
from ecglib.errors import DataError
from ecglib.evaluate.windows import encode_windows
from ecglib.records import LEADS
from ecglib.sources.simulate import Simulation
from ecglib.supervised import Classifier
from ecglib.train import fit
from ecgstudy.analysis.evidence import Region, mark_pairs

HEIGHTS = {"P": ("P", "II"), "R": ("QRS", "V5"), "T": ("T", "V3")}  # output: wave and lead


def wave_heights(simulation: Simulation) -> np.ndarray:
    """Height of each wave of `HEIGHTS` in its lead, mV `(n, 3)`: from the wave's first sample to
    its farthest point.

    The median over a record's normal beats; for R the highest point. NaN where there is no such
    wave.
    """
    heights = np.full((len(simulation.records), len(HEIGHTS)), np.nan)
    for place, signal in enumerate(simulation.records.millivolts()):
        for column, (wave, lead) in enumerate(HEIGHTS.values()):
            tops = []
            for onset, offset in _normal_waves(simulation, place, wave):
                part = signal[LEADS.index(lead), onset : offset + 1]
                part = part - part[0]
                tops.append(part.max() if wave == "QRS" else part[np.abs(part).argmax()])
            if tops:
                heights[place, column] = np.median(tops)
    return heights


def _normal_waves(simulation: Simulation, place: int, wave: str) -> np.ndarray:
    """Onset and offset of a wave in each normal beat of a record, in samples `(beats, 2)`."""
    beats = simulation.beats.get(simulation.records.table["record_id"][place])
    if beats is None:
        return np.empty((0, 2), int)
    return mark_pairs(beats[beats["kind"] == "normal"], f"{wave} onset", f"{wave} offset")


def wave_region(simulation: Simulation, positions: np.ndarray, output: str) -> Region:
    """Where the height of an output of `HEIGHTS` is measured: its wave, in its lead only."""
    wave, lead = HEIGHTS[output]
    mask = np.zeros((len(positions), *simulation.records.signals.shape[1:]), bool)
    for row, place in zip(mask[:, LEADS.index(lead)], positions):
        for onset, offset in _normal_waves(simulation, place, wave):
            row[onset : offset + 1] = True
    return Region(mask)


class HeightRegression(nn.Module):
    """Mean squared error of standardised heights; each lead gets a gain of its own, and its height
    with it.

    Only so is the place known: with the gains drawn apart, no other lead tells the height of this
    one.
    """

    def __init__(self, network: nn.Module, heights: np.ndarray) -> None:
        """`heights (n, outputs)` in mV are those of the training records."""
        super().__init__()
        self.network = network
        self.mean = torch.from_numpy(heights.mean(axis=0)).float()
        self.deviation = torch.from_numpy(heights.std(axis=0)).float()
        self.leads = [LEADS.index(lead) for _, lead in HEIGHTS.values()]

    def loss(self, batch: Batch) -> torch.Tensor:
        """Scalar loss of one batch, whose targets are heights in mV `(batch, outputs)`."""
        signals = batch.signals
        gains = 0.5 + torch.rand(signals.shape[:2], generator=batch.generator)
        wanted = (batch.targets * gains[:, self.leads] - self.mean) / self.deviation
        return nn.functional.mse_loss(self.network(signals * gains[:, :, None]).float(), wanted)


def height_regressor(
    simulation: Simulation, *, steps: int = 400, batch_size: int = 64, seconds: float = 2.5
) -> tuple[nn.Module, np.ndarray, pd.Series]:
    """A network that has learned wave heights, records that it has not seen, and its R2 on these by
    output.

    It is trained on folds 1-8 of the cohort and tested on fold 10. R2 is that of the mean over a
    record's windows. DataError where the cohort is too small.
    """
    heights = wave_heights(simulation)
    records = replace(simulation.records, targets=heights, classes=tuple(HEIGHTS))
    fold = records.table["fold"].where(~np.isnan(heights).any(axis=1))
    train = np.flatnonzero(fold <= 8)
    test = np.flatnonzero(fold == 10)
    if not len(train) or not len(test):
        raise DataError(
            f"{len(records)} simulated records are too few to teach and to ask; simulate more "
            "patients."
        )
    torch.manual_seed(0)
    network = Classifier(make_encoder("xresnet1d_narrow"), len(HEIGHTS))
    objective = HeightRegression(network, heights[train])
    crops = CropBatches(records, train, batch_size, seconds, 0)
    fit(objective, crops, steps, learning_rate=0.01, seed=0)
    answers = encode_windows(network.eval(), records, test, seconds)
    answers = answers * objective.deviation.numpy() + objective.mean.numpy()
    errors = answers - heights[test]
    r2 = 1 - (errors**2).mean(axis=0) / heights[test].var(axis=0)
    return network, test, pd.Series(r2, HEIGHTS)
