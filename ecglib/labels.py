"""Splits by patient and nested label subsets: which records a study may train on, select with and
test on.

CE-SSL splits otherwise: by record with iterative stratification, anew for each seed, 10 % for the
test; of the rest 5, 10 or 15 % are labelled, and of those 80 % train and 20 % select. One patient's
records may then lie both in the test and outside, which `patients_shared` measures. Here fold 10 is
every seed's test, fold 9 selects, and a label subset is that share of folds 1-8.
"""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.records import TRAINING_FOLDS, Records


def patients_shared(records: Records, test_share: float = 0.1) -> tuple[float, float]:
    """What a random split by record leaks: patients on both sides, and share of test records whose
    patient trains.

    Expected values where each record is drawn for the test with probability `test_share`; with
    folds of whole patients both are 0. DataError where the records name no patients.
    """
    if (records.table["patient_id"].astype(str) == records.table["record_id"].astype(str)).all():
        raise DataError(
            f"{records.name}: each record counts as its own patient; give true patients in "
            "patient_id."
        )
    sizes = records.table["patient_id"].value_counts().to_numpy()
    on_both_sides = 1 - (1 - test_share) ** sizes - test_share**sizes
    with_another_outside = sizes * (1 - test_share ** (sizes - 1))
    return float(on_both_sides.sum()), float(with_another_outside.sum() / sizes.sum())


def classes_of_patients(
    patients: Sequence[str], targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The patient of each record as a number, the patients' names, and which classes each patient
    has in any record, bool `(patients, classes)`.
    """
    patient, names = pd.factorize(np.asarray(patients, dtype=object))
    has = np.zeros((len(names), targets.shape[1]), dtype=bool)
    np.logical_or.at(has, patient, targets > 0)
    return patient, names, has


def label_subsets(
    records: Records, fractions: Sequence[float], seed: int, folds: Iterable[int] = TRAINING_FOLDS
) -> dict[float, np.ndarray]:
    """Nested random label subsets of the records in `folds`: fraction -> sorted positions in
    `records`.

    Whole patients in one random order, cut where the number of records is closest to fraction x N,
    so that a smaller subset lies within each larger one. Classes are not balanced: for each class
    that the smallest subset lacks, the next patient in the order who has it takes the place of the
    last patient; a warning names a class for which there is no room. DataError for a fraction
    outside (0, 1], for no records, and for fewer records than classes.
    """
    pool = np.flatnonzero(records.table["fold"].isin(list(folds)))
    fractions = sorted(fractions)
    targets = records.targets[pool]
    _check_request(fractions, len(pool), int((targets > 0).any(axis=0).sum()))
    patient, names, has = classes_of_patients(records.table["patient_id"].iloc[pool], targets)
    sizes = np.bincount(patient)
    order = np.random.default_rng(seed).permutation(len(names))
    order = _cover_classes(order, fractions[0], sizes, has)
    missing = _missing_classes(order, fractions[0], sizes, has)
    if len(missing):
        listed = ", ".join(records.classes[index] for index in missing)
        warnings.warn(
            f"The label subset of {fractions[0]:g} has no room for a patient with {listed}.",
            stacklevel=2,
        )
    place = np.empty(len(names), dtype=int)
    place[order] = np.arange(len(names))
    return {fraction: pool[place[patient] < _cut(sizes[order], fraction)] for fraction in fractions}


def _check_request(fractions: Sequence[float], count: int, classes: int) -> None:
    """DataError where the wanted fractions of `count` records with `classes` classes make no
    sense.
    """
    if not count:
        raise DataError(
            "No record lies in the training folds, so there is nothing to label; check the fold "
            "column."
        )
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise DataError(
            f"The label fractions {list(fractions)} must be shares above 0 and at most 1 (1 % is "
            "0.01)."
        )
    if round(fractions[0] * count) < max(classes, 1):
        raise DataError(
            f"A label fraction of {fractions[0]:g} of {count} records is fewer than one record for "
            f"each of {classes} classes; use at least {max(classes, 1) / count:.2g} or fewer "
            "classes."
        )


def _cut(sizes: np.ndarray, fraction: float) -> int:
    """How many patients, at least one, to take from the front to have as near as can be `fraction`
    of the records.
    """
    records = np.cumsum(sizes)
    return int(np.argmin(np.abs(records - fraction * records[-1]))) + 1


def _cover_classes(
    order: np.ndarray, fraction: float, sizes: np.ndarray, has: np.ndarray
) -> np.ndarray:
    """`order` with the patients moved to its head that its front lacks to hold each class, the
    rarest class first.

    sizes `(patients,)` records of each patient, has `(patients, classes)`. Each patient who comes
    in pushes the last one out; a class lost by this is brought back in the next round, so there are
    at most as many moves as classes.
    """
    carriers = has.sum(axis=0)
    for _ in range(has.shape[1]):
        missing = _missing_classes(order, fraction, sizes, has)
        if not len(missing):
            break
        rarest = missing[np.argmin(carriers[missing])]
        newcomer = int(np.argmax(has[order, rarest]))
        order = np.concatenate([order[[newcomer]], np.delete(order, newcomer)])
    return order


def _missing_classes(
    order: np.ndarray, fraction: float, sizes: np.ndarray, has: np.ndarray
) -> np.ndarray:
    """Classes that some patient has, but none of the front that `fraction` takes."""
    front = order[: _cut(sizes[order], fraction)]
    return np.flatnonzero(has.any(axis=0) & ~has[front].any(axis=0))
