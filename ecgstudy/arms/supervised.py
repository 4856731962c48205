"""Training from scratch as a run: the control of every other arm."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ecglib.evaluate.draws import score_rows
from ecglib.evaluate.windows import predict_windows
from ecglib.labels import label_subsets
from ecglib.records import Records
from ecglib.supervised import Classifier, Training, new_classifier, train_classifier
from ecgstudy.runs import Result, RunSpec


def supervised_run(
    records: Records, fractions: Sequence[float], device: str = "cpu"
) -> Callable[[RunSpec, Path], Result]:
    """The function for `runs.run_or_load`: train on the label subset of the spec, score folds 9 and
    10.

    `fractions` are all fractions of the study, so that the subsets of one seed are nested.
    """

    def run(spec: RunSpec, workspace: Path) -> Result:
        labelled = label_subsets(records, fractions, spec.seed)[spec.fraction]
        training = Training.of(spec.settings)
        classifier = new_classifier(records, spec.seed, training)
        history = train_classifier(
            classifier, records, labelled, spec.seed, training, workspace, device
        )
        return classifier_result(classifier, records, labelled, spec.settings, history, device)

    return run


def classifier_result(
    classifier: Classifier,
    records: Records,
    labelled: np.ndarray,
    settings: Mapping,
    history: list[dict],
    device: str = "cpu",
) -> Result:
    """The result of a trained classifier: its scores on folds 9 and 10, its weights, its history."""
    split, started = records.split, time.perf_counter()
    probabilities = {
        name: predict_windows(classifier, records, split[name], settings["crop_seconds"], device)
        for name in ("validation", "test")
    }
    result = scored_result(records, probabilities, labelled)
    result.seconds = history[-1]["seconds"] + time.perf_counter() - started
    result.model, result.notes = classifier, {"history": history}
    return result


def scored_result(
    records: Records, probabilities: Mapping[str, np.ndarray], labelled: np.ndarray
) -> Result:
    """Metrics and kept arrays of one model with `probabilities` for validation and test, trained on
    `labelled`.
    """
    arrays = {f"{name}/probabilities": values for name, values in probabilities.items()}
    rows = score_rows(records, probabilities, labelled)
    return Result(rows, {**arrays, "labelled": labelled})
