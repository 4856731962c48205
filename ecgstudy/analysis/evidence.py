"""Where the evidence for a class truly lies: from the simulator, or from marks of cardiologists."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.records import LEADS, Records
from ecglib.sources.ludb import INDEX, read_ludb, read_ludb_marks
from ecglib.sources.simulate import ALL, Simulation

# What a network may say, by the superclass that it knows and the statements that have a place in
# the beat.
GROUPS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "infarction": ("MI", ("AMI", "IMI", "LMI", "STEMI", "scar", "ischaemia or scar")),
    "bundle branch block": ("CD", ("CLBBB", "CRBBB", "IRBBB", "ILBBB")),
    "ST-T change": ("STTC", ("ISCAL", "ISCIN", "NDT", "ischaemia", "repolarisation")),
    "hypertrophy": ("HYP", ("LVH",)),
    "AV block": ("CD", ("1AVB",)),
}
# Where the evidence lies in LUDB, whose statements name no wall: leads, from which mark, to which
# mark.
FROM_QRS = (ALL, "QRS onset", "T offset")
REPOLARISATION = (ALL, "QRS offset", "T offset")
LUDB_EVIDENCE = {
    **dict.fromkeys(("CLBBB", "CRBBB", "IRBBB", "ILBBB"), (ALL, "QRS onset", "QRS offset")),
    **dict.fromkeys(("STEMI", "scar", "ischaemia or scar"), FROM_QRS),
    **dict.fromkeys(("ischaemia", "repolarisation"), REPOLARISATION),
    "LVH": ("I aVL V1 V2 V5 V6", "QRS onset", "QRS offset"),
    "1AVB": (ALL, "P onset", "QRS onset"),
}
FETCH = "python -m ecglib.sources.download ludb ../data/ludb"


@dataclass(eq=False)
class Truth:
    """Records whose evidence is known.

    codes: each record's statements. split: positions on which choices may be made ("validation")
    and that are reported ("test"). find: from positions and the statements to look for to the mask
    `(n, 12, time)`. marked: from positions to `counted (n, 1, time)`. note: what the reader must
    know, such as that nothing is marked.
    """

    name: str
    records: Records
    codes: list[set[str]]
    split: dict[str, np.ndarray]
    find: Callable[[np.ndarray, Sequence[set[str]]], np.ndarray]
    marked: Callable[[np.ndarray], np.ndarray]
    note: str = ""

    def stated(self, group: str) -> list[set[str]]:
        """Each record's statements that belong to a group of `GROUPS`."""
        if group not in GROUPS:
            raise DataError(
                f"There is no group {group!r} of statements; choose one of {', '.join(GROUPS)}."
            )
        return [codes & set(GROUPS[group][1]) for codes in self.codes]

    def positions(self, group: str, split: str = "test") -> np.ndarray:
        """The records of a split with a statement of the group, in their order; DataError where
        there is none.
        """
        stated = self.stated(group)
        found = np.array([place for place in self.split[split] if stated[place]], dtype=np.int64)
        if not len(found):
            raise DataError(
                f"{self.name}: no {split} record has a statement of {group} "
                f"({', '.join(GROUPS[group][1])}); choose another group or more records."
            )
        return found

    def regions(
        self, group: str, positions: np.ndarray, like: np.ndarray | None = None
    ) -> np.ndarray:
        """Where the evidence of the group lies, bool `(n, 12, time)`.

        With `like`, where it would lie had each record the statements of another one: for records
        without the disease.
        """
        stated = self.stated(group)
        return self.find(
            positions, [stated[place] for place in (positions if like is None else like)]
        )

    def groups(self, split: str = "test", least: int = 3) -> tuple[str, ...]:
        """The groups with at least `least` records in a split."""
        return tuple(
            group
            for group in GROUPS
            if sum(bool(self.stated(group)[place]) for place in self.split[split]) >= least
        )


def ground_truth(records: Records, results: str | Path, ludb: Path | None = None) -> Truth:
    """The truth that belongs to a study's records: evidence of the simulated cohort, or LUDB's
    marks for real ones.

    Real records without LUDB give a Truth whose masks are empty and whose note says how to fetch
    it.
    """
    if records.about.get("simulated"):
        return simulated_truth(Simulation.load(Path(results) / "records"))
    return targets_truth(records) if ludb is None else ludb_truth(ludb, records.sampling_rate)


def find_ludb(*folders: str | Path) -> Path | None:
    """The first of the folders that holds LUDB, itself or in a folder `ludb` below or beside it;
    None if none does.
    """
    for folder in (Path(folder) for folder in folders if str(folder)):
        for place in (folder, folder / "ludb", folder.resolve().parent / "ludb"):
            if (place / INDEX).is_file():
                return place
    return None


def simulated_truth(simulation: Simulation) -> Truth:
    """Fold 9 to choose on and fold 10 to report, with the cohort's own evidence."""
    records = simulation.records
    fold = records.table["fold"].to_numpy()

    def find(positions: np.ndarray, wanted: Sequence[set[str]]) -> np.ndarray:
        part = records.select(positions)
        part.table["statements"] = [" ".join(codes) for codes in wanted]
        waves = simulation.waves[simulation.waves["record_id"].isin(part.table["record_id"])]
        known, every = Simulation(part, waves), np.arange(len(part))
        masks = [known.evidence(every, code) for code in sorted(set().union(*wanted))]
        return (
            np.any(masks, axis=0)
            if masks
            else np.zeros((len(part), *records.signals.shape[1:]), bool)
        )

    codes = [set(text.split()) for text in records.table["statements"]]
    split = {"validation": np.flatnonzero(fold == 9), "test": np.flatnonzero(fold == 10)}
    return Truth("simulated cohort", records, codes, split, find, _all_counted(records))


def ludb_truth(folder: str | Path, sampling_rate: float) -> Truth:
    """All of LUDB to report on, with the marks of its cardiologists; only what lies between marks
    is counted.

    Beats at the ends of its records carry no marks, so the first onset and the last offset bound
    what is counted.
    """
    records = read_ludb(folder, sampling_rate=sampling_rate)
    marks = read_ludb_marks(folder, records.table["record_id"], sampling_rate=sampling_rate)
    beats = {
        key: lead_beats(rows) for key, rows in marks.groupby(["record_id", "lead"], sort=False)
    }
    names, time = records.table["record_id"].tolist(), records.signals.shape[2]

    def find(positions: np.ndarray, wanted: Sequence[set[str]]) -> np.ndarray:
        mask = np.zeros((len(positions), len(LEADS), time), bool)
        for row, (place, codes) in enumerate(zip(positions, wanted, strict=True)):
            for code in codes:
                leads, first, last = LUDB_EVIDENCE[code]
                for lead in leads.split():
                    known = beats.get((names[place], lead))
                    for onset, offset in (
                        [] if known is None else known[[first, last]].dropna().to_numpy(int)
                    ):
                        mask[row, LEADS.index(lead), onset : offset + 1] = True
        return mask

    spans = marks.groupby("record_id").agg(first=("onset", "min"), last=("offset", "max"))

    def marked(positions: np.ndarray) -> np.ndarray:
        counted = np.zeros((len(positions), 1, time), bool)
        for row, place in enumerate(positions):
            if names[place] in spans.index:
                counted[
                    row,
                    0,
                    int(spans.loc[names[place], "first"]) : int(spans.loc[names[place], "last"])
                    + 1,
                ] = True
        return counted

    codes = [
        {name for name, here in zip(records.classes, row, strict=True) if here}
        for row in records.targets
    ]
    split = {"validation": np.array([], int), "test": np.arange(len(records))}
    return Truth(
        "LUDB", records, codes, split, find, marked, "every record of LUDB is a test record"
    )


def targets_truth(records: Records) -> Truth:
    """Records with classes but without marks: each class stands for its groups' first statement,
    masks are empty.
    """
    stands_for = {class_name: codes[0] for class_name, codes in reversed(GROUPS.values())}
    codes = [
        {
            stands_for[name]
            for name, here in zip(records.classes, row, strict=True)
            if here and name in stands_for
        }
        for row in records.targets
    ]
    split = records.split
    shape = records.signals.shape[1:]
    return Truth(
        records.name,
        records,
        codes,
        {name: split[name] for name in ("validation", "test")},
        lambda positions, wanted: np.zeros((len(positions), *shape), bool),
        _all_counted(records),
        f"no wave is marked; `{FETCH}` fetches LUDB, where cardiologists marked them",
    )


def lead_beats(marks: pd.DataFrame) -> pd.DataFrame:
    """One row a beat of one lead's marks: onset and offset of its P, QRS and T in samples, NaN
    where absent.

    A P belongs to the QRS that follows it, a T to the one before it.
    """
    waves = {wave: rows.sort_values("peak") for wave, rows in marks.groupby("wave")}
    columns = [f"{wave} {end}" for wave in ("P", "QRS", "T") for end in ("onset", "offset")]
    if "QRS" not in waves:
        return pd.DataFrame(columns=columns, dtype=float)
    peaks = waves["QRS"]["peak"].to_numpy(float)
    beats = pd.DataFrame(np.nan, index=range(len(peaks)), columns=columns)
    for wave, rows in waves.items():
        at = rows["peak"].to_numpy(float)
        own = {
            "QRS": np.arange(len(peaks)),
            "P": np.searchsorted(peaks, at),
            "T": np.searchsorted(peaks, at) - 1,
        }[wave]
        inside = (own >= 0) & (own < len(peaks))
        for end in ("onset", "offset"):
            beats.loc[own[inside], f"{wave} {end}"] = rows[end].to_numpy(float, na_value=np.nan)[
                inside
            ]
    return beats


def _all_counted(records: Records) -> Callable[[np.ndarray], np.ndarray]:
    """Every sample of every record counts."""
    return lambda positions: np.ones((len(positions), 1, records.signals.shape[2]), bool)
