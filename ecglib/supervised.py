"""Supervised training from scratch: the control that every other method of the study is held
against.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import Transform, apply, named_transforms
from ecglib.batches import Batch, CropBatches
from ecglib.encoders import make_encoder
from ecglib.records import Records
from ecglib.settings import EncoderTraining
from ecglib.train import fit


@dataclass(frozen=True)
class Training(EncoderTraining):
    """How a classifier is trained with labels.

    `dropout` is the share of features left out before the last layer. In fine-tuning each layer
    learns at `layer_factor` times the rate of the layer above it.
    """

    dropout: float = 0.0
    layer_factor: float = 1.0


class Classifier(nn.Module):
    """An encoder and one linear layer: `(batch, leads, time)` mV -> logits `(batch, classes)`."""

    def __init__(self, encoder: nn.Module, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(encoder.feature_size, classes))

    def forward(self, signals: Tensor) -> Tensor:
        return self.head(self.encoder(signals))


class Supervised(nn.Module):
    """Binary cross-entropy, mean over classes and records, on augmented crops."""

    def __init__(self, classifier: Classifier, transforms: Sequence[Transform] = ()) -> None:
        super().__init__()
        self.classifier, self.transforms = classifier, list(transforms)

    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss of one batch."""
        logits = self.classifier(apply(self.transforms, batch.signals, batch.generator))
        return F.binary_cross_entropy_with_logits(logits.float(), batch.targets)


def train_classifier(
    classifier: Classifier,
    records: Records,
    indices: np.ndarray,
    seed: int,
    training: Training,
    folder: Path | None = None,
    device: str = "cpu",
    **fit_options,
) -> list[dict]:
    """Train `classifier` in place on the labelled records at `indices` and return its history.

    Further options go to `train.fit`.
    """
    objective = Supervised(classifier, named_transforms(training.transforms)).to(device)
    batches = CropBatches(
        records, indices, training.batch_size, training.crop_seconds, seed, device
    )
    history = fit(
        objective,
        batches,
        training.steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        seed=seed,
        folder=folder,
        **fit_options,
    )
    return history.to_dict("records")


def new_classifier(records: Records, seed: int, training: Training) -> Classifier:
    """A classifier with random weights drawn from the seed."""
    torch.manual_seed(seed)
    return Classifier(make_encoder(training.encoder), len(records.classes), training.dropout)
