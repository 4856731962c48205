"""`Records`: the one data type that flows through the study.

Signals are int16 counts `(record, lead, time)`, memory-mapped from disk, with one scale for all of
them. The count -32768 marks a missing sample, as in WFDB format 16.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from errno import ENOSPC
from functools import cached_property, partial
from itertools import permutations
from pathlib import Path
from types import EllipsisType

import numpy as np
import pandas as pd

from ecglib.errors import DataError, explain_storage
from ecglib.files import atomic_folder, read_json, write_json

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
MISSING = np.int16(-32768)
MICROVOLT = 0.001  # millivolts per count: the study's usual scale, good for +-32.7 mV
TABLE_COLUMNS = ("record_id", "patient_id", "fold", "source")
TRAINING_FOLDS = range(1, 9)
SPLIT_FOLDS = {"train": TRAINING_FOLDS, "validation": (9,), "test": (10,)}
LEFT_OUT_COLUMNS = ("record_id", "lead", "fault", "action", "detail")

# Each limb lead as a sum of I and II (Einthoven 1908, Goldberger 1942).
LIMB_FROM_I_AND_II = np.array(
    [[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0], [-0.5, -0.5], [1.0, -0.5], [-0.5, 1.0]], dtype=np.float32
)

FLAT_RANGE = 0.005  # mV; a lead that moves less over the whole record carries no heart beat
ABSURD_PEAK = 20.0  # mV; no surface ECG reaches this, a wrong gain does
ABSURDLY_SMALL = 0.01  # mV; largest lead range below this is a wrong gain the other way
SATURATED_SHARE = 0.05  # share of a lead's samples that sit at its own extreme value
LAW_TOLERANCE = 0.1  # rms residual of Einthoven's law over the rms size of the limb leads
LAW_FLOOR = 0.02  # mV rms; smaller residuals are rounding and filter differences
CHUNK = 1024  # records handled together, so that memory does not grow with their number


@dataclass(eq=False)
class Records:
    """12-lead ECGs with their table, targets and classes.

    signals `(n, 12, time)` int16 counts; scale `unit` per count; sampling_rate Hz; table one row
    per record with at least `record_id, patient_id, fold, source`; targets `(n, classes)` 0/1;
    left_out one row for each repair or omission; about a JSON-like description (source, version,
    whether simulated, the unit where it is not mV). Raises DataError where the parts do not fit.
    """

    signals: np.ndarray
    scale: float
    sampling_rate: float
    table: pd.DataFrame
    targets: np.ndarray
    classes: tuple[str, ...]
    left_out: pd.DataFrame = field(default_factory=partial(pd.DataFrame, columns=LEFT_OUT_COLUMNS))
    about: dict = field(default_factory=dict)
    known_fingerprint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.classes = tuple(self.classes)
        self.table = self.table.reset_index(drop=True)
        self.targets = np.asarray(self.targets)
        count = len(self.signals)
        shape = self.signals.shape
        if self.signals.dtype != np.int16 or shape != (count, len(LEADS), shape[-1]):
            raise DataError(
                f"Records need int16 signals (records, 12, time), not {self.signals.dtype} "
                f"{shape}; use Records.from_millivolts for signals in mV."
            )
        if len(self.table) != count or self.targets.shape != (count, len(self.classes)):
            raise DataError(
                f"Records hold {count} signals, {len(self.table)} table rows and targets "
                f"{self.targets.shape} for {len(self.classes)} classes; give one row a record and "
                "one column a class."
            )
        for column in TABLE_COLUMNS:
            if column not in self.table:
                raise DataError(
                    f"The records' table lacks the column {column!r}; it needs "
                    f"{', '.join(TABLE_COLUMNS)}."
                )
        if not all(0 < number < np.inf for number in (self.scale, self.sampling_rate)):
            raise DataError(
                f"scale {self.scale} and sampling rate {self.sampling_rate} must both be positive "
                "numbers."
            )

    @classmethod
    def from_millivolts(cls, millivolts: np.ndarray, *arguments, **keywords) -> "Records":
        """Records from float signals `(n, 12, time)` in mV, NaN where missing; the rest as in the
        constructor.
        """
        return cls(to_counts(millivolts), MICROVOLT, *arguments, **keywords)

    def __len__(self) -> int:
        return len(self.signals)

    def millivolts(self, indices: np.ndarray | slice | EllipsisType = ...) -> np.ndarray:
        """Signals in mV (in `unit` where that is another), float32 `(n, 12, time)`, NaN where a
        sample is missing.
        """
        counts = np.asarray(self.signals[indices])
        values = counts.astype(np.float32) * np.float32(self.scale)
        values[counts == MISSING] = np.nan
        return values

    def select(self, mask_or_indices: np.ndarray | Sequence[int]) -> "Records":
        """The records of a boolean mask or of an index list, in that order; out of range raises
        DataError.
        """
        chosen = np.asarray(mask_or_indices)
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise DataError(
                    f"The mask has {chosen.shape} entries for {len(self)} records; give one entry "
                    "per record."
                )
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.int64).reshape(-1)
        try:
            signals = self.signals[chosen]
        except IndexError:
            raise DataError(
                f"Record index {chosen.max()} does not exist among {len(self)} records; select by "
                "position."
            ) from None
        part = hashlib.sha256(self.fingerprint.encode() + chosen.tobytes()).hexdigest()
        return replace(
            self,
            signals=signals,
            table=self.table.iloc[chosen],
            targets=self.targets[chosen],
            known_fingerprint=part,
        )

    @cached_property
    def labelled(self) -> "Records":
        """The records that have at least one class."""
        return self.select(self.targets.any(axis=1))

    @cached_property
    def split(self) -> dict[str, np.ndarray]:
        """Positions of the records of `train` (folds 1-8), `validation` (9) and `test` (10).

        DataError where a patient lies in two folds, or where one of the three is empty.
        """
        folds = self.table["fold"]
        crossing = self.table.groupby("patient_id")["fold"].nunique()
        if (crossing > 1).any():
            patient = crossing.idxmax()
            found = sorted(folds[self.table["patient_id"] == patient].unique())
            raise DataError(
                f"Patient {patient} lies in folds {', '.join(map(str, found))}; give each patient "
                "one fold."
            )
        split = {name: np.flatnonzero(folds.isin(wanted)) for name, wanted in SPLIT_FOLDS.items()}
        for name, positions in split.items():
            if not len(positions):
                listed = ", ".join(map(str, SPLIT_FOLDS[name]))
                raise DataError(
                    f"No record lies in the {name} folds ({listed}); assign the folds 1 to 10."
                )
        return split

    def split_truth(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Targets `(n, classes)` and patients `(n,)` of one part of the split, in the order of a
        run's probabilities.
        """
        positions = self.split[name]
        return self.targets[positions], self.table["patient_id"].to_numpy()[positions]

    @property
    def unit(self) -> str:
        """What one count times `scale` is measured in: mV, or what `preprocess.preprocess` made of
        it.
        """
        return self.about.get("unit", "mV")

    @property
    def name(self) -> str:
        """What tables and titles call these data: `simulated`, or their source, with `subset` where
        it is one.
        """
        if self.about.get("simulated"):
            return "simulated"
        source = self.about.get("source", "records")
        return f"{source} subset" if self.about.get("subset") else source

    @property
    def caveat(self) -> str:
        """What a title must say about scores on these data, in brackets; empty for a complete real
        data set.
        """
        if self.about.get("simulated"):
            return " (SIMULATED records)"
        if self.about.get("subset"):
            return " (a subset: not comparable with published tables)"
        return ""

    def _chunks(self):
        """The signals, CHUNK records at a time."""
        for start in range(0, len(self), CHUNK):
            yield np.ascontiguousarray(self.signals[start : start + CHUNK])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over signals, targets, classes and the table's identifying columns; runs are
        keyed by it.
        """
        if self.known_fingerprint:
            return self.known_fingerprint
        form = (self.classes, float(self.scale), float(self.sampling_rate), self.signals.shape)
        digest = hashlib.sha256(repr(form).encode())
        for chunk in self._chunks():
            digest.update(chunk)
        digest.update(np.ascontiguousarray(self.targets.astype(np.float32)))
        for column in TABLE_COLUMNS:
            digest.update("\0".join(self.table[column].astype(str)).encode())
        return digest.hexdigest()

    def validate(self) -> pd.DataFrame:
        """Faults of the stored signals: one row each with record_id, lead, fault and detail; empty
        when all is well.

        The limits are in mV: signals in another unit raise DataError.
        """
        if self.unit != "mV":
            raise DataError(
                f"{self.name}: the signals are in {self.unit}; validate the records in mV they "
                "came from."
            )
        ids = self.table["record_id"].astype(str)
        rows = [
            (ids[start + place], *fault)
            for start in range(0, len(self), CHUNK)
            for place, *fault in find_faults(self.millivolts(slice(start, start + CHUNK)))
        ]
        return pd.DataFrame(rows, columns=["record_id", "lead", "fault", "detail"])

    def save(self, folder: str | Path) -> Path:
        """Write everything below `folder` atomically; raises StorageError and leaves an older
        folder as it was.
        """
        folder = Path(folder)
        with atomic_folder(folder) as temporary:
            needed = self.signals.nbytes + self.targets.nbytes + 1_000_000
            free = shutil.disk_usage(temporary).free
            if free < needed:
                raise OSError(ENOSPC, f"{needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")
            # Plain writes, not a memory map: on a full disk they raise an error where a map would
            # kill the process.
            with (temporary / "signals.npy").open("wb") as stored:
                header = {"descr": "<i2", "fortran_order": False, "shape": self.signals.shape}
                np.lib.format.write_array_header_1_0(stored, header)
                stored.writelines(self._chunks())
            np.save(temporary / "targets.npy", self.targets)
            self.table.to_csv(temporary / "table.csv", index=False)
            self.left_out.to_csv(temporary / "left_out.csv", index=False)
            write_json(
                temporary / "records.json",
                {
                    "scale": float(self.scale),
                    "sampling_rate": float(self.sampling_rate),
                    "classes": list(self.classes),
                    "leads": list(LEADS),
                    "shape": list(self.signals.shape),
                    "fingerprint": self.fingerprint,
                    "about": self.about,
                },
            )
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Records":
        """Open a saved folder; signals stay on disk. Raises DataError where the folder is missing
        or damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(
                f"{folder}: there is no such records folder; run notebook 00_prepare_data first."
            )
        about = read_json(folder / "records.json")
        try:
            signals = np.load(folder / "signals.npy", mmap_mode="r")
            targets = np.load(folder / "targets.npy")
            text = dict.fromkeys(("record_id", "patient_id", "source"), str)
            table = pd.read_csv(folder / "table.csv", dtype=text)
            left_out = pd.read_csv(folder / "left_out.csv", dtype=str, keep_default_na=False)
            if list(signals.shape) != about["shape"] or about["leads"] != list(LEADS):
                raise ValueError("signals do not match records.json")
            return cls(
                signals,
                about["scale"],
                about["sampling_rate"],
                table,
                targets,
                about["classes"],
                left_out,
                about["about"],
                about["fingerprint"],
            )
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(
                f"{folder}: damaged records ({error}); delete the folder and prepare the data "
                "again."
            ) from error


def to_counts(values: np.ndarray, scale: float = MICROVOLT) -> np.ndarray:
    """Values, NaN where missing, as int16 counts of `scale` each (mV as microvolts); clipped beyond
    +-32,767 counts.
    """
    counts = np.rint(np.asarray(values, dtype=np.float32) / np.float32(scale))
    counts = counts.clip(-32767, 32767)
    return np.where(np.isnan(counts), MISSING, counts).astype(np.int16)


def counts_on_disk(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Signals `(n, 12, time)` int16 from blocks of them, mapped from a temporary file without a
    name, which vanishes with them.
    """
    folder = tempfile.gettempdir()
    shape = (0, len(LEADS), 0)
    with explain_storage(folder):
        file = tempfile.TemporaryFile()
    for block in blocks:
        with explain_storage(folder):
            file.write(block.tobytes())
            file.flush()
        shape = (shape[0] + len(block), *block.shape[1:])
    return np.memmap(file, np.int16, "r", shape=shape) if shape[0] else np.empty(shape, np.int16)


def bridge_gaps(signals: np.ndarray, missing: np.ndarray) -> None:
    """Fill missing samples of `(..., time)` in place: straight lines over gaps, zeros where a lead
    has no sample at all.
    """
    for place in zip(*np.nonzero(missing.any(axis=-1))):
        signal = signals[place]
        gaps = np.flatnonzero(missing[place])
        known = np.flatnonzero(~missing[place])
        signal[gaps] = np.interp(gaps, known, signal[known]) if len(known) else 0.0


def find_faults(millivolts: np.ndarray) -> list[tuple[int, str, str, str]]:
    """Faults in signals `(n, 12, time)` in mV as (position, lead, fault, detail); limits are the
    constants above.
    """
    missing = np.isnan(millivolts)
    signals = np.where(missing, np.float32(0), millivolts) if missing.any() else millivolts
    high = signals.max(axis=2, keepdims=True)
    low = signals.min(axis=2, keepdims=True)
    at_extreme = np.maximum((signals == high).mean(axis=2), (signals == low).mean(axis=2))
    peak = np.maximum(high, -low)[..., 0]
    span = (high - low)[..., 0]
    flat = span < FLAT_RANGE
    share = missing.mean(axis=2)
    saturated = (at_extreme > SATURATED_SHARE) & ~flat & (span > 1.0)
    largest = span.max(axis=1, keepdims=True)
    small = (largest < ABSURDLY_SMALL) & ~flat.all(axis=1, keepdims=True)
    faults = [
        (int(place), names[lead], fault, detail.format(values[place, lead]))
        for names, found, fault, detail, values in (
            (LEADS, share > 0, "missing samples", "{:.1%} of the samples", share),
            (LEADS, flat, "flat lead", "range {:.3f} mV", span),
            (LEADS, saturated, "saturated", "{:.1%} at one extreme", at_extreme),
            (LEADS, peak > ABSURD_PEAK, "absurd amplitude", "peak {:.1f} mV", peak),
            (["all"], small, "absurd amplitude", "largest range {:.4f} mV", largest),
        )
        for place, lead in np.argwhere(found)
    ]
    limb = signals[:, :6] - signals[:, :6].mean(axis=2, keepdims=True)
    covariance = limb @ limb.swapaxes(1, 2) / limb.shape[2]
    error = _law_error(covariance)
    size = np.trace(covariance, axis1=1, axis2=2)
    broken = (error > LAW_TOLERANCE**2 * size) & (error > 6 * LAW_FLOOR**2)
    sound = ~flat[:, :6].any(axis=1) & ~missing[:, :6].any(axis=(1, 2))
    for place in np.flatnonzero(broken & sound):
        order = limb_permutation(signals[place])
        residual = np.sqrt(error[place] / size[place])
        detail = f"residual {residual:.2f} of the signal, no order of the leads explains it"
        if order:
            held = [LEADS[lead] for lead in np.argsort(order)]
            detail = f"permuted: the channels hold {', '.join(held)}"
        faults.append((int(place), "limb leads", "Einthoven's law broken", detail))
    return faults


def _law_error(covariance):
    """How far limb leads of a covariance `(..., 6, 6)` are from Einthoven's and Goldberger's laws:
    the sum of the squared deviations of all six, averaged over time.

    A covariance knows no means: an offset of the amplifier is not a permuted lead.
    """
    laws = np.hstack([LIMB_FROM_I_AND_II[2:], -np.eye(4)])  # laws @ limb leads = 0
    return np.einsum("ij,...jk,ik->...", laws, covariance, laws)


def limb_permutation(millivolts: np.ndarray) -> tuple[int, ...] | None:
    """The one order of the six limb leads of `(12, time)` that obeys the laws, or None where none
    or several do.
    """
    covariance = np.cov(millivolts[:6], bias=True)
    orders = np.array(list(permutations(range(6))))
    permuted = covariance[orders[:, :, None], orders[:, None, :]]  # (orders, 6, 6)
    fitting = orders[_law_error(permuted) < (LAW_TOLERANCE / 2) ** 2 * np.trace(covariance)]
    return tuple(fitting[0].tolist()) if len(fitting) == 1 else None
