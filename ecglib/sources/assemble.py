"""From single recordings to `Records`: lead order, missing samples, rate, length, faults; each by
one stated rule.

Every repair and every omission becomes one row of `Records.left_out`. Recordings are handled one
after the other and written to disk as counts, so memory does not grow with their number.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice

import numpy as np
import pandas as pd
from scipy.signal import resample_poly

from ecglib.errors import DataError
from ecglib.records import (
    ABSURD_PEAK,
    FLAT_RANGE,
    LEADS,
    LEFT_OUT_COLUMNS,
    LIMB_FROM_I_AND_II,
    MICROVOLT,
    Records,
    bridge_gaps,
    counts_on_disk,
    find_faults,
    limb_permutation,
    to_counts,
)

REPAIRABLE_GAP = 0.1  # share of a lead's samples that may be missing and are then interpolated
WRONG_GAIN = 5.0  # mV; median distance from the median beyond which the whole lead has a wrong gain
# Share of a lead's samples beyond ABSURD_PEAK that is a wrong gain, not an artefact.
ARTEFACT_SHARE = 0.05
BATCH = 256  # recordings checked and written together

Rules = Mapping[str, str]
# What is done about each fault; a caller may replace single entries by "drop", "keep" or "stop".
RULES: Rules = {
    # A limb lead follows from two others; without a chest lead the recording is dropped.
    "lead missing": "repair",
    # Up to REPAIRABLE_GAP by linear interpolation, otherwise dropped.
    "missing samples": "repair",
    # A limb lead follows from two others; with a flat chest lead the recording is dropped.
    "flat lead": "repair",
    # Reordered where one order of the limb leads fits, otherwise dropped.
    "Einthoven's law broken": "repair",
    # Single artefacts are clipped to +-20 mV; a wrong gain is dropped.
    "absurd amplitude": "repair",
    # Counted and kept: clipped R peaks still carry the rhythm.
    "saturated": "keep",
    # File absent, truncated or damaged: a broken download should be mended, not analysed.
    "unreadable": "stop",
}
# What is noted where the rule is to keep.
_KEPT = {"lead missing": "kept as zeros", "missing samples": "repaired", "saturated": "kept"}


@dataclass
class Recording:
    """One recording as read: leads `(names,)`, millivolts `(leads, time)` with NaN where missing,
    rate in Hz.

    `row` goes to the table (record_id, patient_id, fold, source, ...), `target` `(classes,)` to the
    targets, and `notes` (fault, action, detail) to the left-out table; `comments` are the lines of
    a WFDB header that the reader of a data set may understand.
    """

    leads: Sequence[str]
    millivolts: np.ndarray
    sampling_rate: float
    row: dict = field(default_factory=dict)
    target: np.ndarray | None = None
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    comments: Sequence[str] = ()


# The recordings of each file, read one after the other, with the name that stands for those that
# cannot be read.
Files = Iterable[tuple[str, Iterable[Recording]]]


def assemble(
    files: Files,
    classes: Iterable[str],
    sampling_rate: float,
    seconds: float,
    about: dict,
    rules: Rules | None = None,
) -> Records:
    """`Records` of one rate (Hz) and length from the recordings of `files`.

    A DataError while a file is read ends this file under the rule `unreadable: drop`; otherwise it
    stops, as does a fault whose rule says so, and a rule, fault or action that does not exist.
    """
    ledger = _Ledger(rules)
    length = round(sampling_rate * seconds)
    rows = []
    targets = []

    def blocks():
        formed = (
            _one_form(recording, sampling_rate, length, ledger)
            for recording in _readable(files, ledger)
        )
        usable = filter(None, formed)
        while batch := list(islice(usable, BATCH)):
            signals, batch_rows, batch_targets = zip(*batch)
            signals = np.stack(signals)
            sound = _sound(signals, [row["record_id"] for row in batch_rows], ledger)
            rows.extend(batch_rows[place] for place in sound)
            targets.extend(batch_targets[place] for place in sound)
            yield to_counts(signals[sound])

    signals = counts_on_disk(blocks())
    left_out = pd.DataFrame(ledger.rows, columns=LEFT_OUT_COLUMNS)
    if not rows:
        why = f" ({left_out['fault'][0]}: {left_out['detail'][0]})" if len(left_out) else ""
        raise DataError(
            f"{about.get('folder', about.get('source'))}: no usable recording{why}; check the "
            "folder."
        )
    table = pd.DataFrame(rows)
    return Records(
        signals, MICROVOLT, sampling_rate, table, np.stack(targets), classes, left_out, about
    )


class _Ledger:
    """What was repaired or left out by the rules: rows (record_id, lead, fault, action, detail)."""

    def __init__(self, rules: Rules | None) -> None:
        self.rules = {**RULES, **(rules or {})}
        self.rows = []
        for fault, action in self.rules.items():
            if fault not in RULES or action not in ("repair", "drop", "keep", "stop"):
                raise DataError(
                    f"There is no rule {fault!r}: {action!r}; faults are {', '.join(RULES)}."
                )

    def settle(
        self, record_id: str, signal: np.ndarray, leads: Sequence[str], fault: str, detail: str
    ) -> bool:
        """Do about a fault of `(12, time)` what its rule says and note it; False where the
        recording is dropped, DataError where the rule is to stop.
        """
        lead = ", ".join(leads)
        rule = self.rules[fault]
        if rule == "stop":
            raise DataError(
                f"Record {record_id}, {lead}: {fault} ({detail}); mend the file or allow another "
                "rule."
            )
        action = _KEPT.get(fault, "kept") if rule == "keep" else "dropped"
        if rule == "repair" and _REPAIRS[fault](signal, leads):
            action = "repaired"
        self.rows.append((record_id, lead, fault, action, detail))
        return action != "dropped"


def _readable(files, ledger):
    """The recordings of all files; what cannot be read is settled by its rule."""
    for name, recordings in files:
        try:
            yield from recordings
        except DataError as error:
            if ledger.rules["unreadable"] == "stop":
                raise
            ledger.rows.append((name, "all", "unreadable", "dropped", str(error)))


def _sound(signals, record_ids, ledger):
    """Positions of the signals `(n, 12, time)` that are sound, repaired in place or kept."""
    found = {}
    for place, lead, fault, detail in find_faults(signals):
        found.setdefault((place, fault), []).append((lead, detail))
    sound = list(range(len(signals)))
    for place, fault in sorted(found, key=lambda key: key[0]):
        leads, details = zip(*found[place, fault])
        detail = "; ".join(dict.fromkeys(details))
        if place in sound and not ledger.settle(
            record_ids[place], signals[place], leads, fault, detail
        ):
            sound.remove(place)
    return sound


def _one_form(recording, sampling_rate, length, ledger):
    """Signals `(12, length)` in the study's order, without gaps, at the wanted rate, with row and
    target; None where the recording is dropped.
    """
    record_id = recording.row["record_id"]
    ledger.rows += [(record_id, "all", *note) for note in recording.notes]
    names = [name.upper().removeprefix("LEAD ") for name in recording.leads]
    found = dict(zip(names, recording.millivolts))
    absent = [lead for lead in LEADS if lead.upper() not in found]
    nothing = np.zeros(recording.millivolts.shape[1])
    signal = np.array([found.get(lead.upper(), nothing) for lead in LEADS], dtype=np.float32)
    present = f"{len(LEADS) - len(absent)} of 12 leads"
    if absent and not ledger.settle(record_id, signal, absent, "lead missing", present):
        return None
    missing = np.isnan(signal)
    if missing.any():
        share = missing.mean(axis=1)
        leads = np.array(LEADS)[share > 0]
        detail = f"up to {share.max():.1%}"
        if not ledger.settle(record_id, signal, leads, "missing samples", detail):
            return None
        bridge_gaps(signal, missing)
    signal = resample(signal, recording.sampling_rate, sampling_rate)
    samples = signal.shape[1]
    if samples != length:
        action = "cut" if samples > length else "padded with zeros"
        seconds = f"{samples / sampling_rate:.2f} s"
        ledger.rows.append((record_id, "all", "length", action, seconds))
        signal = np.pad(signal[:, :length], ((0, 0), (0, max(length - samples, 0))))
    return signal, recording.row, recording.target


def resample(signal: np.ndarray, rate: float, wanted: float) -> np.ndarray:
    """Signals `(..., time)` from `rate` to `wanted` Hz by a polyphase filter that removes what
    would alias.
    """
    if rate == wanted:
        return signal
    up, down = Fraction(wanted / rate).limit_denominator(1000).as_integer_ratio()
    # The ends go on in a line: zero padding would draw a step where the baseline is not zero.
    return resample_poly(signal, up, down, axis=-1, padtype="line").astype(np.float32)


def _rebuild_limb_leads(signal, broken):
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


def _reorder(signal, leads):
    """Put permuted limb leads right where exactly one order obeys Einthoven's law."""
    order = limb_permutation(signal)
    if order is None:
        return False
    signal[:6] = signal[list(order)]
    return True


def _clip(signal, leads):
    """Clip single artefacts; False where a whole lead is absurd, which means a wrong gain."""
    if "all" in leads:
        return False
    spread = np.median(np.abs(signal - np.median(signal, axis=1, keepdims=True)), axis=1)
    beyond = (np.abs(signal) > ABSURD_PEAK).mean(axis=1)
    if spread.max() > WRONG_GAIN or beyond.max() > ARTEFACT_SHARE:
        return False
    np.clip(signal, MICROVOLT - ABSURD_PEAK, ABSURD_PEAK - MICROVOLT, out=signal)
    return True


_REPAIRS = {
    "lead missing": _rebuild_limb_leads,
    "missing samples": lambda signal, leads: np.isnan(signal).mean(axis=1).max() <= REPAIRABLE_GAP,
    "flat lead": _rebuild_limb_leads,
    "Einthoven's law broken": _reorder,
    "absurd amplitude": _clip,
    "saturated": lambda signal, leads: True,
}
