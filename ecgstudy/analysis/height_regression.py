"""A network whose answer is known to rest on one wave: the gate that every attribution must pass."""

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

# Regressors of wave heights, for which the true place is known

HEIGHTS = {"P": ("P", "II"), "R": ("QRS", "V5"), "T": ("T", "V3")}  # output: wave and lead


def wave_heights(simulation: Simulation) -> np.ndarray:
    """Height of each wave of `HEIGHTS` in its lead, mV `(n, 3)`: from the wave's first sample to
    its farthest point.

    The median over a record's normal beats; for R the highest point. NaN where there is no such
    wave.
    """
    signals, rows = simulation.records.millivolts(), []
    for record, signal in zip(simulation.records.table["record_id"], signals, strict=True):
        beats = simulation.beats.get(record)
        rows.append(
            [
                np.nan if beats is None else _height(signal[LEADS.index(lead)], beats, wave)
                for wave, lead in HEIGHTS.values()
            ]
        )
    return np.array(rows)


def _height(trace: np.ndarray, beats: pd.DataFrame, wave: str) -> float:
    """Median height of one wave in the trace of its lead."""
    normal = (
        beats.loc[beats["kind"] == "normal", [f"{wave} onset", f"{wave} offset"]]
        .dropna()
        .to_numpy(int)
    )
    over = [trace[onset : offset + 1] - trace[onset] for onset, offset in normal]
    tops = [
        part.max() if wave == "QRS" else part[np.abs(part).argmax()] for part in over if len(part)
    ]
    return float(np.median(tops)) if tops else np.nan


def wave_masks(simulation: Simulation, positions: np.ndarray, output: str) -> np.ndarray:
    """Where the height of an output of `HEIGHTS` is measured, bool `(n, 12, time)`: its wave, in
    its lead alone.
    """
    wave, lead = HEIGHTS[output]
    mask = np.zeros((len(positions), *simulation.records.signals.shape[1:]), bool)
    for row, record in enumerate(simulation.records.table["record_id"].iloc[positions]):
        beats = simulation.beats[record]
        normal = (
            beats.loc[beats["kind"] == "normal", [f"{wave} onset", f"{wave} offset"]]
            .dropna()
            .to_numpy(int)
        )
        for onset, offset in normal:
            mask[row, LEADS.index(lead), onset : offset + 1] = True
    return mask


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
        gains = 0.5 + torch.rand(
            signals.shape[:2], generator=batch.generator, device=signals.device
        )
        wanted = (batch.targets * gains[:, self.leads] - self.mean) / self.deviation
        return nn.functional.mse_loss(self.network(signals * gains[:, :, None]).float(), wanted)


def height_regressor(
    simulation: Simulation,
    *,
    steps: int = 400,
    batch_size: int = 64,
    seconds: float = 2.5,
    learning_rate: float = 0.01,
    encoder: str = "xresnet1d_narrow",
    seed: int = 0,
) -> tuple[nn.Module, np.ndarray, pd.Series]:
    """A network that was taught wave heights, the records it was not taught with, and its R2 on
    these by output.

    Folds 1-8 of the cohort teach, fold 10 is asked. R2 is that of the mean over a record's windows.
    """
    records, heights = simulation.records, wave_heights(simulation)
    usable, fold = ~np.isnan(heights).any(axis=1), simulation.records.table["fold"].to_numpy()
    taught, asked = np.flatnonzero(usable & (fold <= 8)), np.flatnonzero(usable & (fold == 10))
    if not len(taught) or not len(asked):
        raise DataError(
            f"{len(records)} simulated records are too few to teach and to ask; simulate more patients."
        )
    torch.manual_seed(seed)
    objective = HeightRegression(Classifier(make_encoder(encoder), len(HEIGHTS)), heights[taught])
    crops = CropBatches(records, taught, batch_size, seconds, seed)

    def batches(step: int) -> Batch:
        batch = crops(step)
        return replace(
            batch,
            targets=torch.as_tensor(heights[taught[batch.indices.numpy()]], dtype=torch.float32),
        )

    fit(objective, batches, steps, learning_rate=learning_rate, seed=seed)
    network = objective.network.eval()
    said = encode_windows(network, records, asked, seconds)
    said = said * objective.deviation.numpy() + objective.mean.numpy()
    r2 = 1 - ((said - heights[asked]) ** 2).mean(axis=0) / heights[asked].var(axis=0)
    return network, asked, pd.Series(r2, index=list(HEIGHTS))
