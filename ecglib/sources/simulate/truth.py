"""What is known of a simulated record: its classes, its waves, and where the evidence for a class
lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.errors import DataError, explain_reading
from ecglib.files import atomic_file
from ecglib.records import LEADS, Records
from ecglib.sources.simulate.tables import read_table

ALL = " ".join(LEADS)
STATEMENTS = read_table("statements")
# Where the evidence of a class lies: its leads, from which mark to which mark, in which kinds of
# beat.
EVIDENCE = {row.code: row[2:] for row in STATEMENTS.itertuples(index=False)}
# Condition -> PTB-XL superclass.
CONDITIONS = {row.code: row.superclass for row in STATEMENTS.itertuples() if row.superclass}
SUPERCLASSES = ("CD", "HYP", "MI", "NORM", "STTC")
RHYTHMS = ("AFIB", "AFLT", "PAC", "PVC", "SBRAD", "SR", "STACH")
TASKS = {"superclass": SUPERCLASSES, "rhythm": RHYTHMS, "all": tuple(sorted(EVIDENCE))}
BEAT_MARKS = [f"{wave} {end}" for wave in ("P", "QRS", "T") for end in ("onset", "offset")]
WAVE_COLUMNS = ["record_id", "beat", "kind", "wave", "onset", "offset"]


@dataclass(eq=False)
class Simulation:
    """Simulated records with their ground truth.

    waves: one row per wave that lies wholly inside its record: record_id, beat (its number in the
    record), kind (normal, ventricular, atrial), wave (P, QRS, T), onset and offset in samples.
    `records.table` holds the true severity of each condition (0 absent, below 0.15 borderline) and
    the reader's statements, from which the targets follow.
    """

    records: Records
    waves: pd.DataFrame

    def evidence(self, indices: Sequence[int] | np.ndarray, class_name: str) -> np.ndarray:
        """Where the evidence for a class lies, bool `(n, 12, time)`; all False for records not
        stated to have it.

        The class is a superclass, a condition or a rhythm; one that the cohort does not know is a
        DataError.
        """
        codes = {code for code in EVIDENCE if class_name in (code, CONDITIONS.get(code))}
        if not codes:
            known = ", ".join(sorted({*SUPERCLASSES, *EVIDENCE}))
            raise DataError(
                f"The simulated cohort has no class {class_name!r}; use one of {known}."
            )
        indices = np.asarray(indices).reshape(-1)
        mask = np.zeros((len(indices), *self.records.signals.shape[1:]), bool)
        table = self.records.table[["record_id", "statements"]].iloc[indices]
        for row, (record, statements) in enumerate(table.to_numpy()):
            for code in codes & set(statements.split()):
                leads, first, last, kinds = EVIDENCE[code]
                beats = self.beats[record]
                marks = beats.loc[beats["kind"].isin(kinds.split()), [first, last]].dropna()
                seen = [LEADS.index(lead) for lead in leads.split()]
                for onset, offset in marks.to_numpy(int):
                    mask[row, seen, onset : offset + 1] = True
        return mask

    @cached_property
    def beats(self) -> dict[str, pd.DataFrame]:
        """For each record one row per beat: kind, and onset and offset of its P, QRS and T (NaN
        where absent).
        """
        beats = self.waves.pivot(
            index=["record_id", "beat", "kind"], columns="wave", values=["onset", "offset"]
        )
        beats.columns = [f"{wave} {end}" for end, wave in beats.columns]
        beats = beats.reindex(columns=BEAT_MARKS)
        beats["next QRS offset"] = beats.groupby(level="record_id")["QRS offset"].shift(-1)
        beats = beats.reset_index(["beat", "kind"])
        return dict(list(beats.groupby(level="record_id")))

    def save(self, folder: str | Path) -> Path:
        """Save the records below `folder` and the wave marks beside them as `waves.csv`."""
        folder = self.records.save(folder)
        with atomic_file(folder / "waves.csv") as temporary:
            self.waves.to_csv(temporary, index=False)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Simulation":
        """Open a saved simulation; DataError where the folder holds other records or lacks its
        marks.
        """
        records = Records.load(folder)
        path = Path(folder) / "waves.csv"
        if not records.about.get("simulated") or "statements" not in records.table:
            raise DataError(
                f"{folder}: these records are not a simulated cohort; open them with Records.load."
            )
        records.table["statements"] = records.table["statements"].fillna("")
        absent = "the wave marks are missing; simulate the cohort again with the same seed"
        with explain_reading(path, absent):
            try:
                return cls(records, pd.read_csv(path, dtype={"record_id": str})[WAVE_COLUMNS])
            except (ValueError, KeyError) as error:
                raise DataError(
                    f"{path}: damaged wave marks ({error}); simulate the cohort again."
                ) from error
