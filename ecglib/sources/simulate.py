"""The simulated cohort: the study's embedded data, shaped after PTB-XL, so that a first run needs no download.

Patients carry a heart, a torso, conditions of a graded severity and a rhythm; each has one to four records. A reader
states what is plain, misses some of it, and overcalls some borderline findings: these statements are the labels.
Onset and offset of every wave are known, and from them where in a record the evidence for a class lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.files import atomic_file
from ecglib.records import LEADS, LIMB_FROM_I_AND_II, MICROVOLT, Records, to_counts
from ecglib.sources import heart as hearts
from ecglib.sources import rhythm as rhythms
from ecglib.sources.heart import Heart
from ecglib.sources.rhythm import ATRIAL, NORMAL, VENTRICULAR, Beats, Pacing

BLOCK = 120  # patients simulated together: memory does not grow with the cohort, and the first ones never change
FOLDS = 10

# Condition -> PTB-XL superclass. Codes are SCP-ECG statements as PTB-XL writes them.
CONDITIONS = {
    "AMI": "MI", "IMI": "MI", "LMI": "MI", "ISCAL": "STTC", "ISCIN": "STTC", "NDT": "STTC", "CLBBB": "CD", "CRBBB": "CD",
    "IRBBB": "CD", "LAFB": "CD", "1AVB": "CD", "LVH": "HYP",
}  # fmt: skip
SUPERCLASSES = ("CD", "HYP", "MI", "NORM", "STTC")
RHYTHMS = ("AFIB", "AFLT", "PAC", "PVC", "SBRAD", "SR", "STACH")
TASKS = {"superclass": SUPERCLASSES, "rhythm": RHYTHMS, "all": tuple(sorted({*CONDITIONS, "NORM", *RHYTHMS}))}

# Share of patients with each combination of superclasses, after PTB-XL (Wagner et al., Sci Data 2020).
COMBINATIONS = {
    "": 0.43, "STTC": 0.115, "MI": 0.12, "CD": 0.10, "CD MI": 0.054, "HYP STTC": 0.036, "MI STTC": 0.030, "HYP": 0.026,
    "CD STTC": 0.024, "HYP MI STTC": 0.018, "CD HYP": 0.015, "CD MI STTC": 0.010, "CD HYP STTC": 0.010, "HYP MI": 0.008,
    "CD HYP MI STTC": 0.008, "CD HYP MI": 0.006,
}  # fmt: skip
# Within a superclass, the share of each condition or pair of conditions.
KINDS = {
    "MI": {"AMI": 0.42, "IMI": 0.41, "LMI": 0.05, "IMI LMI": 0.08, "AMI LMI": 0.04},
    "STTC": {"NDT": 0.50, "ISCAL": 0.32, "ISCIN": 0.18},
    "CD": {"LAFB": 0.28, "IRBBB": 0.20, "1AVB": 0.16, "CRBBB": 0.11, "CLBBB": 0.13, "CRBBB LAFB": 0.06, "1AVB LAFB": 0.06},
    "HYP": {"LVH": 1.0},
}
PLAIN = 0.15  # from this severity on a condition is present; below it is a borderline finding, not a disease
BORDERLINE = ("AMI", "IMI", "LMI", "ISCAL", "ISCIN", "NDT", "IRBBB", "LAFB", "1AVB", "LVH")
MISSED, OVERCALLED = 0.04, 0.08  # share of plain findings not stated, of borderline ones stated
RECORDS_PER_PATIENT = (0.84, 0.10, 0.04, 0.02)  # one to four

# Where the evidence of a condition lies: leads, first and last mark of each beat, kind of beat.
ALL_LEADS = " ".join(LEADS)
EVIDENCE = {
    "AMI": ("V1 V2 V3 V4", "QRS onset", "T offset", NORMAL), "IMI": ("II III aVF", "QRS onset", "T offset", NORMAL),
    "LMI": ("I aVL V5 V6", "QRS onset", "T offset", NORMAL),
    "ISCAL": ("I aVL V2 V3 V4 V5 V6", "QRS offset", "T offset", NORMAL),
    "ISCIN": ("II III aVF", "QRS offset", "T offset", NORMAL), "NDT": (ALL_LEADS, "QRS offset", "T offset", NORMAL),
    "CLBBB": ("I aVL V1 V2 V3 V5 V6", "QRS onset", "T offset", NORMAL), "CRBBB": ("I aVL V1 V2 V6", "QRS onset", "T offset", NORMAL),
    "IRBBB": ("V1 V2", "QRS onset", "QRS offset", NORMAL), "LAFB": ("I II III aVL aVF", "QRS onset", "QRS offset", NORMAL),
    "1AVB": (ALL_LEADS, "P onset", "QRS onset", NORMAL), "LVH": ("I aVL V1 V2 V5 V6", "QRS onset", "T offset", NORMAL),
    "NORM": (ALL_LEADS, "P onset", "T offset", NORMAL), "SR": (ALL_LEADS, "P onset", "QRS offset", NORMAL),
    "SBRAD": (ALL_LEADS, "P onset", "QRS offset", NORMAL), "STACH": (ALL_LEADS, "P onset", "QRS offset", NORMAL),
    "AFIB": (ALL_LEADS, "T offset", "next QRS offset", NORMAL),
    "AFLT": ("II III aVF V1", "T offset", "next QRS offset", NORMAL),
    "PVC": (ALL_LEADS, "QRS onset", "T offset", VENTRICULAR), "PAC": (ALL_LEADS, "P onset", "QRS offset", ATRIAL),
}  # fmt: skip
WAVE_COLUMNS = ("record_id", "beat", "kind", "wave", "onset", "offset")
KIND_NAMES = {NORMAL: "normal", VENTRICULAR: "ventricular", ATRIAL: "atrial"}


@dataclass(eq=False)
class Simulation:
    """Simulated records with their ground truth.

    waves has one row a wave lying wholly inside its record: record_id, beat (its number in the record), kind (normal,
    ventricular, atrial), wave (P, QRS, T), onset and offset in samples. `records.table` holds the true severity of each
    condition (0 absent, below 0.15 borderline) and the statements of the reader, from which the targets follow.
    """

    records: Records
    waves: pd.DataFrame

    def evidence(self, indices: Sequence[int] | np.ndarray, class_name: str) -> np.ndarray:
        """Where the evidence for a class lies, bool `(n, 12, time)`; empty for records not stated to have the class."""
        codes = [code for code in EVIDENCE if class_name in (code, CONDITIONS.get(code))]
        if not codes:
            raise DataError(f"There is no class {class_name!r} in the simulated cohort; use one of {', '.join(TASKS['all'])}, "
                            f"{', '.join(SUPERCLASSES)}.")  # fmt: skip
        indices = np.asarray(indices).reshape(-1)
        mask = np.zeros((len(indices), len(LEADS), self.records.signals.shape[2]), bool)
        for row, index in enumerate(indices):
            stated = self.records.table["statements"].iloc[index].split()
            marks = self._marks_of(self.records.table["record_id"].iloc[index])
            for code in set(codes) & set(stated):
                _mark_evidence(mask[row], marks, code)
        return mask

    def _marks_of(self, record_id: str) -> pd.DataFrame:
        """One row a beat of a record: its kind, and onset and offset of its three waves (NaN where absent)."""
        if not hasattr(self, "_rows"):
            self._rows = self.waves.groupby("record_id", sort=False).indices
        rows = self.waves.iloc[self._rows.get(record_id, [])]
        marks = rows.pivot(index=["beat", "kind"], columns="wave", values=["onset", "offset"])
        marks.columns = [f"{wave} {end}" for end, wave in marks.columns]
        marks = marks.reindex(columns=[f"{wave} {end}" for wave in ("P", "QRS", "T") for end in ("onset", "offset")])
        marks["next QRS offset"] = marks["QRS offset"].shift(-1)
        return marks.reset_index()

    def save(self, folder: str | Path) -> Path:
        """Save the records below `folder` and the wave marks beside them as `waves.csv`."""
        folder = self.records.save(folder)
        with atomic_file(folder / "waves.csv") as temporary:
            self.waves.to_csv(temporary, index=False)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Simulation":
        """Open a saved simulation; DataError where the folder holds other records or lacks its marks."""
        records = Records.load(folder)
        path = Path(folder) / "waves.csv"
        if not path.is_file():
            raise DataError(f"{path}: the wave marks are missing; simulate the cohort again with the seed in records.json.")
        try:
            waves = pd.read_csv(path, dtype={"record_id": str})
            waves = waves[list(WAVE_COLUMNS)]
            records.table["statements"] = records.table["statements"].fillna("")
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}: damaged wave marks ({error}); simulate the cohort again.") from error
        return cls(records, waves)


def _mark_evidence(mask: np.ndarray, marks: pd.DataFrame, code: str) -> None:
    """Set the region of one statement in `mask (12, time)` for all beats of its kind that have both marks."""
    names, first, last, kind = EVIDENCE[code]
    leads = [LEADS.index(name) for name in names.split()]
    spans = marks.loc[marks["kind"] == KIND_NAMES[kind], [first, last]].dropna().to_numpy(int)
    for onset, offset in spans:
        mask[leads, onset : offset + 1] = True


def simulate_records(patients: int, seed: int, sampling_rate: float = 100, seconds: float = 10.0, task: str = "superclass") -> Records:
    """The records of a simulated cohort without their ground truth; see `simulate_cohort`."""
    return simulate_cohort(patients, seed, sampling_rate, seconds, task).records


def simulate_cohort(patients: int, seed: int, sampling_rate: float = 100, seconds: float = 10.0, task: str = "superclass") -> Simulation:
    """Simulate `patients` patients with one to four 12-lead ECGs each (1.24 on average), the same for the same seed.

    sampling_rate in Hz (at least 50), task superclass, rhythm or all. The first patients are the same however many are
    asked for. Raises DataError where a value cannot give an ECG.
    """
    _check(patients, seed, sampling_rate, seconds, task)
    samples = round(seconds * sampling_rate)
    parts = [
        _simulate_block(seed, start, min(BLOCK, patients - start), sampling_rate, samples)
        for start in range(0, patients, BLOCK)
    ]
    signals, tables, waves = zip(*parts, strict=True)
    table = pd.concat(tables, ignore_index=True)
    about = {"source": "simulated cohort", "simulated": True, "seed": int(seed), "patients": int(patients), "task": task}
    records = Records(np.concatenate(signals), MICROVOLT, float(sampling_rate), table, _targets(table, task), TASKS[task], about=about)
    return Simulation(records, pd.concat(waves, ignore_index=True))


def _check(patients: int, seed: int, sampling_rate: float, seconds: float, task: str) -> None:
    """Refuse settings from which no ECG can be made."""
    if task not in TASKS:
        raise DataError(f"Unknown task {task!r} for the simulated cohort; use one of {', '.join(TASKS)}.")
    if int(patients) != patients or patients < 1:
        raise DataError(f"{patients} patients cannot be simulated; ask for a whole number of at least 1.")
    if int(seed) != seed or seed < 0:
        raise DataError(f"The seed {seed} is not usable; give a whole number of at least 0.")
    if not 50 <= sampling_rate <= 2000:
        raise DataError(f"A sampling rate of {sampling_rate} Hz does not hold an ECG; give 50 to 2000 Hz.")
    if not 2.5 <= seconds <= 3600:
        raise DataError(f"{seconds} seconds do not hold a rhythm; give 2.5 seconds to an hour.")


def _targets(table: pd.DataFrame, task: str) -> np.ndarray:
    """Targets 0/1 `(n, classes)` of a task from the statements."""
    stated = [set(text.split()) for text in table["statements"]]
    if task == "superclass":
        stated = [{CONDITIONS.get(code, code) for code in codes} for codes in stated]
    return np.array([[name in codes for name in TASKS[task]] for codes in stated], dtype=np.uint8)


def _simulate_block(seed: int, start: int, wanted: int, sampling_rate: float, samples: int) -> tuple[np.ndarray, pd.DataFrame, pd.DataFrame]:
    """Signals `(n, 12, time)` int16, table and wave marks of the `wanted` first patients of the block at `start`."""
    rng = np.random.default_rng([seed, start // BLOCK])
    patients = _draw_patients(rng, start)
    visits = 1 + rng.choice(4, BLOCK, p=RECORDS_PER_PATIENT)
    person = np.repeat(np.arange(BLOCK), visits)
    table = _draw_records(rng, patients, person)
    # Everything random is drawn for the whole block before the unwanted patients are dropped.
    heart = hearts.draw_heart(rng, patients["age"].to_numpy(), (patients["sex"] == "male").to_numpy())
    field = hearts.draw_lead_field(rng, BLOCK)[person]
    heart = {name: wave.take(person) for name, wave in heart.items()}
    hearts.apply_conditions(rng, heart, {code: table[f"severity_{code}"].to_numpy() for code in CONDITIONS})
    pacing = _pacing(rng, table)
    beats = rhythms.draw_beats(rng, pacing, samples / sampling_rate)
    signals, marks = _draw_signals(rng, heart, field, pacing, beats, sampling_rate, samples)
    table = _state(rng, table, beats, samples / sampling_rate)
    kept = int((person < wanted).sum())
    marks["record_id"] = table["record_id"].to_numpy()[marks.pop("record")]
    marks = marks[marks["record_id"].isin(table["record_id"].iloc[:kept])]
    return signals[:kept], table.iloc[:kept], marks[list(WAVE_COLUMNS)]


def _draw_patients(rng: np.random.Generator, start: int) -> pd.DataFrame:
    """One row a patient: identity, fold (each ten patients fill the ten folds), age, sex, rhythm, rate, severities."""
    shares = np.array(list(COMBINATIONS.values()))
    combination = np.array(list(COMBINATIONS))[rng.choice(len(shares), BLOCK, p=shares / shares.sum())]
    ill = combination != ""
    age = np.clip(rng.normal(np.where(ill, 64, 53), np.where(ill, 14, 17)), 18, 95).round()
    patients = pd.DataFrame({
        "patient_id": [f"p{start + row:06d}" for row in range(BLOCK)],
        "fold": np.concatenate([rng.permutation(FOLDS) + 1 for _ in range(BLOCK // FOLDS)]),
        "source": "simulated", "age": age, "sex": np.where(rng.random(BLOCK) < 0.52, "male", "female"),
    })  # fmt: skip
    for code, severity in _draw_severities(rng, combination).items():
        patients[f"severity_{code}"] = severity
    fibrillation = rng.random(BLOCK) < 0.0035 * np.exp(0.06 * (age - 18)) * np.where(ill, 1.2, 0.45)
    patients["atrial"] = np.select([fibrillation, rng.random(BLOCK) < 0.012], ["AFIB", "AFLT"], "sinus")
    patients["rate"] = np.clip(rng.normal(72, 10, BLOCK) + rng.choice([0, -20, 34], BLOCK, p=[0.93, 0.03, 0.04]), 38, 150)
    patients["breathing"] = np.abs(rng.normal(0, 0.05, BLOCK)) * np.exp(-(age - 25) / 45)
    patients["ventricular"] = rng.random(BLOCK) < 0.02 + 0.0011 * (age - 18)
    patients["premature_atrial"] = rng.random(BLOCK) < 0.01 + 0.0006 * (age - 18)
    return patients


def _draw_severities(rng: np.random.Generator, combination: np.ndarray) -> dict[str, np.ndarray]:
    """Severity of each condition `(n,)`: many mild cases, few severe ones, and borderline findings in the others."""
    count = len(combination)
    present = {code: np.zeros(count, bool) for code in CONDITIONS}
    for superclass, kinds in KINDS.items():
        affected = np.array([superclass in text.split() for text in combination])
        chosen = np.array(list(kinds))[rng.choice(len(kinds), count, p=list(kinds.values()))]
        for code in present:
            present[code] |= affected & np.array([code in text.split() for text in chosen])
    severities = {}
    for code, here in present.items():
        severity = PLAIN + (1 - PLAIN) * rng.beta(1.3, 1.6, count)
        borderline = rng.uniform(0.02, PLAIN, count) * (rng.random(count) < 0.06) * (code in BORDERLINE)
        severities[code] = np.where(here, severity, borderline)
    return severities


def _draw_records(rng: np.random.Generator, patients: pd.DataFrame, person: np.ndarray) -> pd.DataFrame:
    """One row a record: its patient's traits, with another rate and somewhat another severity at each visit."""
    table = patients.iloc[person].reset_index(drop=True)
    count = len(table)
    visit = table.groupby("patient_id").cumcount() + 1
    table.insert(0, "record_id", table["patient_id"] + "r" + visit.astype(str))
    for code in CONDITIONS:
        severity = table[f"severity_{code}"]
        varied = np.clip(severity * rng.lognormal(0, 0.12, count), 0, 1)
        table[f"severity_{code}"] = np.where(severity >= PLAIN, np.maximum(varied, PLAIN), np.minimum(varied, 0.99 * PLAIN)).round(4)
    rate = np.clip(table["rate"] * rng.lognormal(0, 0.07, count), 36, 165)
    rate = np.where(table["atrial"] == "AFIB", np.clip(rate * 1.2, 50, 160), rate)
    table["rate"] = np.where(table["atrial"] == "AFLT", np.clip(rate * 1.25, 65, 150), rate)
    # First-degree block has no meaning without P waves.
    table.loc[table["atrial"] != "sinus", "severity_1AVB"] = 0.0
    return table


def _pacing(rng: np.random.Generator, table: pd.DataFrame) -> Pacing:
    """What sets the beats of each record."""
    count = len(table)
    return Pacing(
        interval=60 / table["rate"].to_numpy(),
        breathing=table["breathing"].to_numpy(),
        wander=np.abs(rng.normal(0.008, 0.008, count)),
        ventricular=table["ventricular"].to_numpy() * rng.uniform(0.02, 0.22, count),
        atrial=(table["premature_atrial"] & (table["atrial"] == "sinus")).to_numpy() * rng.uniform(0.02, 0.15, count),
        fibrillation=(table["atrial"] == "AFIB").to_numpy(),
        flutter_cycle=np.where(table["atrial"] == "AFLT", rng.uniform(0.19, 0.25, count), 0.0),
    )


def _draw_signals(rng: np.random.Generator, heart: Heart, field: np.ndarray, pacing: Pacing, beats: Beats, sampling_rate: float,
                  samples: int) -> tuple[np.ndarray, pd.DataFrame]:  # fmt: skip
    """Signals `(n, 12, time)` int16 of hearts seen through lead fields, with recorder noise, and the marks of all waves."""
    count = len(field)
    size = rng.lognormal(0, 0.03, len(beats.time)).astype(np.float32)
    usual = np.bincount(beats.record, beats.interval, count) / np.bincount(beats.record, minlength=count)
    slow = 0.6 * usual[beats.record] + 0.4 * np.clip(beats.interval, 0.5, 1.4)
    quick = np.clip(slow, 0.35, 1.6) ** (1 / 3)
    no_atria = (pacing.fibrillation | (pacing.flutter_cycle > 0))[beats.record]
    p_size = np.where(beats.kind == ATRIAL, rng.uniform(-0.8, 0.5, count)[beats.record], 1.0) * size
    eight = np.zeros((count, 8, samples), np.float32)
    marks = []
    every = (heart, beats.kind != VENTRICULAR), (hearts.ectopic_heart(rng, count), beats.kind == VENTRICULAR)
    for waves, chosen in every:
        amplitudes = {name: wave.leads(field) for name, wave in waves.items()}
        limits = {name: hearts.wave_limits(wave, amplitudes[name], hearts.LEVEL[name]) for name, wave in waves.items()}
        for name, wave in waves.items():
            rows = np.flatnonzero(chosen & ~no_atria) if name == "P" else np.flatnonzero(chosen)
            stretch = {"P": quick**0.5, "QRS": np.ones_like(quick), "T": quick}[name][rows]
            _add_waves(eight, wave, amplitudes[name], beats, rows, stretch, (p_size if name == "P" else size)[rows], sampling_rate)
            spans = limits[name][beats.record[rows]] * stretch[:, None]
            if name != "QRS":  # P ends before QRS, T begins after it
                bounds = limits["QRS"][beats.record[rows]]
                spans = np.minimum(spans, bounds[:, :1]) if name == "P" else np.maximum(spans, bounds[:, 1:])
            marks.append(_wave_marks(name, spans, beats, rows, sampling_rate, samples))
    eight += field.astype(np.float32) @ rhythms.atrial_waves(rng, pacing, sampling_rate, samples)
    eight += _recorder_noise(rng, count, sampling_rate, samples)
    frame = pd.concat(marks, ignore_index=True).sort_values(["record", "onset", "offset"], kind="stable")
    return _twelve_leads(eight), frame


def _add_waves(eight: np.ndarray, wave: hearts.Wave, amplitudes: np.ndarray, beats: Beats, rows: np.ndarray, stretch: np.ndarray,
               size: np.ndarray, sampling_rate: float) -> None:  # fmt: skip
    """Add one wave of some beats to `eight (n, 8, time)`; the recorder's anti-alias filter widens each Gaussian exactly."""
    if not len(rows):
        return
    record, samples = beats.record[rows], eight.shape[2]
    centre, width = wave.centre[record] * stretch[:, None], wave.width[record] * stretch[:, None]
    filtered = np.sqrt(width**2 + (0.33 / sampling_rate) ** 2)  # -3 dB at 0.4 of the sampling rate
    low, high = (centre - 4 * filtered).min(), (centre + 4 * filtered).max()
    first = np.floor((beats.time[rows] + low) * sampling_rate).astype(int)
    offsets = np.arange(int(np.ceil((high - low) * sampling_rate)) + 2)
    times = (first[:, None] + offsets) / sampling_rate - beats.time[rows, None]
    scaled = (amplitudes[record] * (width / filtered)[:, None] * size[:, None, None]).astype(np.float32)
    shapes = scaled @ hearts.gaussians(times.astype(np.float32), centre, filtered)
    for row, (begin, shape) in enumerate(zip(first, shapes, strict=True)):
        start, stop = max(begin, 0), min(begin + len(offsets), samples)
        if start < stop:
            eight[record[row], :, start:stop] += shape[:, start - begin : stop - begin]


def _wave_marks(name: str, spans: np.ndarray, beats: Beats, rows: np.ndarray, sampling_rate: float, samples: int) -> pd.DataFrame:
    """Marks in samples of one wave of some beats, from spans `(b, 2)` in seconds after R; those wholly inside the record."""
    onset, offset = np.rint((beats.time[rows, None] + spans) * sampling_rate).astype(int).T
    inside = (onset >= 0) & (offset < samples)
    rows = rows[inside]
    return pd.DataFrame({
        "record": beats.record[rows], "beat": beats.ordinal[rows], "kind": pd.Series(beats.kind[rows]).map(KIND_NAMES),
        "wave": name, "onset": onset[inside], "offset": offset[inside],
    })  # fmt: skip


def _twelve_leads(eight: np.ndarray) -> np.ndarray:
    """int16 counts `(n, 12, time)`: limb leads by Einthoven and Goldberger from I and II, chest leads as they are."""
    limb = np.einsum("lk,nkt->nlt", LIMB_FROM_I_AND_II, eight[:, :2])
    return to_counts(np.concatenate([limb, eight[:, 2:]], axis=1))


def _recorder_noise(rng: np.random.Generator, count: int, sampling_rate: float, samples: int) -> np.ndarray:
    """Noise `(n, 8, time)` in mV, made at nine electrodes and then led off: baseline wander, muscle, white, mains.

    Mains hum exists only where 50 Hz lies well below half the sampling rate: otherwise the anti-alias filter took it.
    """
    level = rng.lognormal(0, 0.5, (count, 1, 1))
    time = np.arange(samples) / sampling_rate
    frequencies = np.array([0.05, 0.09, 0.15, 0.22, 0.3, 0.42])
    waves = np.concatenate([np.sin(2 * np.pi * np.outer(frequencies, time)), np.cos(2 * np.pi * np.outer(frequencies, time))])
    weights = rng.normal(0, 1, (count, 9, 12)) * np.tile((0.15 / frequencies) ** 0.7, 2) * rng.lognormal(-4.7, 0.7, (count, 1, 1))
    electrodes = (weights * level).astype(np.float32) @ waves.astype(np.float32)
    white = rng.standard_normal((count, 9, samples), dtype=np.float32)
    muscle = np.diff(white, axis=2, prepend=0) * rhythms._smooth(np.abs(rng.normal(0, 1, (count, 6))), samples)[:, None].astype(np.float32)
    electrodes += (0.0022 * level * rng.lognormal(0, 0.6, (count, 9, 1))).astype(np.float32) * muscle
    electrodes += (0.0015 * level).astype(np.float32) * rng.standard_normal((count, 9, samples), dtype=np.float32)
    if sampling_rate > 125:
        hum = np.sin(2 * np.pi * (50 * time + rng.random((count, 9, 1)))) * np.abs(rng.normal(0, 0.003, (count, 9, 1)))
        electrodes += (level * hum).astype(np.float32)
    right_arm, left_arm, leg = electrodes[:, 0:1], electrodes[:, 1:2], electrodes[:, 2:3]
    terminal = (right_arm + left_arm + leg) / 3
    return np.concatenate([left_arm - right_arm, leg - right_arm, electrodes[:, 3:] - terminal], axis=1)


def _state(rng: np.random.Generator, table: pd.DataFrame, beats: Beats, seconds: float) -> pd.DataFrame:
    """The table with the reader's statements and the measured heart rate; columns used only inside are dropped."""
    inside = (beats.time >= 0) & (beats.time < seconds)
    count = len(table)
    total = np.bincount(beats.record[inside], beats.interval[inside], count)
    rate = 60 * np.bincount(beats.record[inside], minlength=count) / np.maximum(total, 1e-9)
    premature = {
        name: np.bincount(beats.record[inside & (beats.kind == kind)], minlength=count) > 0
        for name, kind in (("PVC", VENTRICULAR), ("PAC", ATRIAL))
    }
    stated = {}
    for code in CONDITIONS:
        severity = table[f"severity_{code}"].to_numpy()
        chance = np.where(severity >= PLAIN, 1 - MISSED * (1.6 - severity), np.where(severity > 0, OVERCALLED, 0))
        stated[code] = rng.random(count) < chance
    slow, fast = rate < 54 + rng.normal(0, 1.5, count), rate > 100 + rng.normal(0, 1.5, count)
    atrial = table["atrial"].to_numpy()
    rhythm = np.select([atrial != "sinus", slow, fast], [atrial, "SBRAD", "STACH"], "SR")
    stated["NORM"] = ~np.any(list(stated.values()), axis=0) & (atrial == "sinus")
    stated |= {name: here & (rng.random(count) > 0.03) for name, here in premature.items()}
    stated |= {name: rhythm == name for name in ("AFIB", "AFLT", "SBRAD", "SR", "STACH")}
    table["statements"] = [" ".join(name for name in stated if stated[name][row]) for row in range(count)]
    table["heart_rate"] = rate.round(1)
    first = ["record_id", "patient_id", "fold", "source", "age", "sex", "heart_rate", "statements"]
    return table[first + [f"severity_{code}" for code in CONDITIONS]]
