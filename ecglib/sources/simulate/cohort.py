"""A cohort of simulated patients, shaped after PTB-XL.

Patients carry a heart, a torso, conditions of graded severity and a rhythm; each has one to four
records. A reader states what is plain, misses some of it and overcalls some borderline findings:
these statements are the labels.
"""

from numbers import Integral
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.errors import DataError, explain_storage
from ecglib.records import LEADS, MICROVOLT, Records
from ecglib.sources.index_files import FOLDS, binary_targets
from ecglib.sources.simulate.heart import PLAIN, apply_conditions, draw_heart, draw_lead_field
from ecglib.sources.simulate.recorder import record_hearts
from ecglib.sources.simulate.rhythm import ATRIAL, NORMAL, VENTRICULAR, Beats, Pacing, draw_beats
from ecglib.sources.simulate.truth import CONDITIONS, TASKS, WAVE_COLUMNS, Simulation

# Patients simulated together: memory does not grow with the cohort, and the first ones never
# change.
BLOCK = 60
RECORDS_PER_PATIENT = (0.84, 0.10, 0.04, 0.02)  # shares of one to four
KIND_NAMES = {NORMAL: "normal", VENTRICULAR: "ventricular", ATRIAL: "atrial"}

# Share of patients with each combination of superclasses, after PTB-XL (Wagner et al., Sci Data
# 2020).
COMBINATIONS = {
    "": 0.445,
    "STTC": 0.11,
    "MI": 0.115,
    "CD": 0.095,
    "CD MI": 0.05,
    "HYP STTC": 0.036,
    "MI STTC": 0.03,
    "HYP": 0.026,
    "CD STTC": 0.023,
    "HYP MI STTC": 0.018,
    "CD HYP": 0.015,
    "CD MI STTC": 0.010,
    "CD HYP STTC": 0.010,
    "HYP MI": 0.008,
    "CD HYP MI STTC": 0.008,
    "CD HYP MI": 0.006,
}
# Within a superclass, the share of each condition or pair of conditions.
KINDS = {
    "MI": {"AMI": 0.42, "IMI": 0.41, "LMI": 0.05, "IMI LMI": 0.08, "AMI LMI": 0.04},
    "STTC": {"NDT": 0.40, "ISCAL": 0.35, "ISCIN": 0.25},
    "CD": {
        "LAFB": 0.28,
        "IRBBB": 0.20,
        "1AVB": 0.16,
        "CRBBB": 0.11,
        "CLBBB": 0.13,
        "CRBBB LAFB": 0.06,
        "1AVB LAFB": 0.06,
    },
    "HYP": {"LVH": 1.0},
}
# Share of people without a condition who have a borderline finding of it; never a complete block.
BORDERLINE = 0.06
MISSED = 0.04  # share of plain findings that the reader does not state
OVERCALLED = 0.08  # share of borderline findings that the reader states
Arrays = dict[str, np.ndarray]  # one value per patient or record, by name


def simulate_records(
    patients: int,
    seed: int,
    sampling_rate: float = 100,
    seconds: float = 10.0,
    task: str = "superclass",
) -> Records:
    """The records of a simulated cohort without their ground truth; see `simulate_cohort`."""
    return simulate_cohort(patients, seed, sampling_rate, seconds, task).records


def simulate_cohort(
    patients: int,
    seed: int,
    sampling_rate: float = 100,
    seconds: float = 10.0,
    task: str = "superclass",
    signals_file: str | Path | None = None,
) -> Simulation:
    """`patients` simulated patients with one to four 12-lead ECGs each (1.24 on average), the same
    for the same seed.

    sampling_rate in Hz (at least 50); task superclass, rhythm or all. The first patients are the
    same however many are asked for. Cohorts larger than memory keep their signals in `signals_file`
    (.npy). Raises DataError.
    """
    _check(patients, seed, sampling_rate, seconds, task)
    samples = round(seconds * sampling_rate)
    sizes = [(start, min(BLOCK, patients - start)) for start in range(0, patients, BLOCK)]
    count = sum(_draw_visits(seed, start)[:wanted].sum() for start, wanted in sizes)
    shape = (count, len(LEADS), samples)
    if signals_file is None:
        signals = np.empty(shape, np.int16)
    else:
        with explain_storage(signals_file):
            signals = np.lib.format.open_memmap(signals_file, "w+", np.int16, shape)
    tables = []
    waves = []
    filled = 0
    for start, wanted in sizes:
        block, table, marks = _simulate_block(seed, start, wanted, sampling_rate, samples)
        signals[filled : filled + len(block)] = block
        filled += len(block)
        tables.append(table)
        waves.append(marks)
    table = pd.concat(tables, ignore_index=True)
    about = {
        "source": "simulated cohort",
        "simulated": True,
        "seed": int(seed),
        "patients": int(patients),
        "task": task,
    }
    records = Records(
        signals, MICROVOLT, sampling_rate, table, _targets(table, task), TASKS[task], about=about
    )
    return Simulation(records, pd.concat(waves, ignore_index=True))


def _check(patients: int, seed: int, sampling_rate: float, seconds: float, task: str) -> None:
    """Refuse settings from which no ECG can be made."""
    if task not in TASKS:
        raise DataError(
            f"The simulated cohort has no task {task!r}; choose one of {', '.join(TASKS)}."
        )
    for name, value, least in (("patients", patients, 1), ("seed", seed, 0)):
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise DataError(
                f"The simulated cohort's {name} is {value!r}; give a whole number of at least "
                f"{least}."
            )
    if not 50 <= sampling_rate <= 2000:
        raise DataError(
            f"A sampling rate of {sampling_rate} Hz does not hold an ECG; give 50 to 2000 Hz."
        )
    if not 2.5 <= seconds <= 3600:
        raise DataError(f"{seconds} seconds do not hold a rhythm; give 2.5 seconds to an hour.")


def _targets(table: pd.DataFrame, task: str) -> np.ndarray:
    """Targets 0/1 `(n, classes)` of a task from the statements."""
    stated = [set(text.split()) for text in table["statements"]]
    if task == "superclass":
        stated = [{CONDITIONS.get(code, code) for code in codes} for codes in stated]
    return binary_targets(stated, TASKS[task])


def _simulate_block(
    seed: int, start: int, wanted: int, sampling_rate: float, samples: int
) -> tuple[np.ndarray, pd.DataFrame, pd.DataFrame]:
    """Signals `(n, 12, time)` int16, table and wave marks of the `wanted` first patients of the
    block at `start`.
    """
    rng = np.random.default_rng([seed, start, 1])
    visits = _draw_visits(seed, start)
    patients, severities = _draw_patients(rng, start)
    person = np.repeat(np.arange(BLOCK), visits)
    traits = {name: values[person] for name, values in patients.items()}
    severities = {code: severity[person] for code, severity in severities.items()}
    _vary_visits(rng, traits, severities)
    # The whole block is drawn before its unwanted patients are dropped, so that the others do not
    # depend on how many.
    heart = draw_heart(rng, patients["age"], patients["sex"] == "male")
    field = draw_lead_field(rng, BLOCK)[person]
    heart = {name: wave.take(person) for name, wave in heart.items()}
    apply_conditions(rng, heart, severities)
    pacing = _pacing(rng, traits)
    beats = draw_beats(rng, pacing, samples / sampling_rate)
    signals, marks = record_hearts(rng, heart, field, pacing, beats, sampling_rate, samples)
    rate = _heart_rate(beats, len(person), samples / sampling_rate)
    table = pd.DataFrame(
        {
            "record_id": [
                f"{patient}r{visit + 1}"
                for patient, count in zip(patients["patient_id"], visits, strict=True)
                for visit in range(count)
            ],
            "patient_id": traits["patient_id"],
            "fold": traits["fold"],
            "source": "simulated",
            "age": traits["age"],
            "sex": traits["sex"],
            "heart_rate": rate.round(1),
            "statements": _statements(rng, traits["atria"], rate, severities, marks),
            **{f"severity_{code}": severity for code, severity in severities.items()},
        }
    )
    kept = int((person < wanted).sum())
    marks = marks[marks["record"] < kept]
    marks.insert(0, "record_id", table["record_id"].to_numpy()[marks["record"]])
    marks["kind"] = marks["kind"].map(KIND_NAMES)
    return signals[:kept], table.iloc[:kept], marks[WAVE_COLUMNS]


def _draw_visits(seed: int, start: int) -> np.ndarray:
    """Number of records of each patient of a block, one to four."""
    return 1 + np.random.default_rng([seed, start, 0]).choice(4, BLOCK, p=RECORDS_PER_PATIENT)


def _draw_patients(rng: np.random.Generator, start: int) -> tuple[Arrays, Arrays]:
    """Traits of each patient of a block (identity, fold, age, sex, rhythm, rate) and severities of
    the conditions; each ten patients fill the ten folds.
    """
    shares = np.array(list(COMBINATIONS.values()))
    combination = rng.choice(list(COMBINATIONS), BLOCK, p=shares / shares.sum())
    ill = combination != ""
    age = np.clip(rng.normal(np.where(ill, 64, 53), np.where(ill, 14, 17)), 18, 95).round()
    fibrillation = rng.random(BLOCK) < 0.0035 * np.exp(0.06 * (age - 18)) * np.where(ill, 1.2, 0.45)
    rate = rng.normal(72, 10, BLOCK) + rng.choice([0, -20, 34], BLOCK, p=[0.93, 0.03, 0.04])
    traits = {
        "patient_id": np.array([f"p{start + row:06d}" for row in range(BLOCK)]),
        "fold": np.concatenate([rng.permutation(FOLDS) + 1 for _ in range(BLOCK // FOLDS)]),
        "age": age,
        "sex": np.where(rng.random(BLOCK) < 0.52, "male", "female"),
        "atria": np.select([fibrillation, rng.random(BLOCK) < 0.012], ["AFIB", "AFLT"], "sinus"),
        "rate": np.clip(rate, 38, 150),
        "breathing": np.abs(rng.normal(0, 0.05, BLOCK)) * np.exp(-(age - 25) / 45),
        "ventricular": rng.random(BLOCK) < 0.02 + 0.0011 * (age - 18),
        "premature_atrial": rng.random(BLOCK) < 0.01 + 0.0006 * (age - 18),
    }
    return traits, _draw_severities(rng, combination)


def _draw_severities(rng: np.random.Generator, combination: np.ndarray) -> Arrays:
    """Severity of each condition `(n,)`: many mild cases, few severe ones, borderline findings in
    the others.
    """
    count = len(combination)
    present: list[set[str]] = [set() for _ in combination]
    for superclass, kinds in KINDS.items():
        chosen = rng.choice(list(kinds), count, p=list(kinds.values()))
        for found, superclasses, kind in zip(present, combination, chosen, strict=True):
            if superclass in superclasses.split():
                found.update(kind.split())
    severities = {}
    for code in CONDITIONS:
        severity = PLAIN + (1 - PLAIN) * rng.beta(1.3, 1.6, count)
        slight = rng.uniform(0.02, PLAIN, count) * (rng.random(count) < BORDERLINE)
        slight *= code not in ("CLBBB", "CRBBB")
        severities[code] = np.where([code in found for found in present], severity, slight)
    return severities


def _vary_visits(rng: np.random.Generator, traits: Arrays, severities: Arrays) -> None:
    """Another rate and somewhat other severities at each visit, in place."""
    count = len(traits["rate"])
    for code, severity in severities.items():
        varied = np.clip(severity * rng.lognormal(0, 0.12, count), 0, 1)
        slight = np.minimum(varied, 0.99 * PLAIN)
        kept = np.where(severity >= PLAIN, np.maximum(varied, PLAIN), slight)
        severities[code] = kept.round(4)
    atria = traits["atria"]
    rate = np.clip(traits["rate"] * rng.lognormal(0, 0.07, count), 36, 165)
    fast = [np.clip(rate * 1.2, 50, 160), np.clip(rate * 1.25, 65, 150)]
    traits["rate"] = np.select([atria == "AFIB", atria == "AFLT"], fast, rate)
    severities["1AVB"][atria != "sinus"] = 0.0  # without P waves there is no PR interval


def _pacing(rng: np.random.Generator, traits: Arrays) -> Pacing:
    """What sets the beats of each record."""
    atria = traits["atria"]
    count = len(atria)
    atrial = traits["premature_atrial"] & (atria == "sinus")
    return Pacing(
        interval=60 / traits["rate"],
        breathing=traits["breathing"],
        wander=np.abs(rng.normal(0.008, 0.008, count)),
        ventricular=traits["ventricular"] * rng.uniform(0.02, 0.22, count),
        atrial=atrial * rng.uniform(0.02, 0.15, count),
        fibrillation=atria == "AFIB",
        flutter_cycle=np.where(atria == "AFLT", rng.uniform(0.19, 0.25, count), 0.0),
    )


def _heart_rate(beats: Beats, count: int, seconds: float) -> np.ndarray:
    """Measured beats per minute of each of `count` records."""
    inside = (beats.time >= 0) & (beats.time < seconds)
    record = beats.record[inside]
    lasting = np.bincount(record, beats.interval[inside], count)
    return 60 * np.bincount(record, minlength=count) / np.maximum(lasting, 1e-9)


def _statements(
    rng: np.random.Generator,
    atria: np.ndarray,
    rate: np.ndarray,
    severities: Arrays,
    marks: pd.DataFrame,
) -> list[str]:
    """The reader's statements about each record, codes between spaces."""
    count = len(rate)
    stated = {code: _stated(rng, severity) for code, severity in severities.items()}
    stated["NORM"] = ~np.any(list(stated.values()), axis=0) & (atria == "sinus")
    for code, kind, waves in (("PVC", VENTRICULAR, ["QRS", "T"]), ("PAC", ATRIAL, ["P", "QRS"])):
        stated[code] = _has_beat(marks, kind, waves, count) & (rng.random(count) > MISSED)
    slow = rate < 54 + rng.normal(0, 1.5, count)
    fast = rate > 100 + rng.normal(0, 1.5, count)
    rhythm = np.select([atria != "sinus", slow, fast], [atria, "SBRAD", "STACH"], "SR")
    stated |= {code: rhythm == code for code in ("AFIB", "AFLT", "SBRAD", "SR", "STACH")}
    codes = np.array(list(stated))
    return [" ".join(codes[row]) for row in np.stack(list(stated.values()), axis=1)]


def _stated(rng: np.random.Generator, severity: np.ndarray) -> np.ndarray:
    """Whether the reader states a condition: plain ones but for a few, mild ones the most often
    missed.
    """
    plain = 1 - MISSED * (1.6 - severity)
    overcalled = np.where(severity > 0, OVERCALLED, 0.0)
    return rng.random(len(severity)) < np.where(severity >= PLAIN, plain, overcalled)


def _has_beat(marks: pd.DataFrame, kind: int, waves: list[str], count: int) -> np.ndarray:
    """Whether each record has a beat of a kind with all of the named waves wholly inside, bool
    `(count,)`.
    """
    wanted = marks[(marks["kind"] == kind) & marks["wave"].isin(waves)]
    found = wanted.groupby(["record", "beat"]).size()
    complete = found[found == len(waves)].index.get_level_values("record")
    return np.isin(np.arange(count), complete)
