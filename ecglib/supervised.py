"""Supervised training from scratch: the control that every other method of the study is held against."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import Transform, apply
from ecglib.batches import Batch


class Classifier(nn.Module):
    """An encoder and one linear layer: `(batch, leads, time)` mV -> logits `(batch, classes)`."""

    def __init__(self, encoder: nn.Module, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(encoder.feature_size, classes))

    def forward(self, signals: Tensor) -> Tensor:
        return self.head(self.encoder(signals))


class Supervised(nn.Module):
    """Binary cross-entropy of each class, mean over classes and records, on augmented crops."""

    def __init__(self, classifier: Classifier, transforms: Sequence[Transform] = ()) -> None:
        super().__init__()
        self.classifier, self.transforms = classifier, list(transforms)

    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        logits = self.classifier(apply(self.transforms, batch.signals, batch.generator))
        return F.binary_cross_entropy_with_logits(logits.float(), batch.targets)
