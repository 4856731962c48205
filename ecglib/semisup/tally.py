"""What a semi-supervised objective tells of its pseudo-labels in each row of the log."""

import torch
from torch import Tensor, nn


class Tally(nn.Module):
    """Weighted shares by name over all batches in training since the last report."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        # Of each name the sum and what it is a share of; float64 counts exactly.
        self.register_buffer("sums", torch.zeros(len(names), 2, dtype=torch.float64))

    def add(self, *values: Tensor) -> None:
        """Add a batch, values of one shape: for each name some, and those whose sum theirs is a
        share of.
        """
        if self.training:
            self.sums += torch.stack(values).double().flatten(1).sum(dim=1).view_as(self.sums)

    def report(self) -> dict[str, float]:
        """The shares since the last report; NaN where there was nothing to share."""
        parts, wholes = self.sums.T
        shares = (parts / wholes).tolist()
        self.sums.zero_()
        return dict(zip(self.names, shares, strict=True))
