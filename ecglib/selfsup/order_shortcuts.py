"""Can the order of segments be told without the heart? Networks that see the joins only, or the
drift only, against one that sees the whole view.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ecglib.batches import Batch, CropBatches
from ecglib.encoders import make_encoder
from ecglib.errors import DataError
from ecglib.records import LEADS, Records
from ecglib.selfsup.segment_order import DESIGN_SEGMENT, REACH, SegmentOrder, segment_sizes
from ecglib.train import fit


def joins_only(shuffled: Tensor, segments: int, reach: int) -> Tensor:
    """What lies within `reach` samples of the joins of a shuffled view, `(batch, joins x leads, 2 x
    reach)`.
    """
    size = shuffled.shape[2] // segments
    return torch.cat(
        [shuffled[:, :, k * size - reach : k * size + reach] for k in range(1, segments)], dim=1
    )


def drift_only(shuffled: Tensor, sampling_rate: float, cutoff: float = 0.5) -> Tensor:
    """What of a shuffled view is slower than `cutoff` Hz; the shape stays. In 2.2 s that is one
    wave and the mean.
    """
    time = shuffled.shape[2]
    spectrum = torch.fft.rfft(shuffled.float())
    frequency = torch.fft.rfftfreq(time, 1 / sampling_rate, device=shuffled.device)
    return torch.fft.irfft(spectrum * (frequency < cutoff), n=time)


class ProbeNetwork(nn.Module):
    """A small convolutional network, `(batch, channels, time)` -> `(batch, 512)`, that knows where
    in time things lie.

    Its inputs are standardised first, so that a weak trace is seen as well as a strong one.
    """

    feature_size = 512

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(channels, affine=False),
            nn.Conv1d(channels, width, 5, padding=2),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Conv1d(width, width, 5, padding=2),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(self.feature_size // width),
            nn.Flatten(),
        )

    def forward(self, signals: Tensor) -> Tensor:
        return self.layers(signals)


def shortcut_probes(
    records: Records,
    train: np.ndarray,
    held_out: np.ndarray,
    steps: int = 600,
    seed: int = 0,
    *,
    encoder: str = "xresnet1d_narrow",
    crop_seconds: float = 2.5,
    segments: int = 4,
    reach: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    repeats: int = 8,
    device: str = "cpu",
) -> pd.DataFrame:
    """How much of the segment order can be told without the heart: one row for each of three
    networks.

    Each is trained alike on the records at `train`: `encoder` on the whole view, and ProbeNetworks
    on the joins (within `reach` samples, a seventh of a segment by default) and on the drift below
    0.5 Hz. Columns: input, accuracy on `repeats` views of each record at `held_out`, its
    standard_error, chance, and share_of_gain, the part of the whole view's gain above chance: above
    0.5 the task has a shortcut. It is NaN where that gain is below two standard errors.
    """
    size = segment_sizes(round(crop_seconds * records.sampling_rate), segments).segment
    reach = round(size * REACH / DESIGN_SEGMENT) if reach is None else reach
    if not 1 <= reach <= size:
        raise DataError(
            f"A probe of the joins can reach 1 to {size} samples into a segment of {size}, not "
            f"{reach}."
        )
    looks = {
        "whole view": None,
        "joins": partial(joins_only, segments=segments, reach=reach),
        "drift": partial(drift_only, sampling_rate=records.sampling_rate),
    }
    seen = CropBatches(records, train, batch_size, crop_seconds, seed, device)
    unseen = CropBatches(records, held_out, batch_size, crop_seconds, seed + 1, device)
    views = -(-len(held_out) * repeats // batch_size)
    rows = []
    for name, look in looks.items():
        torch.manual_seed(seed)
        channels = len(LEADS) * (segments - 1 if name == "joins" else 1)
        network = ProbeNetwork(channels) if look else make_encoder(encoder)
        objective = SegmentOrder(network, segments=segments, look=look).to(device)
        fit(objective, seen, steps, learning_rate=learning_rate, seed=seed)
        rows.append({"input": name, "accuracy": order_accuracy(objective, unseen, views)})
    return _with_shares(pd.DataFrame(rows), 1 / len(objective.orders), views * batch_size)


@torch.no_grad()
def order_accuracy(objective: SegmentOrder, batches: Callable[[int], Batch], count: int) -> float:
    """Share of the views in the first `count` batches whose order is told rightly, in evaluation
    mode.
    """
    training = objective.training
    objective.eval()
    right = []
    for batch in map(batches, range(count)):
        logits, number = objective.predict(batch.signals, batch.generator)
        right.append((logits.argmax(dim=1) == number).float())
    objective.train(training)
    return float(torch.cat(right).mean())


def _with_shares(table: pd.DataFrame, chance: float, views: int) -> pd.DataFrame:
    """The table of the probes with standard errors, chance and shares of the first row's gain."""
    gain = table["accuracy"] - chance
    error = np.sqrt(table["accuracy"] * (1 - table["accuracy"]) / views)
    share = gain / gain[0] if gain[0] > 2 * error[0] else np.nan
    return table.assign(standard_error=error, chance=chance, share_of_gain=share)
