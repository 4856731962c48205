"""Small files in the real layouts of the data sets, so that each reader's tests run without any download."""

import struct
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.records import LEADS, LIMB_FROM_I_AND_II

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def heart_signal(rate: float = 500, seconds: float = 10.0, seed: int = 0) -> np.ndarray:
    """Twelve leads `(12, time)` in mV that obey Einthoven's law: three waves a beat, other sizes in each lead."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(rate * seconds)) / rate
    phase = (time * generator.uniform(0.9, 1.6)) % 1 - 0.4
    waves = [np.exp(-0.5 * ((phase - at) / width) ** 2) for at, width in ((-0.18, 0.03), (0.0, 0.012), (0.25, 0.05))]
    sizes = np.array([0.1, 1.0, 0.25]) * generator.uniform(0.6, 1.4, (8, 3)) * generator.choice([-1, 1], (8, 1))
    sizes[1] = sizes[0] * [1.5, 0.4, 1.2]  # II never a multiple of I, so that the order of the limb leads can be told
    eight = sizes @ np.stack(waves) + 0.01 * generator.standard_normal((8, len(time)))
    return np.concatenate([LIMB_FROM_I_AND_II @ eight[:2], eight[2:]])


def write_wfdb(folder: Path, name: str, millivolts: np.ndarray, rate: float = 500, *, comments: tuple[str, ...] = (),
               leads: tuple[str, ...] = LEADS, suffix: str = "dat", offset: int = 0, gain: str = "1000/mV",
               record_line: str | None = None) -> Path:  # fmt: skip
    """One record of format 16 with right checksums; NaN becomes the mark of a missing sample. The header's path."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = np.where(np.isnan(millivolts), -32768, np.rint(np.nan_to_num(millivolts) * 1000)).astype("<i2")
    (folder / f"{name}.{suffix}").write_bytes(b"\0" * offset + counts.T.tobytes())
    place = f"16+{offset}" if offset else "16"
    sums = [(int(row.astype(np.int64).sum()) + 32768) % 65536 - 32768 for row in counts]
    lines = [f"{record_line or name} {len(leads)} {rate:g} {counts.shape[1]}"]
    lines += [f"{name}.{suffix} {place} {gain} 16 0 {row[0]} {total} 0 {lead}"
              for row, total, lead in zip(counts, sums, leads, strict=True)]  # fmt: skip
    header = folder / f"{name}.hea"
    header.write_text("\n".join([*lines, *(f"#{comment}" for comment in comments)]) + "\n")
    return header


def write_ptbxl(folder: Path, count: int = 20) -> Path:
    """A PTB-XL folder of `count` records at 100 Hz, two records a patient, all ten folds."""
    rows = []
    for number in range(1, count + 1):
        name = f"records100/00000/{number:05d}_lr"
        write_wfdb(folder / "records100/00000", f"{number:05d}_lr", heart_signal(100, seed=number), 100)
        statement = ("NORM", "IMI", "LVH")[number % 3]
        rows.append({"ecg_id": number, "patient_id": 1000.0 + (number - 1) // 2, "age": 60, "sex": number % 2,
                     "scp_codes": str({statement: 100.0, "SR": 0.0}), "strat_fold": (number - 1) // 2 % 10 + 1,
                     "filename_lr": name, "filename_hr": name.replace("100", "500").replace("lr", "hr")})  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "ptbxl_database.csv", index=False)
    statements = pd.DataFrame({
        "diagnostic": [1, 1, 1, np.nan], "form": np.nan, "rhythm": [np.nan] * 3 + [1],
        "diagnostic_class": ["NORM", "MI", "HYP", np.nan], "diagnostic_subclass": ["NORM", "IMI", "LVH", np.nan],
    }, index=["NORM", "IMI", "LVH", "SR"])  # fmt: skip
    statements.to_csv(folder / "scp_statements.csv")
    return folder


def write_cinc(folder: Path, names: list[str], codes: list[str], rate: float = 500, seconds: float = 10.0,
               **header: str) -> Path:  # fmt: skip
    """A group folder of the CinC 2021 layout: .mat files with 24 bytes before the samples, and RECORDS."""
    for position, (name, code) in enumerate(zip(names, codes, strict=True)):
        comments = ("Age: NaN" if position == 0 else "Age: 61", "Sex: Female", f"Dx: {code}", "Rx: Unknown")
        signal = heart_signal(rate, seconds, position)
        write_wfdb(folder, name, signal, rate, comments=comments, suffix="mat", offset=24, **header)
    (folder / "RECORDS").write_text("\n".join(names) + "\n")
    return folder


def annotation_bytes(marks: list[tuple[int, int]]) -> bytes:
    """A WFDB annotation file of (sample, code), a long step written as the format's skip."""
    words, last = [], 0
    for sample, code in marks:
        step = sample - last
        if step > 1023:
            words += [59 << 10, step >> 16, step & 0xFFFF]
            step = 0
        words.append((code << 10) + step)
        last = sample
    return struct.pack(f"<{len(words) + 1}H", *words, 0)


def write_ludb(folder: Path, count: int = 4) -> Path:
    """A LUDB folder: headers with a gain of their own in each lead, one mark file a lead, ludb.csv."""
    rows = []
    for number in range(1, count + 1):
        signal = heart_signal(500, seed=number)
        header = write_wfdb(folder / "data", str(number), signal, leads=tuple(lead.lower() for lead in LEADS))
        lines = header.read_text().splitlines()
        leads = [line.replace("1000/mV 16", f"{700 + 90 * i}({i})/mV 0") for i, line in enumerate(lines[1:])]
        lines = [lines[0], *leads]
        header.write_text("\n".join(lines) + "\n")
        marks = [(600, 39), (620, 24), (640, 40), (660, 39), (680, 1), (700, 40), (2000, 39), (2100, 27), (2200, 40)]
        for lead in LEADS:
            (folder / "data" / f"{number}.{lead.lower()}").write_bytes(annotation_bytes(marks))
        rows.append({"ID": number, "Sex": "F\n", "Age": ">89\n" if number == 1 else "51\n", "Rhythms": "Sinus rhythm",
                     "Electric axis of the heart": "Electric axis of the heart: normal",
                     "Conduction abnormalities": "I degree av block" if number % 2 else None,
                     "Hypertrophies": "Left ventricular hypertrophy\nLeft atrial overload"})  # fmt: skip
    columns = ("Extrasystolies", "Cardiac pacing", "Ischemia", "Non-specific repolarization abnormalities",
               "Other states")  # fmt: skip
    pd.DataFrame(rows).assign(**dict.fromkeys(columns)).to_csv(folder / "ludb.csv", index=False)
    return folder


def write_code15(folder: Path, parts: int = 2, each: int = 8) -> Path:
    """A CODE-15 % folder: exams.csv and HDF5 parts of 7 s and 10 s tracings, each part with a filler row at its end."""
    import h5py

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for part in range(parts):
        tracings = np.zeros((each + 1, 4096, 12), dtype=np.float32)
        exam_ids = np.zeros(each + 1, dtype=np.int64)
        for place in range(each):
            exam = 100 * (part + 1) + place
            length = 2800 if place % 2 else 4000
            start = (4096 - length) // 2
            tracings[place, start : start + length] = heart_signal(400, length / 400, exam).T
            exam_ids[place] = exam
            classes = {name: place % 6 == i for i, name in enumerate(("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF"))}
            rows.append({"exam_id": exam, "age": 50, "is_male": bool(place % 2), "nn_predicted_age": 48.0, **classes,
                         "patient_id": exam // 2, "normal_ecg": False,
                         "trace_file": f"exams_part{part}.hdf5"})  # fmt: skip
        with h5py.File(folder / f"exams_part{part}.hdf5", "w") as file:
            file["tracings"], file["exam_id"] = tracings, exam_ids
    pd.DataFrame(rows).to_csv(folder / "exams.csv", index=False)
    return folder
