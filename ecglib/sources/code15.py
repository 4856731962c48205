"""CODE-15 % (Ribeiro et al., Zenodo 4916206): 345,779 exams of 233,770 patients, `exams.csv` and 18
HDF5 parts.

The unit of the stored numbers is not certain. Zenodo names none; the authors' "scale 1e-4 V, so
multiply volts by 1000" contradicts itself (tenths of a millivolt, or millivolts). The PhysioNet
Challenge 2025 converts the set as millivolts, as does this reader; measured lead ranges are 1.4 to
2 times those of other sets. `millivolts_per_unit` changes it.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.records import LEADS, Records
from ecglib.sources.assemble import Recording, assemble, readable
from ecglib.sources.index_files import (
    class_counts,
    existing_folder,
    read_index,
    refuse_rows,
    ten_folds,
)

INDEX = "exams.csv"
PARTS = "exams_part*.hdf5"
CLASSES = ("1dAVb", "RBBB", "LBBB", "SB", "AF", "ST")
RATE = 400  # Hz
TRUTH = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}
STORED = 4096  # samples; shorter recordings stand in the middle, zeros on both sides
ROWS = 64  # tracings read together: 12.6 MB


def read_code15(
    folder: str | Path,
    *,
    sampling_rate: float = 100,
    seconds: float = 10.0,
    millivolts_per_unit: float = 1.0,
    rules: Mapping[str, str] | None = None,
) -> Records:
    """The exams of every part that is in the folder, with six classes, patients, and folds by
    patient.

    The zeros around a tracing are stripped, then it is resampled and cut, or padded with zeros, to
    `seconds` (most last 7.3 or 10.24 s); both are noted. Tracings of nothing but zeros are dropped
    as flat. `about` counts exams whose part is not downloaded and stored rows that `exams.csv`
    lacks (each part ends with a filler of exam_id 0). DataError.
    """
    folder = existing_folder(folder, f"CODE-15 %'s {INDEX}")
    exams = _read_exams(folder)
    parts = sorted(path for path in folder.glob(PARTS) if path.is_file())
    if not parts:
        raise DataError(
            f"{folder}: no part ({PARTS}) is there; download at least one, or unpack its zip file."
        )
    absent = ~exams["trace_file"].isin([path.name for path in parts])
    about = {
        "source": "CODE-15%",
        "simulated": False,
        "task": "diagnoses",
        "folder": folder.name,
        "parts": [path.name for path in parts],
        "split": "by patient",
        "millivolts_per_unit": millivolts_per_unit,
        "not_downloaded": int(absent.sum()),
        "filler_rows": 0,
        "not_in_index": 0,
    }
    rows = {exam: row for row, exam in enumerate(exams["exam_id"].tolist())}

    def recordings_of(path: Path) -> Iterator[Recording]:
        missing = set(exams["exam_id"][exams["trace_file"] == path.name].tolist())
        for exam, tracing in _tracings(path):
            missing.discard(exam)
            if exam in rows:
                millivolts = strip_zeros(tracing) * np.float32(millivolts_per_unit)
                yield _recording(exams.iloc[rows[exam]], millivolts)
            else:
                about["filler_rows" if exam == 0 else "not_in_index"] += 1
        if missing:
            raise DataError(
                f"{path}: {len(missing)} exams of {INDEX} are absent (the first is "
                f"{min(missing)}); download this part again."
            )

    stream = chain.from_iterable(readable(path.name, recordings_of(path), rules) for path in parts)
    records = assemble(stream, CLASSES, sampling_rate, seconds, about, rules)
    records.table["fold"] = ten_folds(records.table["patient_id"], records.targets)
    about["class_counts"] = class_counts(CLASSES, records.targets)
    return records


def _read_exams(folder: Path) -> pd.DataFrame:
    """`exams.csv` with numbers for ids and 0/1 for the classes, all checked."""
    path = folder / INDEX
    numbers = ("exam_id", "patient_id")
    text = ("trace_file", *CLASSES)
    exams = read_index(path, (*numbers, *text), numbers=numbers, text=text, unique="exam_id")
    for column in CLASSES:
        values = exams[column].str.strip().str.lower().map(TRUTH)
        refuse_rows(path, exams, column, values.isna(), "not True or False; correct it.")
        exams[column] = values.astype(np.uint8)
    return exams


def _tracings(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """(exam_id, tracing `(4096, 12)` as stored) of one part, a block of `ROWS` at a time."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if "exam_id" not in file or "tracings" not in file:
                raise DataError(
                    f"{path}: lacks the dataset exam_id or tracings; download this part again."
                )
            exam_ids = np.asarray(file["exam_id"])
            tracings = file["tracings"]
            if exam_ids.ndim != 1 or tracings.shape != (len(exam_ids), STORED, len(LEADS)):
                raise DataError(
                    f"{path}: tracings {tracings.shape} for {exam_ids.shape} exams, not (exams, "
                    f"{STORED}, 12); download it again."
                )
            for start in range(0, len(exam_ids), ROWS):
                part = slice(start, start + ROWS)
                block = np.asarray(tracings[part], dtype=np.float32)
                yield from zip(exam_ids[part].tolist(), block, strict=True)
    # What h5py raises on a damaged file.
    except (OSError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: h5py cannot read this part ({error}); it is damaged, download it again."
        ) from error


def strip_zeros(tracing: np.ndarray) -> np.ndarray:
    """`(time, leads)` without the samples at both ends that are zero in all leads; all of it where
    nothing else is.
    """
    active = np.flatnonzero((tracing != 0).any(axis=1))
    return tracing[active[0] : active[-1] + 1] if len(active) else tracing


def _recording(entry: pd.Series, millivolts: np.ndarray) -> Recording:
    """One recording from its index row and its signal `(time, 12)`."""
    row = {
        "record_id": str(entry["exam_id"]),
        "patient_id": str(entry["patient_id"]),
        "fold": 0,
        "source": "code-15",
        "age": pd.to_numeric(entry.get("age"), errors="coerce"),
        "sex": 1.0 - TRUTH.get(str(entry.get("is_male")).lower(), np.nan),  # 1 female, as in PTB-XL
    }
    target = entry[list(CLASSES)].to_numpy(dtype=np.uint8)
    return Recording(LEADS, np.ascontiguousarray(millivolts.T), RATE, row, target)
