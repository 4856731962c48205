"""One method against each comparator: the same labels, patients and seeds, so differences are paired."""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ecglib.evaluate import (
    AbsentClassWarning,
    choose_thresholds,
    paired_calibration_error,
    paired_difference,
    paired_f2,
)
from ecglib.labels import split_truth
from ecglib.records import Records
from ecglib.runs import Run, need_same_seeds, seed_scores
from ecglib.semisup.stages import with_teacher

MEASURES = {"macro_auroc": "auroc", "mean_average_precision": "average_precision"}
CELL = ("start", "fraction", "method")
STAGE = ("stage", "method", "fraction")


def gains_over(runs: Sequence[Run], records: Records, method: str = "ce_ssl", split: str = "test") -> pd.DataFrame:
    """What `method` gains over every other method with the same start and fraction, in three measures.

    A row a start, comparator, fraction and measure (macro_auroc, mean_average_precision, macro_f2): gain, with its
    paired patient-bootstrap interval; both sides are means over the same seeds. Thresholds of F2 come from validation,
    one for each model and class; a class without a positive record there has none and is left out of F2.
    DataError where two methods do not have the same seeds.
    """
    targets, patients = split_truth(records, split)
    scores, known = seed_scores(runs, split, CELL), seed_scores(runs, "validation", CELL)
    decisions = {cell: _decisions(known[cell], scores[cell], records) for cell in scores}
    rows = []
    for cell in scores:
        own = (*cell[:2], method)
        if cell == own or own not in scores:
            continue
        need_same_seeds(runs, CELL, own, cell)
        gains = {measure: paired_difference(targets, scores[own], scores[cell], patients, statistic=statistic,
                                            classes=records.classes)
                 for measure, statistic in MEASURES.items()}  # fmt: skip
        gains["macro_f2"] = paired_f2(targets, decisions[own], decisions[cell], patients)
        pair = {"method": method, "against": cell[2], "start": cell[0], "fraction": cell[1]}
        rows += [{**pair, "metric": measure, "gain": gain.value, "low": gain.low, "high": gain.high}
                 for measure, gain in gains.items()]  # fmt: skip
    # The order in which the runs came, within each start and fraction.
    return pd.DataFrame(rows).sort_values(["start", "fraction"], kind="stable", ignore_index=True)


def stage_gains(runs: Sequence[Run], records: Records, method: str = "distl", split: str = "test") -> pd.DataFrame:
    """What each method gained since T = 0, and what `method` gains over every other one at the same T.

    A row a pair and metric (macro_auroc, expected_calibration_error), with method, network (student or teacher), stage
    and fraction of the one side, `against`, `against_network` and `against_stage` of the other: gain with its paired
    patient-bootstrap interval, both sides as means over the same seeds. A calibration error that falls is a gain below
    zero. DataError where two sides do not have the same seeds.
    """
    taught = with_teacher(runs)
    sides = {("student", *cell): scores for cell, scores in seed_scores(runs, split, STAGE).items()}
    sides |= {("teacher", *cell): scores for cell, scores in seed_scores(taught, split, STAGE, "teacher").items()}
    targets, patients = split_truth(records, split)
    rows = []
    for own, other in _stage_pairs(list(sides), method):
        need_same_seeds(runs, STAGE, own[1:], other[1:])
        names = {"method": own[2], "network": own[0], "stage": own[1], "fraction": own[3], "against": other[2],
                 "against_network": other[0], "against_stage": other[1]}  # fmt: skip
        gains = {
            "macro_auroc": paired_difference(targets, sides[own], sides[other], patients, classes=records.classes),
            "expected_calibration_error": paired_calibration_error(targets, sides[own], sides[other], patients),
        }
        rows += [{**names, "metric": metric, "gain": gain.value, "low": gain.low, "high": gain.high}
                 for metric, gain in gains.items()]  # fmt: skip
    return pd.DataFrame(rows)


def _stage_pairs(sides: Sequence[tuple], method: str) -> list[tuple[tuple, tuple]]:
    """Which (network, stage, method, fraction) are compared: all with their common start, `method` with the others."""
    pairs = [(side, ("student", 0, "supervised", side[3])) for side in sides if side[1] > 0]
    own = [side for side in sides if side[0] == "student" and side[2] == method]
    return pairs + [(one, other) for one in own for other in sides if other != one and other[1::2] == one[1::2]]


def _decisions(known: np.ndarray, scores: np.ndarray, records: Records) -> np.ndarray:
    """1 where a model says yes, 0 where it says no, NaN where it has no threshold, `(seeds, n, classes)`.

    known are its probabilities for validation, from which its thresholds come, scores those that are decided.
    """
    truth, _ = split_truth(records, "validation")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AbsentClassWarning)  # named once, when the run was scored
        thresholds = np.stack([choose_thresholds(truth, one) for one in known])[:, None]
    return np.where(np.isnan(thresholds), np.nan, scores > thresholds)
