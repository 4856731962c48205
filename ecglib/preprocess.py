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
STILL = f"moves less than {FLAT_RANGE:g} mV in the band"
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
    ids = records.table["record_id"].astype(str)
    notes = []

    def blocks():
        for start in range(0, len(records), BLOCK):
            counts = records.signals[start : start + BLOCK]
            # Up to the last sample at which any lead is not zero; 0 where all are.
            sizes = (counts.any(axis=1) * np.arange(1, counts.shape[2] + 1)).max(axis=1)
            block = np.zeros((*counts.shape[:2], length), dtype=np.int16)
            for size in np.unique(sizes[sizes > 0]):  # nearly always a single one
                rows = np.flatnonzero(sizes == size)
                if size <= _edge(order):
                    raise DataError(
                        f"Record {ids[start + rows[0]]}: {size} samples before its padding, where "
                        f"a filter of order {order} needs more than {_edge(order)}; leave the "
                        "record out."
                    )
                values = _standardised(counts[rows, :, :size], records.scale, sections)
                block[rows, :, :size] = to_counts(values[:, :, :length], SCALE)
            yield block
            for place, flat in enumerate(~block.any(axis=2), start):
                if flat.any():
                    leads = ", ".join(np.array(LEADS)[flat])
                    notes.append((ids[place], leads, "flat lead", "set to zeros", STILL))
            for place in np.flatnonzero(sizes > length):
                seconds = f"{sizes[place] / records.sampling_rate:.2f} s"
                notes.append((ids[start + place], "all", "length", "cut", seconds))

    signals = counts_on_disk(blocks())
    noted = pd.DataFrame(notes, columns=LEFT_OUT_COLUMNS, dtype=str)
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


def _check(records, low, high, order, length):
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


def _edge(order):
    """By how many samples each end is continued before filtering: what filtfilt(b, a) takes for 2 x
    order + 1 taps.
    """
    return 3 * (2 * order + 1)


def _standardised(counts, scale, sections):
    """Leads of `(n, 12, time)` counts of `scale` mV, filtered, in standard deviations of their
    known samples; NaN where missing, 0 where flat.
    """
    missing = counts == MISSING
    signals = counts * scale
    bridge_gaps(signals, missing)
    # Second-order sections keep 13 digits of what filtfilt(b, a) keeps 8 of; ends as in filtfilt.
    signals = sosfiltfilt(sections, signals, axis=2, padlen=_edge(len(sections)))
    known = np.maximum((~missing).sum(axis=2, keepdims=True), 1)
    signals -= signals.sum(axis=2, keepdims=True, where=~missing) / known
    signals[missing] = 0.0
    deviation = np.sqrt(np.square(signals).sum(axis=2, keepdims=True) / known)
    flat = np.ptp(signals, axis=2, keepdims=True) < FLAT_RANGE
    signals /= np.where(flat, np.inf, deviation)
    signals[missing] = np.nan
    return signals
