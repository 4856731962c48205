"""Time of the patient bootstrap beside the same work done with scikit-learn, and the largest
difference between them.

python benchmarks/bootstrap.py [records] [classes] [draws] [draws of the scikit-learn loop]
"""

import sys
import time

import numpy as np
from sklearn.metrics import roc_auc_score

from ecglib.evaluate.draws import PatientDraws, bootstrap_interval, class_areas
from ecglib.evaluate.metrics import weighted_auroc


def make_case(records: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets with prevalences from 0.5 % to 50 %, informative scores with many ties, 1.15 records
    or so a patient.
    """
    generator = np.random.default_rng(0)
    targets = generator.random((records, classes)) < np.geomspace(0.005, 0.5, classes)
    scores = np.round(targets + generator.normal(size=(records, classes)), 2)
    return targets, scores, generator.integers(0, round(records * 0.87), records)


def scikit_learn_loop(targets: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """ROC areas `(draws, classes)` by one call for each draw and class, NaN where a class is absent
    from the draw.
    """
    table = np.full((weights.shape[1], targets.shape[1]), np.nan)
    for draw, weight in enumerate(weights.T):
        drawn = np.repeat(np.arange(len(targets)), weight.astype(int))
        for c in range(targets.shape[1]):
            if 0 < targets[drawn, c].sum() < len(drawn):
                table[draw, c] = roc_auc_score(targets[drawn, c], scores[drawn, c])
    return table


def main(records: int = 2200, classes: int = 71, draws: int = 1000, loop_draws: int = 5) -> None:
    """Print both times, their ratio and the largest difference."""
    targets, scores, patients = make_case(records, classes)
    start = time.perf_counter()
    interval = bootstrap_interval(targets, scores, patients, draws=draws)
    ours = time.perf_counter() - start
    weights = np.concatenate(list(PatientDraws(patients, loop_draws).weights()), axis=1)
    start = time.perf_counter()
    expected = scikit_learn_loop(targets, scores, weights)
    loop = (time.perf_counter() - start) * draws / loop_draws
    areas = class_areas(weighted_auroc, targets, scores).of(weights)
    difference = np.nanmax(np.abs(areas.T - expected))
    print(f"{draws:,} patient draws x {classes} classes x {records:,} records, one thread")
    print(
        f"ecglib        {ours:8.2f} s   macro AUROC {interval.value:.4f} "
        f"({interval.low:.4f} to {interval.high:.4f})"
    )
    print(
        f"scikit-learn  {loop:8.2f} s   extrapolated from {loop_draws} draws: "
        f"{loop / ours:.0f} times as long"
    )
    print(f"largest difference of a ROC area, ties included: {difference:.1e}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
