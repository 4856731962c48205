"""WFDB headers and signals as they are found in the wild.

The library wfdb refuses headers that the CinC 2021 challenge ships (a record named `E00271.mat`)
and takes 6 ms to parse a header that needs 0.1 ms, so the header and the one format of all our
sources (16 bits, interleaved) are read here; every other format goes through the library.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.errors import DataError, explain_reading
from ecglib.records import MISSING
from ecglib.sources.assemble import Recording, Unreadable, read_each
from ecglib.sources.index_files import Checksums

UNITS_PER_MILLIVOLT = {"mv": 1.0, "uv": 1000.0, "v": 0.001, "nv": 1e6}
# The first release of the Georgia set gave 4880 counts per mV for counts of 1 microvolt; 1000 is
# right.
OBSOLETE_GAINS = {4880.0: 1000.0}
SAMPLING_RATES = (50.0, 20_000.0)  # Hz; outside it the header is wrong
MOST_SAMPLES_A_BYTE = 64  # of any format, compressed ones included

_SIGNAL_LINE = re.compile(
    r"^(?P<file>\S+)\s+(?P<format>\d+)(?:x(?P<per_frame>\d+))?(?::\d+)?(?:\+(?P<offset>\d+))?"
    r"(?:\s+(?P<gain>[^\s(/]+)(?:\((?P<baseline>[^)\s]*)\))?(?:/(?P<units>\S+))?)?"
    r"(?:\s+\S+)?(?:\s+(?P<zero>\S+))?(?:\s+\S+)?(?:\s+(?P<checksum>\S+))?(?:\s+\S+)?(?:\s+(?P<name>.+?))?\s*$"
)


@dataclass(frozen=True)
class Channel:
    """One signal line: file, format, gain in counts per mV, baseline and checksum in counts, lead
    name.
    """

    file: str
    format: str
    offset: int
    gain: float
    baseline: int
    checksum: int | None
    name: str


@dataclass(frozen=True)
class Header:
    """One WFDB header: sampling rate in Hz, length in samples, channels, comment lines without `#`,
    oddities met.
    """

    path: Path
    sampling_rate: float
    length: int | None
    channels: tuple[Channel, ...]
    comments: tuple[str, ...]
    oddities: tuple[str, ...]

    @property
    def leads(self) -> tuple[str, ...]:
        """Names of the channels as written."""
        return tuple(channel.name for channel in self.channels)


def read_header(path: str | Path) -> Header:
    """Header of `NAME.hea`; anything that cannot be understood is a DataError naming the file and
    the line.
    """
    path = Path(path)
    with explain_reading(path):
        text = path.read_bytes().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    comments = tuple(line.lstrip("#").strip() for line in lines if line.startswith("#"))
    content = [line for line in lines if line and not line.startswith("#")]
    if not content:
        raise DataError(f"{path}: the header is empty; download it again.")
    channel_count, sampling_rate, length, oddities = _record_line(path, content[0])
    if len(content) - 1 < channel_count:
        raise DataError(
            f"{path}: {channel_count} signals announced, {len(content) - 1} described; download it "
            "again."
        )
    channels = []
    for line in content[1 : 1 + channel_count]:
        channel, oddity = _signal_line(path, line)
        channels.append(channel)
        oddities += [oddity] if oddity and oddity not in oddities else []
    return Header(path, sampling_rate, length, tuple(channels), comments, tuple(oddities))


def _record_line(path: Path, line: str) -> tuple[int, float, int | None, list[str]]:
    """Channel count, sampling rate, length and oddities of the first line."""
    name, *fields = line.split()
    if "/" in name:
        raise DataError(
            f"{path}: a multi-segment record; join its segments first, for example with wfdb's "
            "tools."
        )
    if len(fields) < 2:
        raise DataError(
            f"{path}: the record line {line!r} lacks the sampling rate; download the header again."
        )
    count = _number(path, fields[0], "number of signals", 1, 1000)
    rate = _number(path, re.split(r"[/(]", fields[1])[0], "sampling rate", *SAMPLING_RATES)
    length = _number(path, fields[2], "number of samples", 0, 1e12) if len(fields) > 2 else 0
    oddities = [f"record line names {name}"] if name != path.stem else []
    return int(count), rate, int(length) or None, oddities


def _signal_line(path: Path, line: str) -> tuple[Channel, str | None]:
    """One channel and what was odd about it."""
    match = _SIGNAL_LINE.match(line)
    if match is None:
        raise DataError(
            f"{path}: the signal line {line!r} cannot be understood; download the header again."
        )
    part = match.groupdict()
    name = part["name"] or ""

    def number(field: str, what: str, default: str = "0") -> float:
        return _number(path, part[field] or default, what, -1e9, 1e9)

    gain = number("gain", "gain")
    if gain == 0:
        raise DataError(
            f"{path}: lead {name or '?'} has gain zero or none, so its millivolts are unknown; "
            "correct it."
        )
    if (part["per_frame"] or "1") != "1":
        raise DataError(
            f"{path}: lead {name} has several samples a frame; resample it to one rate first."
        )
    units = (part["units"] or "mV").lower()
    if units not in UNITS_PER_MILLIVOLT:
        raise DataError(
            f"{path}: lead {name} is in {part['units']!r}, not in mV, uV or V; correct the unit."
        )
    oddity = None
    if gain in OBSOLETE_GAINS:
        oddity = f"obsolete gain {gain:g}/mV read as {OBSOLETE_GAINS[gain]:g}/mV"
        gain = OBSOLETE_GAINS[gain]
    zero = number("zero", "ADC zero")
    baseline = number("baseline", "baseline") if part["baseline"] else zero
    channel = Channel(
        file=part["file"],
        format=part["format"],
        offset=int(part["offset"] or 0),
        gain=gain * UNITS_PER_MILLIVOLT[units],
        baseline=int(baseline),
        checksum=int(number("checksum", "checksum")) if part["checksum"] else None,
        name=name,
    )
    return channel, oddity


def _number(path: Path, text: str, what: str, low: float, high: float) -> float:
    """A finite number within bounds, or a DataError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise DataError(
            f"{path}: the {what} {text!r} is not a number from {low:g} to {high:g}; correct the "
            "header."
        )
    return value


def read_counts(header: Header) -> np.ndarray:
    """Raw counts `(channels, time)` int16; a missing, short or damaged signal file is a
    DataError.
    """
    places = {(channel.file, channel.format, channel.offset) for channel in header.channels}
    file, form, offset = places.pop()
    if places or form != "16":
        return _counts_by_library(header)
    path = _signal_path(header, file)
    channels = len(header.channels)
    with explain_reading(path):
        size = max(path.stat().st_size - offset, 0)
        length = header.length or size // (2 * channels)
        if length < 1 or size < 2 * channels * length:
            raise DataError(
                f"{path}: {size} bytes of signal where the header promises "
                f"{2 * channels * length}; the file is truncated, download it again."
            )
        counts = np.fromfile(path, "<i2", channels * length, offset=offset)
    return counts.reshape(length, channels).T


def wrong_checksums(header: Header, counts: np.ndarray) -> list[str]:
    """Leads whose samples do not sum to the header's 16-bit checksum."""
    sums = counts.astype(np.int64).sum(axis=1).tolist()
    return [
        channel.name
        for channel, total in zip(header.channels, sums, strict=True)
        if channel.checksum is not None and (total - channel.checksum) % 65536
    ]


def read_millivolts(header: Header, verify: bool = False) -> np.ndarray:
    """Signals in mV `(channels, time)` float32, NaN where the file marks a missing sample.

    With `verify`, samples that do not sum to the checksums in the header are a DataError.
    """
    counts = read_counts(header)
    wrong = wrong_checksums(header, counts) if verify else []
    if wrong:
        raise DataError(
            f"{header.path}: the samples of {', '.join(wrong)} do not sum to the checksum in the "
            "header; download the record again, or read with verify=False."
        )
    scales = [(channel.baseline, channel.gain) for channel in header.channels]
    baseline, gain = np.array(scales, dtype=np.float32).T[..., None]
    values = (counts.astype(np.float32) - baseline) / gain
    values[counts == MISSING] = np.nan
    return values


def read_wfdb(
    path: Path, checksums: Checksums, counts_per_millivolt: float | None = None
) -> Recording:
    """One record, its files compared with `checksums`, still without row and target.

    `counts_per_millivolt` takes the place of the header's gains and baselines.
    """
    checksums.check(path)
    header = read_header(path)
    for name in {channel.file for channel in header.channels}:
        checksums.check(_signal_path(header, name))
    notes = [("header", "repaired", oddity) for oddity in header.oddities]
    if counts_per_millivolt is not None:
        channels = [
            replace(channel, gain=counts_per_millivolt, baseline=0) for channel in header.channels
        ]
        header = replace(header, channels=tuple(channels))
        notes = []
    return Recording(
        header.leads,
        read_millivolts(header, checksums.verify),
        header.sampling_rate,
        notes=notes,
        comments=header.comments,
    )


def read_listed(
    rows: pd.DataFrame,
    paths: Sequence[Path],
    targets: np.ndarray,
    checksums: Checksums,
    rules: Mapping[str, str] | None,
    counts_per_millivolt: float | None = None,
) -> Iterator[Recording | Unreadable]:
    """The WFDB records of a table with one row per record: its row, header path and target."""

    def read(position: int) -> Recording:
        recording = read_wfdb(paths[position], checksums, counts_per_millivolt)
        row = rows.iloc[position].to_dict()
        return replace(recording, row=row, target=targets[position])

    return read_each(rows["record_id"], read, rules)


def _signal_path(header: Header, name: str) -> Path:
    """The signal file beside its header; a name that is a path could point anywhere and is
    refused.
    """
    if name in {".", ".."} or Path(name).name != name or "\0" in name:
        raise DataError(
            f"{header.path}: the signal file {name!r} is not a plain file name; correct the header."
        )
    return header.path.parent / name


def _counts_by_library(header: Header) -> np.ndarray:
    """Counts of a format other than 16, read by wfdb."""
    import wfdb

    for channel in header.channels:
        path = _signal_path(header, channel.file)
        with explain_reading(path):
            size = path.stat().st_size
        # The library would reserve the memory for all announced samples first.
        if (header.length or 0) > MOST_SAMPLES_A_BYTE * size:
            raise DataError(
                f"{path}: far too short for {header.length} samples; it is truncated, download it "
                "again."
            )
    try:
        record = wfdb.rdrecord(str(header.path.with_suffix("")), physical=False)
        counts = record.d_signal.T
    # Whatever the library raises on a damaged file is one thing to our caller.
    except Exception as error:
        raise DataError(
            f"{header.path}: wfdb cannot read this record ({error}); download it again."
        ) from error
    if counts.min() < -32768 or counts.max() > 32767:
        raise DataError(
            f"{header.path}: samples of more than 16 bits; convert the record to format 16 first."
        )
    return counts.astype(np.int16)
