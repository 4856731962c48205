"""Any folder of WFDB records with a CSV file of labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
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
    refuse_repeats,
    refuse_rows,
    ten_folds,
)
from ecglib.sources.wfdb_files import read_listed

NAMES = ("record", "record_id", "filename")
NOT_CLASSES = (*NAMES, "patient_id", "fold", "labels", "age", "sex", "source")


def read_wfdb_folder(
    folder: str | Path,
    labels_csv: str | Path = "labels.csv",
    *,
    sampling_rate: float = 100,
    seconds: float = 10.0,
    classes: Sequence[str] | None = None,
    verify: bool = True,
    rules: Rules | None = None,
) -> Records:
    """The records named in `labels_csv` (a path, or a name within the folder), resampled to one
    rate and length.

    Columns: `record` (or record_id, filename: path below the folder without .hea), optional
    `patient_id` and `fold` (1-10), and the classes: either one column `labels` with names between
    semicolons, or columns of only 0 and 1; `classes` names them. Other columns go to the table.
    Without a fold column whole patients are dealt to ten folds, or records where there is no
    patient_id either; `about["split"]` says which. Raises DataError.
    """
    folder = existing_folder(folder, "the WFDB records")
    path = Path(labels_csv) if Path(labels_csv).is_file() else folder / labels_csv
    table = _read_labels(path)
    names, targets = _targets(path, table, classes)
    patients = table.get("patient_id", table["record"])
    split = "by patient" if "patient_id" in table else "by record, no patient_id is given"
    if "fold" in table:
        split = "as given"
        refuse_folds(path, table["fold"])
    rows = {
        "record_id": table["record"],
        "patient_id": patients,
        "fold": table.get("fold", ten_folds(patients, targets)),
        "source": folder.name,
    }
    used = {*NAMES, "patient_id", "fold", "source", *names}
    kept = table[[column for column in table if column not in used]]
    paths = [
        inside(folder, f"{name}.hea", f"{path}, line {line}")
        for line, name in enumerate(table["record"], 2)
    ]
    about = {
        "source": folder.name,
        "simulated": False,
        "task": path.stem,
        "folder": folder.name,
        "labels": path.name,
        "split": split,
        "not_classes": list(kept.columns),
        "without_class": int((~targets.any(axis=1)).sum()),
        "class_counts": class_counts(names, targets),
    }
    checksums = Checksums.of(folder, verify)
    files = read_listed(pd.DataFrame(rows).join(kept), paths, targets, checksums)
    return assemble(files, names, sampling_rate, seconds, about, rules)


def _read_labels(path):
    """The labels with a column `record` of unique names, and patient_id as text."""
    table = read_index(path, numbers=("fold",), text=(*NAMES, "patient_id", "labels"))
    column = next((name for name in NAMES if name in table), None)
    if column is None:
        raise DataError(f"{path}: no column names the records; add one called 'record'.")
    for needed in table.columns.intersection([column, "patient_id"]):
        refuse_rows(path, table[needed], table[needed].isna(), "fill it in.")
    table["record"] = table[column].str.strip().str.removesuffix(".hea")
    refuse_repeats(path, table["record"])
    return table


def _targets(path, table, classes):
    """Class names and 0/1 targets `(records, classes)`."""
    if "labels" in table:
        cells = table["labels"].fillna("").str.split(";")
        sets = [{name.strip() for name in cell} - {""} for cell in cells]
        names = tuple(classes or sorted(set().union(*sets)))
        targets = binary_targets(sets, names)
    else:
        names = tuple(classes or _class_columns(path, table))
        for name in names:
            if name not in table:
                raise DataError(
                    f"{path}: the column of the class {name!r} is missing; add it or leave the "
                    "class out."
                )
            if not _is_binary(table[name]):
                raise DataError(
                    f"{path}: the class column {name!r} holds something else than 0 and 1; correct "
                    "it."
                )
        targets = table[list(names)].to_numpy(dtype=np.uint8)
    if not names:
        raise DataError(
            f"{path}: no column is a class; add columns of 0 and 1, or one column 'labels' "
            "(AF;LBBB)."
        )
    return names, targets


def _class_columns(path, table):
    """Columns of 0 and 1; one with blanks among them is a DataError, since a blank label is
    neither.
    """
    found = []
    for name in table.columns.difference(NOT_CLASSES, sort=False):
        column = table[name]
        known = column.dropna()
        if len(known) and _is_binary(known):
            column = column.rename(f"value for the class {name!r}")
            refuse_rows(path, column, column.isna(), "write 0 or 1.")
            found.append(name)
    return found


def _is_binary(column):
    """Whether a column holds 0 and 1 (or False and True) and nothing else."""
    return bool(pd.api.types.is_numeric_dtype(column) and column.isin([0, 1]).all())
