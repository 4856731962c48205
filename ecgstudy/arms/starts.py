"""Where a backbone comes from: labels of simulated ECGs, self-supervision on the study's own
signals, or chance.
"""

from pathlib import Path

import numpy as np

from ecglib.encoders import make_encoder
from ecglib.errors import DataError
from ecglib.evaluate.windows import predict_windows
from ecglib.records import Records
from ecglib.sources.simulate import CONDITIONS, TASKS
from ecglib.supervised import Classifier
from ecgstudy.arms.pretrain import Encode
from ecgstudy.arms.semi_supervised import Start
from ecgstudy.arms.transfer import Frozen, frozen_arms, origin_of
from ecgstudy.runs import BACKBONES, keep_runs, kept_group
from ecgstudy.study import LabelSubset, Study


def keep_start(start: Start, results: str | Path) -> None:
    """Note a start below its name, so that later notebooks find it."""
    keep_runs([start.run], f"{BACKBONES}/{start.name}", results)


def kept_starts(results: str | Path) -> dict[str, Start]:
    """The noted start of each name; DataError where there is none or where one's run is gone."""
    return {name: Start(name, run) for name, run in kept_group(BACKBONES, results).items()}


def frozen_start(
    study: Study, start: Start, backbone: str, crop_seconds: float, subsets: list[LabelSubset]
) -> list[Frozen]:
    """A linear probe for each label subset on the frozen features of a start."""
    about = start.settings()
    encoded = study.run(
        Encode(
            "encoded",
            backbone,
            crop_seconds,
            0,
            start.run,
            about,
        )
    )
    about = {**origin_of(encoded, "frozen"), "backbone": backbone, **about}
    return frozen_arms(study, encoded, subsets, "frozen", about)


def without_real_labels(
    start: Start, records: Records, indices: np.ndarray, device: str = "cpu"
) -> np.ndarray:
    """What a network trained on simulated statements says of real records: `(n, classes)` in the
    order of `records`.

    A superclass is as likely as the noisy-or of its statements, 1 - prod(1 - p). DataError where a
    class of `records` has no simulated statement.
    """
    run = start.run
    if run.spec.data != "simulated":
        raise DataError(
            f"{run.folder.name}: was trained on {run.spec.data}, not on simulated statements; "
            "without labels only a simulated backbone can be asked."
        )
    statements = TASKS[run.spec.labels]
    belongs = [CONDITIONS.get(name, name) for name in statements]
    absent = [name for name in records.classes if name not in belongs]
    if absent:
        raise DataError(
            f"The simulated cohort has no statement of the class {absent[0]}; ask for superclasses."
        )
    network = Classifier(make_encoder(run.spec.settings["encoder"]), len(statements)).to(device)
    window = run.spec.settings["crop_seconds"]
    stated = predict_windows(run.load(network), records, indices, window, device)
    inside = np.array(belongs) == np.array(records.classes)[:, None]  # (classes, statements)
    return np.stack([1.0 - (1.0 - stated[:, own]).prod(axis=1) for own in inside], axis=1)
