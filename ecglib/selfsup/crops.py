"""Time windows of several lengths cut out of one batch, for multi-crop training (SwAV, DINO)."""

import torch
from torch import Generator, Tensor

from ecglib.errors import DataError


def window_length(time: int, share: float, multiple: int = 1) -> int:
    """The `share` of `time` samples, rounded down to a `multiple`; DataError where not one multiple fits."""
    # The small number keeps 0.7 of 10 at 7, whatever floating point makes of it.
    length = int(share * time / multiple + 1e-6) * multiple
    if not 1 <= length <= time:
        raise DataError(f"A window of {share:g} of a {time}-sample crop does not fit (in steps of {multiple} samples); "
                        "use longer crops or another share, above 0 and at most 1.")  # fmt: skip
    return length


def random_windows(signals: Tensor, length: int, generator: Generator, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """One window a record, `(batch, leads, length)`, and its first sample `(batch,)`, a multiple of `multiple`.

    The samples stay as they are: stretching a window to another length would change rate and intervals.
    """
    batch, leads, time = signals.shape
    places = (time - length) // multiple + 1
    starts = multiple * torch.randint(places, (batch,), generator=generator, device=signals.device)
    index = starts[:, None] + torch.arange(length, device=signals.device)
    return signals.gather(2, index[:, None, :].expand(-1, leads, -1)), starts
