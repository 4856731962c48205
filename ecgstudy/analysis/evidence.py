"""Where the evidence for a class truly lies: from the simulator, or from marks of cardiologists."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.records import LEADS, Records
from ecglib.sources.ludb import INDEX, read_ludb, read_ludb_marks
from ecglib.sources.simulate import ALL, EVIDENCE, Simulation

# What a network may say: the superclass that it knows, statements that have a place in the beat,
# and where that is in LUDB, whose statements name no wall: leads, from which mark, to which mark.
GROUPS: Mapping[str, tuple[str, str, tuple[str, str, str]]] = {
    "infarction": (
        "MI",
        "AMI, IMI, LMI, STEMI, scar, ischaemia or scar",
        (ALL, "QRS onset", "T offset"),
    ),
    "bundle branch block": ("CD", "CLBBB, CRBBB, IRBBB, ILBBB", (ALL, "QRS onset", "QRS offset")),
    "ST-T change": (
        "STTC",
        "ISCAL, ISCIN, NDT, ischaemia, repolarisation",
        (ALL, "QRS offset", "T offset"),
    ),
    "hypertrophy": ("HYP", "LVH", ("I aVL V1 V2 V5 V6", "QRS onset", "QRS offset")),
    "AV block": ("CD", "1AVB", (ALL, "P onset", "QRS onset")),
}
LUDB_EVIDENCE = {code: place for _, codes, place in GROUPS.values() for code in codes.split(", ")}
FETCH = "python -m ecglib.sources.download ludb ../data/ludb"


class Region:
    """Where the evidence lies in some records, and what may be counted at all.

    mask: bool `(n, 12, time)`. counted: bool, of the same shape or `(n, 1, time)`; all by default.
    evidence: what is counted of the mask. DataError for a mask of another form.
    """

    def __init__(
        self,
        mask: np.ndarray,
        counted: np.ndarray | bool = True,
    ) -> None:
        if mask.ndim != 3 or mask.dtype != bool:
            form = f"{mask.dtype} {mask.shape}"
            raise DataError(f"A mask is bool (records, leads, time), not {form}.")
        self.mask = mask
        self.counted = np.broadcast_to(counted, mask.shape)
        self.evidence = mask & self.counted

    def __getitem__(self, part: slice | np.ndarray) -> "Region":
        """The region of some of the records."""
        return Region(self.mask[part], self.counted[part])


@dataclass(eq=False)
class Truth:
    """Records whose evidence is known.

    codes: each record's statements. split: positions on which choices may be made ("validation")
    and that are reported ("test"). mark: sets in a record's mask `(12, time)` what shows a
    statement, given the mask, the record's position and the statement. counted: `(n, 1, time)`,
    everything where it is None. note: what the reader must know, such as that nothing is marked.
    """

    name: str
    records: Records
    codes: list[set[str]]
    split: Mapping[str, np.ndarray]
    mark: Callable[[np.ndarray, int, str], None]
    counted: np.ndarray | None = None
    note: str = ""

    def stated(self, group: str) -> np.ndarray:
        """Each record's statements that belong to a group of `GROUPS`, sets `(n,)`."""
        if group not in GROUPS:
            raise DataError(
                f"There is no group {group!r} of statements; choose one of {', '.join(GROUPS)}."
            )
        members = set(GROUPS[group][1].split(", "))
        return np.array([codes & members for codes in self.codes], object)

    def positions(self, group: str, split: str = "test") -> np.ndarray:
        """The records of a split with a statement of the group, in their order; DataError where
        there is none.
        """
        places = self.split[split]
        found = places[self.stated(group)[places].astype(bool)]
        if not len(found):
            raise DataError(
                f"{self.name}: no {split} record has a statement of {group} "
                f"({GROUPS[group][1]}); choose another group or more records."
            )
        return found

    def region(
        self,
        group: str,
        positions: np.ndarray,
        like: np.ndarray | None = None,
    ) -> Region:
        """Where the evidence of the group lies in the records at `positions`.

        With `like`, where it would lie had each record the statements of another one: for records
        without the disease.
        """
        wanted = self.stated(group)[positions if like is None else like]
        mask = np.zeros((len(positions), *self.records.signals.shape[1:]), bool)
        for row, place, codes in zip(mask, positions, wanted, strict=True):
            for code in codes:
                self.mark(row, place, code)
        return Region(mask, True if self.counted is None else self.counted[positions])

    def groups(
        self,
        split: str = "test",
        least: int = 3,
    ) -> tuple[str, ...]:
        """The groups with at least `least` records in a split."""
        stated = {group: self.stated(group)[self.split[split]] for group in GROUPS}
        return tuple(group for group, codes in stated.items() if sum(map(bool, codes)) >= least)


def ground_truth(
    records: Records,
    results: str | Path,
    ludb: Path | None = None,
) -> Truth:
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
    for folder in map(Path, filter(None, folders)):
        for place in (folder, folder / "ludb", folder.resolve().parent / "ludb"):
            if (place / INDEX).is_file():
                return place
    return None


def simulated_truth(simulation: Simulation) -> Truth:
    """Fold 9 to choose on and fold 10 to report, with the cohort's own evidence."""
    records = simulation.records

    def mark(mask: np.ndarray, place: int, code: str) -> None:
        leads, first, last, kinds = EVIDENCE[code]
        beats = simulation.beats[records.table["record_id"].iloc[place]]
        mark_beats(
            mask,
            leads,
            beats[beats["kind"].isin(kinds.split())],
            first,
            last,
        )

    codes = [set(text.split()) for text in records.table["statements"]]
    return Truth("simulated cohort", records, codes, records.split, mark)


def ludb_truth(folder: str | Path, sampling_rate: float) -> Truth:
    """All of LUDB to report on, with the marks of its cardiologists; only what lies between marks
    is counted.

    Beats at the ends of its records carry no marks, so the first onset and the last offset bound
    what is counted.
    """
    records = read_ludb(folder, sampling_rate=sampling_rate)
    names = records.table["record_id"]
    marks = read_ludb_marks(folder, names, sampling_rate=sampling_rate)
    beats = dict(list(lead_beats(marks).groupby(level=["record_id", "lead"])))

    def mark(mask: np.ndarray, place: int, code: str) -> None:
        leads, first, last = LUDB_EVIDENCE[code]
        for lead in leads.split():
            key = (names[place], lead)
            if key in beats:
                mark_beats(mask, lead, beats[key], first, last)

    spans = marks.groupby("record_id").agg({"onset": "min", "offset": "max"}).reindex(names)
    first, last = spans.to_numpy(float, na_value=np.nan).T[:, :, None, None]
    clock = np.arange(records.signals.shape[2])
    counted = (clock >= first) & (clock <= last)
    split = {"validation": np.array([], int), "test": np.arange(len(records))}
    note = "every record of LUDB is a test record"
    return Truth("LUDB", records, _classes(records), split, mark, counted, note)


def targets_truth(records: Records) -> Truth:
    """Records with classes but without marks: each class stands for its groups' first statement,
    masks are empty.
    """
    stands_for = {name: codes.split(", ")[0] for name, codes, _ in reversed(GROUPS.values())}
    codes = [{stands_for[name] for name in found & set(stands_for)} for found in _classes(records)]
    note = f"no wave is marked; `{FETCH}` fetches LUDB, where cardiologists marked them"
    return Truth(
        records.name,
        records,
        codes,
        records.split,
        lambda *_: None,
        note=note,
    )


def _classes(records: Records) -> list[set[str]]:
    """The names of each record's classes."""
    return [set(np.array(records.classes)[row > 0]) for row in records.targets]


def mark_beats(
    mask: np.ndarray,
    leads: str,
    beats: pd.DataFrame,
    first: str,
    last: str,
) -> None:
    """Set in a record's mask `(12, time)`, in these leads, what lies between two marks of each
    beat, ends included.
    """
    rows = [LEADS.index(lead) for lead in leads.split()]
    for onset, offset in mark_pairs(beats, first, last):
        mask[rows, onset : offset + 1] = True


def mark_pairs(beats: pd.DataFrame, first: str, last: str) -> np.ndarray:
    """Two marks, in samples, of each beat that has both, `(beats, 2)`."""
    return beats[[first, last]].dropna().to_numpy(int)


def lead_beats(marks: pd.DataFrame) -> pd.DataFrame:
    """One row per record, lead and beat of marks as from `read_ludb_marks`: onset and offset of its
    P, QRS and T in samples, NaN where absent.

    A P belongs to the QRS that follows it, a T to the one before it.
    """
    lead = ["record_id", "lead"]
    marks = marks.sort_values("peak", kind="stable").astype({"onset": float, "offset": float})
    begun = (marks["wave"] == "QRS").groupby([marks[name] for name in lead]).cumsum()
    marks["beat"] = begun - (marks["wave"] != "P")
    waves = marks.drop_duplicates([*lead, "beat", "wave"], keep="last")
    beats = waves.pivot(index=[*lead, "beat"], columns="wave", values=["onset", "offset"])
    beats.columns = [f"{wave} {end}" for end, wave in beats.columns]
    return beats.dropna(subset=["QRS onset", "QRS offset"], how="all")
