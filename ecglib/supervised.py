"""Supervised training from scratch: the control that every other method of the study is held against."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import Transform, apply, named_transforms
from ecglib.batches import Batch, CropBatches
from ecglib.encoders import make_encoder
from ecglib.evaluate import predict_windows, score_rows
from ecglib.labels import label_subsets, split_indices
from ecglib.records import Records
from ecglib.runs import Result, RunSpec
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


def train_supervised(records: Records, indices: np.ndarray, seed: int, settings: Mapping, folder: Path | None = None,
                     device: str = "cpu", **fit_options) -> tuple[Classifier, list[dict]]:  # fmt: skip
    """A classifier trained on the records at `indices`, and its history. Settings are those of notebook 02's config."""
    torch.manual_seed(seed)
    encoder = make_encoder(settings["encoder"])
    objective = Supervised(Classifier(encoder, len(records.classes), settings["dropout"]),
                           named_transforms(settings["transforms"])).to(device)  # fmt: skip
    batches = CropBatches(records, indices, settings["batch_size"], settings["crop_seconds"], seed, device)
    history = fit(objective, batches, settings["steps"], learning_rate=settings["learning_rate"],
                  weight_decay=settings["weight_decay"], seed=seed, folder=folder, **fit_options)  # fmt: skip
    return objective.classifier, history.to_dict("records")


def supervised_run(
    records: Records, fractions: Sequence[float], device: str = "cpu"
) -> Callable[[RunSpec, Path], Result]:
    """The function for `runs.run_or_load`: train on the label subset of the spec, score folds 9 and 10.

    `fractions` are all fractions of the study, so that the subsets of one seed are nested.
    """
    split = split_indices(records)

    def run(spec: RunSpec, workspace: Path) -> Result:
        labelled = label_subsets(records, fractions, spec.seed)[spec.fraction]
        classifier, history = train_supervised(records, labelled, spec.seed, spec.settings, workspace, device)
        started = time.perf_counter()
        probabilities = {name: predict_windows(classifier, records, split[name], spec.settings["crop_seconds"],
                                               device=device) for name in ("validation", "test")}  # fmt: skip
        patients = records.table["patient_id"].iloc[labelled].nunique()
        metrics = score_rows(records, split, probabilities, len(labelled), patients)
        arrays = {f"{name}/probabilities": values for name, values in probabilities.items()}
        seconds = history[-1]["seconds"] + time.perf_counter() - started
        return Result(metrics, {**arrays, "labelled": labelled}, classifier, seconds, {"history": history})

    return run
