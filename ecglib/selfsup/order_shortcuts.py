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
from ecglib.evaluate.windows import evaluation
from ecglib.records import LEADS, Records
from ecglib.selfsup.segment_order import DESIGN_SEGMENT, REACH, SegmentOrder
from ecglib.train import fit

BATCH = 64
REPEATS = 8  # views of each held-out record


def joins_only(shuffled: Tensor, segments: int) -> Tensor:
    """What lies around the joins of a shuffled view, a seventh of a segment on each side, `(batch,
    joins x leads, samples)`.
    """
    size = shuffled.shape[2] // segments
    reach = round(size * REACH / DESIGN_SEGMENT)
    joins = range(size, segments * size, size)
    return torch.cat([shuffled[:, :, join - reach : join + reach] for join in joins], dim=1)


def drift_only(shuffled: Tensor, sampling_rate: float) -> Tensor:
    """What of a shuffled view is slower than 0.5 Hz; the shape stays. In 2.2 s that is one wave and
    the mean.
    """
    time = shuffled.shape[2]
    spectrum = torch.fft.rfft(shuffled.float())
    frequency = torch.fft.rfftfreq(time, 1 / sampling_rate, device=shuffled.device)
    return torch.fft.irfft(spectrum * (frequency < 0.5), n=time)


class ProbeNetwork(nn.Sequential):
    """A small convolutional network, `(batch, leads, time)` -> `(batch, 512)`, that knows where in
    time things lie.

    It sees what `look` leaves of a view, standardised, so that a weak trace is seen as well as a
    strong one.
    """

    feature_size = 512

    def __init__(self, channels: int, look: Callable[[Tensor], Tensor]) -> None:
        width = 32
        layers = [nn.BatchNorm1d(channels, affine=False)]
        for inputs in (channels, width):
            convolution = nn.Conv1d(inputs, width, 5, padding=2)
            layers += [convolution, nn.BatchNorm1d(width), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool1d(self.feature_size // width), nn.Flatten())
        self.look = look

    def forward(self, signals: Tensor) -> Tensor:
        return super().forward(self.look(signals))


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
    device: str = "cpu",
) -> pd.DataFrame:
    """How much of the segment order can be told without the heart: one row for each of three
    networks.

    Each is trained alike on the records at `train`: `encoder` on the whole view, and ProbeNetworks
    on the joins (within a seventh of a segment) and on the drift below 0.5 Hz. Columns: input,
    accuracy on eight views of each record at `held_out`, its standard_error, chance, and
    share_of_gain, the part of the whole view's gain above chance: above 0.5 the task has a
    shortcut. It is NaN where that gain is below two standard errors.
    """
    joins = partial(joins_only, segments=segments)
    drift = partial(drift_only, sampling_rate=records.sampling_rate)
    networks = {
        "whole view": partial(make_encoder, encoder),
        "joins": partial(ProbeNetwork, len(LEADS) * (segments - 1), joins),
        "drift": partial(ProbeNetwork, len(LEADS), drift),
    }
    seen = CropBatches(records, train, BATCH, crop_seconds, seed, device)
    unseen = CropBatches(records, held_out, BATCH, crop_seconds, seed + 1, device)
    count = -(-len(held_out) * REPEATS // BATCH)
    rows = []
    for name, make in networks.items():
        torch.manual_seed(seed)
        objective = SegmentOrder(make(), segments=segments).to(device)
        fit(objective, seen, steps, learning_rate=3e-3, seed=seed)
        rows.append({"input": name, "accuracy": order_accuracy(objective, unseen, count)})
    table = pd.DataFrame(rows)
    chance = 1 / len(objective.order_head.orders)
    error = np.sqrt(table["accuracy"] * (1 - table["accuracy"]) / (count * BATCH))
    gain = table["accuracy"] - chance
    share = gain / gain[0] if gain[0] > 2 * error[0] else np.nan
    return table.assign(standard_error=error, chance=chance, share_of_gain=share)


@torch.no_grad()
def order_accuracy(objective: SegmentOrder, batches: Callable[[int], Batch], count: int) -> float:
    """Share of the views in the first `count` batches whose order is told rightly, in evaluation
    mode.
    """
    right = []
    with evaluation(objective):
        for batch in map(batches, range(count)):
            logits, number = objective.order_head(objective.encoder, batch)
            right.append((logits.argmax(dim=1) == number).float())
    return float(torch.cat(right).mean())
