"""The order of a view's segments as a pretext (EchoCLR, Holste et al. 2022, arXiv 2207.11581).

An ECG repeats itself, so that the order can be told from what says nothing of the heart: jumps
where segments meet, or a drift of the baseline. Segments are therefore cut apart by random gaps,
freed of their mean and tapered; `order_shortcuts` measures what is left to be told without a heart.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ecglib.batches import Batch
from ecglib.errors import DataError
from ecglib.selfsup.crops import windows_at

# The design for views of 640 samples (6.4 s at 100 Hz): four segments of 140, gaps of 10 to 26,
# tapers of 10 samples, and probes that see 20 samples on each side of a join. All of it scales with
# the length of the view.
DESIGN_VIEW, DESIGN_SEGMENT, GAP, TAPER, REACH = 640, 140, (10, 26), 10, 20


class SegmentSizes(NamedTuple):
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
        f"A view of {length / sampling_rate:g} s gives {segments} segments of {seconds:.2f} s; "
        f"where the heart beats less than {60 / seconds:.0f} times a minute a segment is shorter "
        "than one beat."
    )


def all_orders(segments: int) -> Tensor:
    """Every order of the segments, `(segments!, segments)`; the first leaves them as they are."""
    return torch.tensor(list(itertools.permutations(range(segments))))


def cut_segments(signals: Tensor, generator: Generator, segments: int = 4) -> Tensor:
    """Segments of views `(batch, leads, time)` in the order of time, `(batch, segments, leads,
    samples)`.

    Random gaps lie between them, and the whole starts at a random place of the view; each segment
    of each lead is freed of its mean, and a cosine taper brings both its ends to zero.
    """
    batch, _, time = signals.shape
    segment, smallest, largest, taper = segment_sizes(time, segments)
    # One draw per gap, and one for the room that is left before the first segment.
    draws = torch.rand((batch, segments), generator=generator, device=signals.device)
    gaps = smallest + (draws[:, 1:] * (largest - smallest + 1)).long()
    room = time - segments * segment - gaps.sum(dim=1, keepdim=True)
    begin = (draws[:, :1] * (room + 1)).long()
    starts = torch.cat([begin, begin + (gaps + segment).cumsum(dim=1)], dim=1)
    pieces = windows_at(signals, starts, segment)
    pieces = pieces - pieces.mean(dim=3, keepdim=True)
    # Ones that fall to zero at both ends along half a cosine.
    clock = torch.arange(segment, device=signals.device, dtype=signals.dtype)
    distance = torch.minimum(clock, clock.flip(0)) / max(taper, 1)
    weight = 0.5 - 0.5 * torch.cos(torch.pi * distance.clamp(max=1.0))
    return pieces * weight


def join_segments(pieces: Tensor, order: Tensor) -> Tensor:
    """Segments `(batch, segments, leads, samples)` one after the other as `order` `(batch,
    segments)` says: place k holds segment `order[:, k]`; `(batch, leads, segments x samples)`.
    """
    rows = torch.arange(len(pieces), device=pieces.device)[:, None]
    return pieces[rows, order].transpose(1, 2).flatten(2)


def shuffle_segments(
    signals: Tensor, generator: Generator, orders: Tensor
) -> tuple[Tensor, Tensor]:
    """Views with their segments in a random one of `orders`, and the number of that order,
    `(batch,)`.
    """
    pieces = cut_segments(signals, generator, orders.shape[1])
    number = torch.randint(len(orders), (len(signals),), generator=generator, device=signals.device)
    return join_segments(pieces, orders[number]), number


class OrderHead(nn.Linear):
    """Which of the `segments`! orders was applied to a view, told from an encoder's features."""

    def __init__(self, features: int, segments: int) -> None:
        orders = all_orders(segments)
        super().__init__(features, len(orders))
        self.register_buffer("orders", orders, persistent=False)

    def forward(self, encoder: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits `(batch, orders)` for the batch's signals, freshly shuffled, and the numbers of
        the orders that were applied.
        """
        views, number = shuffle_segments(batch.signals, batch.generator, self.orders)
        return super().forward(encoder(views)).float(), number


class SegmentOrder(nn.Module):
    """The order of the segments as the only task; `.encoder` is kept.

    Nothing is augmented: a blanked segment has no place.
    """

    def __init__(self, encoder: nn.Module, *, segments: int = 4) -> None:
        super().__init__()
        self.encoder = encoder
        self.order_head = OrderHead(encoder.feature_size, segments)

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy; log(segments!) at chance."""
        return F.cross_entropy(*self.order_head(self.encoder, batch))
