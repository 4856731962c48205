"""ECGs drawn on ECG paper, with marks and with the relevance of an attribution."""

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ecglib.errors import DataError
from ecglib.records import LEADS

MILLIMETRES = 25.4  # in an inch
PAPER_SPEED = 25.0  # mm/s
GAIN = 10.0  # mm/mV
MARGIN = 5.0  # mm of paper around the traces
PULSE_WIDTH = 5.0  # mm, the 0.2 s of a calibration pulse
LABEL_HEIGHT, LABEL_WIDTH, LABEL_LIFT = (
    4.0,
    9.0,
    2.5,
)  # mm: room kept for a lead's name, its least height over the line
SMALLEST_WIDTH = 110.0  # mm, so that the scale and the names of the marks fit side by side
TITLE_LETTER, TITLE_LINE = 2.4, 5.5  # mm, a letter and a line of the title
LARGEST_HEIGHT = 420.0  # mm (A3); a taller drawing is made at half the gain, as cardiographs do
GRID_COLOUR, TRACE_COLOUR = "#e8a0a0", "#101010"
STANDARD_ROWS = (
    ("I", "aVR", "V1", "V4"),
    ("II", "aVL", "V2", "V5"),
    ("III", "aVF", "V3", "V6"),
    ("II",),
)
LAYOUTS = {"standard": STANDARD_ROWS, "rows": tuple((lead,) for lead in LEADS)}


def plot_ecg(
    millivolts: np.ndarray,
    sampling_rate: float,
    title: str | None = None,
    marks: pd.DataFrame | None = None,
    layout: str = "standard",
    seconds: float = 10.0,
) -> Figure:
    """One 12-lead ECG `(12, time)` in mV on ECG paper in true size: 25 mm/s, 10 mm/mV, grid of 1
    and 5 mm.

    layout "standard" is 3 x 4 with lead II below as rhythm strip, "rows" twelve whole rows; the
    first `seconds` are drawn. Each lead is drawn about its median; gaps (NaN) stay open; the gain,
    printed below, is halved where the paper would grow beyond 420 mm. marks: a table of waves with
    the columns wave, onset, offset (s) and, if wanted, lead.
    """
    segments, shown = _segments(millivolts, sampling_rate, layout, seconds)
    gain = GAIN
    height, baselines = _stack_rows(segments, gain)
    while height > LARGEST_HEIGHT:
        gain /= 2
        height, baselines = _stack_rows(segments, gain)
    left = MARGIN + 2 * PULSE_WIDTH
    width = max(left + shown * PAPER_SPEED + MARGIN, SMALLEST_WIDTH)
    lines = textwrap.wrap(title or "", int((width - 2 * MARGIN) / TITLE_LETTER))
    figure, axes = _paper(width, height + TITLE_LINE * len(lines))
    axes.text(
        MARGIN,
        height + TITLE_LINE * len(lines) - 2,
        "\n".join(lines),
        va="top",
        ha="left",
        fontsize=11,
    )
    scale = f"{PAPER_SPEED:g} mm/s   {gain:g} mm/mV   {sampling_rate:g} Hz"
    axes.text(MARGIN, 2, scale, va="bottom", ha="left", fontsize=8)
    for row, baseline in zip(segments, baselines, strict=True):
        axes.plot(*_pulse(baseline, gain), color=TRACE_COLOUR, linewidth=0.8)
        for segment in row:
            _draw_segment(axes, segment, left, baseline, gain)
    if marks is not None:
        _draw_marks(axes, marks, segments, baselines, left, width)
    plt.close(figure)
    return figure


class _Segment:
    """One lead over a stretch of time: seconds from the record's start, mV about the lead's median."""

    def __init__(self, lead: str, time: np.ndarray, values: np.ndarray, starts_row: bool) -> None:
        self.lead, self.time, self.values, self.starts_row = lead, time, values, starts_row
        finite = values[np.isfinite(values)]
        self.high, self.low = (
            (float(finite.max()), float(finite.min())) if len(finite) else (0.0, 0.0)
        )
        near = values[(time - time[0] < (1 + LABEL_WIDTH) / PAPER_SPEED) & np.isfinite(values)]
        self.high_at_label = float(near.max()) if len(near) else 0.0

    def label_bottom(self, gain: float) -> float:
        """Millimetres from the zero line to the lower edge of the lead's name, clear of the trace
        below it.
        """
        return max(self.high_at_label * gain + 1, LABEL_LIFT)


def _segments(
    millivolts: np.ndarray, rate: float, layout: str, seconds: float
) -> tuple[list[list[_Segment]], float]:
    """The rows of the layout as lists of segments, and the seconds that they cover; DataError for a
    bad input.
    """
    millivolts = np.asarray(millivolts, dtype=np.float64)
    if (
        millivolts.ndim != 2
        or millivolts.shape[0] != len(LEADS)
        or millivolts.shape[1] < len(LEADS)
    ):
        raise DataError(
            f"An ECG drawing needs 12 leads as (12, time), not {millivolts.shape}; take one record."
        )
    if layout not in LAYOUTS or not (rate > 0 and seconds > 0):
        raise DataError(
            f"Layout {layout!r}, {rate} Hz and {seconds} s cannot be drawn; layouts: {', '.join(LAYOUTS)}."
        )
    count = min(millivolts.shape[1], max(len(LEADS), round(seconds * rate)))
    time, signals = np.arange(count) / rate, millivolts[:, :count]
    middle = [
        np.median(lead[np.isfinite(lead)]) if np.isfinite(lead).any() else 0.0 for lead in signals
    ]
    signals = np.where(np.isfinite(signals), signals, np.nan) - np.array(middle)[:, None]
    rows = []
    for names in LAYOUTS[layout]:
        parts = np.array_split(np.arange(count), len(names))
        rows.append(
            [
                _Segment(name, time[part], signals[LEADS.index(name), part], part[0] == 0)
                for name, part in zip(names, parts, strict=True)
            ]
        )
    return rows, count / rate


def _stack_rows(rows: list[list[_Segment]], gain: float) -> tuple[float, list[float]]:
    """Height of the drawing and of each row's zero line in mm from the bottom: on 5 mm lines, clear
    of each other.
    """
    baselines, floor = [], MARGIN + 3
    for row in reversed(rows):
        below = max(5.0, *(-segment.low * gain for segment in row))
        above = max(
            gain,
            *(
                max(segment.high * gain, segment.label_bottom(gain) + LABEL_HEIGHT)
                for segment in row
            ),
        )
        baselines.append(float(5 * np.ceil((floor + below) / 5)))
        floor = baselines[-1] + above + 1
    return float(5 * np.ceil((floor + MARGIN - 1) / 5)), baselines[::-1]


def _paper(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty sheet of ECG paper whose data units are millimetres from the lower left corner."""
    figure = plt.figure(figsize=(width / MILLIMETRES, height / MILLIMETRES), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    for step, line in ((1, 0.25), (5, 0.6)):
        axes.vlines(
            np.arange(0, width + 0.5, step), 0, height, color=GRID_COLOUR, linewidth=line, zorder=0
        )
        axes.hlines(
            np.arange(0, height + 0.5, step), 0, width, color=GRID_COLOUR, linewidth=line, zorder=0
        )
    return figure, axes


def _pulse(baseline: float, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Corners in mm of the calibration pulse: 1 mV for 0.2 s."""
    x = MARGIN + PULSE_WIDTH * np.array([0, 0.25, 0.25, 1.25, 1.25, 1.5])
    return x, baseline + gain * np.array([0, 0, 1, 1, 0, 0])


def _draw_segment(axes: Axes, segment: _Segment, left: float, baseline: float, gain: float) -> None:
    """One lead's trace, its name above its beginning, and a short line where it follows another
    lead.
    """
    x = left + segment.time * PAPER_SPEED
    axes.plot(
        x,
        baseline + segment.values * gain,
        color=TRACE_COLOUR,
        linewidth=0.8,
        solid_joinstyle="round",
    )
    bottom = baseline + segment.label_bottom(gain)
    axes.text(x[0] + 1, bottom, segment.lead, va="bottom", ha="left", fontsize=9, fontweight="bold")
    if not segment.starts_row:
        axes.vlines(x[0], baseline - 2, baseline + 2, color=TRACE_COLOUR, linewidth=0.8)


def _draw_marks(
    axes: Axes,
    marks: pd.DataFrame,
    rows: list[list[_Segment]],
    baselines: list[float],
    left: float,
    width: float,
) -> None:
    """Coloured bands behind the traces from each wave's onset to its offset, and what the colours
    mean.
    """
    lacking = [column for column in ("wave", "onset", "offset") if column not in marks]
    if lacking:
        raise DataError(
            f"The table of wave marks lacks the column {lacking[0]!r}; it needs wave, onset, offset (s)."
        )
    colours = dict(zip(pd.unique(marks["wave"]), sns.color_palette("colorblind")))
    for row, baseline in zip(rows, baselines, strict=True):
        for segment in row:
            own = marks[marks["lead"] == segment.lead] if "lead" in marks else marks
            for wave, onset, offset in own[["wave", "onset", "offset"]].itertuples(index=False):
                start, end = max(onset, segment.time[0]), min(offset, segment.time[-1])
                if start < end:
                    corner, length = (
                        (left + start * PAPER_SPEED, baseline - 5),
                        (end - start) * PAPER_SPEED,
                    )
                    axes.add_patch(
                        Rectangle(corner, length, 10, color=colours[wave], alpha=0.3, lw=0)
                    )
    for place, (wave, colour) in enumerate(reversed(colours.items())):
        axes.add_patch(
            Rectangle((width - MARGIN - 15 * (place + 1), 2), 4, 3, color=colour, alpha=0.5, lw=0)
        )
        axes.text(
            width - MARGIN - 15 * (place + 1) + 5, 2, wave, va="bottom", ha="left", fontsize=8
        )


def plot_attributed_ecgs(
    examples: Sequence[tuple[str, np.ndarray, np.ndarray]],
    sampling_rate: float,
    title: str | None = None,
    seconds: float = 10.0,
) -> Figure:
    """ECGs on ECG paper, one below the other, each with the relevance of its samples as shade
    behind the traces.

    examples are (text, signals `(12, time)` in mV, relevance of the same shape). A record's darkest
    shade is its 99.5 % quantile of relevance, so shades compare within a record, not between
    records.
    """
    if not examples:
        raise DataError("There is no example to draw; choose a record.")
    sheets = [
        (text, *_segments(millivolts, sampling_rate, "standard", seconds), relevance)
        for text, millivolts, relevance in examples
    ]
    stacked = [_stack_rows(segments, GAIN) for _, segments, _, _ in sheets]
    left, room = MARGIN + 2 * PULSE_WIDTH, TITLE_LINE + 6
    width = max(
        left + max(shown for _, _, shown, _ in sheets) * PAPER_SPEED + MARGIN, SMALLEST_WIDTH
    )
    heads = textwrap.wrap(title or "", int((width - 2 * MARGIN) / TITLE_LETTER))
    top = sum(height + room for height, _ in stacked) + TITLE_LINE * len(heads)
    figure, axes = _paper(width, top)
    axes.text(MARGIN, top - 2, "\n".join(heads), va="top", ha="left", fontsize=12)
    floor = top - TITLE_LINE * len(heads)
    for (text, segments, _, relevance), (height, baselines) in zip(sheets, stacked, strict=True):
        floor -= height + room
        axes.text(MARGIN, floor + height + 4, text, va="bottom", ha="left", fontsize=10)
        largest = float(np.quantile(relevance, 0.995)) or 1.0
        for row, baseline in zip(segments, baselines, strict=True):
            axes.plot(*_pulse(floor + baseline, GAIN), color=TRACE_COLOUR, linewidth=0.8)
            for segment in row:
                _shade_segment(
                    axes, segment, relevance, largest, sampling_rate, left, floor + baseline
                )
                _draw_segment(axes, segment, left, floor + baseline, GAIN)
    axes.text(
        MARGIN, 2, f"{PAPER_SPEED:g} mm/s   {GAIN:g} mm/mV", va="bottom", ha="left", fontsize=8
    )
    axes.set(xlim=(0, width), ylim=(0, top))
    plt.close(figure)
    return figure


def _shade_segment(
    axes: Axes,
    segment: _Segment,
    relevance: np.ndarray,
    largest: float,
    rate: float,
    left: float,
    baseline: float,
) -> None:
    """The relevance of one lead's stretch as a band of shade as high as its trace."""
    first = round(segment.time[0] * rate)
    values = relevance[LEADS.index(segment.lead), first : first + len(segment.time)]
    colours = np.zeros((1, len(values), 4))
    colours[0, :, :3] = mpl.colors.to_rgb("#0072b2")
    colours[0, :, 3] = 0.75 * np.clip(values / largest, 0, 1)
    sides = left + PAPER_SPEED * (segment.time[[0, -1]] + np.array([-0.5, 0.5]) / rate)
    low, high = (
        baseline + min(segment.low * GAIN, -4) - 1,
        baseline + max(segment.high * GAIN, 4) + 1,
    )
    axes.imshow(
        colours, extent=(*sides, low, high), aspect="auto", interpolation="nearest", zorder=1
    )
