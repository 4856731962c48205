"""CE-SSL against each comparator: the same labels, patients and seeds, so differences are paired."""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.evaluate import AbsentClassWarning, choose_thresholds, paired_difference, paired_f2
from ecglib.labels import split_indices
from ecglib.records import Records
from ecglib.runs import Run

MEASURES = {"macro_auroc": "auroc", "mean_average_precision": "average_precision"}


def gains_over(runs: Sequence[Run], records: Records, method: str = "ce_ssl", split: str = "test") -> pd.DataFrame:
    """What `method` gains over every other method with the same start and fraction, in three measures.

    A row a start, comparator, fraction and measure (macro_auroc, mean_average_precision, macro_f2): gain, with its
    paired patient-bootstrap interval; both sides are means over the same seeds. Thresholds of F2 come from validation,
    one for each model and class; a class without a positive record there has none and is left out of F2.
    DataError where two methods do not have the same seeds.
    """
    positions = split_indices(records)[split]
    targets, patients = records.targets[positions], records.table["patient_id"].to_numpy()[positions]
    cells: dict[tuple, dict[str, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: run.spec.seed):
        cell = cells.setdefault((run.spec.value("start"), run.spec.fraction), {})
        cell.setdefault(run.spec.method, []).append(run)
    rows = []
    for (start, fraction), members in sorted(cells.items()):
        own = members.pop(method, None)
        for other, theirs in members.items() if own else ():
            _need_same_seeds(own, theirs)
            one, two = _scores(own, split), _scores(theirs, split)
            gains = {measure: paired_difference(targets, one, two, patients, statistic=statistic,
                                                classes=records.classes)
                     for measure, statistic in MEASURES.items()}  # fmt: skip
            gains["macro_f2"] = paired_f2(targets, _decisions(own, records, split), _decisions(theirs, records, split),
                                          patients)  # fmt: skip
            pair = {"method": method, "against": other, "start": start, "fraction": fraction}
            rows += [{**pair, "metric": measure, "gain": gain.value, "low": gain.low, "high": gain.high}
                     for measure, gain in gains.items()]  # fmt: skip
    return pd.DataFrame(rows)


def _need_same_seeds(one: Sequence[Run], two: Sequence[Run]) -> None:
    """DataError where two lists of runs do not pair."""
    if [run.spec.seed for run in one] != [run.spec.seed for run in two]:
        raise DataError(f"{one[0].spec.method} and {two[0].spec.method} were not run with the same seeds; run the "
                        "missing ones.")  # fmt: skip


def _scores(runs: Sequence[Run], split: str) -> np.ndarray:
    """Probabilities `(seeds, n, classes)`."""
    return np.stack([run.predictions()[f"{split}/probabilities"] for run in runs])


def _decisions(runs: Sequence[Run], records: Records, split: str) -> np.ndarray:
    """1 where a model says yes, 0 where it says no, NaN where it has no threshold, `(seeds, n, classes)`."""
    truth = records.targets[split_indices(records)["validation"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AbsentClassWarning)  # named once, when the run was scored
        thresholds = np.stack([choose_thresholds(truth, scores) for scores in _scores(runs, "validation")])[:, None]
    scores = _scores(runs, split)
    return np.where(np.isnan(thresholds), np.nan, scores > thresholds)
