"""Training from scratch as a run: the control of every other arm."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from torch import nn

from ecglib.evaluate.draws import score_rows
from ecglib.evaluate.windows import predict_windows
from ecglib.records import Records
from ecglib.supervised import Training, new_classifier, train_classifier
from ecgstudy.runs import Result, Run
from ecgstudy.study import Job, LabelSubset, Study

SPLITS = ("validation", "test")  # that are scored


@dataclass(frozen=True)
class Labelled(Job):
    """A job that uses the labels of one subset."""

    subset: LabelSubset

    def settings(self) -> Mapping:
        return {"fractions": list(self.subset.fractions)}

    @property
    def fraction(self) -> float:
        """The labelled share."""
        return self.subset.fraction

    @property
    def seed(self) -> int:
        """The seed of the subset, which also draws weights and batches."""
        return self.subset.seed

    def train(
        self,
        study: Study,
        classifier: nn.Module,
        workspace: Path,
        groups: list[dict] | None = None,
    ) -> Result:
        """The result of a classifier trained on the labelled records by the job's `training`, with
        parameter `groups` that have rates of their own where they are given.
        """
        training = self.training
        labelled = self.subset.positions(study.records)
        history = train_classifier(
            classifier,
            study.records,
            labelled,
            self.seed,
            training,
            workspace,
            study.device,
            groups=groups,
        )
        return classifier_result(study, classifier, labelled, training.crop_seconds, history)


@dataclass(frozen=True)
class FromScratch(Labelled):
    """A classifier from random weights, trained on a label subset."""

    training: Training
    method: str = "supervised"
    rebuild = "ecgstudy.arms.supervised:kept_classifier"

    def settings(self) -> Mapping:
        return asdict(self.training) | super().settings() | {"protocol": "supervised"}

    def compute(self, study: Study, workspace: Path) -> Result:
        classifier = new_classifier(study.records, self.seed, self.training)
        return self.train(study, classifier, workspace)


def classifier_result(
    study: Study, classifier: nn.Module, labelled: np.ndarray, seconds: float, history: list[dict]
) -> Result:
    """The result of a trained classifier: its scores on folds 9 and 10, its weights, its history.

    Windows are as long as its training crops, `seconds`, and overlap by half.
    """
    started = time.perf_counter()
    records = study.records
    arrays = {
        f"{name}/probabilities": predict_windows(
            classifier, records, records.split[name], seconds, study.device
        )
        for name in SPLITS
    }
    result = scored(Result([], arrays, classifier, notes={"history": history}), records, labelled)
    result.seconds = history[-1]["seconds"] + time.perf_counter() - started
    return result


def kept_classifier(run: Run, records: Records, results: Path) -> nn.Module:
    """The classifier that a run kept."""
    return run.load(new_classifier(records, run.spec.seed, Training.of(run.spec.settings)))


def scored(result: Result, records: Records, labelled: np.ndarray) -> Result:
    """A result that holds `validation/probabilities` and `test/probabilities`, with their metrics
    and with the positions of the records that the model was trained on, `labelled`.
    """
    arrays = result.predictions
    probabilities = {name: arrays[f"{name}/probabilities"] for name in SPLITS}
    rows = score_rows(records, probabilities, labelled)
    return replace(result, metrics=rows, predictions={**arrays, "labelled": labelled})
