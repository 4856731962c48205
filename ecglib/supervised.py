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


def train_classifier(classifier: Classifier, records: Records, indices: np.ndarray, seed: int, settings: Mapping,
                     folder: Path | None = None, device: str = "cpu", **fit_options) -> list[dict]:  # fmt: skip
    """Train `classifier` in place on the labelled records at `indices` and return its history.

    Settings are those of notebook 02's config. Further options go to `train.fit`.
    """
    objective = Supervised(classifier, named_transforms(settings["transforms"])).to(device)
    batches = CropBatches(records, indices, settings["batch_size"], settings["crop_seconds"], seed, device)
    history = fit(objective, batches, settings["steps"], learning_rate=settings["learning_rate"],
                  weight_decay=settings["weight_decay"], seed=seed, folder=folder, **fit_options)  # fmt: skip
    return history.to_dict("records")


def new_classifier(records: Records, seed: int, settings: Mapping) -> Classifier:
    """A classifier with random weights drawn from the seed."""
    torch.manual_seed(seed)
    return Classifier(make_encoder(settings["encoder"]), len(records.classes), settings["dropout"])


def supervised_run(
    records: Records, fractions: Sequence[float], device: str = "cpu"
) -> Callable[[RunSpec, Path], Result]:
    """The function for `runs.run_or_load`: train on the label subset of the spec, score folds 9 and 10.

    `fractions` are all fractions of the study, so that the subsets of one seed are nested.
    """

    def run(spec: RunSpec, workspace: Path) -> Result:
        labelled = label_subsets(records, fractions, spec.seed)[spec.fraction]
        classifier = new_classifier(records, spec.seed, spec.settings)
        history = train_classifier(classifier, records, labelled, spec.seed, spec.settings, workspace, device)
        return classifier_result(classifier, records, labelled, spec.settings, history, device)

    return run


def classifier_result(classifier: Classifier, records: Records, labelled: np.ndarray, settings: Mapping,
                      history: list[dict], device: str = "cpu") -> Result:  # fmt: skip
    """The result of a trained classifier: its scores on folds 9 and 10, its weights, its history."""
    split, started = split_indices(records), time.perf_counter()
    probabilities = {name: predict_windows(classifier, records, split[name], settings["crop_seconds"],
                                           settings["crop_seconds"] / 2, device=device)
                     for name in ("validation", "test")}  # fmt: skip
    result = scored_result(records, probabilities, labelled)
    result.seconds = history[-1]["seconds"] + time.perf_counter() - started
    result.model, result.notes = classifier, {"history": history}
    return result


def scored_result(records: Records, probabilities: Mapping[str, np.ndarray], labelled: np.ndarray) -> Result:
    """Metrics and kept arrays of one model with `probabilities` for validation and test, trained on `labelled`."""
    patients = records.table["patient_id"].iloc[labelled].nunique()
    metrics = score_rows(records, split_indices(records), probabilities, len(labelled), patients)
    arrays = {f"{name}/probabilities": values for name, values in probabilities.items()}
    return Result(metrics, {**arrays, "labelled": labelled})
