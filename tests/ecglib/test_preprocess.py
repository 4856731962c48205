"""CE-SSL's preprocessing against scipy a lead at a time, on real records where at hand; what its
split leaks.
"""

import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.signal import butter, filtfilt

from ecglib import preprocess as module
from ecglib.errors import DataError
from ecglib.labels import patients_shared
from ecglib.preprocess import SCALE, UNIT, preprocess
from ecglib.records import LEADS, Records
from ecglib.sources import read_source
from ecglib.sources.cinc2021 import read_cinc2021
from ecglib.sources.wfdb_files import read_header, read_millivolts
from toolkit import SHARED, heart_signal

CINC, PTBXL = SHARED / "cinc2021-samples", SHARED / "ptb-xl-subset"
needs_cinc = pytest.mark.skipif(not CINC.is_dir(), reason="the CinC 2021 samples are not here")
needs_ptbxl = pytest.mark.skipif(not PTBXL.is_dir(), reason="the PTB-XL subset is not here")
ROUNDING = 0.51 * SCALE  # half a count


def make_records(signals: np.ndarray, rate: float = 500.0) -> Records:
    """Records of signals `(n, 12, time)` in mV, one a patient, with one class."""
    count = len(signals)
    table = pd.DataFrame(
        {
            "record_id": [f"r{i}" for i in range(count)],
            "patient_id": [f"p{i}" for i in range(count)],
            "fold": 1,
            "source": "test",
        }
    )
    return Records.from_millivolts(signals, rate, table, np.ones((count, 1), np.uint8), ("A",))


def hearts(count: int = 3, rate: float = 500.0, seconds: float = 10.0) -> np.ndarray:
    return np.stack([heart_signal(rate, seconds, seed) for seed in range(count)])


def slow(signal: np.ndarray, rate: float, length: int) -> np.ndarray:
    """One record `(12, time)` in mV as published, a lead after the other: filtfilt(b, a), z-score,
    zeros or a cut.
    """
    result = np.zeros((12, length))
    for lead, values in enumerate(signal.astype(float)):
        b, a = butter(3, [1 / (rate / 2), 47 / (rate / 2)], "bandpass")
        values = filtfilt(b, a, values)
        values = (values - values.mean()) / values.std()
        result[lead, : min(len(values), length)] = values[:length]
    return result


def assert_as_published(records: Records, length: int) -> Records:
    """Compare every record with the slow reference; the preprocessed records."""
    done = preprocess(records, length=length)
    assert done.signals.dtype == np.int16 and done.signals.shape == (len(records), 12, length)
    for millivolts, found in zip(records.millivolts(), done.millivolts(), strict=True):
        np.testing.assert_allclose(
            found, slow(millivolts, records.sampling_rate, length), atol=ROUNDING
        )
    return done


# Equal to the slow reference


@pytest.mark.parametrize(("rate", "length"), [(500.0, 6144), (100.0, 1000), (257.0, 1500)])
def test_each_lead_is_filtered_standardised_and_filled_up(rate: float, length: int) -> None:
    done = assert_as_published(make_records(hearts(rate=rate), rate), length)
    real = round(10 * rate)
    if length >= real:
        values = done.millivolts()[:, :, :real]
        np.testing.assert_allclose(values.mean(axis=2), 0.0, atol=1e-3)
        np.testing.assert_allclose(values.std(axis=2), 1.0, atol=1e-3)
    assert not done.signals[:, :, real:].any() and done.sampling_rate == rate


@needs_cinc
@pytest.mark.parametrize(
    ("dataset", "count", "classes"),
    [("georgia", 24, 18), ("ptb-xl", 4, 19), ("ningbo", 17, 23), ("chapman", 7, 16)],
)
def test_the_four_sets_as_published(dataset: str, count: int, classes: int) -> None:
    records = read_cinc2021(CINC, dataset, sampling_rate=500)
    done = assert_as_published(records, 6144)
    assert (
        len(done) == count
        and len(done.classes) == classes
        and done.targets.shape == (count, classes)
    )
    assert (
        done.signals[:, :, 4990:5000].any(axis=(1, 2)).all() and not done.signals[:, :, 5000:].any()
    )
    assert done.unit == UNIT and done.about["dataset"] == dataset
    name = records.table["record_id"].iloc[0]
    as_stored = read_millivolts(read_header(next(CINC.glob(f"*/g1/{name}.hea"))))
    np.testing.assert_allclose(
        records.millivolts()[0], as_stored, atol=0.00051
    )  # read at 500 Hz, not resampled


@needs_ptbxl
def test_ptbxl_at_100_hz_as_published() -> None:
    paths = sorted(PTBXL.glob("records100/*/*_lr.hea"))[::100]
    signals = np.stack([read_millivolts(read_header(path)) for path in paths])
    assert_as_published(make_records(signals, 100.0), 1000)


def test_only_the_band_passes() -> None:
    time = np.arange(5000) / 500
    tones = [np.sin(2 * np.pi * frequency * time) for frequency in (0.1, 10.0, 80.0)]
    mixed = np.tile(tones[1] + 2 * tones[0] + 2 * tones[2] + 3.0, (1, 12, 1))
    found = preprocess(make_records(mixed)).millivolts()[0, 0, 1000:4000]
    assert np.corrcoef(found, tones[1][1000:4000])[0, 1] > 0.995


def test_the_number_of_records_in_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    signals = hearts(7, 100.0)
    signals[3, :, 800:] = 0.0
    signals[5, 2, 100:140] = np.nan
    done = []
    for size in (1, 3, 7, 100):
        monkeypatch.setattr(module, "BLOCK", size)
        done.append(preprocess(make_records(signals, 100.0), length=1100))
    assert all(np.array_equal(each.signals, done[0].signals) for each in done)
    assert len({each.fingerprint for each in done}) == 1


# What is not as it should be


def test_a_flat_lead_becomes_zeros_and_is_named() -> None:
    signals = hearts()
    signals[1, 7], signals[1, 9] = 0.7, np.linspace(0.0, 0.004, 5000)
    done = preprocess(make_records(signals))
    assert not done.signals[1, [7, 9]].any() and done.signals[1, 8].any()
    row = done.left_out.iloc[0]
    assert len(done.left_out) == 1 and (row["record_id"], row["lead"], row["fault"]) == (
        "r1",
        "V2, V4",
        "flat lead",
    )
    assert row["action"] == "set to zeros"


def test_a_record_of_zeros_stays_zeros() -> None:
    done = preprocess(make_records(np.concatenate([hearts(1), np.zeros((1, 12, 5000))])))
    assert not done.signals[1].any() and done.signals[0].any()
    assert done.left_out["lead"].tolist() == [", ".join(LEADS)]


def test_missing_samples_stay_missing_and_spoil_nothing_else() -> None:
    signals = hearts()
    whole = preprocess(make_records(signals)).millivolts()
    signals[0, 3, 2000:2020], signals[0, 5, :40], signals[2, 8] = np.nan, np.nan, np.nan
    found = preprocess(make_records(signals)).millivolts()
    missing = np.zeros(found.shape, dtype=bool)
    missing[:, :, :5000] = np.isnan(signals)
    assert np.array_equal(np.isnan(found), missing)
    apart = np.abs(found - whole)
    touched = apart / (1 + np.abs(whole))  # the gap changes the lead's deviation a little
    assert touched[[0, 0], [3, 5], 3000:].max() < 0.02 and touched[0, 3, :1000].max() < 0.02
    unharmed = np.ones((3, 12), dtype=bool)
    unharmed[[0, 0, 2], [3, 5, 8]] = False
    assert not apart[unharmed].any()


def test_padding_by_the_reader_is_not_part_of_the_record() -> None:
    signals = hearts() + 0.3  # the padding stands off the baseline
    signals[1, :, 3000:] = 0.0
    records = make_records(signals)
    done = preprocess(records)
    expected = slow(records.millivolts()[1, :, :3000], 500, 6144)
    np.testing.assert_allclose(done.millivolts()[1], expected, atol=ROUNDING)
    assert not done.signals[1, :, 3000:].any() and done.left_out.empty


def test_what_is_longer_is_cut_and_said() -> None:
    done = assert_as_published(make_records(hearts(2)), 2048)
    assert (
        done.left_out[["fault", "action", "detail"]].values.tolist()
        == [["length", "cut", "10.00 s"]] * 2
    )


def test_an_artefact_as_large_as_can_be_is_not_clipped() -> None:
    signals = np.zeros((1, 12, 6144))
    signals[:, :, 3000], signals[:, :, -1] = 20.0, 0.001
    counts = preprocess(make_records(signals)).signals
    assert 5 / SCALE < counts.max() < 32767


@pytest.mark.parametrize(
    ("settings", "rate", "message"),
    [
        ({}, 94.0, "a band from 1 to 47 Hz does not lie between 0 and 47 Hz"),
        ({"low": 0.0}, 500.0, "choose another band or read the records at a higher rate"),
        ({"low": 50.0}, 500.0, "a band from 50 to 47 Hz"),
        ({"high": float("nan")}, 500.0, "does not lie between"),
        ({"order": 0}, 500.0, "must both be at least 1"),
        ({"length": 0}, 500.0, "must both be at least 1"),
    ],
)
def test_impossible_settings_are_one_sentence(settings: dict, rate: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        preprocess(make_records(hearts(1), rate), **settings)


def test_unusable_records_are_one_sentence() -> None:
    signals = hearts(2)
    signals[1, :, 20:] = 0.0
    with pytest.raises(
        DataError, match="Record r1: 20 samples before its padding, where a filter of order 3 needs"
    ):
        preprocess(make_records(signals))
    with pytest.raises(DataError, match="there is no record to preprocess"):
        preprocess(make_records(hearts(1)).select([]))
    done = preprocess(make_records(hearts(1)))
    with pytest.raises(
        DataError, match="the signals are in standard deviations; preprocess the records in mV"
    ):
        preprocess(done)
    with pytest.raises(
        DataError, match="the signals are in standard deviations; validate the records in mV"
    ):
        done.validate()


# What comes out


def test_saved_and_loaded_they_are_the_same_and_tell_what_was_done(tmp_path: Path) -> None:
    records = make_records(hearts())
    done = preprocess(records)
    loaded = Records.load(done.save(tmp_path / "done"))
    assert np.array_equal(loaded.signals, done.signals) and loaded.about == done.about
    assert (loaded.scale, loaded.unit, loaded.fingerprint) == (SCALE, UNIT, done.fingerprint)
    assert loaded.about["preprocessing"]["band_hz"] == [1.0, 47.0] and records.unit == "mV"
    assert np.array_equal(preprocess(records).signals, done.signals)
    assert len({each.fingerprint for each in (records, done, preprocess(records, high=40.0))}) == 3
    again = Records.load(loaded.save(tmp_path / "again"))
    assert np.array_equal(again.signals, done.signals) and again.fingerprint == done.fingerprint


def test_memory_does_not_grow_with_the_number_of_records() -> None:
    signals, peaks = hearts(4, 100.0), []
    for count in (64, 512):
        records = make_records(np.tile(signals, (count // 4, 1, 1)), 100.0)
        tracemalloc.start()
        preprocess(records, length=1000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    int16_of_the_difference = 448 * 12 * 1000 * 2  # 11 MB
    assert peaks[1] - peaks[0] < 0.1 * int16_of_the_difference


# The published split


def drawn_leak(patients: np.ndarray, generator: np.random.Generator) -> tuple[int, float]:
    """Patients on both sides of one random split by record, and the share of test records whose
    patient trains.
    """
    test = np.zeros(len(patients), dtype=bool)
    test[generator.permutation(len(patients))[: len(patients) // 10]] = True
    shared = np.intersect1d(patients[test], patients[~test])
    return len(shared), float(np.isin(patients[test], shared).mean())


def test_patients_shared_is_what_random_splits_by_record_give() -> None:
    generator = np.random.default_rng(0)
    patients = np.repeat(np.arange(400), generator.integers(1, 5, 400)).astype(str)
    records = make_records(np.zeros((len(patients), 12, 1)))
    records.table["patient_id"] = patients
    found = np.mean([drawn_leak(patients, generator) for _ in range(300)], axis=0)
    np.testing.assert_allclose(patients_shared(records), found, rtol=0.02)


@needs_ptbxl
def test_what_a_split_of_the_ptbxl_subset_by_record_leaks() -> None:
    index = pd.read_csv(PTBXL / "ptbxl_database.csv")
    records = make_records(np.zeros((len(index), 12, 1)))
    records.table["patient_id"], records.table["fold"] = (
        index["patient_id"].astype(int),
        index["strat_fold"],
    )
    patients, share = patients_shared(records)
    assert (round(patients, 1), round(share, 3)) == (9.2, 0.037)
    assert len(records.split) == 3, "with the study's folds a patient on both sides would raise"


def test_unknown_patients_are_not_called_separate() -> None:
    records = make_records(hearts(2))
    records.table["patient_id"] = records.table["record_id"]
    with pytest.raises(DataError, match="each record counts as its own patient"):
        patients_shared(records)


@needs_cinc
def test_a_folder_of_cinc_2021_is_known_by_its_name() -> None:
    records = read_source(CINC / "georgia", sampling_rate=500)
    assert records.about["dataset"] == "georgia" and len(records.classes) == 18
    assert records.targets.any(axis=1).all(), "CE-SSL leaves out records without a class"
    with pytest.raises(
        DataError, match="chapman_ningbo: .* holds chapman and ningbo; separate them"
    ):
        read_source(CINC / "chapman_ningbo")
