"""What a user might add: an encoder, a self-supervised and a semi-supervised method, a file each
in earnest.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import apply
from ecglib.batches import Batch, SemiBatch
from ecglib.semisup import Task


class ToyEncoder(nn.Module):
    """`(batch, leads, time)` -> `(batch, 8)`, or logits `(batch, classes)` where made with
    classes.
    """

    feature_size = 8

    def __init__(self, leads: int = 12, classes: int | None = None) -> None:
        super().__init__()
        self.first = nn.Conv1d(leads, 8, 9, stride=4)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, classes) if classes else nn.Identity()

    def layers(self) -> list[nn.Module]:
        """Its parts from input to output."""
        return [self.first, self.norm]

    def forward(self, signals: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.first(signals))).mean(dim=2))


class ToyPretext(nn.Module):
    """Two views of a crop should have the same features."""

    def __init__(self, encoder: nn.Module, transforms: list) -> None:
        super().__init__()
        self.encoder = encoder
        self.transforms = transforms

    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        views = [apply(self.transforms, batch.signals, batch.generator) for _ in range(2)]
        first, second = map(self.encoder, views)
        return F.mse_loss(first, second) + (1 - first.std(dim=0)).relu().mean()


class ToyConsistency(nn.Module):
    """Cross-entropy of the labelled records; the others should not change what is said of them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, batch: SemiBatch) -> Tensor:
        """Scalar loss of one batch."""
        logits = self.network(batch.signals)
        quiet = self.network(batch.unlabelled).square().mean()
        return F.binary_cross_entropy_with_logits(logits, batch.targets) + 0.01 * quiet


def make_toy(network: nn.Module, task: Task) -> ToyConsistency:
    """The objective around an adapted network."""
    return ToyConsistency(network)
