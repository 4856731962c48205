"""Where the evidence for a class truly lies: from the simulator, or from marks of cardiologists."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Region:
    """Where the evidence lies in some records, and what may be counted at all.

    mask: bool `(n, 12, time)`. counted: bool, of the same shape or `(n, 1, time)`; all by default.
    DataError for a mask of another form.
    """

    mask: np.ndarray
    counted: np.ndarray = field(default_factory=lambda: np.array([[[True]]]))

    def __post_init__(self) -> None:
        if self.mask.ndim != 3 or self.mask.dtype != bool:
            form = f"{self.mask.dtype} {self.mask.shape}"
            raise DataError(f"A mask is bool (records, leads, time), not {form}.")
        object.__setattr__(self, "counted", np.broadcast_to(self.counted, self.mask.shape))

    def __getitem__(self, part: slice | np.ndarray) -> "Region":
        """The region of some of the records."""
        return Region(self.mask[part], self.counted[part])

    @property
    def evidence(self) -> np.ndarray:
        """What is counted of the mask."""
        return self.mask & self.counted


@dataclass(eq=False)
class Truth:
    """Records whose evidence is known.

    codes: each record's statements. split: positions on which choices may be made ("validation")
    and that are reported ("test"). find: from positions and the statements to look for to the mask
    `(n, 12, time)`. marked: from positions to `counted (n, 1, time)`, everything where it is None.
    note: what the reader must know, such as that nothing is marked.
    """

    name: str
    records: Records
    codes: list[set[str]]
    split: Mapping[str, np.ndarray]
    find: Callable[[np.ndarray, Sequence[set[str]]], np.ndarray]
    marked: Callable[[np.ndarray], np.ndarray] | None = None
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

    def region(self, group: str, positions: np.ndarray, like: np.ndarray | None = None) -> Region:
        """Where the evidence of the group lies in the records at `positions`.

        With `like`, where it would lie had each record the statements of another one: for records
        without the disease.
        """
        stated = self.stated(group)
        wanted = [stated[place] for place in (positions if like is None else like)]
        counted = {} if self.marked is None else {"counted": self.marked(positions)}
        return Region(self.find(positions, wanted), **counted)

    def groups(self, split: str = "test", least: int = 3) -> tuple[str, ...]:
        """The groups with at least `least` records in a split."""
        places = self.split[split]
        counts = {
            group: sum(bool(self.codes[place] & set(codes)) for place in places)
            for group, (_, codes) in GROUPS.items()
        }
        return tuple(group for group, count in counts.items() if count >= least)


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

    def find(positions: np.ndarray, wanted: Sequence[set[str]]) -> np.ndarray:
        part = records.select(positions)
        part.table["statements"] = [" ".join(codes) for codes in wanted]
        waves = simulation.waves[simulation.waves["record_id"].isin(part.table["record_id"])]
        known, mask = Simulation(part, waves), _no_mask(records, positions)
        for code in set().union(*wanted):
            mask |= known.evidence(np.arange(len(part)), code)
        return mask

    codes = [set(text.split()) for text in records.table["statements"]]
    return Truth("simulated cohort", records, codes, records.split, find)


def ludb_truth(folder: str | Path, sampling_rate: float) -> Truth:
    """All of LUDB to report on, with the marks of its cardiologists; only what lies between marks
    is counted.

    Beats at the ends of its records carry no marks, so the first onset and the last offset bound
    what is counted.
    """
    records = read_ludb(folder, sampling_rate=sampling_rate)
    names = records.table["record_id"]
    marks = read_ludb_marks(folder, names, sampling_rate=sampling_rate)
    beats = {key: lead_beats(rows) for key, rows in marks.groupby(["record_id", "lead"])}

    def find(positions: np.ndarray, wanted: Sequence[set[str]]) -> np.ndarray:
        mask = _no_mask(records, positions)
        for row, name, codes in zip(mask, names.iloc[positions], wanted, strict=True):
            for leads, first, last in (LUDB_EVIDENCE[code] for code in codes):
                for lead in set(leads.split()) & {lead for key, lead in beats if key == name}:
                    mark_beats(row[LEADS.index(lead)], beats[name, lead], first, last)
        return mask

    spans = marks.groupby("record_id").agg({"onset": "min", "offset": "max"}).reindex(names)
    first, last = (spans[[end]].to_numpy(float, na_value=np.nan) for end in spans)
    clock = np.arange(records.signals.shape[2])

    def marked(positions: np.ndarray) -> np.ndarray:
        return ((clock >= first[positions]) & (clock <= last[positions]))[:, None]

    split = {"validation": np.array([], int), "test": np.arange(len(records))}
    note = "every record of LUDB is a test record"
    return Truth("LUDB", records, _classes(records), split, find, marked, note)


def targets_truth(records: Records) -> Truth:
    """Records with classes but without marks: each class stands for its groups' first statement,
    masks are empty.
    """
    stands_for = {name: codes[0] for name, codes in reversed(GROUPS.values())}
    codes = [{stands_for[name] for name in found & set(stands_for)} for found in _classes(records)]
    note = f"no wave is marked; `{FETCH}` fetches LUDB, where cardiologists marked them"

    def find(positions: np.ndarray, wanted: Sequence[set[str]]) -> np.ndarray:
        return _no_mask(records, positions)

    return Truth(records.name, records, codes, records.split, find, note=note)


def mark_beats(mask: np.ndarray, beats: pd.DataFrame, first: str, last: str) -> None:
    """Mark in one lead `(time,)` what lies between two marks of each beat, ends included."""
    for onset, offset in beats[[first, last]].dropna().to_numpy(int):
        mask[onset : offset + 1] = True


def _no_mask(records: Records, positions: np.ndarray) -> np.ndarray:
    return np.zeros((len(positions), *records.signals.shape[1:]), bool)


def _classes(records: Records) -> list[set[str]]:
    """The names of each record's classes."""
    return [set(np.array(records.classes)[row > 0]) for row in records.targets]


def lead_beats(marks: pd.DataFrame) -> pd.DataFrame:
    """One row a beat of one lead's marks: onset and offset of its P, QRS and T in samples, NaN
    where absent.

    A P belongs to the QRS that follows it, a T to the one before it.
    """
    columns = [f"{wave} {end}" for wave in ("P", "QRS", "T") for end in ("onset", "offset")]
    waves = {wave: rows.sort_values("peak") for wave, rows in marks.groupby("wave")}
    if "QRS" not in waves:
        return pd.DataFrame(columns=columns, dtype=float)
    peaks = waves["QRS"]["peak"].to_numpy(float)
    beats = pd.DataFrame(np.nan, index=range(len(peaks)), columns=columns)
    for wave, rows in waves.items():
        side = "right" if wave == "QRS" else "left"
        own = np.searchsorted(peaks, rows["peak"].to_numpy(float), side) - (wave != "P")
        inside = (own >= 0) & (own < len(peaks))
        for end in ("onset", "offset"):
            values = rows[end].to_numpy(float, na_value=np.nan)
            beats.loc[own[inside], f"{wave} {end}"] = values[inside]
    return beats
