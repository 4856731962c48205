"""What a semi-supervised objective tells of its pseudo-labels in each row of the log."""

import math

import torch
from torch import Tensor, nn


class Tally(nn.Module):
    """Weighted shares by name over all batches in training since the last report."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        # Of each name the sum and what it is a share of; float64 counts exactly.
        self.register_buffer("sums", torch.zeros(len(names), 2, dtype=torch.float64))

    def add(self, *parts: tuple[Tensor, Tensor]) -> None:
        """Add a batch: for each name values, and those whose sum theirs is a share of."""
        if self.training:
            sums = [[values.sum(dtype=torch.float64) for values in part] for part in parts]
            self.sums += torch.stack([torch.stack(pair) for pair in sums])

    def report(self) -> dict[str, float]:
        """The shares since the last report; NaN where there was nothing to share."""
        shares = [part / whole if whole else math.nan for part, whole in self.sums.tolist()]
        self.sums.zero_()
        return dict(zip(self.names, shares, strict=True))
