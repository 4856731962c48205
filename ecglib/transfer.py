"""What a pretrained encoder is worth with few labels: linear probes on its frozen features, and fine-tuning.

Both give runs in the form of the supervised control (`ecglib.supervised`), so that all stand in one table.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ecglib.evaluate import macro_auroc
from ecglib.labels import label_subsets, split_indices
from ecglib.probe import probe_subsets
from ecglib.records import Records
from ecglib.runs import MODEL, Result, Run, RunSpec
from ecglib.supervised import Classifier, classifier_result, new_classifier, scored_result, train_classifier
from ecglib.train import load_state, parameter_groups


def layerwise_groups(classifier: Classifier, weight_decay: float, factor: float) -> list[dict]:
    """Parameter groups for `train.fit`: the head at the full learning rate, each layer below at `factor` times the next.

    The first layers hold what every ECG needs, the last ones what the pretext wanted (Howard & Ruder 2018).
    """
    groups = []
    for depth, part in enumerate([classifier.head, *reversed(classifier.encoder.layers())]):
        for group in parameter_groups(part, weight_decay):
            if group["params"]:
                groups.append({**group, "learning_rate_factor": factor**depth})
    return groups


@torch.no_grad()
def set_head(classifier: Classifier, weights: np.ndarray, bias: np.ndarray) -> None:
    """Start the head as a probe with weights `(classes, features)` and bias `(classes,)`."""
    layer = classifier.head[-1]
    layer.weight.copy_(torch.from_numpy(weights))
    layer.bias.copy_(torch.from_numpy(bias))


def grid_subsets(records: Records, fractions: Sequence[float], seeds: Mapping[float, int]) -> dict:
    """(fraction, seed) -> labelled positions, for as many seeds as each fraction has; nested over all `fractions`."""
    nested = [label_subsets(records, fractions, seed) for seed in range(max(seeds.values()))]
    return {(fraction, seed): nested[seed][fraction] for fraction in seeds for seed in range(seeds[fraction])}


def frozen_run(records: Records, fractions: Sequence[float], seeds: Mapping[float, int],
               pretrained: Run) -> Callable[[RunSpec, Path], Result]:  # fmt: skip
    """The function for `runs.run_or_load`: linear probes on the features that `pretrained` kept.

    `seeds` gives the number of label subsets of each fraction. All of them are fitted together when the first is asked
    for; `fractions` are all fractions of the study, so that the subsets of one seed are nested.
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


def _all_probes(records: Records, fractions: Sequence[float], seeds: Mapping[float, int], pretrained: Run) -> dict:
    """(fraction, seed) -> labelled positions, probe, and its share of the seconds."""
    subsets = grid_subsets(records, fractions, seeds)
    started = time.perf_counter()
    probes = _probe(records, subsets, pretrained)
    seconds = (time.perf_counter() - started) / len(subsets)
    return {key: (labelled, probes[key], seconds) for key, labelled in subsets.items()}


def _probe(records: Records, subsets: Mapping, pretrained: Run) -> dict:
    """Probes of the features of `pretrained` on label subsets, see `probe_subsets`."""
    features = pretrained.predictions()["features"]
    return probe_subsets(features, records.targets, subsets, split_indices(records), classes=records.classes)


def finetuned_run(records: Records, fractions: Sequence[float], pretrained: Run,
                  device: str = "cpu") -> Callable[[RunSpec, Path], Result]:  # fmt: skip
    """The function for `runs.run_or_load`: train everything, from the encoder of `pretrained` and from its probe.

    A head that starts at random would tear the features apart before it has learnt to read them, so it starts as the
    probe of the same label subset (Kumar et al. 2022). Everything else is as in `supervised_run`.
    """

    def run(spec: RunSpec, workspace: Path) -> Result:
        labelled = label_subsets(records, fractions, spec.seed)[spec.fraction]
        probe = _probe(records, {"own": labelled}, pretrained)["own"]
        classifier = new_classifier(records, spec.seed, spec.settings)
        load_state(classifier.encoder, pretrained.weights(), pretrained.folder / MODEL)
        set_head(classifier, probe["weights"], probe["bias"])
        groups = layerwise_groups(classifier, spec.settings["weight_decay"], spec.settings["layer_factor"])
        history = train_classifier(classifier, records, labelled, spec.seed, spec.settings, workspace, device,
                                   groups=groups)  # fmt: skip
        result = classifier_result(classifier, records, labelled, spec.settings, history, device)
        result.notes["penalty"] = probe["penalty"]
        return result

    return run


def frozen_validation(records: Records, features: Mapping[str, np.ndarray], fractions: Sequence[float],
                      seeds: int) -> pd.DataFrame:  # fmt: skip
    """Macro AUROC on fold 9 of linear probes: a row for each of the named feature matrices, a column a fraction.

    Mean over `seeds` label subsets. The penalty is chosen on the same fold, so this is for looking while one learns;
    what counts is measured on fold 10 in notebook 09.
    """
    split = split_indices(records)
    subsets = grid_subsets(records, fractions, dict.fromkeys(fractions, seeds))
    rows = {}
    for name, values in features.items():
        probes = probe_subsets(values, records.targets, subsets, split, classes=records.classes)
        scores = {key: macro_auroc(records.targets[split["validation"]], probe["validation/probabilities"])
                  for key, probe in probes.items()}  # fmt: skip
        rows[name] = {fraction: np.mean([scores[fraction, seed] for seed in range(seeds)]) for fraction in fractions}
    return pd.DataFrame(rows).T
