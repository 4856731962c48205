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
    """The windows of each record that begin at its `starts` `(batch, windows)`: `(batch, leads,
    windows, length)`.
    """
    places = (starts[:, :, None] + torch.arange(length, device=signals.device)).flatten(1)
    index = places[:, None].expand(-1, signals.shape[1], -1)
    return signals.gather(2, index).unflatten(2, (-1, length))


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
    return windows_at(signals, starts[:, None], length).squeeze(2), starts


def random_views(
    signals: Tensor,
    shares: Sequence[float],
    generator: Generator,
    transforms: Sequence[Transform] = (),
    multiple: int = 1,
) -> list[View]:
    """One view for each of the `shares` of the signals' length, cut at a `multiple` of samples,
    then transformed.
    """
    views = []
    for share in shares:
        length = window_length(signals.shape[2], share, multiple)
        window, start = random_windows(signals, length, generator, multiple)
        views.append((apply(transforms, window, generator), start))
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
