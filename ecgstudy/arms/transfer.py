"""What a pretrained encoder is worth with few labels: linear probes on its frozen features, and
fine-tuning.

Both give runs in the form of the supervised control (`ecglib.supervised`), so that all stand in one
table.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ecglib.checkpoints import load_state
from ecglib.labels import label_subsets
from ecglib.probe import probe_layer, probe_subsets
from ecglib.records import Records
from ecglib.supervised import Classifier, Training, new_classifier, train_classifier
from ecglib.train import parameter_groups
from ecgstudy.arms.supervised import classifier_result, scored_result
from ecgstudy.runs import MODEL, Result, Run, RunSpec


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
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [parameter for parameter in classifier.parameters() if id(parameter) not in grouped]
    groups.append(
        {"params": rest, "weight_decay": 0.0, "learning_rate_factor": factor ** (len(parts) - 1)}
    )
    return [group for group in groups if group["params"]]


def transfer_spec(
    records: Records, pretrained: Run, protocol: str, fraction: float, seed: int, settings: Mapping
) -> RunSpec:
    """What identifies the use of a pretrained encoder, by the `protocol` frozen or fine-tuned, with
    some labels.
    """
    start = {
        "encoder": pretrained.spec.settings["encoder"],
        "pretraining": pretrained.spec.key,
        "protocol": protocol,
    }
    return RunSpec(
        pretrained.spec.method,
        records.name,
        records.fingerprint,
        records.about["task"],
        fraction,
        seed,
        {**settings, **start},
    )


def grid_subsets(records: Records, fractions: Sequence[float], seeds: Mapping[float, int]) -> dict:
    """(fraction, seed) -> labelled positions, for as many seeds as each fraction has; nested over
    all `fractions`.
    """
    nested = [label_subsets(records, fractions, seed) for seed in range(max(seeds.values()))]
    return {
        (fraction, seed): nested[seed][fraction]
        for fraction in seeds
        for seed in range(seeds[fraction])
    }


def frozen_run(
    records: Records, fractions: Sequence[float], seeds: Mapping[float, int], pretrained: Run
) -> Callable[[RunSpec, Path], Result]:
    """The function for `runs.run_or_load`: linear probes on the features that `pretrained` kept.

    `seeds` gives the number of label subsets of each fraction. All of them are fitted together when
    the first is asked for; `fractions` are all fractions of the study, so that the subsets of one
    seed are nested.
    """
    fitted: dict = {}

    def run(spec: RunSpec, workspace: Path) -> Result:
        if not fitted:
            fitted.update(_all_probes(records, fractions, seeds, pretrained))
        labelled, probe, seconds = fitted[spec.fraction, spec.seed]
        probabilities = {name: probe[f"{name}/probabilities"] for name in ("validation", "test")}
        result = scored_result(records, probabilities, labelled)
        result.seconds, result.notes = seconds, {"penalty": probe["penalty"]}
        return result

    return run


def _all_probes(
    records: Records, fractions: Sequence[float], seeds: Mapping[float, int], pretrained: Run
) -> dict:
    """(fraction, seed) -> labelled positions, probe, and its share of the seconds."""
    subsets = grid_subsets(records, fractions, seeds)
    started = time.perf_counter()
    features = pretrained.predictions()["features"]
    probes = probe_subsets(
        features, records.targets, subsets, records.split, classes=records.classes
    )
    seconds = (time.perf_counter() - started) / len(subsets)
    return {key: (labelled, probes[key], seconds) for key, labelled in subsets.items()}


def start_classifier(
    records: Records, labelled: np.ndarray, pretrained: Run, settings: Mapping, seed: int
) -> Classifier:
    """A classifier with the encoder of `pretrained` and a probe of the `labelled` records as its
    head.

    DataError where the weights of `pretrained` are those of another encoder.
    """
    classifier = new_classifier(records, seed, Training.of(settings))
    load_state(classifier.encoder, pretrained.weights(), pretrained.folder / MODEL)
    features = pretrained.predictions()["features"]
    split, layer = records.split, classifier.head[-1]
    weights, bias = probe_layer(features, records.targets, labelled, split, classes=records.classes)
    with torch.no_grad():
        layer.weight.copy_(weights)
        layer.bias.copy_(bias)
    return classifier


def finetuned_run(
    records: Records, fractions: Sequence[float], pretrained: Run, device: str = "cpu"
) -> Callable[[RunSpec, Path], Result]:
    """The function for `runs.run_or_load`: train everything, from the encoder of `pretrained` and
    from a probe.

    A head that starts at random would tear the features apart before it has learnt to read them, so
    it starts as the probe of the same label subset (Kumar et al. 2022). Everything else is as in
    `supervised_run`.
    """

    def run(spec: RunSpec, workspace: Path) -> Result:
        labelled = label_subsets(records, fractions, spec.seed)[spec.fraction]
        classifier = start_classifier(records, labelled, pretrained, spec.settings, spec.seed)
        training = Training.of(spec.settings)
        groups = layerwise_groups(classifier, training.weight_decay, training.layer_factor)
        history = train_classifier(
            classifier,
            records,
            labelled,
            spec.seed,
            training,
            workspace,
            device,
            groups=groups,
        )
        return classifier_result(classifier, records, labelled, spec.settings, history, device)

    return run
