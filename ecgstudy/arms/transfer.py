"""What a pretrained encoder is worth with few labels: linear probes on its frozen features, and
fine-tuning.

Both give runs in the form of the supervised control, so that all stand in one table.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ecglib.probe import probe_layer, probe_subsets
from ecglib.records import Records
from ecglib.supervised import Classifier, Training, new_classifier
from ecglib.train import parameter_groups
from ecgstudy.arms.supervised import Labelled, scored
from ecgstudy.runs import Result, Run
from ecgstudy.study import LabelSubset, Study


def layerwise_groups(classifier: Classifier, weight_decay: float, factor: float) -> list[dict]:
    """Parameter groups for `train.fit`: the head at the full learning rate, layers below at
    `factor` times the next.

    The first layers hold what every ECG needs, the last ones what the pretext wanted (Howard &
    Ruder 2018).
    """
    parts = [classifier.head, *reversed(classifier.encoder.layers())]
    groups = [
        {**group, "learning_rate_factor": factor**depth}
        for depth, part in enumerate(parts)
        for group in parameter_groups(part, weight_decay)
    ]
    # What belongs to no layer, such as a transformer's positions, stands below them all.
    grouped = {parameter for group in groups for parameter in group["params"]}
    rest = [parameter for parameter in classifier.parameters() if parameter not in grouped]
    groups.append({**groups[-1], "params": rest, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class Probes:
    """Linear probes on the features that one run kept, all label subsets fitted together when the
    first is asked for.
    """

    records: Records
    start: Run
    subsets: Sequence[LabelSubset]

    @cached_property
    def fitted(self) -> dict[LabelSubset, Result]:
        """The result of each subset's probe, see `probe.probe_subsets`."""
        started = time.perf_counter()
        records = self.records
        features = self.start.predictions()["features"]
        positions = {subset: subset.positions(records) for subset in self.subsets}
        probes = probe_subsets(
            features, records.targets, positions, records.split, classes=records.classes
        )
        seconds = (time.perf_counter() - started) / len(probes)
        results = {}
        for subset, arrays in probes.items():
            notes = {"penalty": arrays.pop("penalty")}
            result = Result([], arrays, seconds=seconds, notes=notes)
            results[subset] = scored(result, records, positions[subset])
        return results


@dataclass(frozen=True)
class Frozen(Labelled):
    """A linear probe on the features that `start`, a run with an encoder, kept.

    `probes` fits it together with those of other subsets.
    """

    start: Run
    probes: Probes
    method: str
    about: Mapping
    rebuild = "ecgstudy.arms.trained:probed_encoder"

    def settings(self) -> Mapping:
        return {**self.about, **super().settings()}

    def compute(self, study: Study, workspace: Path) -> Result:
        return self.probes.fitted[self.subset]


def frozen_arms(
    study: Study,
    start: Run,
    subsets: Iterable[LabelSubset],
    method: str | None = None,
    about: Mapping | None = None,
) -> list[Frozen]:
    """A linear probe for each label subset, on the frozen encoder of `start`.

    `method` and `about` name the arm otherwise than after the encoder's pretraining.
    """
    probes = Probes(study.records, start, list(subsets))
    method = method or start.spec.method
    about = origin_of(start, "frozen") if about is None else about
    return [Frozen(subset, start, probes, method, about) for subset in probes.subsets]


def origin_of(start: Run, protocol: str) -> dict:
    """The settings that tell from which pretrained encoder an arm starts, and how it is used."""
    encoder = start.spec.settings["encoder"]
    return {"encoder": encoder, "pretraining": start.spec.key, "protocol": protocol}


@dataclass(frozen=True)
class FineTuned(Labelled):
    """Everything trained on from the encoder of `start` and from a probe.

    A head that starts at random would tear the features apart before it has learnt to read them,
    so it starts as the probe of the same label subset (Kumar et al. 2022). Everything else is as
    in training from scratch.
    """

    start: Run
    training: Training
    rebuild = "ecgstudy.arms.supervised:kept_classifier"

    @property
    def method(self) -> str:
        """The method that pretrained the encoder."""
        return self.start.spec.method

    def settings(self) -> Mapping:
        origin = origin_of(self.start, "fine-tuned")
        return asdict(self.training) | origin | super().settings()

    def compute(self, study: Study, workspace: Path) -> Result:
        training = self.training
        labelled = self.subset.positions(study.records)
        classifier = start_classifier(study.records, labelled, self.start, training, self.seed)
        groups = layerwise_groups(classifier, training.weight_decay, training.layer_factor)
        return self.train(study, classifier, workspace, groups)


def start_classifier(
    records: Records, labelled: np.ndarray, start: Run, training: Training, seed: int
) -> Classifier:
    """A classifier with the encoder of `start` and a probe of the `labelled` records as its head.

    DataError where the weights of `start` are those of another encoder.
    """
    classifier = new_classifier(records, seed, training)
    start.load(classifier.encoder)
    features = start.predictions()["features"]
    weights, bias = probe_layer(
        features, records.targets, labelled, records.split, classes=records.classes
    )
    classifier.head[-1].load_state_dict({"weight": weights, "bias": bias})
    return classifier
