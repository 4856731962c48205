"""Splits and label subsets: whole patients, nested, representative, every class present."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecglib.errors import DataError
from ecglib.labels import label_subsets
from ecglib.records import Records

PREVALENCE = np.array([0.45, 0.25, 0.22, 0.15, 0.02])


def make_records(
    patients: int = 900, seed: int = 0, prevalence: np.ndarray = PREVALENCE
) -> Records:
    """Records without signal: one to four a patient, folds by patient, classes shared by a
    patient's records.
    """
    generator = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), generator.integers(1, 5, patients))
    patient = generator.permutation(patient)
    table = pd.DataFrame(
        {
            "record_id": np.arange(len(patient)).astype(str),
            "patient_id": [f"P{number}" for number in patient],
            "fold": patient % 10 + 1,
            "source": "made",
        }
    )
    sick = generator.random((patients, len(prevalence))) < prevalence
    signals, classes = (
        np.zeros((len(patient), 12, 1), np.int16),
        tuple("ABCDEFGHIJ"[: len(prevalence)]),
    )
    return Records(signals, 0.001, 100.0, table, sick[patient].astype(np.int8), classes)


def test_split_holds_each_record_once_and_no_patient_twice():
    records = make_records()
    split = records.split
    assert sorted(np.concatenate(list(split.values()))) == list(range(len(records)))
    patients = [set(records.table["patient_id"].iloc[indices]) for indices in split.values()]
    assert not (patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2])


def test_split_names_a_patient_who_crosses_folds():
    records = make_records(50)
    first = records.table.index[records.table["patient_id"].duplicated()][0]
    records.table.loc[first, "fold"] = records.table.loc[first, "fold"] % 10 + 1
    with pytest.raises(
        DataError, match=f"Patient {records.table.loc[first, 'patient_id']} lies in folds"
    ):
        _ = records.split


def test_split_names_an_empty_part():
    records = make_records()
    with pytest.raises(DataError, match="test folds"):
        _ = records.select((records.table["fold"] != 10).to_numpy()).split


def test_split_truth_follows_the_order_of_the_split():
    records = make_records()
    targets, patients = records.split_truth("validation")
    assert np.array_equal(targets, records.targets[records.split["validation"]])
    assert (patients == records.select(records.split["validation"]).table["patient_id"]).all()


def test_labelled_records_have_a_class():
    records = make_records()
    mask = records.targets.any(axis=1)
    assert 0 < mask.sum() < len(records) == len(mask)
    assert records.labelled.fingerprint == records.select(mask).fingerprint
    assert records.labelled.targets.any(axis=1).all() and len(records.labelled) == mask.sum()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(120, 400),
    st.sampled_from([(0.05, 0.1, 0.5, 1.0), (0.04, 0.041, 0.3)]),
)
def test_subsets_are_nested_whole_patients_complete_and_of_the_asked_size(
    seed, patients, fractions
):
    records = make_records(patients, seed)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        subsets = label_subsets(records, fractions, seed)
    named = {
        name
        for warning in told
        for name in str(warning.message).split(" with ")[-1].rstrip(".").split(", ")
    }
    without_room = [name in named for name in records.classes]
    pool = np.flatnonzero(records.table["fold"] <= 8)
    patient = records.table["patient_id"].to_numpy()
    previous = np.array([], int)
    for fraction in fractions:
        chosen = subsets[fraction]
        assert (
            np.all(np.diff(chosen) > 0)
            and np.isin(chosen, pool).all()
            and np.isin(previous, chosen).all()
        )
        assert not set(patient[chosen]) & set(patient[np.setdiff1d(pool, chosen)])
        assert (
            abs(len(chosen) - fraction * len(pool)) <= 2
        )  # half of the largest patient's four records
        complete = records.targets[chosen].any(axis=0) == records.targets[pool].any(axis=0)
        assert (complete | without_room).all()
        previous = chosen
    if 1.0 in fractions:
        assert np.array_equal(subsets[1.0], pool)


def test_same_seed_same_subsets_and_other_seed_others():
    records = make_records()
    first, again, other = (label_subsets(records, [0.1], seed)[0.1] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and len(np.intersect1d(first, other)) < 0.3 * len(first)


def test_subsets_are_representative():
    records = make_records()
    pool = np.flatnonzero(records.table["fold"] <= 8)
    drawn = [label_subsets(records, [0.05, 0.1], seed) for seed in range(60)]
    share = np.mean([records.targets[subset[0.1]].mean(axis=0) for subset in drawn], axis=0)
    assert np.allclose(share, records.targets[pool].mean(axis=0), atol=0.02)
    taken = np.bincount(np.concatenate([subset[0.1] for subset in drawn]), minlength=len(records))[
        pool
    ]
    common = (
        records.targets[pool, 4] == 0
    )  # records without the one rare class that has to be brought in
    assert abs(taken[common].mean() / 60 - 0.1) < 0.005


def test_a_class_of_one_patient_is_in_each_subset():
    records = make_records(prevalence=PREVALENCE[:4])
    targets = np.hstack(
        [records.targets, (records.table["patient_id"] == "P5").to_numpy()[:, None]]
    )
    rare = Records(
        records.signals, 0.001, 100.0, records.table, targets, (*records.classes, "RARE")
    )
    for seed in range(20):
        with warnings.catch_warnings(action="error"):
            chosen = label_subsets(rare, [0.01], seed)[0.01]
        assert rare.targets[chosen, 4].any() and rare.targets[chosen].any(axis=0).all()


def test_a_class_without_room_is_named():
    prevalence = np.full(3, 0.001)
    records = make_records(60, prevalence=prevalence)
    patient = records.table["patient_id"].to_numpy()
    sizes = records.table["patient_id"].value_counts()
    large = [
        name
        for name in sizes.index[sizes == 4]
        if records.table["fold"][patient == name].iloc[0] <= 8
    ][:3]
    records.targets[:] = np.stack([patient == name for name in large], axis=1)
    with pytest.warns(UserWarning, match="no room for a patient with"):
        label_subsets(records, [0.04], 0)


@pytest.mark.parametrize(
    ("fractions", "folds", "message"),
    [
        ([0.0, 0.1], range(1, 9), "above 0"),
        ([1.5], range(1, 9), "at most 1"),
        ([], range(1, 9), "shares above 0"),
        ([float("nan")], range(1, 9), "above 0"),
        ([0.1], [11], "No record"),
        ([0.001], range(1, 9), "fewer than one record"),
    ],
)
def test_impossible_requests_are_one_sentence(fractions, folds, message):
    with pytest.raises(DataError, match=message):
        label_subsets(make_records(), fractions, 0, folds)
