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


def patients_shared(records: Records) -> tuple[float, float]:
    """What a random split by record leaks: patients on both sides, and share of test records whose
    patient trains.

    Expected values where each record is drawn for the test with probability 0.1, as in CE-SSL; with
    folds of whole patients both are 0. DataError where the records name no patients.
    """
    table = records.table
    if (table["patient_id"].astype(str) == table["record_id"].astype(str)).all():
        raise DataError(
            f"{records.name}: each record counts as its own patient; give true patients in "
            "patient_id."
        )
    sizes = table["patient_id"].value_counts().to_numpy()
    test = 0.1
    on_both_sides = 1 - (1 - test) ** sizes - test**sizes
    with_another_outside = sizes * (1 - test ** (sizes - 1))
    return float(on_both_sides.sum()), float(with_another_outside.sum() / sizes.sum())


def classes_of_patients(
    patients: Sequence[str], targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The patient of each record as a number, the patients' names, and which classes each patient
    has in any record, bool `(patients, classes)`.
    """
    patient, names = pd.factorize(np.asarray(patients, dtype=object))
    return patient, names, pd.DataFrame(targets > 0).groupby(patient).any().to_numpy(bool)


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
    count = len(pool)
    if not count:
        raise DataError(
            "No record lies in the training folds, so there is nothing to label; check the fold "
            "column."
        )
    fractions = sorted(fractions)
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise DataError(
            f"The label fractions {fractions} must be shares above 0 and at most 1 (1 % is 0.01)."
        )
    patients = records.table["patient_id"].iloc[pool]
    patient, names, has = classes_of_patients(patients, records.targets[pool])
    classes = has.any(axis=0).sum()
    needed = max(classes, 1)
    smallest = fractions[0]
    if round(smallest * count) < needed:
        raise DataError(
            f"A label fraction of {smallest:g} of {count} records is fewer than one record for "
            f"each of {classes} classes; use at least {needed / count:.2g} or fewer classes."
        )
    sizes = np.bincount(patient)
    order = np.random.default_rng(seed).permutation(len(names))
    order, missing = _cover_classes(order, smallest, sizes, has)
    if len(missing):
        listed = ", ".join(np.array(records.classes)[missing])
        warnings.warn(
            f"The label subset of {smallest:g} has no room for a patient with {listed}.",
            stacklevel=2,
        )
    return {
        fraction: pool[np.isin(patient, _front(order, fraction, sizes))] for fraction in fractions
    }


def _front(order, fraction, sizes):
    """The patients, at least one, from the front of `order` who have as near as can be `fraction`
    of the records; sizes `(patients,)` counts those of each.
    """
    records = np.cumsum(sizes[order])
    return order[: np.abs(records - fraction * records[-1]).argmin() + 1]


def _cover_classes(order, fraction, sizes, has):
    """`order` with the patients moved to its head that its front lacks to hold each class, the
    rarest class first; and the classes that it lacks nevertheless.

    has `(patients, classes)`. Each patient who comes in pushes the last one out; a class lost by
    this is brought back in the next round, so there are at most as many moves as classes.
    """
    classes = has.shape[1]
    for moves in range(classes + 1):
        held = has[_front(order, fraction, sizes)].any(axis=0)
        missing = np.flatnonzero(has.any(axis=0) & ~held)
        if not len(missing) or moves == classes:
            return order, missing
        rarest = missing[has[:, missing].sum(axis=0).argmin()]
        newcomer = has[order, rarest].argmax()
        order = np.append(order[newcomer], np.delete(order, newcomer))
