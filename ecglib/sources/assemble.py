"""From single recordings to `Records`: lead order, missing samples, rate, length, faults; each by
one stated rule.

Every repair and every omission becomes one row of `Records.left_out`. Recordings are handled one
after the other and written to disk as counts, so memory does not grow with their number.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
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

# What is done about each fault; a caller may replace single entries by "drop", "keep" or "stop".
RULES: Mapping[str, str] = {
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
_LEAD_NAMES = {lead.upper(): lead for lead in LEADS}


@dataclass
class Recording:
    """One recording as read: leads `(names,)`, millivolts `(leads, time)` with NaN where missing,
    rate in Hz.

    `row` goes to the table (record_id, patient_id, fold, source, ...), `target` `(classes,)` to the
    targets, and `notes` (fault, action, detail) to the left-out table; `comments` are the lines of
    a WFDB header that the reader of a data set may understand.
    """

    leads: tuple[str, ...]
    millivolts: np.ndarray
    sampling_rate: float
    row: dict = field(default_factory=dict)
    target: np.ndarray | None = None
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    comments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unreadable:
    """A listed recording that could not be read, with the sentence that says why."""

    record_id: str
    reason: str


def merged_rules(rules: Mapping[str, str] | None) -> dict[str, str]:
    """The default rules with the caller's replacements; DataError for a fault or action that does
    not exist.
    """
    merged = {**RULES, **(rules or {})}
    for fault, action in merged.items():
        if fault not in RULES or action not in ("repair", "drop", "keep", "stop"):
            raise DataError(
                f"There is no rule {fault!r}: {action!r}; faults are {', '.join(RULES)}."
            )
    return merged


def readable(
    name: str, recordings: Iterable[Recording], rules: Mapping[str, str] | None
) -> Iterator[Recording | Unreadable]:
    """The recordings up to the first DataError, which stops, or becomes `Unreadable` under the rule
    `unreadable: drop`.
    """
    try:
        yield from recordings
    except DataError as error:
        if merged_rules(rules)["unreadable"] == "stop":
            raise
        yield Unreadable(name, str(error))


def read_each(
    names: Iterable[str], read: Callable[[int], Recording], rules: Mapping[str, str] | None
) -> Iterator[Recording | Unreadable]:
    """Read the recordings of these names by their positions, one after the other."""
    for position, name in enumerate(names):
        yield from readable(name, map(read, [position]), rules)


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
    length = round(sampling_rate * seconds)
    ledger = _Ledger(merged_rules(rules))
    formed = (_one_form(recording, sampling_rate, length, ledger) for recording in recordings)
    usable = (recording for recording in formed if recording is not None)
    rows: list[dict] = []
    targets: list[np.ndarray] = []

    def sound() -> Iterator[np.ndarray]:
        while batch := list(islice(usable, BATCH)):
            signals = np.stack([recording.millivolts for recording in batch])
            ids = [recording.row["record_id"] for recording in batch]
            kept = _settle_faults(signals, ids, ledger)
            rows.extend(batch[place].row for place in kept)
            targets.extend(batch[place].target for place in kept)
            yield to_counts(signals[kept])

    signals = counts_on_disk(sound())
    left_out = pd.DataFrame(ledger.rows, columns=list(LEFT_OUT_COLUMNS))
    if not rows:
        why = f" ({left_out['fault'][0]}: {left_out['detail'][0]})" if len(left_out) else ""
        raise DataError(
            f"{about.get('folder', about.get('source'))}: no usable recording{why}; check the "
            "folder."
        )
    return Records(
        signals,
        MICROVOLT,
        sampling_rate,
        pd.DataFrame(rows),
        np.stack(targets),
        tuple(classes),
        left_out,
        about,
    )


class _Ledger:
    """What was repaired or left out by the rules: rows (record_id, lead, fault, action, detail)."""

    def __init__(self, rules: Mapping[str, str]) -> None:
        self.rules = rules
        self.rows: list[tuple[str, str, str, str, str]] = []

    def settle(
        self,
        record_id: str,
        leads: Sequence[str],
        fault: str,
        detail: str,
        repair: Callable[[], bool],
        kept: str = "kept",
    ) -> bool:
        """Do about a fault what its rule says and note it; False where the recording is dropped.

        `repair` says whether it succeeded; `kept` is the note where the rule is to keep. DataError
        where the rule is to stop.
        """
        lead = ", ".join(leads)
        rule = self.rules[fault]
        if rule == "stop":
            raise DataError(
                f"Record {record_id}, {lead}: {fault} ({detail}); mend the file or allow another "
                "rule."
            )
        if rule == "repair":
            action = "repaired" if repair() else "dropped"
        else:
            action = {"keep": kept, "drop": "dropped"}[rule]
        self.rows.append((record_id, lead, fault, action, detail))
        return action != "dropped"


def _settle_faults(signals: np.ndarray, record_ids: Sequence[str], ledger: _Ledger) -> list[int]:
    """Positions of the signals `(n, 12, time)` that are sound, repaired in place or kept."""
    found: dict[tuple[int, str], list[tuple[str, str]]] = {}
    for place, lead, fault, detail in find_faults(signals):
        found.setdefault((place, fault), []).append((lead, detail))
    dropped = set()
    for place, fault in sorted(found, key=lambda key: key[0]):
        leads, details = zip(*found[place, fault], strict=True)
        detail = "; ".join(dict.fromkeys(details))
        repair = partial(_REPAIRS[fault], signals[place], leads)
        if place not in dropped and not ledger.settle(
            record_ids[place], leads, fault, detail, repair
        ):
            dropped.add(place)
    return [place for place in range(len(signals)) if place not in dropped]


def _one_form(
    recording: Recording | Unreadable, sampling_rate: float, length: int, ledger: _Ledger
) -> Recording | None:
    """The recording with the twelve leads in order, without gaps, at the wanted rate and length;
    None where it is dropped.
    """
    if isinstance(recording, Unreadable):
        ledger.rows.append((recording.record_id, "all", "unreadable", "dropped", recording.reason))
        return None
    record_id = str(recording.row["record_id"])
    ledger.rows += [(record_id, "all", *note) for note in recording.notes]
    signal = _in_order(recording, record_id, ledger)
    if signal is None or not _without_gaps(signal, record_id, ledger):
        return None
    signal = resample(signal, recording.sampling_rate, sampling_rate)
    found = signal.shape[1]
    if found != length:
        action = "cut" if found > length else "padded with zeros"
        ledger.rows.append((record_id, "all", "length", action, f"{found / sampling_rate:.2f} s"))
        signal = np.pad(signal[:, :length], ((0, 0), (0, max(length - found, 0))))
    return replace(recording, leads=LEADS, millivolts=signal, sampling_rate=sampling_rate)


def _in_order(recording: Recording, record_id: str, ledger: _Ledger) -> np.ndarray | None:
    """Signals `(12, time)` in the study's order, absent limb leads computed; None where the
    recording is dropped.
    """
    found = {
        _LEAD_NAMES.get(name.upper().removeprefix("LEAD ")): signal
        for name, signal in zip(recording.leads, recording.millivolts, strict=True)
    }
    absent = [lead for lead in LEADS if lead not in found]
    nothing = np.zeros(recording.millivolts.shape[1])
    signal = np.array([found.get(lead, nothing) for lead in LEADS], dtype=np.float32)
    if absent and not ledger.settle(
        record_id,
        absent,
        "lead missing",
        f"{len(LEADS) - len(absent)} of 12 leads",
        lambda: _rebuild_limb_leads(signal, absent),
        kept="kept as zeros",
    ):
        return None
    return signal


def _without_gaps(signal: np.ndarray, record_id: str, ledger: _Ledger) -> bool:
    """Interpolate the gaps (NaN) of `(12, time)` in place; False where the recording is dropped."""
    missing = np.isnan(signal)
    if not missing.any():
        return True
    share = missing.mean(axis=1)
    kept = ledger.settle(
        record_id,
        [lead for lead, part in zip(LEADS, share, strict=True) if part],
        "missing samples",
        f"up to {share.max():.1%}",
        lambda: share.max() <= REPAIRABLE_GAP,
        kept="repaired",
    )
    bridge_gaps(signal, missing)
    return kept


def resample(signal: np.ndarray, rate: float, wanted: float) -> np.ndarray:
    """Signals `(..., time)` from `rate` to `wanted` Hz by a polyphase filter that removes what
    would alias.
    """
    if rate == wanted:
        return signal
    ratio = Fraction(wanted / rate).limit_denominator(1000)
    up, down = ratio.as_integer_ratio()
    # The ends go on in a line: zero padding would draw a step where the baseline is not zero.
    return resample_poly(signal, up, down, axis=-1, padtype="line").astype(np.float32)


def _rebuild_limb_leads(signal: np.ndarray, broken: Sequence[str]) -> bool:
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


def _reorder(signal: np.ndarray, leads: Sequence[str]) -> bool:
    """Put permuted limb leads right where exactly one order obeys Einthoven's law."""
    order = limb_permutation(signal)
    if order is None:
        return False
    signal[:6] = signal[list(order)]
    return True


def _clip(signal: np.ndarray, leads: Sequence[str]) -> bool:
    """Clip single artefacts; False where a whole lead is absurd, which means a wrong gain."""
    if "all" in leads:
        return False
    spread = np.median(np.abs(signal - np.median(signal, axis=1, keepdims=True)), axis=1)
    beyond = (np.abs(signal) > ABSURD_PEAK).mean(axis=1)
    if spread.max() > WRONG_GAIN or beyond.max() > ARTEFACT_SHARE:
        return False
    np.clip(signal, MICROVOLT - ABSURD_PEAK, ABSURD_PEAK - MICROVOLT, out=signal)
    return True


_REPAIRS: dict[str, Callable[[np.ndarray, Sequence[str]], bool]] = {
    "flat lead": _rebuild_limb_leads,
    "Einthoven's law broken": _reorder,
    "absurd amplitude": _clip,
    "saturated": lambda signal, leads: True,
}
