"""CE-SSL against each comparator: the same labels, patients and seeds, so differences are paired."""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.evaluate import AbsentClassWarning, choose_thresholds, paired_difference, paired_f2
from ecglib.labels import split_indices
from ecglib.records import Records
from ecglib.runs import Run, seed_scores

MEASURES = {"macro_auroc": "auroc", "mean_average_precision": "average_precision"}
CELL = ("start", "fraction", "method")


def gains_over(runs: Sequence[Run], records: Records, method: str = "ce_ssl", split: str = "test") -> pd.DataFrame:
    """What `method` gains over every other method with the same start and fraction, in three measures.

    A row a start, comparator, fraction and measure (macro_auroc, mean_average_precision, macro_f2): gain, with its
    paired patient-bootstrap interval; both sides are means over the same seeds. Thresholds of F2 come from validation,
    one for each model and class; a class without a positive record there has none and is left out of F2.
    DataError where two methods do not have the same seeds.
    """
    positions = split_indices(records)[split]
    targets, patients = records.targets[positions], records.table["patient_id"].to_numpy()[positions]
    scores, known = seed_scores(runs, split, CELL), seed_scores(runs, "validation", CELL)
    decisions = {cell: _decisions(known[cell], scores[cell], records) for cell in scores}
    rows = []
    for cell in scores:
        own = (*cell[:2], method)
        if cell == own or own not in scores:
            continue
        _need_same_seeds(runs, own, cell)
        gains = {measure: paired_difference(targets, scores[own], scores[cell], patients, statistic=statistic,
                                            classes=records.classes)
                 for measure, statistic in MEASURES.items()}  # fmt: skip
        gains["macro_f2"] = paired_f2(targets, decisions[own], decisions[cell], patients)
        pair = {"method": method, "against": cell[2], "start": cell[0], "fraction": cell[1]}
        rows += [{**pair, "metric": measure, "gain": gain.value, "low": gain.low, "high": gain.high}
                 for measure, gain in gains.items()]  # fmt: skip
    # The order in which the runs came, within each start and fraction.
    return pd.DataFrame(rows).sort_values(["start", "fraction"], kind="stable", ignore_index=True)


def _need_same_seeds(runs: Sequence[Run], own: tuple, other: tuple) -> None:
    """DataError where the runs of two cells do not pair."""
    seeds = [sorted(run.spec.seed for run in runs if tuple(map(run.spec.value, CELL)) == cell) for cell in (own, other)]
    if seeds[0] != seeds[1]:
        raise DataError(f"{own[2]} and {other[2]} were not run with the same seeds; run the missing ones.")


def _decisions(known: np.ndarray, scores: np.ndarray, records: Records) -> np.ndarray:
    """1 where a model says yes, 0 where it says no, NaN where it has no threshold, `(seeds, n, classes)`.

    known are its probabilities for validation, from which its thresholds come, scores those that are decided.
    """
    truth = records.targets[split_indices(records)["validation"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AbsentClassWarning)  # named once, when the run was scored
        thresholds = np.stack([choose_thresholds(truth, one) for one in known])[:, None]
    return np.where(np.isnan(thresholds), np.nan, scores > thresholds)
