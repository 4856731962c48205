"""A cohort of simulated patients, shaped after PTB-XL.

Patients carry a heart, a torso, conditions of graded severity and a rhythm; each has one to four
records. A reader states what is plain, misses some of it and overcalls some borderline findings:
these statements are the labels.
"""

from numbers import Integral

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.records import MICROVOLT, Records, counts_on_disk
from ecglib.sources.index_files import FOLDS, binary_targets
from ecglib.sources.simulate.heart import PLAIN, apply_conditions, draw_heart, draw_lead_field
from ecglib.sources.simulate.recorder import record_hearts
from ecglib.sources.simulate.rhythm import ATRIAL, VENTRICULAR, draw_rhythm
from ecglib.sources.simulate.tables import read_table
from ecglib.sources.simulate.truth import CONDITIONS, TASKS, WAVE_COLUMNS, Simulation

# Patients simulated together: memory does not grow with the cohort, and the first ones never
# change.
BLOCK = 60
RECORDS_PER_PATIENT = (0.84, 0.10, 0.04, 0.02)  # shares of one to four
SHARES = dict(list(read_table("shares").groupby("group")))
# Share of people without a condition who have a borderline finding of it; never a complete block.
BORDERLINE = 0.06
MISSED = 0.04  # share of plain findings that the reader does not state
OVERCALLED = 0.08  # share of borderline findings that the reader states


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
) -> Simulation:
    """`patients` simulated patients with one to four 12-lead ECGs each (1.24 on average), the same
    for the same seed.

    sampling_rate in Hz (at least 50); task superclass, rhythm or all. The first patients are the
    same however many are asked for. The signals lie in a temporary file, so that a cohort may be
    larger than memory. Raises DataError, and StorageError where that file cannot be written.
    """
    _check(patients, seed, sampling_rate, seconds, task)
    tables = []
    waves = []

    def blocks():
        """The signals of each block; its table and wave marks are put aside."""
        for start in range(0, patients, BLOCK):
            signals, table, marks = _simulate_block(seed, start, patients, sampling_rate, seconds)
            tables.append(table)
            waves.append(marks)
            yield signals

    signals = counts_on_disk(blocks())
    table = pd.concat(tables, ignore_index=True)
    stated = [
        {*codes, *(CONDITIONS.get(code) for code in codes)}
        for codes in table["statements"].str.split()
    ]
    about = {
        "source": "simulated cohort",
        "simulated": True,
        "seed": int(seed),
        "patients": int(patients),
        "task": task,
    }
    targets = binary_targets(stated, TASKS[task])
    records = Records(signals, MICROVOLT, sampling_rate, table, targets, TASKS[task], about=about)
    return Simulation(records, pd.concat(waves, ignore_index=True))


def _check(patients, seed, sampling_rate, seconds, task):
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


def _simulate_block(seed, start, patients, sampling_rate, seconds):
    """Signals `(n, 12, time)` int16, table and wave marks of the block at `start`, of the first
    `patients` of the cohort.
    """
    visits = np.random.default_rng([seed, start, 0]).choice(4, BLOCK, p=RECORDS_PER_PATIENT) + 1
    rng = np.random.default_rng([seed, start, 1])
    people, severities = _draw_patients(rng, start)
    person = np.repeat(np.arange(BLOCK), visits)
    traits = {name: values[person] for name, values in people.items()}
    severities = _vary_visits(rng, traits, severities[:, person])
    # The whole block is drawn before its unwanted patients are dropped, so that the others do not
    # depend on how many.
    heart = draw_heart(rng, people["age"], people["sex"] == "male")
    field = draw_lead_field(rng, BLOCK)[person]
    heart = {name: wave.take(person) for name, wave in heart.items()}
    apply_conditions(rng, heart, dict(zip(CONDITIONS, severities)))
    samples = round(seconds * sampling_rate)
    seconds = samples / sampling_rate
    rhythm = draw_rhythm(rng, traits, seconds)
    signals, marks = record_hearts(rng, heart, field, rhythm, sampling_rate, samples)
    inside = rhythm.beats[rhythm.beats["time"].between(0, seconds, inclusive="left")]
    beats = np.bincount(inside["record"], minlength=len(person))
    lasting = np.bincount(inside["record"], inside["interval"], len(person))
    rate = 60 * beats / np.maximum(lasting, 1e-9)
    table = pd.DataFrame(
        {
            "record_id": [
                f"{patient}r{visit + 1}"
                for patient, count in zip(people["patient_id"], visits)
                for visit in range(count)
            ],
            "patient_id": traits["patient_id"],
            "fold": traits["fold"],
            "source": "simulated",
            "age": traits["age"],
            "sex": traits["sex"],
            "heart_rate": rate.round(1),
            "statements": _statements(rng, traits["atria"], rate, severities, marks),
            **{f"severity_{code}": severity for code, severity in zip(CONDITIONS, severities)},
        }
    )
    kept = (person < patients - start).sum()
    marks = marks[marks["record"] < kept]
    marks = marks.assign(record_id=table["record_id"].to_numpy()[marks["record"]])
    return signals[:kept], table[:kept], marks[WAVE_COLUMNS]


def _draw_kinds(rng, group):
    """For each patient of a block a kind of a group, by the shares of the table."""
    share = SHARES[group]["share"].to_numpy()
    return rng.choice(SHARES[group]["kinds"].tolist(), BLOCK, p=share / share.sum())


def _draw_patients(rng, start):
    """Traits of each patient of a block (identity, fold, age, sex, rhythm, rate), and severities
    `(conditions, patients)`; each ten patients fill the ten folds.
    """
    combination = _draw_kinds(rng, "patients")
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
        "atrial": rng.random(BLOCK) < 0.01 + 0.0006 * (age - 18),
    }
    return traits, _draw_severities(rng, combination)


def _draw_severities(rng, combination):
    """Severities `(conditions, patients)`: many mild cases, few severe ones, borderline findings in
    the others.
    """
    kinds = {name: _draw_kinds(rng, name) for name in ("MI", "STTC", "CD", "HYP")}
    severities = []
    for code, superclass in CONDITIONS.items():
        severity = PLAIN + (1 - PLAIN) * rng.beta(1.3, 1.6, BLOCK)
        slight = rng.uniform(0.02, PLAIN, BLOCK) * (rng.random(BLOCK) < BORDERLINE)
        slight *= code not in ("CLBBB", "CRBBB")
        affected = [
            superclass in superclasses.split() and code in kind.split()
            for superclasses, kind in zip(combination, kinds[superclass])
        ]
        severities.append(np.where(affected, severity, slight))
    return np.array(severities)


def _vary_visits(rng, traits, severities):
    """Somewhat other severities at each visit, and in place another rate."""
    varied = np.clip(severities * rng.lognormal(0, 0.12, severities.shape), 0, 1)
    plain = np.maximum(varied, PLAIN)
    varied = np.where(severities >= PLAIN, plain, np.minimum(varied, 0.99 * PLAIN)).round(4)
    atria = traits["atria"]
    rate = np.clip(traits["rate"] * rng.lognormal(0, 0.07, len(atria)), 36, 165)
    fast = [np.clip(rate * 1.2, 50, 160), np.clip(rate * 1.25, 65, 150)]
    traits["rate"] = np.select([atria == "AFIB", atria == "AFLT"], fast, rate)
    # Without P waves there is no PR interval.
    varied[list(CONDITIONS).index("1AVB"), atria != "sinus"] = 0.0
    return varied


def _statements(rng, atria, rate, severities, marks):
    """The reader's statements about each record, codes between spaces: plain conditions but for a
    few, mild ones the most often missed; premature beats that are wholly inside; one rhythm.
    """
    count = len(rate)
    plain = 1 - MISSED * (1.6 - severities)
    likely = np.select([severities >= PLAIN, severities > 0], [plain, OVERCALLED], 0.0)
    found = rng.random(severities.shape) < likely
    stated = dict(zip(CONDITIONS, found))
    stated["NORM"] = ~found.any(axis=0) & (atria == "sinus")
    for code, kind, waves in (("PVC", VENTRICULAR, ["QRS", "T"]), ("PAC", ATRIAL, ["P", "QRS"])):
        wanted = marks[(marks["kind"] == kind) & marks["wave"].isin(waves)]
        shown = wanted.value_counts(["record", "beat"])
        complete = shown.index[shown == len(waves)].get_level_values("record")
        stated[code] = np.isin(np.arange(count), complete) & (rng.random(count) > MISSED)
    slow = rate < 54 + rng.normal(0, 1.5, count)
    fast = rate > 100 + rng.normal(0, 1.5, count)
    rhythm = np.select([atria != "sinus", slow, fast], [atria, "SBRAD", "STACH"], "SR")
    codes = np.array(list(stated))
    rows = np.array(list(stated.values())).T
    return [" ".join([*codes[row], beating]) for row, beating in zip(rows, rhythm)]
