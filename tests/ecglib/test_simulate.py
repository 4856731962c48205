"""The simulated cohort: its laws, its physiology, its labels and its ground truth."""

import tempfile
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from ecglib.errors import DataError, StorageError
from ecglib.records import LEADS, Records
from ecglib.sources.simulate import (
    BLOCK,
    CONDITIONS,
    EVIDENCE,
    PLAIN,
    RHYTHMS,
    SUPERCLASSES,
    TASKS,
    Simulation,
    simulate_cohort,
    simulate_records,
)
from ecglib.sources.simulate.heart import LEAD_FIELD, rotation
from ecglib.sources.simulate.recorder import recorder_noise

SECOND = 100  # samples


@pytest.fixture(scope="module")
def cohort() -> Simulation:
    """About 900 records with all statements as classes."""
    return simulate_cohort(720, seed=3, task="all")


@pytest.fixture(scope="module")
def measured(cohort: Simulation) -> pd.DataFrame:
    """The table with PR, QRS, QT and QTc (ms, mean over the sinus beats of each record) from the
    wave marks.
    """
    waves = cohort.waves[cohort.waves["kind"] == "normal"]
    marks = waves.pivot(index=["record_id", "beat"], columns="wave", values=["onset", "offset"]) * (
        1000 / SECOND
    )
    intervals = pd.DataFrame(
        {
            "pr": marks["onset", "QRS"] - marks["onset", "P"],
            "qrs": marks["offset", "QRS"] - marks["onset", "QRS"],
            "qt": marks["offset", "T"] - marks["onset", "QRS"],
        }
    )
    table = cohort.records.table.join(intervals.groupby("record_id").mean(), on="record_id")
    return table.assign(qtc=table["qt"] / (60 / table["heart_rate"]) ** (1 / 3))


def lead(signals: np.ndarray, name: str) -> np.ndarray:
    """One lead of `(n, 12, time)`."""
    return signals[:, LEADS.index(name)]


def severity(cohort: Simulation, code: str) -> np.ndarray:
    """True severity of a condition in each record."""
    return cohort.records.table[f"severity_{code}"].to_numpy()


def stated(table: pd.DataFrame, code: str) -> np.ndarray:
    """Whether the reader stated a code."""
    return np.array([code in text.split() for text in table["statements"]])


def healthy(cohort: Simulation) -> np.ndarray:
    """Records in sinus rhythm without any finding, not even a borderline one."""
    severities = cohort.records.table.filter(like="severity_")
    return (severities == 0).all(axis=1).to_numpy() & stated(cohort.records.table, "NORM")


def median_beats(cohort: Simulation, chosen: np.ndarray) -> np.ndarray:
    """Median beat `(n, 12, 100)` in mV from 0.3 s before QRS onset to 0.7 s after it, the PR
    segment at zero.
    """
    beats = []
    for index in chosen:
        signal = cohort.records.millivolts([index])[0]
        marks = cohort.beats[cohort.records.table["record_id"].iloc[index]]
        onsets = marks.loc[marks["kind"] == "normal", "QRS onset"].dropna().to_numpy(int)
        cut = [
            signal[:, o - 30 : o + 70] - signal[:, o - 2 : o + 1].mean(axis=1, keepdims=True)
            for o in onsets
            if o >= 30 and o + 70 <= signal.shape[1]
        ]
        beats.append(np.median(cut, axis=0))
    return np.array(beats)


def test_limb_leads_obey_einthoven_and_goldberger(cohort):
    counts = cohort.records.signals.astype(int)
    one, two = lead(counts, "I"), lead(counts, "II")
    assert np.abs(lead(counts, "III") - (two - one)).max() <= 1
    assert np.abs(lead(counts, "aVR") + (one + two) / 2).max() <= 1.5
    assert np.abs(lead(counts, "aVL") - (one - two / 2)).max() <= 1.5
    assert np.abs(lead(counts, "aVF") - (two - one / 2)).max() <= 1.5


def test_records_pass_their_own_validation(cohort):
    assert cohort.records.validate().empty


def test_same_seed_same_records_other_seed_others():
    first, again, other = (simulate_records(30, seed, seconds=2.5) for seed in (5, 5, 6))
    assert first.fingerprint == again.fingerprint
    assert first.table.equals(again.table)
    assert first.fingerprint != other.fingerprint


def test_first_patients_do_not_depend_on_how_many_are_asked_for():
    many = simulate_cohort(130, 2, seconds=2.5)
    for patients in (1, BLOCK, BLOCK + 5):
        few = simulate_cohort(patients, 2, seconds=2.5)
        count = len(few.records)
        assert few.records.table["patient_id"].nunique() == patients
        assert np.array_equal(few.records.signals, many.records.signals[:count])
        assert few.records.table.equals(many.records.table.iloc[:count])
        assert few.waves.equals(many.waves.iloc[: len(few.waves)])


def test_about_says_that_the_records_are_simulated():
    about = simulate_records(12, 4, seconds=2.5).about
    assert about["source"] == "simulated cohort"
    assert about["simulated"] is True
    assert (about["seed"], about["patients"]) == (4, 12)


def test_patients_have_one_to_four_records_in_one_fold(cohort):
    patients = cohort.records.table.groupby("patient_id")
    counts = patients.size()
    assert set(counts) == {1, 2, 3, 4}
    assert 1.15 < counts.mean() < 1.35
    assert (patients["fold"].nunique() == 1).all()
    assert (patients["fold"].first().value_counts() == 72).all()
    assert cohort.records.table["record_id"].is_unique


def test_visits_of_one_patient_share_the_heart_and_differ_in_rate(cohort):
    table = cohort.records.table
    chosen = np.flatnonzero(
        ~stated(table, "AFIB") & ~stated(table, "AFLT") & (table["heart_rate"] < 90)
    )[:250]
    beats = median_beats(cohort, chosen)[:, :2, 25:45].reshape(len(chosen), -1)
    likeness = np.corrcoef(beats)
    same = table["patient_id"].to_numpy()[chosen]
    pairs = (same[:, None] == same) & ~np.eye(len(same), dtype=bool)
    assert np.median(likeness[pairs]) > 0.95 > np.median(likeness[~pairs]) + 0.1
    first, second = np.nonzero(pairs)
    rates = table["heart_rate"].to_numpy()[chosen]
    assert np.abs(rates[first] - rates[second]).mean() > 2


def test_prevalences_are_like_ptb_xl(cohort):
    table = cohort.records.table
    has = {
        name: np.any(
            [stated(table, code) for code in EVIDENCE if name in (code, CONDITIONS.get(code))],
            axis=0,
        )
        for name in SUPERCLASSES
    }
    for name, wanted in {"NORM": 0.44, "STTC": 0.24, "MI": 0.25, "CD": 0.22, "HYP": 0.12}.items():
        assert abs(has[name].mean() - wanted) < 0.06, name
    classes = np.sum(list(has.values()), axis=0)
    assert 0 < (classes == 0).mean() < 0.04
    assert 0.2 < (classes > 1).mean() < 0.35
    assert 0.03 < stated(table, "AFIB").mean() < 0.11


def test_superclass_targets_follow_from_the_statements(cohort):
    records = simulate_records(BLOCK, 3)
    assert records.classes == SUPERCLASSES
    for row, text in enumerate(cohort.records.table["statements"].iloc[: len(records)]):
        wanted = {CONDITIONS.get(code, code) for code in text.split()} & set(SUPERCLASSES)
        assert {
            name for name, here in zip(SUPERCLASSES, records.targets[row], strict=True) if here
        } == wanted


def test_every_class_of_every_task_occurs(cohort):
    assert cohort.records.targets.sum(axis=0).min() > 0
    rhythms = cohort.records.targets[
        :, [TASKS["all"].index(name) for name in ("AFIB", "AFLT", "SBRAD", "SR", "STACH")]
    ]
    assert (rhythms.sum(axis=1) == 1).all()
    assert simulate_records(5, 0, seconds=2.5, task="rhythm").classes == RHYTHMS


def test_some_labels_are_wrong_and_only_a_few(cohort):
    table = cohort.records.table
    wrong = np.stack(
        [stated(table, code) != (severity(cohort, code) >= PLAIN) for code in CONDITIONS], axis=1
    )
    assert 0.02 < wrong.any(axis=1).mean() < 0.15
    clean = np.stack([severity(cohort, code) == 0 for code in CONDITIONS], axis=1)
    assert not (wrong & clean).any()  # a statement is never made of nothing


def test_intervals_of_normal_hearts_are_normal(measured, cohort):
    normal = measured[healthy(cohort)]
    assert normal["pr"].between(100, 215).all()
    assert 140 < normal["pr"].median() < 175
    assert normal["qrs"].between(65, 118).all()
    assert 80 < normal["qrs"].median() < 100
    assert 390 < normal["qtc"].median() < 440
    slow, fast = normal["heart_rate"] < 62, normal["heart_rate"] > 82
    assert normal.loc[slow, "qt"].mean() > normal.loc[fast, "qt"].mean() + 30


def test_conduction_disease_shows_in_the_marks(measured):
    blocks = (measured["severity_CLBBB"] >= PLAIN) | (measured["severity_CRBBB"] >= PLAIN)
    assert measured.loc[blocks, "qrs"].min() > 118
    assert measured.loc[~blocks, "qrs"].quantile(0.99) < 122
    late = measured["severity_1AVB"] >= PLAIN
    assert measured.loc[late, "pr"].min() > 190
    assert measured.loc[late, "pr"].median() > 220
    assert measured.loc[measured["severity_1AVB"] == 0, "pr"].quantile(0.98) < 210


def test_waves_come_in_order_and_inside(cohort):
    waves = cohort.waves
    assert (waves["onset"] >= 0).all() and (waves["offset"] < cohort.records.signals.shape[2]).all()
    assert (waves["offset"] > waves["onset"]).all()
    marks = waves.pivot(index=["record_id", "beat"], columns="wave", values=["onset", "offset"])
    assert not (marks["offset", "P"] > marks["onset", "QRS"]).any()
    assert not (marks["offset", "QRS"] > marks["onset", "T"]).any()
    assert set(waves["record_id"]) == set(cohort.records.table["record_id"])


def test_marks_agree_with_the_signal(cohort):
    chosen = np.flatnonzero(healthy(cohort))[:60]
    for index in chosen:
        steep = np.abs(np.gradient(cohort.records.millivolts([index])[0, 6:], axis=1)).max(axis=0)
        marks = cohort.beats[cohort.records.table["record_id"].iloc[index]].dropna()
        inside = np.zeros(len(steep), bool)
        for onset, offset in marks[["QRS onset", "QRS offset"]].to_numpy(int):
            inside[onset : offset + 1] = True
        first, last = int(marks["P onset"].min()), int(marks["T offset"].max())
        highest = np.argmax(steep[first:last]) + first
        assert inside[highest]


def rr_spread(cohort: Simulation, index: int) -> float:
    """Standard deviation over mean of the RR intervals of one record."""
    intervals = (
        cohort.beats[cohort.records.table["record_id"].iloc[index]]["QRS onset"]
        .dropna()
        .diff()
        .dropna()
    )
    return intervals.std() / intervals.mean()


def test_atrial_fibrillation_is_irregular_without_p_waves(cohort):
    table = cohort.records.table
    fibrillating = np.flatnonzero(stated(table, "AFIB") & ~stated(table, "PVC"))
    sinus = np.flatnonzero(stated(table, "SR") & ~stated(table, "PVC") & ~stated(table, "PAC"))
    assert np.median([rr_spread(cohort, index) for index in fibrillating]) > 0.15
    assert np.median([rr_spread(cohort, index) for index in sinus]) < 0.06
    with_p = set(cohort.waves.loc[cohort.waves["wave"] == "P", "record_id"])
    assert not with_p & set(table["record_id"].iloc[fibrillating])
    assert set(table["record_id"].iloc[sinus]) <= with_p


def test_flutter_waves_stand_out_in_the_inferior_leads(cohort):
    fluttering = np.flatnonzero(stated(cohort.records.table, "AFLT"))
    sinus = np.flatnonzero(healthy(cohort))[:60]

    def share(rows: np.ndarray) -> np.ndarray:
        """Share of the power of lead aVF between 4 and 5.5 Hz: the cycle of a flutter."""
        power = np.square(np.abs(np.fft.rfft(lead(cohort.records.millivolts(rows), "aVF"), axis=1)))
        frequency = np.fft.rfftfreq(cohort.records.signals.shape[2], 1 / SECOND)
        return power[:, (frequency > 4) & (frequency < 5.5)].sum(axis=1) / power[
            :, frequency > 1
        ].sum(axis=1)

    assert np.median(share(fluttering)) > 1.5 * np.median(share(sinus))


def test_premature_beats_come_early(cohort):
    table = cohort.records.table
    for code, kind in (("PVC", "ventricular"), ("PAC", "atrial")):
        for index in np.flatnonzero(stated(table, code) & stated(table, "SR")):
            marks = cohort.beats[table["record_id"].iloc[index]].dropna(subset=["QRS onset"])
            early = marks["QRS onset"].diff()[(marks["kind"] == kind)].dropna()
            usual = marks["QRS onset"].diff()[(marks["kind"] == "normal")].dropna()
            assert early.empty or early.median() < usual.median()
    widths = cohort.waves[cohort.waves["wave"] == "QRS"].assign(
        width=lambda w: (w["offset"] - w["onset"]) / SECOND
    )
    assert widths.loc[widths["kind"] == "ventricular", "width"].min() > 0.12


def test_rates_are_as_stated(cohort):
    table = cohort.records.table
    assert table.loc[stated(table, "SBRAD"), "heart_rate"].max() < 61
    assert table.loc[stated(table, "STACH"), "heart_rate"].min() > 94
    assert table["heart_rate"].between(30, 190).all()


@pytest.mark.parametrize(
    "class_name", [*SUPERCLASSES, *(code for code in EVIDENCE if code != "NORM")]
)
def test_evidence_lies_where_the_condition_acts(cohort, class_name):
    table = cohort.records.table
    codes = [code for code in EVIDENCE if class_name in (code, CONDITIONS.get(code))]
    positive = np.any([stated(table, code) for code in codes], axis=0)
    chosen = np.flatnonzero(positive)[:25]
    mask = cohort.evidence(chosen, class_name)
    assert mask.shape == (len(chosen), 12, 1000) and mask.dtype == bool
    assert mask.any(axis=(1, 2)).all() and not mask.all(axis=(1, 2)).any()
    leads = set().union(*(EVIDENCE[code][0].split() for code in codes))
    assert not mask[:, [row for row, name in enumerate(LEADS) if name not in leads]].any()
    assert not cohort.evidence(np.flatnonzero(~positive)[:25], class_name).any()


def test_inferior_evidence_is_inferior_qrs_to_t(cohort):
    index = np.flatnonzero(stated(cohort.records.table, "IMI"))[0]
    mask = cohort.evidence([index], "IMI")[0]
    assert [LEADS[row] for row in np.flatnonzero(mask.any(axis=1))] == ["II", "III", "aVF"]
    beat = cohort.beats[cohort.records.table["record_id"].iloc[index]].dropna().iloc[1]
    inside = mask[1, int(beat["P onset"]) : int(beat["T offset"]) + 1]
    assert not inside[: int(beat["QRS onset"] - beat["P onset"])].all()
    assert inside[int(beat["QRS onset"] - beat["P onset"]) :].all()


@pytest.fixture(scope="module")
def normal_beats(cohort: Simulation) -> np.ndarray:
    """Median beats of 120 people without any finding."""
    return median_beats(cohort, np.flatnonzero(healthy(cohort))[:120])


def separation(
    cohort: Simulation, normal: np.ndarray, code: str, value: Callable[[np.ndarray], np.ndarray]
) -> float:
    """AUROC of one classical measurement, from median beats, for severe cases against clean
    normals.
    """
    leads = {c: set(EVIDENCE[c][0].split()) for c in CONDITIONS}
    rivals = [
        c
        for c in CONDITIONS
        if c != code and CONDITIONS[c] in ("CD", "MI", "HYP") and leads[c] & leads[code]
    ]
    alone = np.all([severity(cohort, c) < 0.3 for c in rivals], axis=0)
    atria = stated(cohort.records.table, "AFIB") | stated(cohort.records.table, "AFLT")
    severe = np.flatnonzero((severity(cohort, code) > 0.45) & alone & ~atria)
    assert len(severe) >= 4, code
    scores = np.concatenate([value(median_beats(cohort, severe)), value(normal)])
    return roc_auc_score(np.arange(len(scores)) < len(severe), scores)


def lowest(beats: np.ndarray, names: str, start: int, stop: int) -> np.ndarray:
    """Depth below zero in mV, mean over leads, between two samples of median beats (QRS onset at
    30).
    """
    return np.mean(
        [-lead(beats, name)[:, start:stop].min(axis=1) for name in names.split()], axis=0
    )


def highest(beats: np.ndarray, names: str, start: int, stop: int) -> np.ndarray:
    """Height above zero in mV, mean over leads, between two samples of median beats (QRS onset at
    30).
    """
    return np.mean([lead(beats, name)[:, start:stop].max(axis=1) for name in names.split()], axis=0)


CLASSICAL = {
    "IMI": lambda beats: lowest(beats, "II aVF", 30, 35),  # Q
    "AMI": lambda beats: -highest(beats, "V1 V2 V3", 30, 36),  # lost R
    "LMI": lambda beats: lowest(beats, "V5 V6", 30, 35),  # Q
    "LVH": lambda beats: (
        lowest(beats, "V1", 30, 42)  # Sokolow-Lyon: S in V1 and the taller R of V5 and V6
        + np.maximum(highest(beats, "V5", 30, 42), highest(beats, "V6", 30, 42))
    ),
    "CRBBB": lambda beats: highest(beats, "V1", 39, 44),  # R'
    "IRBBB": lambda beats: highest(beats, "V1", 38, 42),  # r'
    "CLBBB": lambda beats: highest(beats, "I", 39, 44),  # the left ventricle comes late
    "LAFB": lambda beats: lowest(beats, "II aVF", 34, 42),  # S: axis to the left
    "ISCAL": lambda beats: -highest(beats, "I V5 V6", 50, 66),  # T
    "ISCIN": lambda beats: lowest(beats, "III aVF", 46, 66),  # T
    "NDT": lambda beats: -highest(beats, "II V3 V4 V5", 50, 66),  # T
}


@pytest.mark.parametrize("code", CLASSICAL)
def test_classical_measurement_separates_severe_cases(cohort, normal_beats, code):
    assert separation(cohort, normal_beats, code, CLASSICAL[code]) > 0.85


def test_voltages_are_plausible(normal_beats):
    normal = normal_beats
    for name, low, high in (("II", 0.25, 1.6), ("V5", 0.5, 2.5)):
        tall = lead(normal, name).max(axis=1)
        assert low < np.quantile(tall, 0.1) and np.quantile(tall, 0.9) < high
    assert lead(normal, "V1").min(axis=1).mean() < -0.5  # S in V1
    p_wave = lead(normal, "II")[:, 8:28].max(axis=1)
    assert 0.05 < np.median(p_wave) < 0.25


def test_noise_has_a_random_level_and_mains_only_where_it_can_be_sampled():
    rng = np.random.default_rng(0)
    noise = recorder_noise(rng, 120, 100, 1000)
    level = np.diff(noise, axis=2).std(axis=(1, 2))
    assert np.quantile(level, 0.95) > 4 * np.quantile(level, 0.05)

    def hum(rate: int) -> float:
        power = np.square(
            np.abs(np.fft.rfft(recorder_noise(rng, 30, rate, 10 * rate)[:, 0], axis=1))
        ).mean(axis=0)
        frequency = np.fft.rfftfreq(10 * rate, 1 / rate)
        near = (
            (np.abs(frequency - 50) < 2)
            & (frequency < rate / 2 - 1)
            & (np.abs(frequency - 50) > 0.15)
        )
        return power[np.argmin(np.abs(frequency - 50))] / power[near].mean()

    assert hum(500) > 20
    assert hum(104) < 3


def test_same_heart_at_another_sampling_rate():
    slow, fast = (simulate_cohort(20, 1, sampling_rate=rate, seconds=4) for rate in (100, 200))
    assert fast.records.signals.shape[2] == 2 * slow.records.signals.shape[2]
    marks = slow.waves.merge(fast.waves, on=["record_id", "beat", "kind", "wave"])
    assert len(marks) > 0.95 * len(slow.waves)
    assert (np.abs(marks["onset_x"] - marks["onset_y"] / 2) <= 1).all()


def test_saved_and_loaded_with_its_ground_truth(tmp_path):
    made = simulate_cohort(50, 9, task="all")
    again = Simulation.load(made.save(tmp_path / "cohort"))
    assert (
        again.records.fingerprint
        == made.records.fingerprint
        == simulate_records(50, 9, task="all").fingerprint
    )
    assert again.waves.reset_index(drop=True).equals(made.waves.reset_index(drop=True))
    every = np.arange(len(made.records))
    for name in (*SUPERCLASSES, "SR", "AFIB"):
        assert np.array_equal(again.evidence(every, name), made.evidence(every, name))


def test_loading_what_is_not_a_simulation(tmp_path):
    made = simulate_cohort(10, 9, seconds=2.5)
    folder = made.records.save(tmp_path / "only_records")
    with pytest.raises(DataError, match="wave marks are missing"):
        Simulation.load(folder)
    (folder / "waves.csv").write_text("nonsense\n1\n")
    with pytest.raises(DataError, match="damaged wave marks"):
        Simulation.load(folder)
    records = made.records
    real = Records(
        records.signals, records.scale, 100, records.table, records.targets, records.classes
    )
    with pytest.raises(DataError, match="not a simulated cohort"):
        Simulation.load(real.save(tmp_path / "real"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"patients": 0}, "patients"),
        ({"patients": 2.5}, "patients"),
        ({"patients": True}, "patients"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
        ({"task": "subclass"}, "superclass, rhythm, all"),
        ({"sampling_rate": 20}, "sampling rate"),
        ({"sampling_rate": float("nan")}, "sampling rate"),
        ({"seconds": 0.5}, "seconds"),
        ({"seconds": float("inf")}, "seconds"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(DataError, match=said):
        simulate_records(**{"patients": 10, "seed": 0, **settings})


def test_unknown_class_and_unwritable_file_are_told(cohort, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no class 'WPW'"):
        cohort.evidence([0], "WPW")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(StorageError, match="absent"):
        simulate_cohort(1, 0)


def test_rotation_keeps_lengths_and_turns_the_right_way():
    matrices = rotation(np.random.default_rng(0).normal(0, 1, (20, 3)))
    assert np.allclose(matrices @ matrices.transpose(0, 2, 1), np.eye(3))
    assert np.allclose(np.linalg.det(matrices), 1)
    quarter = rotation(np.array([[0.0, 0.0, np.pi / 2]]))[0]
    assert np.allclose(quarter @ [1, 0, 0], [0, 1, 0])


def test_lead_field_is_dowers():
    assert LEAD_FIELD.shape == (8, 3)
    assert LEAD_FIELD[1].tolist() == [0.235, 1.066, -0.132]
    assert LEAD_FIELD[3].tolist() == [0.044, 0.164, -1.387]
