"""What every source needs before it reads a signal: its folder, its index, its checksums, its
targets and ten folds.
"""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.errors import DataError, explain_reading
from ecglib.labels import classes_of_patients

SUMS = "SHA256SUMS.txt"
FOLDS = 10


def existing_folder(folder: str | Path, holds: str) -> Path:
    """The folder as a path; where there is none, a DataError that says what it should hold."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder; give the folder that holds {holds} or download it "
            "first."
        )
    return folder


def read_sums(path: Path) -> dict[str, str]:
    """Relative path -> SHA-256 from the lines of a SHA256SUMS.txt; lines of another form are passed
    over.
    """
    with explain_reading(path):
        text = path.read_text(errors="replace")
    pairs = re.findall(r"^[ \t]*([0-9a-fA-F]{64})[ \t]+\*?(\S.*?)\s*$", text, re.MULTILINE)
    return {name: digest.lower() for digest, name in pairs}


@dataclass(frozen=True)
class Checksums:
    """What a reader compares files with: SHA-256 `sums` by path.

    With `verify` the samples are compared with the sums in their WFDB header as well.
    """

    sums: Mapping[Path, str]
    verify: bool

    @classmethod
    def of(cls, folder: Path, verify: bool, levels: int = 0) -> "Checksums":
        """The SHA256SUMS.txt of a folder or of one up to `levels` above it; without any, or without
        `verify`, no sums.
        """
        folder = folder.resolve()
        for root in (folder, *folder.parents[:levels]):
            path = root / SUMS
            if verify and path.is_file():
                sums = {root / name: digest for name, digest in read_sums(path).items()}
                return cls(sums, verify)
        return cls({}, verify)

    def check(self, path: Path) -> None:
        """Compare one file with its listed sum, if it has one and is there; a difference is a
        DataError.
        """
        expected = self.sums and self.sums.get(path.resolve())
        if not expected or not path.is_file():
            return
        with explain_reading(path), path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise DataError(f"{path}: its checksum differs from {SUMS}; download the file again.")


def read_index(
    path: Path,
    columns: Sequence[str] = (),
    *,
    numbers: Sequence[str] = (),
    text: Sequence[str] = (),
    unique: str | None = None,
) -> pd.DataFrame:
    """A CSV file that has the given columns: `numbers` that are there as int64, `text` unparsed, no
    value of `unique` twice; otherwise a DataError.
    """
    with explain_reading(path, "the file is missing; give the folder that holds it or download it"):
        try:
            table = pd.read_csv(path, low_memory=False, dtype=dict.fromkeys(text, str))
        except (ValueError, OverflowError) as error:  # ParserError, UnicodeDecodeError and others
            raise DataError(
                f"{path}: cannot be read as CSV ({error}); download it again."
            ) from None
    for column in columns:
        if column not in table:
            raise DataError(
                f"{path}: the column {column!r} is missing; download the file again or add the "
                "column."
            )
    if not len(table):
        raise DataError(f"{path}: lists no record; add one line per record or download it again.")
    for column in table.columns.intersection(numbers):
        # As text first: pandas takes True for a number, and keeps whole numbers beyond 64 bits.
        values = pd.to_numeric(table[column].astype(str), errors="coerce").astype(float)
        wrong = ~(values.abs() < 2**53) | (values % 1 != 0)
        refuse_rows(path, table[column], wrong, "not a whole number; correct it.")
        table[column] = values.astype(np.int64)
    if unique:
        refuse_repeats(path, table[unique])
    return table


def refuse_rows(path: Path, column: pd.Series, wrong: pd.Series, problem: str) -> None:
    """A DataError that names the first line of a CSV file whose value in a column is wrong."""
    if wrong.any():
        row = int(np.argmax(wrong))
        value = column.iloc[row]
        shown = repr(value) if isinstance(value, str) else value
        said = f"no {column.name}" if pd.isna(value) else f"{column.name} {shown}"
        raise DataError(f"{path}: line {row + 2} has {said}, {problem}")


def refuse_repeats(path: Path, column: pd.Series) -> None:
    """A DataError that names the first line whose value stands in an earlier one too."""
    refuse_rows(path, column, column.duplicated(), "which stands there twice; keep one line.")


def refuse_folds(path: Path, folds: pd.Series) -> None:
    """A DataError that names the first line whose fold is not 1 to 10."""
    outside = ~folds.between(1, FOLDS)
    refuse_rows(path, folds, outside, f"use 1 to {FOLDS} (9 selects, 10 tests).")


def binary_targets(found: Sequence[Collection[str]], classes: Sequence[str]) -> np.ndarray:
    """Targets 0/1 `(records, classes)` from the classes found for each record."""
    return np.array([[name in names for name in classes] for names in found], dtype=np.uint8)


def class_counts(classes: Sequence[str], targets: np.ndarray) -> dict[str, int]:
    """How many records have each class."""
    return dict(zip(classes, targets.sum(axis=0, dtype=int).tolist()))


def ten_folds(patients: Sequence[str], targets: np.ndarray) -> np.ndarray:
    """Fold 1 to 10 of each record: whole patients, each class spread evenly, the same on every
    machine.

    targets `(records, classes)`. Patients are ordered by the set of classes that they have, the
    rarest class first, and within a set by the SHA-256 of their name; then they are dealt to the
    folds in turn.
    """
    patient, names, has = classes_of_patients(patients, targets)
    rarest_first = has[:, np.argsort(has.sum(axis=0), kind="stable")]
    _, group = np.unique(rarest_first, axis=0, return_inverse=True)
    keys = [hashlib.sha256(str(name).encode()).hexdigest() for name in names]
    folds = np.empty(len(names), dtype=np.int64)
    folds[np.lexsort((keys, group.reshape(-1)))] = np.arange(len(names)) % FOLDS + 1
    return folds[patient]
