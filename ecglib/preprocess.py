"""The preprocessing of CE-SSL (Zhou et al. 2024, arXiv 2406.14377) for its four downstream sets,
blocks at a time.

Each lead is band-passed without delay, brought to mean 0 and standard deviation 1 over its record,
and followed by zeros up to one length: a record of 10 s at the published 500 Hz becomes 5,000
samples and 1,144 zeros. Voltages and proportions between leads are lost by this, and with them
Einthoven's law and the voltage criteria.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.signal import butter, sosfiltfilt

from ecglib.errors import DataError
from ecglib.records import (
    FLAT_RANGE,
    LEADS,
    LEFT_OUT_COLUMNS,
    MISSING,
    Records,
    bridge_gaps,
    counts_on_disk,
    to_counts,
)

UNIT = "standard deviations"
# Standard deviations per count, +-82 in all: none of n samples lies further out than sqrt(n - 1),
# which is 78 where n is 6144.
SCALE = 0.0025
BLOCK = 16  # records filtered together; more are not faster


def preprocess(
    records: Records, low: float = 1.0, high: float = 47.0, order: int = 3, length: int = 6144
) -> Records:
    """Records `(n, 12, length)` in standard deviations: Butterworth band-pass from `low` to `high`
    Hz, z-score, zeros.

    Mean and deviation are those of the whole lead, before anything beyond `length` samples is cut;
    zeros with which a reader ended a short record are not part of it. A missing sample stays
    missing. A lead that moves less than FLAT_RANGE within the band becomes zeros; this and what was
    cut is said in `left_out`, the settings in `about`. Raises DataError for a band that does not
    fit the sampling rate and for a record shorter than the filter needs.
    """
    _check(records, low, high, order, length)
    sections = butter(order, (low, high), "bandpass", fs=records.sampling_rate, output="sos")
    notes: list[tuple[str, str, str, str, str]] = []

    def standardised(start: int) -> np.ndarray:
        part = slice(start, start + BLOCK)
        counts = np.asarray(records.signals[part])
        ids = records.table["record_id"].iloc[part].astype(str).tolist()
        sizes = _samples_before_padding(counts)
        _check_sizes(ids, sizes, order)
        block = _standardised_block(counts, sizes, records.scale, sections, length)
        notes.extend(_notes(ids, sizes, ~block.any(axis=2), length, records.sampling_rate))
        return block

    signals = counts_on_disk(map(standardised, range(0, len(records), BLOCK)))
    noted = pd.DataFrame(notes, columns=list(LEFT_OUT_COLUMNS), dtype=str)
    settings = {
        "filter": f"Butterworth band-pass of order {order}, forwards and backwards",
        "band_hz": [low, high],
        "normalised": "each lead of a record to mean 0 and standard deviation 1",
        "length": length,
    }
    return replace(
        records,
        signals=signals,
        scale=SCALE,
        left_out=pd.concat([records.left_out, noted], ignore_index=True),
        about={**records.about, "unit": UNIT, "preprocessing": settings},
        known_fingerprint=None,
    )


def _check(records: Records, low: float, high: float, order: int, length: int) -> None:
    """DataError where these records cannot be preprocessed in this way."""
    half = records.sampling_rate / 2
    if records.unit != "mV":
        raise DataError(
            f"{records.name}: the signals are in {records.unit}; preprocess the records in mV."
        )
    if not len(records):
        raise DataError(
            f"{records.name}: there is no record to preprocess; check what was selected."
        )
    if not 0 < low < high < half:
        raise DataError(
            f"{records.name}: a band from {low:g} to {high:g} Hz does not lie between 0 and "
            f"{half:g} Hz, half the sampling rate; choose another band or read the records at a "
            "higher rate."
        )
    if order < 1 or length < 1:
        raise DataError(
            f"An order of {order} and a length of {length} samples must both be at least 1; "
            "correct them."
        )


def _edge(order: int) -> int:
    """By how many samples each end is continued before filtering: what filtfilt(b, a) takes for 2 x
    order + 1 taps.
    """
    return 3 * (2 * order + 1)


def _samples_before_padding(counts: np.ndarray) -> np.ndarray:
    """Samples `(n,)` of `(n, 12, time)` up to the last at which any lead is not zero; 0 where all
    are.
    """
    any_lead = (counts != 0).any(axis=1)
    return np.where(any_lead.any(axis=1), counts.shape[2] - any_lead[:, ::-1].argmax(axis=1), 0)


def _check_sizes(ids: list[str], sizes: np.ndarray, order: int) -> None:
    """DataError naming the first record that is too short to be filtered; one of nothing but zeros
    needs no filter.
    """
    short = (sizes > 0) & (sizes <= _edge(order))
    if short.any():
        place = int(short.argmax())
        raise DataError(
            f"Record {ids[place]}: {sizes[place]} samples before its padding, where a filter of "
            f"order {order} needs more than {_edge(order)}; leave the record out."
        )


def _standardised_block(
    counts: np.ndarray, sizes: np.ndarray, scale: float, sections: np.ndarray, length: int
) -> np.ndarray:
    """Counts `(n, 12, length)` of SCALE from counts `(n, 12, time)` of `scale` mV, `sizes` of them
    before padding.
    """
    result = np.zeros((len(counts), len(LEADS), length), dtype=np.int16)
    for size in np.unique(sizes[sizes > 0]):  # nearly always a single one
        rows = sizes == size
        part = counts[rows, :, :size]
        missing = part == MISSING
        signals = part * scale
        bridge_gaps(signals, missing)
        # Second-order sections keep 13 digits of what filtfilt(b, a) keeps 8 of; ends as in
        # filtfilt.
        filtered = sosfiltfilt(sections, signals, axis=2, padlen=_edge(len(sections)))
        result[rows, :, :size] = to_counts(_standardised(filtered, missing)[:, :, :length], SCALE)
    return result


def _standardised(signals: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Leads of `(n, 12, time)` in mV in standard deviations of their known samples; NaN where
    missing, 0 where flat.
    """
    known = np.maximum((~missing).sum(axis=2, keepdims=True), 1)
    centred = signals - signals.sum(axis=2, keepdims=True, where=~missing) / known
    centred[missing] = 0.0
    deviation = np.sqrt(np.square(centred).sum(axis=2, keepdims=True) / known)
    flat = np.ptp(centred, axis=2, keepdims=True) < FLAT_RANGE
    centred /= np.where(flat, np.inf, deviation)
    centred[missing] = np.nan
    return centred


def _notes(
    ids: list[str], sizes: np.ndarray, flat: np.ndarray, length: int, sampling_rate: float
) -> list[tuple[str, str, str, str, str]]:
    """One row of `left_out` for each record with leads `flat (n, 12)`, and for each that is longer
    than `length`.
    """
    detail = f"moves less than {FLAT_RANGE:g} mV in the band"
    flat_leads = [
        (name, ", ".join(np.array(LEADS)[leads]), "flat lead", "set to zeros", detail)
        for name, leads in zip(ids, flat, strict=True)
        if leads.any()
    ]
    return flat_leads + [
        (name, "all", "length", "cut", f"{size / sampling_rate:.2f} s")
        for name, size in zip(ids, sizes, strict=True)
        if size > length
    ]
