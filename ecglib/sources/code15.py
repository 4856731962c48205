"""CODE-15 % (Ribeiro et al., Zenodo 4916206): 345,779 exams of 233,770 patients, `exams.csv` and 18
HDF5 parts.

The unit of the stored numbers is not certain. Zenodo names none; the authors' "scale 1e-4 V, so
multiply volts by 1000" contradicts itself (tenths of a millivolt, or millivolts). The PhysioNet
Challenge 2025 converts the set as millivolts, as does this reader; measured lead ranges are 1.4 to
2 times those of other sets. `millivolts_per_unit` changes it.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.records import LEADS, Records
from ecglib.sources.assemble import Recording, Rules, assemble
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
    rules: Rules | None = None,
) -> Records:
    """The exams of every part that is in the folder, with six classes, patients, and folds by
    patient.

    The zeros around a tracing are stripped, then it is resampled and cut, or padded with zeros, to
    `seconds` (most last 7.3 or 10.24 s); both are noted. Tracings of nothing but zeros are dropped
    as flat. `about` counts exams whose part is not downloaded and stored rows that `exams.csv`
    lacks (each part ends with a filler of exam_id 0). DataError.
    """
    folder = existing_folder(folder, f"CODE-15 %'s {INDEX}")
    table, targets, trace_file = _read_exams(folder / INDEX)
    parts = sorted(filter(Path.is_file, folder.glob(PARTS)))
    if not parts:
        raise DataError(
            f"{folder}: no part ({PARTS}) is there; download at least one, or unpack its zip file."
        )
    names = [path.name for path in parts]
    about = {
        "source": "CODE-15%",
        "simulated": False,
        "task": "diagnoses",
        "folder": folder.name,
        "parts": names,
        "split": "by patient",
        "millivolts_per_unit": millivolts_per_unit,
        "not_downloaded": int((~trace_file.isin(names)).sum()),
        "filler_rows": 0,
        "not_in_index": 0,
    }

    def read(path):
        missing = set(table.index[trace_file == path.name])
        for exam, tracing in _tracings(path):
            missing.discard(exam)
            if exam in table.index:
                millivolts = strip_zeros(tracing).T * np.float32(millivolts_per_unit)
                row = table.loc[exam].to_dict()
                yield Recording(LEADS, millivolts, RATE, row, targets.loc[exam].to_numpy())
            else:
                about["not_in_index" if exam else "filler_rows"] += 1
        if missing:
            raise DataError(
                f"{path}: {len(missing)} exams of {INDEX} are absent (the first is "
                f"{min(missing)}); download this part again."
            )

    files = zip(names, map(read, parts))
    records = assemble(files, CLASSES, sampling_rate, seconds, about, rules)
    records.table["fold"] = ten_folds(records.table["patient_id"], records.targets)
    about["class_counts"] = class_counts(CLASSES, records.targets)
    return records


def _read_exams(path):
    """From `exams.csv`, by exam_id: the table's rows, 0/1 targets `(exams, classes)` and the names
    of the parts.
    """
    numbers = ("exam_id", "patient_id")
    needed = (*numbers, "trace_file", *CLASSES)
    text = (*needed[2:], "is_male")
    exams = read_index(path, needed, numbers=numbers, text=text, unique="exam_id")
    exams = exams.set_index("exam_id")
    yes_or_no = exams.reindex(columns=[*CLASSES, "is_male"]).astype(str)
    truth = yes_or_no.apply(lambda column: column.str.strip().str.lower().map(TRUTH))
    for name in CLASSES:
        refuse_rows(path, exams[name], truth[name].isna(), "not True or False; correct it.")
    rows = {
        "record_id": exams.index.astype(str),
        "patient_id": exams["patient_id"].astype(str),
        "fold": 0,
        "source": "code-15",
        "age": pd.to_numeric(exams.get("age", np.nan), errors="coerce"),
        "sex": 1.0 - truth["is_male"],  # 1 female, as in PTB-XL
    }
    targets = truth[list(CLASSES)].astype(np.uint8)
    return pd.DataFrame(rows, exams.index), targets, exams["trace_file"]


def _tracings(path):
    """(exam_id, tracing `(4096, 12)` as stored) of one part, a block of `ROWS` at a time."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if "exam_id" not in file or "tracings" not in file:
                raise DataError(
                    f"{path}: lacks the dataset exam_id or tracings; download this part again."
                )
            exam_ids = file["exam_id"]
            tracings = file["tracings"]
            if exam_ids.ndim != 1 or tracings.shape != (*exam_ids.shape, STORED, len(LEADS)):
                raise DataError(
                    f"{path}: tracings {tracings.shape} for {exam_ids.shape} exams, not (exams, "
                    f"{STORED}, 12); download it again."
                )
            for start in range(0, len(exam_ids), ROWS):
                part = slice(start, start + ROWS)
                yield from zip(exam_ids[part].tolist(), tracings[part].astype(np.float32))
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
