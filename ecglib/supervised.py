"""Supervised training from scratch: the control that every other method of the study is held
against.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import Transform, apply, named_transforms
from ecglib.batches import Batch, CropBatches
from ecglib.encoders import make_encoder
from ecglib.records import Records
from ecglib.train import fit


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
    settings: Mapping,
    folder: Path | None = None,
    device: str = "cpu",
    **fit_options,
) -> list[dict]:
    """Train `classifier` in place on the labelled records at `indices` and return its history.

    Settings are those of notebook 02's config. Further options go to `train.fit`.
    """
    objective = Supervised(classifier, named_transforms(settings["transforms"])).to(device)
    batches = CropBatches(
        records, indices, settings["batch_size"], settings["crop_seconds"], seed, device
    )
    history = fit(
        objective,
        batches,
        settings["steps"],
        learning_rate=settings["learning_rate"],
        weight_decay=settings["weight_decay"],
        seed=seed,
        folder=folder,
        **fit_options,
    )
    return history.to_dict("records")


def new_classifier(records: Records, seed: int, settings: Mapping) -> Classifier:
    """A classifier with random weights drawn from the seed."""
    torch.manual_seed(seed)
    return Classifier(make_encoder(settings["encoder"]), len(records.classes), settings["dropout"])
