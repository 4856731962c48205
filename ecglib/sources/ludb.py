"""Lobachevsky University database 1.0.1 (Kalyakulina et al., IEEE Access 8:186181, 2020), with its
wave marks.

The headers give each lead its own gain, which maps that lead's range to one "millivolt": it is a
normalisation, not a calibration. No common gain is documented; this reader takes one microvolt a
count. Einthoven's law holds exactly on the counts, and read so the leads' median 1-99 % ranges lie
within 20 % of PTB-XL's (lead II: 0.98 mV against 0.92 mV).
"""

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.errors import DataError, explain_reading
from ecglib.files import inside
from ecglib.records import LEADS, Records
from ecglib.sources.assemble import Rules, assemble
from ecglib.sources.index_files import (
    Checksums,
    binary_targets,
    class_counts,
    existing_folder,
    read_index,
    ten_folds,
)
from ecglib.sources.wfdb_files import read_listed

INDEX = "ludb.csv"
RATE = 500  # Hz
COUNTS_PER_MILLIVOLT = 1000.0
# Annotation codes of the WFDB format: the peaks, and the borders around them.
WAVES = {24: "P", 1: "QRS", 27: "T"}
ONSET, OFFSET = 39, 40
SKIP, NOTE, WITHOUT_TIME = 59, 63, (60, 61, 62)
STATEMENT_COLUMNS = (
    "Rhythms",
    "Conduction abnormalities",
    "Extrasystolies",
    "Hypertrophies",
    "Cardiac pacing",
    "Ischemia",
    "Non-specific repolarization abnormalities",
    "Other states",
)
AXIS = "Electric axis of the heart"

# The beginning of a statement -> its class, under PTB-XL's code where it has one. Walls and sites
# are not told apart.
CLASSES: dict[str, str] = pd.read_csv(
    Path(__file__).with_name("ludb_classes.csv"), index_col="beginning"
)["class"].to_dict()


def read_ludb(
    folder: str | Path,
    *,
    sampling_rate: float = RATE,
    verify: bool = True,
    rules: Rules | None = None,
) -> Records:
    """All 200 recordings (10 s, 500 Hz, resampled to `sampling_rate`) with the classes of
    `CLASSES`.

    One patient a record; folds are split by record, though the study only tests on this set.
    Statements without a class (rare rhythms) are counted in `about`; the axis and all statements
    are in the table. Ages over 89 are 90.
    """
    folder = existing_folder(folder, f"LUDB's {INDEX}")
    checksums = Checksums.of(folder, verify)
    checksums.check(folder / INDEX)
    index = _read_index(folder)
    names = index["ID"].astype(str)
    classes = tuple(dict.fromkeys(CLASSES.values()))
    statements = [_statements(cells) for cells in index[list(STATEMENT_COLUMNS)].to_numpy()]
    targets = binary_targets([set(map(_class, stated)) for stated in statements], classes)
    without = Counter(name for stated in statements for name in stated if not _class(name))
    ages = index["Age"].astype(str).str.strip().replace(">89", "90")
    rows = {
        "record_id": names,
        "patient_id": names,
        "fold": ten_folds(names, targets),
        "source": "ludb",
        "age": pd.to_numeric(ages, errors="coerce").astype(float),
        "sex": index["Sex"].astype(str).str.strip().map({"M": 0.0, "F": 1.0}),
        "axis": index[AXIS].fillna("").astype(str).str.rpartition(":")[2].str.strip(),
        "statements": list(map(";".join, statements)),
    }
    about = {
        "source": "LUDB",
        "simulated": False,
        "task": "diagnoses",
        "folder": folder.name,
        "split": "by record, one patient each",
        "scale": "1 microvolt a count in all leads, not the headers' gains",
        "class_counts": class_counts(classes, targets),
        "statements_without_class": dict(without),
    }
    paths = [_header_path(folder, name) for name in names]
    files = read_listed(pd.DataFrame(rows), paths, targets, checksums, COUNTS_PER_MILLIVOLT)
    return assemble(files, classes, sampling_rate, 10.0, about, rules)


def read_ludb_marks(
    folder: str | Path, record_ids: Iterable[str] | None = None, *, sampling_rate: float = RATE
) -> pd.DataFrame:
    """Marks of the cardiologists: record_id, lead, wave (P, QRS, T), onset, peak, offset, one row
    per wave and lead.

    Onset, peak and offset are samples at `sampling_rate`, rounded to the nearest, and missing
    (<NA>) where a border was not marked. All records, or those in `record_ids`; an absent or
    damaged mark file is a DataError.
    """
    folder = existing_folder(folder, f"LUDB's {INDEX}")
    if record_ids is None:
        record_ids = _read_index(folder)["ID"]
    rows = []
    for record in map(str, record_ids):
        path = _header_path(folder, record)
        for lead in LEADS:
            marks = read_annotations(path.with_suffix(f".{lead.lower()}"))
            rows += [(record, lead, *wave) for wave in _waves(marks)]
    samples = ["onset", "peak", "offset"]
    waves = pd.DataFrame(rows, columns=["record_id", "lead", "wave", *samples])
    scaled = waves[samples].astype("Float64") * (sampling_rate / RATE)
    return waves.assign(**scaled.round().astype("Int64"))


def read_annotations(path: Path) -> list[tuple[int, int]]:
    """(sample, code) of each mark in a WFDB annotation file; an absent or damaged file is a
    DataError.

    wfdb.rdann reads the same in 20 ms a file, which is 48 s for the 2,400 files of this set; a test
    compares the two.
    """
    with explain_reading(path, "the wave marks of this lead are absent; download the file again"):
        content = path.read_bytes()
    words = iter(np.frombuffer(content, "<u2", len(content) // 2).tolist())
    marks = []
    sample = 0
    for word in words:
        if not word:  # a whole file ends with a zero
            return marks
        code, value = divmod(word, 1 << 10)  # six bits of code, ten of time since the last mark
        if code == SKIP:  # a longer time: 32 bits, high word first
            long = (next(words, 0) << 16) + next(words, 0)
            sample += long - (long >> 31 << 32)
        elif code == NOTE:
            list(islice(words, (value + 1) // 2))
        elif code not in WITHOUT_TIME:
            sample += value
            marks.append((sample, code))
    raise DataError(f"{path}: the wave marks end too early; download the file again.")


def _waves(marks):
    """(wave, onset, peak, offset) from marks in order of time.

    Usually they come as onset, peak, offset. Some waves overlap (onsets, peaks, then offsets), some
    lack a border, and on some the onset lies a few samples behind the peak: it then counts as the
    peak's sample.
    """
    waves = []
    onsets = []
    unfinished = []  # waves without an offset so far
    for sample, code in marks:
        if code == ONSET:
            onsets.append(sample)
        elif code in WAVES:
            onset = onsets.pop(0) if onsets else None
            unfinished = [wave for wave in unfinished if onset is None or wave[2] > onset]
            waves.append([WAVES[code], onset, sample, None])
            unfinished.append(waves[-1])
        elif code == OFFSET and unfinished:
            wave = unfinished.pop(0)
            wave[3] = sample
            if wave[1] is None and onsets:
                onsets.pop(0)
                wave[1] = wave[2]
        elif code == OFFSET:
            onsets.clear()  # borders without a peak between them
    return [tuple(wave) for wave in waves]


def _read_index(folder):
    """`ludb.csv`, its columns and record numbers checked."""
    columns = ("ID", "Sex", "Age", AXIS, *STATEMENT_COLUMNS)
    return read_index(folder / INDEX, columns, numbers=("ID",), unique="ID")


def _header_path(folder, record):
    """Header of one record, a plain name."""
    return inside(folder / "data", f"{record}.hea", f"the list of LUDB records of {folder}")


def _statements(cells):
    """All statements in the cells of one record; each line of a cell holds one."""
    lines = "\n".join(str(cell) for cell in cells if pd.notna(cell)).splitlines()
    return [line.strip() for line in lines if line.strip()]


def _class(statement):
    """The class of one statement, or None."""
    text = statement.lower()
    return next((name for start, name in CLASSES.items() if text.startswith(start)), None)
