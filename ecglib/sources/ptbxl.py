"""PTB-XL (Wagner et al., Scientific Data 7:154, 2020) in PhysioNet's own layout."""

import ast
from pathlib import Path

import pandas as pd

from ecglib.errors import DataError
from ecglib.files import inside
from ecglib.records import Records
from ecglib.sources.assemble import Rules, assemble
from ecglib.sources.index_files import (
    Checksums,
    binary_targets,
    class_counts,
    existing_folder,
    read_index,
    refuse_folds,
    refuse_rows,
)
from ecglib.sources.wfdb_files import read_listed

TASKS = ("all", "diagnostic", "subclass", "superclass", "form", "rhythm")
VERSIONS = {21_837: "1.0.1 or 1.0.2", 21_799: "1.0.3"}  # told apart by the number of records
LIKELY = 50.0  # per cent; the optional rule for diagnostic statements
INDEX = "ptbxl_database.csv"
STATEMENTS = "scp_statements.csv"
_KEPT = (
    "age",
    "sex",
    "device",
    "validated_by_human",
    "baseline_drift",
    "static_noise",
    "burst_noise",
    "electrodes_problems",
    "scp_codes",
)


def read_ptbxl(
    folder: str | Path,
    task: str = "superclass",
    *,
    sampling_rate: int = 100,
    likely_only: bool = False,
    verify: bool = True,
    rules: Rules | None = None,
) -> Records:
    """All recordings of a PTB-XL folder, 10 s of 12 leads at 100 or 500 Hz, with the classes of one
    of `TASKS`.

    A statement counts whatever its likelihood; with `likely_only` diagnostic statements count from
    50 % on. Both counts a class are in `about["class_counts"]`. Recordings without a class of the
    task are kept with an all-zero target. `verify` compares each file with SHA256SUMS.txt where
    that exists, and the samples with the header's own checksums. Raises DataError.
    """
    if task not in TASKS:
        raise DataError(f"There is no PTB-XL task {task!r}; choose one of {', '.join(TASKS)}.")
    if sampling_rate not in (100, 500):
        raise DataError(
            f"PTB-XL has recordings at 100 and 500 Hz, not at {sampling_rate}; choose one of them."
        )
    folder = existing_folder(folder, f"PTB-XL's {INDEX}")
    checksums = Checksums.of(folder, verify)
    for name in (INDEX, STATEMENTS):
        checksums.check(folder / name)
    index = read_ptbxl_index(folder / INDEX)
    statements = _read_statements(folder / STATEMENTS)
    classes, stated, likely = _targets(index["codes"], statements, task)
    targets = likely if likely_only else stated
    counts = {
        "any statement": class_counts(classes, stated),
        f"likelihood {LIKELY:.0f} or more": class_counts(classes, likely),
    }
    names = index["filename_lr" if sampling_rate == 100 else "filename_hr"]
    paths = [
        inside(folder, f"{name}.hea", f"{folder / INDEX}, ecg_id {ecg_id}")
        for name, ecg_id in zip(names, index["ecg_id"])
    ]
    # The files of 500 Hz are optional in a download; `about` says how many are not there.
    present = [place for place, path in enumerate(paths) if sampling_rate == 100 or path.exists()]
    about = {
        "source": "PTB-XL",
        "simulated": False,
        "task": task,
        "folder": folder.name,
        **_version(folder, index),
        "likely_only": likely_only,
        "not_downloaded": len(paths) - len(present),
        "without_class": int((~targets.any(axis=1)).sum()),
        "class_counts": pd.DataFrame(counts).to_dict("index"),
    }
    files = read_listed(
        _rows(index).iloc[present], [paths[place] for place in present], targets[present], checksums
    )
    return assemble(files, classes, sampling_rate, 10.0, about, rules)


def _rows(index):
    """The table of the records."""
    rows = {
        "record_id": index["ecg_id"].astype(str),
        "patient_id": index["patient_id"].astype(str),
        "fold": index["strat_fold"],
        "source": "ptb-xl",
    }
    return pd.DataFrame(rows).join(index[[name for name in _KEPT if name in index]])


def read_ptbxl_index(path: Path) -> pd.DataFrame:
    """`ptbxl_database.csv`, its columns and values checked, with the statements and likelihoods of
    each record as the column `codes`: `{"NORM": 100.0, ...}`.
    """
    numbers = ("ecg_id", "patient_id", "strat_fold")
    needed = (*numbers, "scp_codes", "filename_lr", "filename_hr")
    index = read_index(path, needed, numbers=numbers, unique="ecg_id")
    refuse_folds(path, index["strat_fold"])
    codes = [
        _parse_codes(path, ecg_id, text)
        for ecg_id, text in zip(index["ecg_id"], index["scp_codes"])
    ]
    return index.assign(codes=codes)


def _parse_codes(path, ecg_id, text):
    """The statements of one record."""
    try:
        return {str(code): float(value) for code, value in ast.literal_eval(str(text)).items()}
    except Exception:  # a text that is no Python literal fails in many ways
        raise DataError(
            f"{path}: ecg_id {ecg_id} has scp_codes {text!r}, not a list of statements; correct it."
        ) from None


def _version(folder, index):
    """The recognised version; a record count that disagrees with the folder's own list is a
    DataError.
    """
    listing = folder / "RECORDS"
    lines = listing.read_text().split() if listing.exists() else []
    listed = {line for line in lines if line.startswith("records100/")}
    unknown = set(index["filename_lr"]) ^ listed
    if listed and unknown:
        raise DataError(
            f"{listing}: lists {len(listed)} recordings at 100 Hz where {INDEX} has {len(index)} "
            f"(first difference {min(unknown, key=str)}); download both files of one version."
        )
    version = VERSIONS.get(len(index))
    return {"version": version or f"a subset of {len(index):,} records", "subset": version is None}


def _read_statements(path):
    """`scp_statements.csv`, one row per statement, its columns and names checked."""
    columns = ("diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass")
    table = read_index(path, columns)
    names = table.iloc[:, 0]
    refuse_rows(path, names, names.isna(), "which names no statement; download the file again.")
    return table.assign(name=names).set_index(names.astype(str))


def _targets(codes, statements, task):
    """Classes of a task, and 0/1 targets `(records, classes)` by any statement and by statements of
    at least 50 % likelihood.

    Form and rhythm statements carry no likelihood (it is 0): they always count. For a diagnostic
    statement 0 means that no likelihood was noted, so that the likelihood rule leaves it out.
    """
    class_of = _class_of(statements, task)
    diagnostic = _class_of(statements, "diagnostic")
    stated = []
    likely = []
    for found in codes:
        plain = [code for code in found if found[code] >= LIKELY or code not in diagnostic]
        stated.append(set(map(class_of.get, found)))
        likely.append(set(map(class_of.get, plain)))
    classes = tuple(sorted(set(class_of.values())))
    return classes, binary_targets(stated, classes), binary_targets(likely, classes)


def _class_of(statements, task):
    """Statement -> its class, for those that have one in a task."""
    kind, column = {
        "superclass": ("diagnostic", "diagnostic_class"),
        "subclass": ("diagnostic", "diagnostic_subclass"),
    }.get(task, (task, "name"))
    chosen = statements if task == "all" else statements[statements[kind] == 1]
    return chosen[column].dropna().astype(str).to_dict()
