"""Where a backbone comes from: labels of simulated ECGs, self-supervision on the study's own
signals, or chance.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ecglib.checkpoints import load_state
from ecglib.encoders import make_encoder
from ecglib.errors import DataError
from ecglib.evaluate.windows import predict_windows
from ecglib.records import Records
from ecglib.sources.simulate import CONDITIONS, TASKS
from ecglib.supervised import Classifier
from ecgstudy.runs import BACKBONES, Run, RunSpec, keep_runs, kept_group


def cohort_spec(cohort: Records, seed: int, settings: Mapping) -> RunSpec:
    """What identifies a backbone trained with all labels of a simulated cohort
    (`supervised.supervised_run`).
    """
    return RunSpec(
        "backbone", cohort.name, cohort.fingerprint, cohort.about["task"], 1.0, seed, settings
    )


def keep_start(run: Run, name: str, results: str | Path) -> None:
    """Note which run is the start of that name, so that later notebooks find it."""
    keep_runs([run], f"{BACKBONES}/{name}", results)


def kept_starts(results: str | Path) -> dict[str, Run]:
    """The noted start of each name; DataError where there is none or where one's run is gone."""
    return kept_group(BACKBONES, results)


def without_real_labels(
    run: Run, records: Records, indices: np.ndarray, device: str = "cpu"
) -> np.ndarray:
    """What a network trained on simulated statements says of real records: `(n, classes)` in the
    order of `records`.

    A superclass is as likely as the noisy-or of its statements, 1 - prod(1 - p). DataError where a
    class of `records` has no simulated statement.
    """
    if run.spec.data != "simulated":
        raise DataError(
            f"{run.folder.name}: was trained on {run.spec.data}, not on simulated statements; without "
            "labels only a simulated backbone can be asked."
        )
    statements = TASKS[run.spec.labels]
    belongs = {name: CONDITIONS.get(name, name) for name in statements}
    absent = [name for name in records.classes if name not in belongs.values()]
    if absent:
        raise DataError(
            f"The simulated cohort has no statement of the class {absent[0]}; ask for superclasses."
        )
    network = Classifier(make_encoder(run.spec.settings["encoder"]), len(statements)).to(device)
    load_state(network, run.weights(), run.folder)
    window = run.spec.settings["crop_seconds"]
    stated = predict_windows(network, records, indices, window, device)
    columns = [
        [place for place, name in enumerate(statements) if belongs[name] == wanted]
        for wanted in records.classes
    ]
    return np.stack([1.0 - (1.0 - stated[:, own]).prod(axis=1) for own in columns], axis=1)
