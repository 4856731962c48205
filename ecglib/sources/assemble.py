"""From single recordings to `Records`: lead order, missing samples, rate, length, faults; each by
one stated rule.

Every repair and every omission becomes one row of `Records.left_out`. Recordings are handled one
after the other and written to disk as counts, so memory does not grow with their number.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeVar

import numpy as np
import pandas as pd
from scipy.signal import resample_poly

from ecglib.errors import DataError, explain_storage
from ecglib.records import (
    ABSURD_PEAK,
    FLAT_RANGE,
    LEADS,
    LEFT_OUT_COLUMNS,
    LIMB_FROM_I_AND_II,
    MICROVOLT,
    Records,
    find_faults,
    limb_permutation,
    to_counts,
)

REPAIRABLE_GAP = 0.1  # share of a lead's samples that may be missing and are then interpolated
WRONG_GAIN = 5.0  # mV; median distance from the median beyond which the whole lead has a wrong gain
ARTEFACT_SHARE = (
    0.05  # share of a lead's samples beyond ABSURD_PEAK that is a wrong gain, not an artefact
)
FLUSH = 256  # recordings checked and written together

# What is done about each fault; a caller may replace single entries by "drop", "keep" or "stop".
RULES: Mapping[str, str] = {
    "lead missing": "repair",  # a limb lead follows from two others; without a chest lead the recording is dropped
    "missing samples": "repair",  # up to REPAIRABLE_GAP by linear interpolation, otherwise dropped
    "flat lead": "repair",  # a limb lead follows from two others; with a flat chest lead the recording is dropped
    "Einthoven's law broken": "repair",  # reordered where one order of the limb leads fits, otherwise dropped
    "absurd amplitude": "repair",  # single artefacts are clipped to +-20 mV; a wrong gain is dropped
    "saturated": "keep",  # counted and kept: clipped R peaks still carry the rhythm
    "unreadable": "stop",  # file absent, truncated or damaged: a broken download should be mended, not analysed
}
_LEAD_NAMES = {lead.upper(): lead for lead in LEADS}
Listed = TypeVar("Listed")


@dataclass
class Recording:
    """One recording as read: leads `(names,)`, millivolts `(leads, time)` with NaN where missing,
    rate in Hz.

    `row` goes to the table (record_id, patient_id, fold, source, ...), `target` `(classes,)` to the
    targets, and `notes` (fault, action, detail) to the left-out table.
    """

    leads: tuple[str, ...]
    millivolts: np.ndarray
    sampling_rate: float
    row: dict
    target: np.ndarray
    notes: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Unreadable:
    """A listed recording that could not be read, with the sentence that says why."""

    record_id: str
    reason: str


def read_each(
    items: Iterable[Listed],
    read: Callable[[Listed], Recording],
    name: Callable[[Listed], str],
    rules: Mapping[str, str] | None = None,
) -> Iterator[Recording | Unreadable]:
    """Read one item after the other; a DataError stops, or becomes `Unreadable` under the rule
    `unreadable: drop`.
    """
    stop = {**RULES, **(rules or {})}["unreadable"] == "stop"
    for item in items:
        try:
            yield read(item)
        except DataError as error:
            if stop:
                raise
            yield Unreadable(name(item), str(error))


def assemble(
    recordings: Iterable[Recording | Unreadable],
    classes: Iterable[str],
    sampling_rate: float,
    seconds: float,
    about: dict,
    rules: Mapping[str, str] | None = None,
) -> Records:
    """`Records` of one rate (Hz) and length from a stream of recordings; DataError where a rule
    says stop.
    """
    rules = _checked_rules(rules)
    length = round(sampling_rate * seconds)
    work = _Assembly(length, rules)
    for recording in recordings:
        if isinstance(recording, Unreadable):
            work.note(recording.record_id, "all", "unreadable", "dropped", recording.reason)
            continue
        recording = _one_form(recording, sampling_rate, length, work)
        if recording is not None:
            work.add(recording)
    return work.finish(tuple(classes), sampling_rate, about)


def _checked_rules(rules: Mapping[str, str] | None) -> dict[str, str]:
    """The default rules with the caller's replacements."""
    merged = {**RULES, **(rules or {})}
    for fault, action in merged.items():
        if fault not in RULES or action not in ("repair", "drop", "keep", "stop"):
            raise DataError(
                f"There is no rule {fault!r}: {action!r}; faults are {', '.join(RULES)}."
            )
    return merged


class _Assembly:
    """Buffers recordings, settles their faults a batch at a time, and writes counts to an unnamed
    temporary file.
    """

    def __init__(self, length: int, rules: Mapping[str, str]) -> None:
        self.length, self.rules = length, rules
        self.rows: list[dict] = []
        self.targets: list[np.ndarray] = []
        self.left_out: list[tuple] = []
        self.buffer: list[Recording] = []
        with explain_storage(tempfile.gettempdir()):
            self.file = tempfile.TemporaryFile()

    def note(self, record_id: str, lead: str, fault: str, action: str, detail: str) -> None:
        """Keep one line of what was repaired or left out; stop where the rule for this fault says
        so.
        """
        if self.rules.get(fault) == "stop":
            raise DataError(
                f"Record {record_id}, {lead}: {fault} ({detail}); mend the file or allow another rule."
            )
        self.left_out.append((record_id, lead, fault, action, detail))

    def add(self, recording: Recording) -> None:
        self.buffer.append(recording)
        if len(self.buffer) == FLUSH:
            self.flush()

    def flush(self) -> None:
        """Check the buffered recordings together, settle what is wrong, write the rest."""
        if not self.buffer:
            return
        signals = np.stack([recording.millivolts for recording in self.buffer])
        faults: dict[int, list[tuple[str, str, str]]] = {}
        for index, lead, fault, detail in find_faults(signals):
            faults.setdefault(index, []).append((lead, fault, detail))
        keep = [
            self._settle(signals[i], self.buffer[i].row["record_id"], faults.get(i, []))
            for i in range(len(signals))
        ]
        with explain_storage(tempfile.gettempdir()):
            self.file.write(to_counts(signals[keep]).tobytes())
        self.rows += [r.row for r, kept in zip(self.buffer, keep, strict=True) if kept]
        self.targets += [r.target for r, kept in zip(self.buffer, keep, strict=True) if kept]
        self.buffer.clear()

    def _settle(
        self, signal: np.ndarray, record_id: str, faults: list[tuple[str, str, str]]
    ) -> bool:
        """Apply the rules to one signal `(12, time)` in place; False where it is dropped."""
        for fault in dict.fromkeys(name for _, name, _ in faults):
            leads = [lead for lead, name, _ in faults if name == fault]
            details = [detail for _, name, detail in faults if name == fault]
            action = self.rules[fault]
            if action == "repair":
                action = "repaired" if _REPAIRS[fault](signal, leads) else "drop"
            action = {"drop": "dropped", "keep": "kept"}.get(action, action)
            self.note(record_id, ", ".join(leads), fault, action, "; ".join(dict.fromkeys(details)))
            if action == "dropped":
                return False
        return True

    def finish(self, classes: tuple[str, ...], sampling_rate: float, about: dict) -> Records:
        """The `Records`, their signals mapped from the temporary file, which vanishes with them."""
        self.flush()
        left_out = pd.DataFrame(self.left_out, columns=list(LEFT_OUT_COLUMNS))
        if not self.rows:
            why = (
                f" ({left_out['fault'].iloc[0]}: {left_out['detail'].iloc[0]})"
                if len(left_out)
                else ""
            )
            raise DataError(
                f"{about.get('folder', about.get('source'))}: no usable recording{why}; check the folder."
            )
        with explain_storage(tempfile.gettempdir()):
            self.file.flush()
        signals = np.memmap(
            self.file, np.int16, "r", shape=(len(self.rows), len(LEADS), self.length)
        )
        return Records(
            signals,
            MICROVOLT,
            sampling_rate,
            pd.DataFrame(self.rows),
            np.stack(self.targets),
            classes,
            left_out,
            about,
        )


def _one_form(
    recording: Recording, sampling_rate: float, length: int, work: _Assembly
) -> Recording | None:
    """The recording with the twelve leads in order, without gaps, at the wanted rate and length;
    None if dropped.
    """
    record_id = str(recording.row["record_id"])
    for fault, action, detail in recording.notes:
        work.note(record_id, "all", fault, action, detail)
    signal = _ordered(recording, work)
    if signal is None or not _fill_gaps(signal, record_id, work):
        return None
    signal = resample(signal, recording.sampling_rate, sampling_rate)
    if signal.shape[1] != length:
        action = "cut" if signal.shape[1] > length else "padded with zeros"
        work.note(record_id, "all", "length", action, f"{signal.shape[1] / sampling_rate:.2f} s")
        padded = np.zeros((len(LEADS), length), dtype=np.float32)
        shared = min(length, signal.shape[1])
        padded[:, :shared] = signal[:, :shared]
        signal = padded
    return Recording(LEADS, signal, sampling_rate, recording.row, recording.target)


def _ordered(recording: Recording, work: _Assembly) -> np.ndarray | None:
    """Signals `(12, time)` in the study's order; an absent limb lead is computed, an absent chest
    lead drops.
    """
    record_id = str(recording.row["record_id"])
    found = {
        _LEAD_NAMES.get(name.upper().removeprefix("LEAD ")): row
        for row, name in enumerate(recording.leads)
    }
    absent = [lead for lead in LEADS if lead not in found]
    signal = np.zeros((len(LEADS), recording.millivolts.shape[1]), dtype=np.float32)
    for row, lead in enumerate(LEADS):
        if lead in found:
            signal[row] = recording.millivolts[found[lead]]
    if absent:
        action = work.rules["lead missing"]
        if action == "repair":
            action = "repaired" if rebuild_limb_leads(signal, absent) else "drop"
        action = {"drop": "dropped", "keep": "kept as zeros"}.get(action, action)
        work.note(
            record_id, ", ".join(absent), "lead missing", action, f"{12 - len(absent)} of 12 leads"
        )
        return None if action == "dropped" else signal
    return signal


def _fill_gaps(signal: np.ndarray, record_id: str, work: _Assembly) -> bool:
    """Interpolate short gaps (NaN) of `(12, time)` in place; False where the recording is dropped."""
    missing = np.isnan(signal)
    if not missing.any():
        return True
    leads = ", ".join(LEADS[row] for row in np.flatnonzero(missing.any(axis=1)))
    share = missing.mean(axis=1).max()
    action = work.rules["missing samples"]
    if action == "repair" and share > REPAIRABLE_GAP:
        action = "drop"
    work.note(
        record_id,
        leads,
        "missing samples",
        "dropped" if action == "drop" else "repaired",
        f"up to {share:.1%}",
    )
    time = np.arange(signal.shape[1])
    for row in np.flatnonzero(missing.any(axis=1)):
        known = ~missing[row]
        signal[row] = np.interp(time, time[known], signal[row, known]) if known.any() else 0.0
    return action != "drop"


def resample(signal: np.ndarray, rate: float, wanted: float) -> np.ndarray:
    """Signals `(..., time)` from `rate` to `wanted` Hz by a polyphase filter that removes what
    would alias.
    """
    if rate == wanted:
        return signal
    ratio = Fraction(wanted / rate).limit_denominator(1000)
    # The ends are extended by their own value: zero padding would draw a step where the baseline is
    # not zero.
    return resample_poly(
        signal, ratio.numerator, ratio.denominator, axis=-1, padtype="line"
    ).astype(np.float32)


def rebuild_limb_leads(signal: np.ndarray, broken: list[str]) -> bool:
    """Compute broken limb leads of `(12, time)` in place from two sound ones; False where that is
    not possible.
    """
    rows = [LEADS.index(lead) for lead in broken]
    sound = [row for row in range(6) if row not in rows]
    if max(rows) > 5 or len(sound) < 2:
        return False
    # Any two different limb leads determine I and II, and those all others.
    to_i_and_ii = np.linalg.inv(LIMB_FROM_I_AND_II[sound[:2]])
    signal[rows] = LIMB_FROM_I_AND_II[rows] @ (to_i_and_ii @ signal[sound[:2]])
    return bool((np.ptp(signal[rows], axis=1) >= FLAT_RANGE).all())


def _reorder(signal: np.ndarray, leads: list[str]) -> bool:
    """Put permuted limb leads right where exactly one order obeys Einthoven's law."""
    order = limb_permutation(signal)
    if order is None:
        return False
    signal[:6] = signal[list(order)]
    return True


def _clip(signal: np.ndarray, leads: list[str]) -> bool:
    """Clip single artefacts; False where a whole lead is absurd, which means a wrong gain."""
    if leads == ["all"]:
        return False
    spread = np.median(np.abs(signal - np.median(signal, axis=1, keepdims=True)), axis=1)
    beyond = (np.abs(signal) > ABSURD_PEAK).mean(axis=1)
    if spread.max() > WRONG_GAIN or beyond.max() > ARTEFACT_SHARE:
        return False
    np.clip(signal, MICROVOLT - ABSURD_PEAK, ABSURD_PEAK - MICROVOLT, out=signal)
    return True


_REPAIRS: dict[str, Callable[[np.ndarray, list[str]], bool]] = {
    "flat lead": rebuild_limb_leads,
    "Einthoven's law broken": _reorder,
    "absurd amplitude": _clip,
    "saturated": lambda signal, leads: True,
}
