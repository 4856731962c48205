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
from ecgstudy.analysis.evidence import Region

HEIGHTS = {"P": ("P", "II"), "R": ("QRS", "V5"), "T": ("T", "V3")}  # output: wave and lead


def wave_heights(simulation: Simulation) -> np.ndarray:
    """Height of each wave of `HEIGHTS` in its lead, mV `(n, 3)`: from the wave's first sample to
    its farthest point.

    The median over a record's normal beats; for R the highest point. NaN where there is no such
    wave.
    """
    names = simulation.records.table["record_id"]
    heights = np.full((len(names), len(HEIGHTS)), np.nan)
    for row, (name, signal) in enumerate(zip(names, simulation.records.millivolts(), strict=True)):
        for column, (wave, lead) in enumerate(HEIGHTS.values()):
            trace, tops = signal[LEADS.index(lead)], []
            for onset, offset in _normal_waves(simulation, name, wave):
                part = trace[onset : offset + 1] - trace[onset]
                tops.append(part.max() if wave == "QRS" else part[np.abs(part).argmax()])
            if tops:
                heights[row, column] = np.median(tops)
    return heights


def _normal_waves(simulation: Simulation, record: str, wave: str) -> np.ndarray:
    """Onset and offset of a wave in each normal beat of a record, in samples `(beats, 2)`."""
    if record not in simulation.beats:
        return np.empty((0, 2), int)
    beats = simulation.beats[record].query("kind == 'normal'")
    return beats[[f"{wave} onset", f"{wave} offset"]].dropna().to_numpy(int)


def wave_region(simulation: Simulation, positions: np.ndarray, output: str) -> Region:
    """Where the height of an output of `HEIGHTS` is measured: its wave, in its lead only."""
    wave, lead = HEIGHTS[output]
    mask = np.zeros((len(positions), *simulation.records.signals.shape[1:]), bool)
    for row, record in zip(mask, simulation.records.table["record_id"].iloc[positions]):
        for onset, offset in _normal_waves(simulation, record, wave):
            row[LEADS.index(lead), onset : offset + 1] = True
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
        self.register_buffer("mean", torch.tensor(heights.mean(axis=0), dtype=torch.float32))
        self.register_buffer("deviation", torch.tensor(heights.std(axis=0), dtype=torch.float32))
        self.leads = [LEADS.index(lead) for _, lead in HEIGHTS.values()]

    def loss(self, batch: Batch) -> torch.Tensor:
        """Scalar loss of one batch, whose targets are heights in mV `(batch, outputs)`."""
        signals = batch.signals
        drawn = torch.rand(signals.shape[:2], generator=batch.generator, device=signals.device)
        gains = 0.5 + drawn
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
    records, heights = simulation.records, wave_heights(simulation)
    known, fold = ~np.isnan(heights).any(axis=1), records.table["fold"].to_numpy()
    train = np.flatnonzero(known & (fold <= 8))
    test = np.flatnonzero(known & (fold == 10))
    if not len(train) or not len(test):
        raise DataError(
            f"{len(records)} simulated records are too few to teach and to ask; simulate more "
            "patients."
        )
    torch.manual_seed(0)
    network = Classifier(make_encoder("xresnet1d_narrow"), len(HEIGHTS))
    objective = HeightRegression(network, heights[train])
    crops = CropBatches(records, train, batch_size, seconds, 0)

    def batches(step: int) -> Batch:
        batch = crops(step)
        targets = heights[train[batch.indices.numpy()]]
        return replace(batch, targets=torch.as_tensor(targets, dtype=torch.float32))

    fit(objective, batches, steps, learning_rate=0.01, seed=0)
    answers = encode_windows(network.eval(), records, test, seconds)
    answers = answers * objective.deviation.numpy() + objective.mean.numpy()
    r2 = 1 - ((answers - heights[test]) ** 2).mean(axis=0) / heights[test].var(axis=0)
    return network, test, pd.Series(r2, index=list(HEIGHTS))
