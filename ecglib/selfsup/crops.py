"""Time windows of several lengths cut out of one batch, for multi-crop training (SwAV, DINO,
DISTL).
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Generator, Tensor, nn

from ecglib.augment import Transform, apply
from ecglib.errors import DataError

# Signals `(batch, leads, time)` and the sample of the record where each begins `(batch,)`.
View = tuple[Tensor, Tensor]


def window_length(time: int, share: float, multiple: int = 1) -> int:
    """The `share` of `time` samples, rounded down to a `multiple`; DataError where not one multiple
    fits.
    """
    # The small number keeps 0.7 of 10 at 7, whatever floating point makes of it.
    length = int(share * time / multiple + 1e-6) * multiple
    if not 1 <= length <= time:
        raise DataError(
            f"A window of {share:g} of a {time}-sample crop does not fit (in steps of {multiple} "
            "samples); use longer crops or another share, above 0 and at most 1."
        )
    return length


def windows_at(signals: Tensor, starts: Tensor, length: int) -> Tensor:
    """The windows of each record that begin at its `starts` `(batch, windows)`: `(batch, windows,
    leads, length)`.
    """
    rows = torch.arange(len(signals), device=signals.device)[:, None]
    return signals.unfold(2, length, 1)[rows, :, starts].contiguous()


def random_windows(
    signals: Tensor, length: int, generator: Generator, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """One window per record, `(batch, leads, length)`, and its first sample `(batch,)`, a multiple
    of `multiple`.

    The samples stay as they are: stretching a window to another length would change rate and
    intervals. Nothing is drawn where the window is the whole record.
    """
    batch, _, time = signals.shape
    if length == time:
        return signals, torch.zeros(batch, dtype=torch.long, device=signals.device)
    places = (time - length) // multiple + 1
    starts = multiple * torch.randint(places, (batch,), generator=generator, device=signals.device)
    return windows_at(signals, starts[:, None], length).squeeze(1), starts


class MultiCrop:
    """`crops(signals, generator)` gives one view for each of the `shares` of the signals' length,
    cut at whole patches of a transformer `encoder`, then transformed.
    """

    def __init__(
        self, encoder: nn.Module, shares: Sequence[float], transforms: Sequence[Transform]
    ) -> None:
        self.multiple = getattr(encoder, "patch", 1)
        self.shares = shares
        self.transforms = transforms

    def __call__(self, signals: Tensor, generator: Generator) -> list[View]:
        """The views of one batch; DataError where a share of it is shorter than a patch."""
        views = []
        for share in self.shares:
            length = window_length(signals.shape[2], share, self.multiple)
            window, start = random_windows(signals, length, generator, self.multiple)
            views.append((apply(self.transforms, window, generator), start))
        return views


def encode_views(encoder: nn.Module, views: Sequence[View]) -> Tensor:
    """Features of each view in turn, `(views x batch, features)`; transformers are told where each
    begins. Neighbouring views of one length go through the encoder together.
    """
    features = []
    for _, group in groupby(views, key=lambda view: view[0].shape[2]):
        signals, starts = (torch.cat(part) for part in zip(*group, strict=True))
        placed = (signals, starts) if hasattr(encoder, "positions") else (signals,)
        features.append(encoder(*placed))
    return torch.cat(features)
