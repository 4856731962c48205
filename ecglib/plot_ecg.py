"""ECGs drawn on ECG paper, with marks and with the relevance of an attribution."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ecglib.errors import DataError
from ecglib.records import LEADS

MILLIMETRES = 25.4  # in an inch
PAPER_SPEED = 25.0  # mm/s
GAIN = 10.0  # mm/mV
MARGIN = 5.0  # mm of paper around the traces
PULSE_WIDTH = 5.0  # mm, the 0.2 s of a calibration pulse
LEFT = MARGIN + 2 * PULSE_WIDTH  # mm, where the traces begin
LABEL_HEIGHT = 4.0  # mm, room kept for a lead's name
LABEL_WIDTH = 9.0  # mm
LABEL_LIFT = 2.5  # mm, its least height over the line
SMALLEST_WIDTH = 110.0  # mm, so that the scale and the names of the marks fit side by side
TITLE_LETTER = 2.4  # mm
TITLE_LINE = 5.5  # mm
LARGEST_HEIGHT = 420.0  # mm (A3); a taller drawing is made at half the gain, as cardiographs do
GRID_COLOUR, TRACE_COLOUR, RELEVANCE_COLOUR = "#e8a0a0", "#101010", "#0072b2"
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
    drawing = _Drawing(millivolts, sampling_rate, layout, seconds)
    while drawing.height > LARGEST_HEIGHT:
        drawing.stack(drawing.gain / 2)
    figure, axes, (floor,) = _paper([drawing], title)
    drawing.draw(axes, floor)
    if marks is not None:
        _draw_marks(axes, marks, drawing)
    return figure


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
    drawings = [
        _Drawing(millivolts, sampling_rate, "standard", seconds) for _, millivolts, _ in examples
    ]
    figure, axes, floors = _paper(drawings, title, room=TITLE_LINE + 6)
    limits = axes.axis()
    for (text, _, relevance), drawing, floor in zip(examples, drawings, floors, strict=True):
        axes.text(MARGIN, floor + drawing.height + 4, text, va="bottom", ha="left", fontsize=10)
        largest = float(np.quantile(relevance, 0.995)) or 1.0
        for segment, baseline in drawing.segments():
            _shade(axes, segment, relevance / largest, sampling_rate, floor + baseline)
        drawing.draw(axes, floor)
    axes.axis(limits)
    return figure


class _Segment:
    """One lead over a stretch of time: seconds from the record's start, mV about its median."""

    def __init__(self, lead: str, time: np.ndarray, values: np.ndarray) -> None:
        self.lead, self.time, self.values = lead, time, values
        known = np.isfinite(values)
        near = known & (time - time[0] < (1 + LABEL_WIDTH) / PAPER_SPEED)
        self.low, self.high = min(values[known], default=0.0), max(values[known], default=0.0)
        self.high_at_label = max(values[near], default=0.0)

    def label_bottom(self, gain: float) -> float:
        """Millimetres from the zero line to the lower edge of the lead's name, clear of the trace
        below it.
        """
        return max(self.high_at_label * gain + 1, LABEL_LIFT)


class _Drawing:
    """One ECG as rows of segments: `seconds` long, `height` mm high at its `gain`, and each row's
    zero line in mm from the bottom.

    DataError where it is no ECG of 12 leads or cannot be laid out.
    """

    def __init__(self, millivolts: np.ndarray, rate: float, layout: str, seconds: float) -> None:
        millivolts = np.asarray(millivolts, dtype=np.float64)
        shape = millivolts.shape
        if len(shape) != 2 or shape[0] != len(LEADS) or shape[1] < len(LEADS):
            raise DataError(
                f"An ECG drawing needs 12 leads as (12, time), not {shape}; take one record."
            )
        if layout not in LAYOUTS or not (rate > 0 and seconds > 0):
            raise DataError(
                f"Layout {layout!r}, {rate} Hz and {seconds} s cannot be drawn; layouts: "
                f"{', '.join(LAYOUTS)}."
            )
        count = min(shape[1], max(len(LEADS), round(seconds * rate)))
        time, self.rate, self.seconds = np.arange(count) / rate, rate, count / rate
        signals = pd.DataFrame(np.where(np.isfinite(millivolts), millivolts, np.nan)[:, :count].T)
        signals = (signals - signals.median()).to_numpy()
        self.rows = []
        for names in LAYOUTS[layout]:
            parts = np.array_split(np.arange(count), len(names))
            self.rows.append(
                [
                    _Segment(name, time[part], signals[part, LEADS.index(name)])
                    for name, part in zip(names, parts, strict=True)
                ]
            )
        self.stack(GAIN)

    def stack(self, gain: float) -> None:
        """Lay the zero lines on 5 mm lines, bottom row first, so that the rows are clear of each
        other.
        """
        self.gain, self.baselines = gain, []
        floor = MARGIN + 3
        for row in reversed(self.rows):
            below = max(5.0, *(-segment.low * gain for segment in row))
            tops = [segment.label_bottom(gain) + LABEL_HEIGHT for segment in row]
            above = max(gain, *tops, *(segment.high * gain for segment in row))
            self.baselines.insert(0, float(5 * np.ceil((floor + below) / 5)))
            floor = self.baselines[0] + above + 1
        self.height = float(5 * np.ceil((floor + MARGIN - 1) / 5))

    def segments(self) -> list[tuple[_Segment, float]]:
        """Each segment with its zero line."""
        rows = zip(self.rows, self.baselines, strict=True)
        return [(segment, baseline) for row, baseline in rows for segment in row]

    def draw(self, axes: Axes, floor: float) -> None:
        """Calibration pulses of 1 mV and 0.2 s, traces, and each lead's name above its beginning;
        a short line where a lead follows another.
        """
        line = {"color": TRACE_COLOUR, "linewidth": 0.8}
        for row, baseline in zip(self.rows, self.baselines, strict=True):
            zero = floor + baseline
            x = MARGIN + PULSE_WIDTH * np.array([0, 0.25, 0.25, 1.25, 1.25, 1.5])
            axes.plot(x, zero + self.gain * np.array([0, 0, 1, 1, 0, 0]), **line)
            for segment in row:
                x = LEFT + segment.time * PAPER_SPEED
                y = zero + segment.values * self.gain
                axes.plot(x, y, solid_joinstyle="round", **line)
                bottom = zero + segment.label_bottom(self.gain)
                axes.text(x[0] + 1, bottom, segment.lead, va="bottom", fontsize=9, weight="bold")
                if segment is not row[0]:
                    axes.vlines(x[0], zero - 2, zero + 2, **line)


def _paper(
    drawings: Sequence[_Drawing], title: str | None, room: float = 0.0
) -> tuple[Figure, Axes, list[float]]:
    """A sheet of ECG paper with title and scale, whose data units are millimetres from the lower
    left corner, and the floor of each drawing, with `room` mm of text above it.
    """
    longest = max(drawing.seconds for drawing in drawings)
    width = max(LEFT + longest * PAPER_SPEED + MARGIN, SMALLEST_WIDTH)
    lines = textwrap.wrap(title or "", int((width - 2 * MARGIN) / TITLE_LETTER))
    heights = np.array([drawing.height + room for drawing in drawings])
    height = heights.sum() + TITLE_LINE * len(lines)
    figure = plt.figure(figsize=(width / MILLIMETRES, height / MILLIMETRES), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    for step, thickness in ((1, 0.25), (5, 0.6)):
        grid = {"color": GRID_COLOUR, "linewidth": thickness, "zorder": 0}
        axes.vlines(np.arange(0, width + 0.5, step), 0, height, **grid)
        axes.hlines(np.arange(0, height + 0.5, step), 0, width, **grid)
    axes.text(MARGIN, height - 2, "\n".join(lines), va="top", fontsize=11)
    scale = f"{PAPER_SPEED:g} mm/s   {drawings[0].gain:g} mm/mV   {drawings[0].rate:g} Hz"
    axes.text(MARGIN, 2, scale, va="bottom", fontsize=8)
    plt.close(figure)
    return figure, axes, list(heights.sum() - heights.cumsum())


def _draw_marks(axes: Axes, marks: pd.DataFrame, drawing: _Drawing) -> None:
    """Coloured bands behind the traces from each wave's onset to its offset, and what the colours
    mean.
    """
    lacking = [column for column in ("wave", "onset", "offset") if column not in marks]
    if lacking:
        raise DataError(
            f"The table of wave marks lacks the column {lacking[0]!r}; it needs wave, onset, "
            "offset (s)."
        )
    colours = dict(zip(pd.unique(marks["wave"]), sns.color_palette("colorblind")))
    for segment, baseline in drawing.segments():
        own = marks[marks["lead"] == segment.lead] if "lead" in marks else marks
        for wave, onset, offset in own[["wave", "onset", "offset"]].itertuples(index=False):
            start, end = max(onset, segment.time[0]), min(offset, segment.time[-1])
            if start < end:
                corner = LEFT + start * PAPER_SPEED, baseline - 5
                length, colour = (end - start) * PAPER_SPEED, colours[wave]
                axes.add_patch(Rectangle(corner, length, 10, color=colour, alpha=0.3, lw=0))
    right = axes.get_xlim()[1] - MARGIN
    for place, (wave, colour) in enumerate(reversed(colours.items()), start=1):
        left = right - 15 * place
        axes.add_patch(Rectangle((left, 2), 4, 3, color=colour, alpha=0.5, lw=0))
        axes.text(left + 5, 2, wave, va="bottom", fontsize=8)


def _shade(axes: Axes, segment: _Segment, relevance: np.ndarray, rate: float, zero: float) -> None:
    """The relevance of one lead's stretch, 1 for the darkest, as a band of shade as high as its
    trace.
    """
    first = round(segment.time[0] * rate)
    values = relevance[LEADS.index(segment.lead), first : first + len(segment.time)]
    colours = np.zeros((1, len(values), 4))
    colours[0, :, :3] = to_rgb(RELEVANCE_COLOUR)
    colours[0, :, 3] = 0.75 * np.clip(values, 0, 1)
    left, right = LEFT + PAPER_SPEED * (segment.time[[0, -1]] + np.array([-0.5, 0.5]) / rate)
    low = zero + min(segment.low * GAIN, -4) - 1
    high = zero + max(segment.high * GAIN, 4) + 1
    extent = (left, right, low, high)
    axes.imshow(colours, extent=extent, aspect="auto", interpolation="nearest", zorder=1)
