"""The order of a view's segments as a pretext (EchoCLR, Holste et al. 2022, arXiv 2207.11581).

An ECG repeats itself, so that the order can be told from what says nothing of the heart: jumps
where segments meet, or a drift of the baseline. Segments are therefore cut apart by random gaps,
freed of their mean and tapered; `order_shortcuts` measures what is left to be told without a heart.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

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
    sizes = segment_sizes(time, segments)
    # One draw per gap, and one for the room that is left before the first segment.
    draws = torch.rand((batch, segments), generator=generator, device=signals.device)
    gaps = sizes.smallest_gap + (draws[:, 1:] * (sizes.largest_gap - sizes.smallest_gap + 1)).long()
    room = time - segments * sizes.segment - gaps.sum(dim=1, keepdim=True)
    begin = (draws[:, :1] * (room + 1)).long()
    starts = torch.cat([begin, begin + (gaps + sizes.segment).cumsum(dim=1)], dim=1)
    pieces = windows_at(signals, starts, sizes.segment)
    pieces = pieces - pieces.mean(dim=3, keepdim=True)
    # The taper: ones that fall to zero at both ends along half a cosine.
    clock = torch.arange(sizes.segment, device=signals.device, dtype=signals.dtype)
    distance = torch.minimum(clock, clock.flip(0)) / max(sizes.taper, 1)
    taper = 0.5 - 0.5 * torch.cos(torch.pi * distance.clamp(max=1.0))
    return (pieces * taper).transpose(1, 2)


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
    shape, device = (len(signals),), signals.device
    number = torch.randint(len(orders), shape, generator=generator, device=device)
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
        views, number = shuffle_segments(signals, generator, self.orders)
        if self.look:
            views = self.look(views)
        return self.order_head(self.encoder(views)), number

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy; log(segments!) at chance."""
        logits, number = self.predict(batch.signals, batch.generator)
        return F.cross_entropy(logits.float(), number)
