"""WFDB headers and signals as they are found in the wild.

The library wfdb refuses headers that the CinC 2021 challenge ships (a record named `E00271.mat`)
and takes 6 ms to parse a header that needs 0.1 ms, so the header and the one format of all our
sources (16 bits, interleaved) are read here; every other format goes through the library.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.errors import DataError, explain_reading
from ecglib.records import MISSING
from ecglib.sources.assemble import Files, Recording
from ecglib.sources.index_files import Checksums

UNITS_PER_MILLIVOLT = {"": 1.0, "mv": 1.0, "uv": 1000.0, "v": 0.001, "nv": 1e6}
# The first release of the Georgia set gave 4880 counts per mV for counts of 1 microvolt; 1000 is
# right.
OBSOLETE_GAINS = {4880.0: 1000.0}
SAMPLING_RATES = (50.0, 20_000.0)  # Hz; outside it the header is wrong
MOST_SAMPLES_A_BYTE = 64  # of any format, compressed ones included

_SIGNAL_LINE = re.compile(
    r"^(?P<file>\S+)\s+(?P<format>\d+)(?:x(?P<per_frame>\d+))?(?::\d+)?(?:\+(?P<offset>\d+))?"
    r"(?:\s+(?P<gain>[^\s(/]+)(?:\((?P<baseline>[^)\s]*)\))?(?:/(?P<units>\S+))?)?"
    r"(?:\s+\S+)?(?:\s+(?P<ADC_zero>\S+))?(?:\s+\S+)?(?:\s+(?P<checksum>\S+))?(?:\s+\S+)?(?:\s+(?P<name>.+?))?\s*$"
)


@dataclass(frozen=True)
class Channel:
    """One signal line: file, format, offset in bytes, gain in counts per mV, baseline and checksum
    in counts, lead name.
    """

    file: Path
    format: str
    offset: int
    gain: float
    baseline: int
    checksum: int | None
    name: str


@dataclass(frozen=True)
class Header:
    """One WFDB header: sampling rate in Hz, length in samples (0 where it is not told), channels,
    comment lines without `#`, oddities met.
    """

    path: Path
    sampling_rate: float
    length: int
    channels: list[Channel]
    comments: list[str]
    oddities: list[str]


def read_header(path: str | Path) -> Header:
    """Header of `NAME.hea`; anything that cannot be understood is a DataError naming the file and
    the line.
    """
    path = Path(path)
    with explain_reading(path):
        text = path.read_bytes().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    comments = [line.lstrip("#").strip() for line in lines if line.startswith("#")]
    content = [line for line in lines if line and not line.startswith("#")]
    if not content:
        raise DataError(f"{path}: the header is empty; download it again.")
    name, *fields = content[0].split()
    if "/" in name:
        raise DataError(
            f"{path}: a multi-segment record; join its segments first, for example with wfdb's "
            "tools."
        )
    if len(fields) < 2:
        raise DataError(
            f"{path}: the record line {content[0]!r} lacks the sampling rate; download the header "
            "again."
        )
    count = int(_number(path, fields[0], "number of signals", 1, 1000))
    rate = _number(path, re.split(r"[/(]", fields[1])[0], "sampling rate", *SAMPLING_RATES)
    length = _number(path, [*fields, "0"][2], "number of samples", 0, 1e12)
    described = content[1 : 1 + count]
    if len(described) < count:
        raise DataError(
            f"{path}: {count} signals announced, {len(described)} described; download it again."
        )
    oddities = [] if name == path.stem else [f"record line names {name}"]
    channels = [_channel(path, line, oddities) for line in described]
    return Header(path, rate, int(length), channels, comments, list(dict.fromkeys(oddities)))


def _channel(path, line, oddities):
    """The channel of one signal line; what was odd about it is added to the oddities."""
    match = _SIGNAL_LINE.match(line)
    if match is None:
        raise DataError(
            f"{path}: the signal line {line!r} cannot be understood; download the header again."
        )
    part = match.groupdict(default="")

    def number(field):
        return _number(path, part[field] or "0", field.replace("_", " "), -1e9, 1e9)

    # A name that is a path could point anywhere.
    file, name = part["file"], part["name"]
    if re.search(r"[/\\\0]|^\.{1,2}$", file):
        raise DataError(
            f"{path}: the signal file {file!r} is not a plain file name; correct the header."
        )
    gain = number("gain")
    if gain == 0:
        raise DataError(
            f"{path}: lead {name or '?'} has gain zero or none, so its millivolts are unknown; "
            "correct it."
        )
    if part["per_frame"] not in {"", "1"}:
        raise DataError(
            f"{path}: lead {name} has several samples a frame; resample it to one rate first."
        )
    per_millivolt = UNITS_PER_MILLIVOLT.get(part["units"].lower())
    if per_millivolt is None:
        raise DataError(
            f"{path}: lead {name} is in {part['units']!r}, not in mV, uV or V; correct the unit."
        )
    right = OBSOLETE_GAINS.get(gain, gain)
    if right != gain:
        oddities.append(f"obsolete gain {gain:g}/mV read as {right:g}/mV")
    return Channel(
        path.parent / file,
        part["format"],
        int(part["offset"] or 0),
        right * per_millivolt,
        int(number("baseline" if part["baseline"] else "ADC_zero")),
        int(number("checksum")) if part["checksum"] else None,
        name,
    )


def _number(path, text, what, low, high):
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


def read_millivolts(
    header: Header, verify: bool = False, counts_per_millivolt: float | None = None
) -> np.ndarray:
    """Signals in mV `(channels, time)` float32, NaN where the file marks a missing sample.

    `counts_per_millivolt` takes the place of the header's gains and baselines. With `verify`,
    samples that do not sum to the 16-bit checksums in the header are a DataError, as a missing,
    short or damaged signal file always is.
    """
    counts = _counts(header)
    if verify:
        sums = counts.sum(axis=1, dtype=np.int64).tolist()
        wrong = [
            channel.name
            for channel, total in zip(header.channels, sums)
            if channel.checksum is not None and (total - channel.checksum) % 65536
        ]
        if wrong:
            raise DataError(
                f"{header.path}: the samples of {', '.join(wrong)} do not sum to the checksum in "
                "the header; download the record again, or read with verify=False."
            )
    scales = [(channel.baseline, channel.gain) for channel in header.channels]
    if counts_per_millivolt:
        scales = [(0, counts_per_millivolt)]
    baseline, gain = np.array(scales, dtype=np.float32).T[..., None]
    values = (counts.astype(np.float32) - baseline) / gain
    values[counts == MISSING] = np.nan
    return values


def _counts(header):
    """Raw counts `(channels, time)` int16."""
    places = {(channel.file, channel.format, channel.offset) for channel in header.channels}
    path, form, offset = places.pop()
    if places or form != "16":
        return _counts_by_library(header)
    frame = 2 * len(header.channels)  # bytes
    with explain_reading(path):
        size = max(path.stat().st_size - offset, 0)
        length = header.length or size // frame
        if length < 1 or size < frame * length:
            raise DataError(
                f"{path}: {size} bytes of signal where the header promises {frame * length}; the "
                "file is truncated, download it again."
            )
        counts = np.fromfile(path, f"({len(header.channels)},)<i2", length, offset=offset)
    return counts.T


def _counts_by_library(header):
    """Counts of a format other than 16, read by wfdb."""
    import wfdb

    for channel in header.channels:
        with explain_reading(channel.file):
            size = channel.file.stat().st_size
        # The library would reserve the memory for all announced samples first.
        if header.length > MOST_SAMPLES_A_BYTE * size:
            raise DataError(
                f"{channel.file}: far too short for {header.length} samples; it is truncated, "
                "download it again."
            )
    try:
        counts = wfdb.rdrecord(str(header.path.with_suffix("")), physical=False).d_signal.T
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


def read_wfdb(
    path: Path, checksums: Checksums, counts_per_millivolt: float | None = None
) -> Recording:
    """One record, its files compared with `checksums`, still without row and target."""
    checksums.check(path)
    header = read_header(path)
    for file in {channel.file for channel in header.channels}:
        checksums.check(file)
    return Recording(
        [channel.name for channel in header.channels],
        read_millivolts(header, checksums.verify, counts_per_millivolt),
        header.sampling_rate,
        notes=[("header", "repaired", oddity) for oddity in header.oddities],
        comments=header.comments,
    )


def read_listed(
    table: pd.DataFrame,
    paths: Sequence[Path],
    targets: np.ndarray,
    checksums: Checksums,
    counts_per_millivolt: float | None = None,
) -> Files:
    """The WFDB records of a table with one row per record: its row, header path and target."""

    def read(path, row, target):
        recording = read_wfdb(path, checksums, counts_per_millivolt)
        recording.row = row
        recording.target = target
        yield recording

    for row, path, target in zip(table.to_dict("records"), paths, targets):
        yield row["record_id"], read(path, row, target)
