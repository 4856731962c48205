"""What every source needs before it reads a signal: its folder, its CSV files, its checksums, and
ten folds.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.errors import DataError

SUMS = "SHA256SUMS.txt"
FOLDS = 10


def existing_folder(folder: str | Path, holds: str) -> Path:
    """The folder as a path; a DataError saying what it should hold where there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder; give the folder that holds {holds} or download it first."
        )
    return folder


def read_csv(path: Path, columns: Sequence[str], text: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV file that has the given columns, those in `text` unparsed; otherwise a DataError."""
    try:
        table = pd.read_csv(path, low_memory=False, dtype=dict.fromkeys(text, str))
    except FileNotFoundError:
        raise DataError(
            f"{path}: the file is missing; give the folder that holds it or download it."
        ) from None
    except (
        ValueError,
        OSError,
        OverflowError,
    ) as error:  # ParserError, EmptyDataError, UnicodeDecodeError too
        raise DataError(f"{path}: cannot be read as CSV ({error}); download it again.") from None
    for column in columns:
        if column not in table:
            raise DataError(
                f"{path}: the column {column!r} is missing; download the file again or add the column."
            )
    return table


def whole_numbers(path: Path, table: pd.DataFrame, column: str) -> pd.Series:
    """One column as int64; a DataError names the line that holds something else."""
    numbers = pd.to_numeric(table[column], errors="coerce")
    if numbers.dtype == bool or not pd.api.types.is_numeric_dtype(numbers):
        numbers = pd.Series(np.nan, index=table.index)
    wrong = ~(numbers.abs() < 2**53) | (numbers % 1 != 0)
    if wrong.any():
        raise DataError(f"{path}: {where(table, column, wrong)}, not a whole number; correct it.")
    return numbers.astype(np.int64)


def where(table: pd.DataFrame, column: str, wrong: pd.Series) -> str:
    """`line 3 has fold 'x'` for the first row of a CSV file that is wrong, to begin a message with."""
    row = int(np.argmax(wrong.to_numpy()))
    value = table[column].iloc[row]
    return f"line {row + 2} has {column} {repr(value) if isinstance(value, str) else value}"


def no_duplicates(path: Path, table: pd.DataFrame, column: str) -> None:
    """A DataError where a column that identifies the rows holds a value twice."""
    again = table[column].duplicated()
    if again.any():
        raise DataError(
            f"{path}: {where(table, column, again)}, which stands there twice; keep one line."
        )


def read_checksums(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 from SHA256SUMS.txt; empty where there is none."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check its permissions or delete it."
        ) from None
    pairs = (line.split(maxsplit=1) for line in lines if line.strip())
    return {
        name.strip().lstrip("*"): digest.lower()
        for digest, name in (pair for pair in pairs if len(pair) == 2)
    }


def nearest_checksums(folder: Path, levels: int = 2) -> tuple[Path, dict[str, str]]:
    """The folder, itself or up to `levels` above, that holds SHA256SUMS.txt, and its checksums;
    else (folder, {}).
    """
    resolved = folder.resolve()
    for root in (resolved, *resolved.parents[:levels]):
        if (root / SUMS).is_file():
            return root, read_checksums(root)
    return resolved, {}


def verify_file(folder: Path, path: Path, sums: Mapping[str, str]) -> None:
    """Compare one file with its listed SHA-256, if it has one and is there; a difference is a
    DataError.
    """
    resolved, root = path.resolve(), folder.resolve()
    expected = (
        sums.get(resolved.relative_to(root).as_posix()) if resolved.is_relative_to(root) else None
    )
    if expected is None or not resolved.is_file():
        return
    try:
        with resolved.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check the file and its permissions."
        ) from None
    if found != expected:
        raise DataError(f"{path}: its checksum differs from {SUMS}; download the file again.")


def ten_folds(patients: Sequence[str], targets: np.ndarray) -> np.ndarray:
    """Fold 1 to 10 of each record: whole patients, each class spread evenly, the same on every
    machine.

    targets `(records, classes)`. Patients are ordered by the set of classes that they have, the
    rarest class first, and within a set by the SHA-256 of their name; then they are dealt to the
    folds in turn.
    """
    codes, names = pd.factorize(np.asarray(patients, dtype=object))
    has = np.zeros((len(names), targets.shape[1]), dtype=bool)
    np.logical_or.at(has, codes, targets > 0)
    rarest_first = has[:, np.argsort(has.sum(axis=0), kind="stable")]
    _, group = np.unique(rarest_first, axis=0, return_inverse=True)
    keys = [hashlib.sha256(str(name).encode()).hexdigest() for name in names]
    folds = np.empty(len(names), dtype=np.int64)
    folds[np.lexsort((keys, group.reshape(-1)))] = np.arange(len(names)) % FOLDS + 1
    return folds[codes]
