"""Patient pairs: the ECG counterpart of EchoCLR (Holste et al. 2022, arXiv 2207.11581).

Two different records of one patient agree, other patients are pushed away, and the order of a
view's four segments is predicted. An ECG repeats itself, so that order can be told from what says
nothing of the heart: jumps where segments meet, or a drift of the baseline. Segments are therefore
cut apart by random gaps, freed of their mean and tapered, and `shortcut_probes` measures what
networks reach that see the joins only, or the drift only.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ecglib.augment import Transform, apply
from ecglib.batches import Batch, CropBatches, PairBatch
from ecglib.distributed import gathered
from ecglib.encoders import make_encoder
from ecglib.errors import DataError
from ecglib.records import LEADS, Records
from ecglib.selfsup.heads import projection_head
from ecglib.selfsup.simclr import nt_xent
from ecglib.train import fit

# The design for views of 640 samples (6.4 s at 100 Hz): four segments of 140, gaps of 10 to 26,
# tapers of 10 samples, and probes that see 20 samples on each side of a join. All of it scales with
# the length of the view.
DESIGN_VIEW, DESIGN_SEGMENT, GAP, TAPER, REACH = 640, 140, (10, 26), 10, 20


def patient_nt_xent(z1: Tensor, z2: Tensor, patients: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent of pairs `(batch, d)` in which no other pair of the same patient counts as a
    negative: the scalar

    L = -1/2N sum_i log( exp(s_ij / T) / (exp(s_ij / T) + sum_{k: p_k != p_i} exp(s_ik / T)) ),   j
    the pair of i.

    `patients` `(batch,)` holds the numbers p. EchoCLR leaves such false negatives in; with all
    patients different it is `nt_xent`. DataError for a batch of one.
    """
    everyone = torch.cat(gathered(patients)).repeat(2)
    return nt_xent(z1, z2, temperature, same=everyone[:, None] == everyone)


@dataclass(frozen=True)
class SegmentSizes:
    """Samples of a segment, of the smallest and the largest gap between two, and of the taper at
    each end.
    """

    segment: int
    smallest_gap: int
    largest_gap: int
    taper: int


def segment_sizes(length: int, segments: int = 4) -> SegmentSizes:
    """The published design scaled to a view of `length` samples; DataError where a segment would
    have less than 8.
    """
    if not 2 <= segments <= 6:
        raise DataError(
            f"A view is cut into 2 to 6 segments, not {segments}; 6 already have 720 orders."
        )
    smallest, largest = (round(gap * length / DESIGN_VIEW) for gap in GAP)
    segment = (length - (segments - 1) * largest) // segments
    if segment < 8:
        raise DataError(
            f"A view of {length} samples is too short for {segments} segments; use longer crops."
        )
    return SegmentSizes(segment, smallest, largest, round(segment * TAPER / DESIGN_SEGMENT))


def describe_segments(length: int, sampling_rate: float, segments: int = 4) -> str:
    """One sentence on how long the segments are, and at which heart rates they are shorter than a
    beat.
    """
    seconds = segment_sizes(length, segments).segment / sampling_rate
    return (
        f"A view of {length / sampling_rate:g} s gives {segments} segments of {seconds:.2f} s; where the heart "
        f"beats less than {60 / seconds:.0f} times a minute a segment is shorter than one beat."
    )


def all_orders(segments: int) -> Tensor:
    """Every order of the segments, `(segments!, segments)`; the first one leaves them as they are."""
    return torch.tensor(list(itertools.permutations(range(segments))))


def cut_segments(signals: Tensor, generator: Generator, segments: int = 4) -> Tensor:
    """Segments of views `(batch, leads, time)` in the order of time, `(batch, segments, leads,
    samples)`.

    Random gaps lie between them, and the whole starts at a random place of the view; each segment
    of each lead is freed of its mean, and a cosine taper brings both its ends to zero.
    """
    batch, leads, time = signals.shape
    sizes = segment_sizes(time, segments)
    # One draw a gap, and one for the room that is left before the first segment.
    draws = torch.rand((batch, segments), generator=generator, device=signals.device)
    gaps = sizes.smallest_gap + (draws[:, 1:] * (sizes.largest_gap - sizes.smallest_gap + 1)).long()
    room = time - segments * sizes.segment - gaps.sum(dim=1, keepdim=True)
    begin = (draws[:, :1] * (room + 1)).long()
    starts = torch.cat([begin, begin + (gaps + sizes.segment).cumsum(dim=1)], dim=1)
    places = (starts[:, :, None] + torch.arange(sizes.segment, device=signals.device)).flatten(1)
    pieces = signals.gather(2, places[:, None, :].expand(-1, leads, -1)).unflatten(
        2, (segments, sizes.segment)
    )
    pieces = pieces - pieces.mean(dim=3, keepdim=True)
    return (pieces * _taper(sizes.segment, sizes.taper, signals)).transpose(1, 2)


def _taper(samples: int, ends: int, like: Tensor) -> Tensor:
    """A window `(samples,)` of ones whose two ends fall to zero along half a cosine over `ends`
    samples.
    """
    clock = torch.arange(samples, device=like.device, dtype=like.dtype)
    distance = torch.minimum(clock, samples - 1 - clock)
    return 0.5 - 0.5 * torch.cos(torch.pi * (distance / max(ends, 1)).clamp(max=1.0))


def join_segments(pieces: Tensor, order: Tensor) -> Tensor:
    """Segments `(batch, segments, leads, samples)` one after the other as `order` `(batch,
    segments)` says: place k holds segment `order[:, k]`; `(batch, leads, segments x samples)`.
    """
    rows = torch.arange(len(pieces), device=pieces.device)
    return pieces[rows[:, None], order].transpose(1, 2).flatten(2)


def shuffle_segments(
    signals: Tensor, generator: Generator, orders: Tensor
) -> tuple[Tensor, Tensor]:
    """Views with their segments in a random one of `orders`, and the number of that order,
    `(batch,)`.
    """
    pieces = cut_segments(signals, generator, orders.shape[1])
    number = torch.randint(
        0, len(orders), (len(signals),), generator=generator, device=signals.device
    )
    return join_segments(pieces, orders[number]), number


class SegmentOrder(nn.Module):
    """Which of the `segments`! orders was applied to a view, told by a linear layer on the
    encoder's features.

    `.encoder` is kept. `look` says what of the shuffled view `(batch, leads, time)` the encoder may
    see; the probes use it. Nothing is augmented: a blanked segment has no place.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        segments: int = 4,
        look: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.look = encoder, look
        self.register_buffer("orders", all_orders(segments), persistent=False)
        self.order_head = nn.Linear(encoder.feature_size, len(self.orders))

    def predict(self, signals: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Logits `(batch, orders)` for freshly shuffled views, and the numbers of the orders that
        were applied.
        """
        shuffled, number = shuffle_segments(signals, generator, self.orders)
        return self.order_head(self.encoder(self.look(shuffled) if self.look else shuffled)), number

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy; log(segments!) at chance."""
        logits, number = self.predict(batch.signals, batch.generator)
        return F.cross_entropy(logits.float(), number)


class PatientPairs(nn.Module):
    """L = NT-Xent over pairs of one patient + `order_weight` x cross-entropy of the segment order,
    on PatientBatches.

    `.encoder` is kept, projector (features -> 256 -> 128, no bias) and order head are thrown away.
    The contrastive branch sees augmented views with their time in order, the order branch the views
    as they were cut. EchoCLR sends one shuffled view through both, which breaks the rhythm:
    `shared=True`. Its weight is 1, its temperature 0.05. With `order_weight=0` only the pairs are
    left; `SegmentOrder` is the order alone.
    """

    def __init__(
        self,
        encoder: nn.Module,
        transforms: Sequence[Transform] = (),
        *,
        temperature: float = 0.1,
        order_weight: float = 1.0,
        segments: int = 4,
        shared: bool = False,
        hidden: int = 256,
        outputs: int = 128,
    ) -> None:
        super().__init__()
        self.encoder, self.transforms, self.temperature = encoder, list(transforms), temperature
        self.order_weight, self.shared = order_weight, shared
        self.projector = projection_head(encoder.feature_size, hidden, outputs, bias=False)
        self.register_buffer("orders", all_orders(segments), persistent=False)
        # No head where it would not learn: data parallelism refuses parameters without gradients.
        self.order_head = (
            nn.Linear(encoder.feature_size, len(self.orders)) if order_weight else None
        )

    def loss(self, batch: PairBatch) -> Tensor:
        """Scalar loss of one batch of pairs; DataError for a batch without pairs, and for a single
        pair.
        """
        if not isinstance(batch, PairBatch):
            raise DataError("Patient pairs need batches of pairs; make them with PatientBatches.")
        views = apply(self.transforms, batch.signals, batch.generator)
        if self.shared:
            views, number = shuffle_segments(views, batch.generator, self.orders)
        features = self.encoder(views)
        contrast = patient_nt_xent(
            *self.projector(features).chunk(2), batch.patients, self.temperature
        )
        if self.order_head is None:
            return contrast
        if not self.shared:
            views, number = shuffle_segments(batch.signals, batch.generator, self.orders)
            features = self.encoder(views)
        return contrast + self.order_weight * F.cross_entropy(
            self.order_head(features).float(), number
        )


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
            f"A probe of the joins can reach 1 to {size} samples into a segment of {size}, not {reach}."
        )
    looks = {
        "whole view": None,
        "joins": partial(joins_only, segments=segments, reach=reach),
        "drift": partial(drift_only, sampling_rate=records.sampling_rate),
    }
    seen = CropBatches(records, train, batch_size, crop_seconds, seed, device)
    unseen = CropBatches(records, held_out, batch_size, crop_seconds, seed + 1, device)
    rows = []
    for name, look in looks.items():
        torch.manual_seed(seed)
        channels = len(LEADS) * (segments - 1 if name == "joins" else 1)
        network = make_encoder(encoder) if look is None else ProbeNetwork(channels)
        objective = SegmentOrder(network, segments=segments, look=look).to(device)
        fit(objective, seen, steps, learning_rate=learning_rate, seed=seed)
        views = -(-len(held_out) * repeats // batch_size)
        rows.append({"input": name, "accuracy": order_accuracy(objective, unseen, views)})
    return _with_shares(pd.DataFrame(rows), 1 / len(all_orders(segments)), views * batch_size)


@torch.no_grad()
def order_accuracy(objective: SegmentOrder, batches: Callable[[int], Batch], count: int) -> float:
    """Share of the views in the first `count` batches whose order is told rightly, in evaluation
    mode.
    """
    was_training = objective.training
    objective.eval()
    right = []
    for step in range(count):
        batch = batches(step)
        logits, number = objective.predict(batch.signals, batch.generator)
        right.append((logits.argmax(dim=1) == number).float())
    objective.train(was_training)
    return float(torch.cat(right).mean())


def _with_shares(table: pd.DataFrame, chance: float, views: int) -> pd.DataFrame:
    """The table of the probes with standard errors, chance and shares of the first row's gain."""
    gain = table["accuracy"] - chance
    error = np.sqrt(table["accuracy"] * (1 - table["accuracy"]) / views)
    share = gain / gain[0] if gain[0] > 2 * error[0] else np.nan
    return table.assign(standard_error=error, chance=chance, share_of_gain=share)
