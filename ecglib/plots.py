"""Every figure of the study, one function each; only this module and the notebooks need matplotlib.

Each function returns a closed `Figure`: it shows itself once as the last expression of a notebook cell.
"""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ecglib.errors import DataError
from ecglib.files import atomic_file
from ecglib.records import LEADS

MILLIMETRES = 25.4  # in an inch
PAPER_SPEED = 25.0  # mm/s
GAIN = 10.0  # mm/mV
MARGIN = 5.0  # mm of paper around the traces
PULSE_WIDTH = 5.0  # mm, the 0.2 s of a calibration pulse
LABEL_HEIGHT, LABEL_WIDTH, LABEL_LIFT = 4.0, 9.0, 2.5  # mm: room kept for a lead's name, its least height over the line
SMALLEST_WIDTH = 110.0  # mm, so that the scale and the names of the marks fit side by side
TITLE_LETTER, TITLE_LINE = 2.4, 5.5  # mm, a letter and a line of the title
LARGEST_HEIGHT = 420.0  # mm (A3); a taller drawing is made at half the gain, as cardiographs do
GRID_COLOUR, TRACE_COLOUR = "#e8a0a0", "#101010"
MARKERS = "osD^vPXhp*"
STANDARD_ROWS = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"), ("II",))
LAYOUTS = {"standard": STANDARD_ROWS, "rows": tuple((lead,) for lead in LEADS)}


def plot_ecg(
    millivolts: np.ndarray, sampling_rate: float, title: str | None = None, marks: pd.DataFrame | None = None,
    layout: str = "standard", seconds: float = 10.0,
) -> Figure:  # fmt: skip
    """One 12-lead ECG `(12, time)` in mV on ECG paper in true size: 25 mm/s, 10 mm/mV, grid of 1 and 5 mm.

    layout "standard" is 3 x 4 with lead II below as rhythm strip, "rows" twelve whole rows; the first `seconds` are
    drawn. Each lead is drawn about its median; gaps (NaN) stay open; the gain, printed below, is halved where the paper
    would grow beyond 420 mm. marks: a table of waves with the columns wave, onset, offset (s) and, if wanted, lead.
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
    axes.text(MARGIN, height + TITLE_LINE * len(lines) - 2, "\n".join(lines), va="top", ha="left", fontsize=11)
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
        self.high, self.low = (float(finite.max()), float(finite.min())) if len(finite) else (0.0, 0.0)
        near = values[(time - time[0] < (1 + LABEL_WIDTH) / PAPER_SPEED) & np.isfinite(values)]
        self.high_at_label = float(near.max()) if len(near) else 0.0

    def label_bottom(self, gain: float) -> float:
        """Millimetres from the zero line to the lower edge of the lead's name, clear of the trace below it."""
        return max(self.high_at_label * gain + 1, LABEL_LIFT)


def _segments(millivolts: np.ndarray, rate: float, layout: str, seconds: float) -> tuple[list[list[_Segment]], float]:
    """The rows of the layout as lists of segments, and the seconds that they cover; DataError for a bad input."""
    millivolts = np.asarray(millivolts, dtype=np.float64)
    if millivolts.ndim != 2 or millivolts.shape[0] != len(LEADS) or millivolts.shape[1] < len(LEADS):
        raise DataError(f"An ECG drawing needs 12 leads as (12, time), not {millivolts.shape}; take one record.")
    if layout not in LAYOUTS or not (rate > 0 and seconds > 0):
        raise DataError(f"Layout {layout!r}, {rate} Hz and {seconds} s cannot be drawn; layouts: {', '.join(LAYOUTS)}.")
    count = min(millivolts.shape[1], max(len(LEADS), round(seconds * rate)))
    time, signals = np.arange(count) / rate, millivolts[:, :count]
    middle = [np.median(lead[np.isfinite(lead)]) if np.isfinite(lead).any() else 0.0 for lead in signals]
    signals = np.where(np.isfinite(signals), signals, np.nan) - np.array(middle)[:, None]
    rows = []
    for names in LAYOUTS[layout]:
        parts = np.array_split(np.arange(count), len(names))
        rows.append([_Segment(name, time[part], signals[LEADS.index(name), part], part[0] == 0)
                     for name, part in zip(names, parts, strict=True)])  # fmt: skip
    return rows, count / rate


def _stack_rows(rows: list[list[_Segment]], gain: float) -> tuple[float, list[float]]:
    """Height of the drawing and of each row's zero line in mm from the bottom: on 5 mm lines, clear of each other."""
    baselines, floor = [], MARGIN + 3
    for row in reversed(rows):
        below = max(5.0, *(-segment.low * gain for segment in row))
        above = max(gain, *(max(segment.high * gain, segment.label_bottom(gain) + LABEL_HEIGHT) for segment in row))
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
        axes.vlines(np.arange(0, width + 0.5, step), 0, height, color=GRID_COLOUR, linewidth=line, zorder=0)
        axes.hlines(np.arange(0, height + 0.5, step), 0, width, color=GRID_COLOUR, linewidth=line, zorder=0)
    return figure, axes


def _pulse(baseline: float, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Corners in mm of the calibration pulse: 1 mV for 0.2 s."""
    x = MARGIN + PULSE_WIDTH * np.array([0, 0.25, 0.25, 1.25, 1.25, 1.5])
    return x, baseline + gain * np.array([0, 0, 1, 1, 0, 0])


def _draw_segment(axes: Axes, segment: _Segment, left: float, baseline: float, gain: float) -> None:
    """One lead's trace, its name above its beginning, and a short line where it follows another lead."""
    x = left + segment.time * PAPER_SPEED
    axes.plot(x, baseline + segment.values * gain, color=TRACE_COLOUR, linewidth=0.8, solid_joinstyle="round")
    bottom = baseline + segment.label_bottom(gain)
    axes.text(x[0] + 1, bottom, segment.lead, va="bottom", ha="left", fontsize=9, fontweight="bold")
    if not segment.starts_row:
        axes.vlines(x[0], baseline - 2, baseline + 2, color=TRACE_COLOUR, linewidth=0.8)


def _draw_marks(
    axes: Axes, marks: pd.DataFrame, rows: list[list[_Segment]], baselines: list[float], left: float, width: float
) -> None:
    """Coloured bands behind the traces from each wave's onset to its offset, and what the colours mean."""
    lacking = [column for column in ("wave", "onset", "offset") if column not in marks]
    if lacking:
        raise DataError(f"The table of wave marks lacks the column {lacking[0]!r}; it needs wave, onset, offset (s).")
    colours = dict(zip(pd.unique(marks["wave"]), sns.color_palette("colorblind")))
    for row, baseline in zip(rows, baselines, strict=True):
        for segment in row:
            own = marks[marks["lead"] == segment.lead] if "lead" in marks else marks
            for wave, onset, offset in own[["wave", "onset", "offset"]].itertuples(index=False):
                start, end = max(onset, segment.time[0]), min(offset, segment.time[-1])
                if start < end:
                    corner, length = (left + start * PAPER_SPEED, baseline - 5), (end - start) * PAPER_SPEED
                    axes.add_patch(Rectangle(corner, length, 10, color=colours[wave], alpha=0.3, lw=0))
    for place, (wave, colour) in enumerate(reversed(colours.items())):
        axes.add_patch(Rectangle((width - MARGIN - 15 * (place + 1), 2), 4, 3, color=colour, alpha=0.5, lw=0))
        axes.text(width - MARGIN - 15 * (place + 1) + 5, 2, wave, va="bottom", ha="left", fontsize=8)


def plot_label_curve(
    table: pd.DataFrame, training_records: int | None = None, metric: str = "Macro AUROC", title: str | None = None
) -> Figure:
    """Mean over seeds of `value` against the share of labels, one line a method; small dots are the seeds.

    table has the columns method, fraction, seed, value, low, high; the bars are the means of low and of high.
    training_records is the number of records at fraction 1: with it, each tick also tells the number of records.
    """
    _require_columns(table, ("method", "fraction", "seed", "value", "low", "high"), "label curve")
    methods = list(pd.unique(table["method"]))
    colours = sns.color_palette("colorblind", len(methods))
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    for place, method in enumerate(methods):
        rows = table[table["method"] == method]
        shift = 1.035 ** (place - (len(methods) - 1) / 2)  # beside each other, so that no bar hides another
        mean = rows.groupby("fraction")[["value", "low", "high"]].mean()
        bars = np.clip([mean["value"] - mean["low"], mean["high"] - mean["value"]], 0, None)
        axes.plot(rows["fraction"] * shift, rows["value"], ".", color=colours[place], alpha=0.35, markersize=4)
        axes.errorbar(
            mean.index * shift, mean["value"], bars, color=colours[place], marker=MARKERS[place % len(MARKERS)],
            markersize=5, linewidth=1.6, elinewidth=1, capsize=2, label=method, linestyle="-" if place < 10 else "--",
        )  # fmt: skip
    _label_axis(axes, sorted(table["fraction"].unique()), training_records)
    axes.set(ylabel=f"{metric} (mean, 95 % interval)", title=title)
    axes.grid(axis="y", color="0.9")
    sns.despine(figure)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    plt.close(figure)
    return figure


def _label_axis(axes: Axes, fractions: list[float], training_records: int | None) -> None:
    """A logarithmic x-axis with a tick at each fraction, in percent and in records."""
    names = [f"{100 * fraction:g} %" for fraction in fractions]
    label = "Labelled share of the training records"
    if training_records:
        names = [f"{100 * fraction:g} %\n{round(fraction * training_records):,}" for fraction in fractions]
        label += "\n(below: number of labelled records)"
    axes.set_xscale("log")
    axes.set_xticks(fractions, names)
    axes.minorticks_off()
    axes.set_xlabel(label)


def plot_training(history: pd.DataFrame, title: str | None = None) -> Figure:
    """Losses and learning rate over training steps; columns step, learning_rate, loss and others that end in loss."""
    _require_columns(history, ("step", "loss", "learning_rate"), "training history")
    losses = [column for column in history if column.endswith("loss")]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.5, 4.8), sharex=True, layout="constrained", height_ratios=(3, 1)
    )  # fmt: skip
    for column, colour in zip(losses, sns.color_palette("colorblind", len(losses)), strict=True):
        rows = history[["step", column]].dropna()  # a validation loss is known at a few steps only
        above.plot(rows["step"], rows[column], color=colour, linewidth=1.5, label=_loss_name(column))
    below.plot(history["step"], history["learning_rate"], color="0.3", linewidth=1.5)
    above.set(ylabel="Loss", title=title)
    below.set(ylabel="Learning rate", xlabel="Step (mini-batches)", ylim=(0, None))
    if len(losses) > 1:
        above.legend(frameon=False)
    for axes in (above, below):
        axes.grid(color="0.9")
    sns.despine(figure)
    figure.align_ylabels()
    plt.close(figure)
    return figure


def _arm(method: str, encoder: str) -> str:
    """An arm's name in a figure."""
    return f"{_method_name(method)}, {encoder}"


def _method_name(method: str) -> str:
    """A method's name in a figure."""
    return method.replace("ce_ssl", "CE-SSL").replace("distl", "DISTL").replace("dvme", "DVME").replace("_", " ")


def plot_label_efficiency(summary: pd.DataFrame, training_records: int, title: str | None = None) -> Figure:
    """Macro AUROC against the share of labels, frozen on the left and fine-tuned on the right, a line an arm.

    summary has method, encoder, protocol, fraction, value, low, high (see `runs.seed_summary`). The controls stand in
    both panels: trained from scratch black, random filters (frozen only) grey, another line style for each encoder.
    """
    _require_columns(summary, ("method", "encoder", "protocol", "fraction", "value", "low", "high"), "label summary")
    arms = summary.groupby(["protocol", "method", "encoder"], sort=False)
    methods = [name for name in pd.unique(summary["method"]) if name not in ("supervised", "random")]
    colours = dict(zip(methods, sns.color_palette("colorblind", len(methods)))) | {
        "supervised": "black",
        "random": "0.6",
    }
    styles = dict(zip(sorted(pd.unique(summary["encoder"])), ("-", "--", ":", "-.")))
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.2), sharey=True, layout="constrained")
    for axes, protocol in zip(panels, ("frozen", "fine-tuned"), strict=True):
        shown = [(key, rows.sort_values("fraction")) for key, rows in arms if key[0] in (protocol, "supervised")]
        for place, ((_, method, encoder), rows) in enumerate(shown):
            x = rows["fraction"] * 1.02 ** (place - (len(shown) - 1) / 2)
            bars = np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None)
            axes.errorbar(x, rows["value"], bars, color=colours[method], linestyle=styles[encoder], marker="o",
                          label=_arm(method, encoder), markersize=3.5, linewidth=1.4, elinewidth=0.7,
                          capsize=1.5)  # fmt: skip
        _label_axis(axes, sorted(summary["fraction"].unique()), training_records)
        axes.set_title(f"{protocol} encoders")
        axes.grid(axis="y", color="0.9")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    panels[0].set_ylabel("Macro AUROC (mean over subsets, 95 % interval)")
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


def plot_gains(gains: pd.DataFrame, title: str | None = None) -> Figure:
    """Gain in macro AUROC with its paired interval, a panel a fraction, a row an arm; hollow where it spans zero.

    gains has method, encoder, protocol, fraction, gain, low, high (see `transfer.paired_gains`).
    """
    _require_columns(gains, ("method", "encoder", "protocol", "fraction", "gain", "low", "high"), "table of gains")
    arms = [_arm(row.method, row.encoder) for row in gains.itertuples()]
    panels = [f"{100 * fraction:g} % of the labels" for fraction in gains["fraction"]]
    table = gains.assign(row=arms, panel=panels, colour=gains["protocol"]).sort_values(["fraction", "row"])
    return _plot_intervals(table, ("frozen", "fine-tuned"), 1.75, title)


def plot_method_gains(gains: pd.DataFrame, title: str | None = None) -> Figure:
    """What one method gains over the others: a panel a measure, a row a comparator, a colour a label fraction.

    gains has against, fraction, metric, gain, low, high (see `semisup.compare.gains_over`); hollow where the interval
    spans zero.
    """
    _require_columns(gains, ("against", "fraction", "metric", "gain", "low", "high"), "table of gains")
    colours = {fraction: f"{100 * fraction:g} % of the labels" for fraction in sorted(gains["fraction"].unique())}
    table = gains.assign(row=gains["against"].map(_method_name), panel=gains["metric"].str.replace("_", " "),
                         colour=gains["fraction"].map(colours))  # fmt: skip
    return _plot_intervals(table, tuple(colours.values()), 3.2, title, one_scale=False)


FUSION_NAMES = {"dvme": "DVME", "dvme_random_start": "DVME from random weights", "best_single": "best single encoder",
                "concatenation": "concatenation + logistic", "perceptron": "matched perceptron"}  # fmt: skip


def plot_fusion_gains(gains: pd.DataFrame, title: str | None = None) -> Figure:
    """What DVME gains over other fusions: a panel a fraction, a row a comparator; hollow where it spans zero.

    gains has over, fraction, gain, low, high (see `fusion_runs.fusion_gains`).
    """
    _require_columns(gains, ("over", "fraction", "gain", "low", "high"), "table of fusion gains")
    rows = [FUSION_NAMES.get(name, name.replace("_", " ")) for name in gains["over"]]
    panels = [f"{100 * fraction:g} % of the labels" for fraction in gains["fraction"]]
    table = gains.assign(row=rows, panel=panels, colour="gain of DVME").sort_values("fraction", kind="stable")
    return _plot_intervals(table, ("gain of DVME",), 1.75, title)


def plot_similarity(similarity: pd.DataFrame, title: str | None = None) -> Figure:
    """Heat map of a symmetric table of similarities from 0 to 1, such as CKA between encoders, with its numbers."""
    _require_columns(similarity, similarity.index, "table of similarities")
    names, size = [_method_name(name) for name in similarity], 2.2 + 0.6 * len(similarity)
    figure, axes = plt.subplots(figsize=(size + 0.9, size), layout="constrained")
    sns.heatmap(similarity.to_numpy(), vmin=0, vmax=1, cmap="viridis", annot=True, fmt=".2f", square=True, ax=axes,
                xticklabels=names, yticklabels=names, cbar_kws={"label": "Linear CKA"})  # fmt: skip
    axes.tick_params(axis="x", rotation=45)
    axes.tick_params(axis="y", rotation=0)
    figure.suptitle(title, fontsize=10)
    plt.close(figure)
    return figure


def plot_token_weights(weights: pd.DataFrame, title: str | None = None) -> Figure:
    """Share of each member for each class, a panel a measure; the dotted line is an equal share.

    weights has measure, class, member and share, see `fusion.token_weights`.
    """
    _require_columns(weights, ("measure", "class", "member", "share"), "table of token weights")
    measures, members = pd.unique(weights["measure"]), list(pd.unique(weights["member"]))
    classes = list(pd.unique(weights["class"]))
    figure, panels = plt.subplots(1, len(measures), figsize=(1.5 + 4.5 * len(measures), 1.6 + 0.42 * len(members)),
                                  sharey=True, squeeze=False, layout="constrained")  # fmt: skip
    for axes, measure in zip(panels[0], measures, strict=True):
        table = weights[weights["measure"] == measure].pivot(index="member", columns="class", values="share")
        for place, (name, colour) in enumerate(zip(classes, sns.color_palette("colorblind", len(classes)))):
            heights = np.arange(len(members))[::-1] + 0.5 * (0.5 - (place + 0.5) / len(classes))
            axes.plot(table.loc[members, name], heights, "o", color=colour, markersize=5, label=name)
        axes.axvline(1 / len(members), color="0.5", linestyle=":", linewidth=1)
        axes.set(title=measure, xlabel="Share", xlim=(0, None))
        axes.grid(axis="x", color="0.9")
    panels[0, 0].set_yticks(range(len(members)), [_method_name(name) for name in members[::-1]])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), frameon=False, ncols=len(classes),
                  loc="outside lower center")  # fmt: skip
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


def plot_stages(summary: pd.DataFrame, title: str | None = None) -> Figure:
    """Macro AUROC (left, with the students' intervals) and calibration error (right) over the stages T, a line an arm.

    summary has method, network, stage, value, low, high, calibration_error (see `semisup.stages.stage_summary`). Dashed
    is the teacher of an arm, black the control with the same labels, grey the one that knows all labels.
    """
    columns = ("method", "network", "stage", "value", "low", "high", "calibration_error")
    _require_columns(summary, columns, "table of stages")
    methods = [name for name in pd.unique(summary["method"]) if name not in ("supervised", "oracle")]
    colours = dict(zip(methods, sns.color_palette("colorblind", len(methods)))) | {
        "supervised": "black",
        "oracle": "0.6",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    arms = list(summary.groupby(["method", "network"], sort=False))
    for place, ((method, network), rows) in enumerate(arms):
        rows, shift = rows.sort_values("stage"), 0.025 * (place - (len(arms) - 1) / 2)
        look = {"color": colours[method], "linestyle": "--" if network == "teacher" else "-", "marker": "o",
                "markersize": 4, "linewidth": 1.4}  # fmt: skip
        name = _method_name(method) + (", teacher" if network == "teacher" else "")
        left.plot(rows["stage"] + shift, rows["value"], **look, label=name)
        if network == "student":  # a teacher's interval is as wide as its student's, and the start is the same for all
            barred = rows if place == 0 else rows[rows["stage"] > 0]
            left.vlines(barred["stage"] + shift, barred["low"], barred["high"], color=colours[method], linewidth=0.7)
        right.plot(rows["stage"], rows["calibration_error"], **look)
    stages = sorted(summary["stage"].unique())
    for axes, label in ((left, "Macro AUROC, 95 % interval"), (right, "Calibration error")):
        axes.set(xlabel="Stage T", ylabel=label, xticks=stages)
        axes.grid(axis="y", color="0.9")
    right.set_ylim(0, None)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, ncols=4, loc="outside lower center", fontsize=9)
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


def _plot_intervals(table: pd.DataFrame, colours: Sequence[str], width: float, title: str | None,
                    one_scale: bool = True) -> Figure:  # fmt: skip
    """gain with low and high of each panel, row and colour, in the order in which panels and rows come in `table`.

    A point is filled where its interval lies on one side of zero; `width` is that of a panel in inches, `one_scale`
    says whether the panels show the same measure.
    """
    panels, rows = pd.unique(table["panel"]), list(pd.unique(table["row"]))[::-1]
    palette = dict(zip(colours, sns.color_palette("colorblind", len(colours))))
    figure, grid = plt.subplots(1, len(panels), figsize=(2.6 + width * len(panels), 1.2 + 0.42 * len(rows)),
                                sharex=one_scale, sharey=True, squeeze=False, layout="constrained")  # fmt: skip
    for axes, panel in zip(grid[0], panels, strict=True):
        axes.axvline(0, color="0.5", linewidth=1)
        for row in table[table["panel"] == panel].itertuples():
            height = rows.index(row.row) + 0.6 * (0.5 - (colours.index(row.colour) + 0.5) / len(colours))
            colour, sure = palette[row.colour], row.low > 0 or row.high < 0
            axes.plot([row.low, row.high], [height, height], color=colour, linewidth=1.4)
            axes.plot(row.gain, height, "o", color=colour, markerfacecolor=colour if sure else "white", markersize=5)
        axes.set(title=panel, xlabel="Gain")
        axes.title.set_size(10)
        axes.grid(axis="x", color="0.9")
        axes.locator_params(axis="x", nbins=3 if width < 2 else 5)
    grid[0, 0].set_yticks(range(len(rows)), rows)
    handles = [plt.Line2D([], [], color=colour, marker="o", label=name) for name, colour in palette.items()]
    figure.legend(handles=handles, frameon=False, ncols=len(handles), loc="outside lower center")
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


COSTS = {"seconds_per_iteration": ("Seconds an iteration", 1.0),
         "saved_activation_bytes": ("Activations kept (MiB)", 2**20),
         "stored_bytes": ("Stored for the task (kB)", 1e3)}  # fmt: skip


def plot_cost(costs: pd.DataFrame, summary: pd.DataFrame, title: str | None = None) -> Figure:
    """Macro AUROC over time, memory and storage: a point a method, a colour a way of training, a marker a method.

    costs has method and the columns of `COSTS` (see `semisup.cost.measure`), summary method, value, low, high.
    """
    _require_columns(costs, ("method", *COSTS), "table of costs")
    _require_columns(summary, ("method", "value", "low", "high"), "summary")
    table = costs.merge(summary[["method", "value", "low", "high"]], on="method")
    figure, panels = plt.subplots(1, len(COSTS), figsize=(13.5, 4.6), sharey=True, layout="constrained")
    looks = _method_looks(table["method"])
    for axes, (column, (name, unit)) in zip(panels, COSTS.items(), strict=True):
        for row in table.itertuples():
            colour, marker = looks[row.method]
            x = getattr(row, column) / unit
            axes.errorbar(x, row.value, [[row.value - row.low], [row.high - row.value]], color=colour, marker=marker,
                          linestyle="none", elinewidth=0.5, markersize=7,
                          label=_method_name(row.method))  # fmt: skip
        axes.set_xlabel(name)
        axes.set_xscale("log") if column == "stored_bytes" else axes.set_xlim(left=0)
        axes.grid(color="0.92")
    panels[0].set_ylabel("Macro AUROC (95 % interval)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, loc="outside right center", fontsize=9)
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


def _method_looks(methods: Iterable[str]) -> dict[str, tuple]:
    """Colour by what is trained (CE-SSL, low-rank pairs, every weight), marker by method."""
    seen: dict[int, int] = {}
    looks = {}
    for method in methods:
        family = 0 if method.startswith("ce_ssl") else 1 if "lora" in method else 2
        looks[method] = (sns.color_palette("colorblind")[family], "osD^vP"[seen.get(family, 0) % 6])
        seen[family] = seen.get(family, 0) + 1
    return looks


WATCHED = {"loss": "Loss", "online_probe": "Online probe\n(macro AUROC, fold 9)",
           "alignment": "Alignment\n(0: views agree)", "uniformity": "Uniformity\n(0: collapsed)",
           "effective_rank": "Effective rank\n(1: collapsed)"}  # fmt: skip


def plot_pretraining(history: pd.DataFrame, title: str | None = None) -> Figure:
    """What a pretraining learns, over its steps: loss, online probe, alignment, uniformity and effective rank.

    history has these columns and `step`; step 0 is the random start, drawn as a dotted line through each panel.
    """
    _require_columns(history, ("step", *WATCHED), "pretraining history")
    figure, panels = plt.subplots(1, len(WATCHED), figsize=(13, 2.9), layout="constrained")
    for axes, (column, name) in zip(panels, WATCHED.items(), strict=True):
        axes.plot(history["step"], history[column], color=sns.color_palette("colorblind")[0], linewidth=1.5)
        start = history.loc[history["step"] == 0, column].dropna()
        if len(start):
            axes.axhline(start.iloc[0], color="0.5", linestyle=":", linewidth=1)
        axes.set(xlabel="Step", title=name)
        axes.title.set_size(10)
        axes.grid(color="0.9")
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


def plot_ranks(scores: pd.DataFrame, ranks: pd.DataFrame, title: str | None = None) -> Figure:
    """Importance of each layer on a logarithmic axis, in the order of the network; filled where it gets the full rank.

    scores and ranks have the layers as index and the same columns, ways to score; each gets a panel with its own scale.
    Colours tell the parts of the network, the first piece of a layer's name.
    """
    _require_columns(scores, (), "table of scores")
    _require_columns(ranks, scores.columns, "table of ranks")
    layers, parts = list(scores.index), [name.split(".")[0] for name in scores.index]
    colours = dict(zip(pd.unique(pd.Series(parts)), sns.color_palette("colorblind")))
    figure, panels = plt.subplots(1, len(scores.columns), figsize=(9.5, 1.6 + 0.26 * len(layers)), sharey=True,
                                  squeeze=False, layout="constrained")  # fmt: skip
    for axes, score in zip(panels[0], scores.columns, strict=True):
        full = ranks[score].max()
        for height, (name, part) in enumerate(zip(layers, parts, strict=True)):
            colour = colours[part]
            axes.plot(scores[score][name], height, "o", color=colour, markersize=7, markeredgewidth=1.4,
                      markerfacecolor=colour if ranks[score][name] == full else "white")  # fmt: skip
        axes.set(title=score, xlabel="Importance", xscale="log")
        axes.grid(color="0.9")
    panels[0, 0].set_yticks(range(len(layers)), layers)
    panels[0, 0].set_ylim(len(layers) - 0.4, -0.6)  # the first layer on top
    handles = [plt.Line2D([], [], color=colour, marker="o", linestyle="", label=part)
               for part, colour in colours.items()]  # fmt: skip
    for place, value in enumerate(sorted(pd.unique(ranks.to_numpy().ravel()), reverse=True)):
        handles.append(plt.Line2D([], [], color="0.2", marker="o", linestyle="", label=f"rank {value}",
                                  markerfacecolor="0.2" if place == 0 else "white"))  # fmt: skip
    figure.legend(handles=handles, frameon=False, ncols=len(handles), loc="outside lower center")
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


def _loss_name(column: str) -> str:
    """How a loss column is called in the legend."""
    return "training loss" if column == "loss" else column.replace("_", " ")


def _require_columns(table: pd.DataFrame, columns: Iterable[str], what: str) -> None:
    """DataError where a table to be drawn lacks a column or has no row."""
    lacking = [column for column in columns if column not in table]
    if lacking:
        raise DataError(f"The {what} lacks the column {lacking[0]!r}; it needs {', '.join(columns)}.")
    if not len(table):
        raise DataError(f"The {what} has no row, so there is nothing to draw; run the earlier notebooks first.")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure as SVG, atomically, and close it, so that a notebook shows it once; equal in, equal out."""
    path = Path(path)
    if path.suffix != ".svg":
        raise DataError(f"{path}: figures are kept as SVG; choose a name that ends in .svg.")
    with mpl.rc_context({"svg.hashsalt": "ecglib"}), atomic_file(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)
    return path


NOISE_NAMES = {"lead_loss": "lost leads", "powerline": "mains hum", "white": "white noise", "muscle": "muscle noise"}
TWINS = {"frozen": ":", "fine-tuned": "-", "supervised": "-"}  # line styles; "--" for other protocols


def _noise_name(kind: str) -> str:
    """A kind of noise in a figure."""
    return NOISE_NAMES.get(kind, kind.replace("_", " "))


def plot_noise_kinds(clean: np.ndarray, noisy: dict[str, np.ndarray], sampling_rate: float,
                     title: str | None = None) -> Figure:  # fmt: skip
    """The worst hit lead of an ECG under each kind of noise (left), the spectrum of what was added (right).

    clean and each of `noisy` are `(12, time)` in mV; the spectra are Welch's, of all leads together, in dB, grey the
    clean ECG's.
    """
    from scipy.signal import welch

    clean, clock = np.nan_to_num(clean), np.arange(clean.shape[1]) / sampling_rate
    figure, grid = plt.subplots(len(noisy), 2, figsize=(12, 1.25 * len(noisy) + 0.8), sharex="col", squeeze=False,
                                width_ratios=(3, 1), layout="constrained")  # fmt: skip
    pieces = min(clean.shape[1], round(4 * sampling_rate))

    def spectrum(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        frequency, power = welch(values, sampling_rate, nperseg=pieces, detrend=False)
        return frequency, 10 * np.log10(np.maximum(power.sum(axis=0), 1e-12))

    colour = sns.color_palette("colorblind")[3]
    for (trace, spectra), (kind, values) in zip(grid, noisy.items(), strict=True):
        values = np.nan_to_num(values)
        place = int(np.square(values - clean).sum(axis=1).argmax())
        trace.plot(clock, values[place], color=colour, linewidth=0.7)
        trace.plot(clock, clean[place], color="0.3", linewidth=0.7)
        trace.set_ylabel("mV", fontsize=8)
        trace.set_title(f"{_noise_name(kind)}, lead {LEADS[place]}", fontsize=9, loc="left", pad=2)
        spectra.plot(*spectrum(clean), color="0.6", linewidth=1)
        spectra.plot(*spectrum(values - clean), color=colour, linewidth=1)
        spectra.set_ylim(-70, 10)
        spectra.set_ylabel("dB", fontsize=8)
        for axes in (trace, spectra):
            axes.grid(color="0.92")
            axes.tick_params(labelsize=8)
    grid[-1, 0].set_xlabel("Time (s)")
    grid[-1, 1].set_xlabel("Frequency (Hz)")
    handles = [plt.Line2D([], [], color="0.3", label="clean"), plt.Line2D([], [], color=colour, label="with noise")]
    figure.legend(handles=handles, frameon=False, ncols=2, loc="outside lower center")
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


def plot_robustness(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Macro AUROC over the signal-to-noise ratio, a panel a kind of noise, a line an arm; clean stands on the right.

    table has method, protocol, encoder, fraction, kind, snr_db (infinite: clean), auroc, see
    `robustness.robustness_table`. Colours are methods (supervised black, random grey), dotted lines frozen encoders,
    dashed ones arms with few labels; the markers tell encoders apart.
    """
    columns = ("method", "protocol", "encoder", "fraction", "kind", "snr_db", "auroc")
    _require_columns(table, columns, "robustness table")
    methods = [name for name in pd.unique(table["method"]) if name not in ("supervised", "random")]
    shades = [*sns.color_palette("colorblind"), (0.45, 0.0, 0.1)]
    del shades[7]  # a grey
    colours = {name: shades[place % len(shades)] for place, name in enumerate(methods)} | {
        "supervised": "black",
        "random": "0.6",
    }
    markers = dict(zip(sorted(pd.unique(table["encoder"])), MARKERS))
    levels = sorted(pd.unique(table.loc[np.isfinite(table["snr_db"]), "snr_db"]))
    gap = levels[-1] + (max(levels[-1] - levels[-2], 1) if len(levels) > 1 else 6)
    kinds = list(pd.unique(table["kind"]))
    rows = -(-(len(kinds) + 1) // 4)
    figure, grid = plt.subplots(rows, 4, figsize=(15, 4.1 * rows + 0.4), sharex=True, sharey=True, squeeze=False,
                                layout="constrained")  # fmt: skip
    arms = list(table.groupby(["method", "protocol", "encoder", "fraction"], sort=False))
    for axes, kind in zip(grid.flat, kinds):
        for (method, protocol, encoder, fraction), all_kinds in arms:
            own = all_kinds[all_kinds["kind"] == kind].sort_values("snr_db")
            x = own["snr_db"].replace(np.inf, gap)
            axes.plot(x, own["auroc"], color=colours[method], linestyle=TWINS.get(protocol, "--"), linewidth=1.2,
                      marker=markers[encoder], markersize=3.2,
                      label=f"{_arm(method, encoder)}, {_share(protocol, fraction)}")  # fmt: skip
        axes.set_title(_noise_name(kind), fontsize=10)
        axes.axhline(0.5, color="0.7", linewidth=0.8)
        axes.grid(color="0.93")
        axes.set_xticks([*levels, gap], [*(f"{level:g}" for level in levels), "clean"])
        axes.tick_params(labelsize=8, labelbottom=True)
    for axes in grid.flat[len(kinds) :]:
        axes.axis("off")
    grid[0, 0].invert_xaxis()
    for axes in grid[:, 0]:
        axes.set_ylabel("Macro AUROC")
    figure.supxlabel("Signal-to-noise ratio (dB)", fontsize=10)
    # There is always a panel left for it.
    grid.flat[-1].legend(*grid[0, 0].get_legend_handles_labels(), frameon=False, fontsize=7.5, loc="center",
                         handlelength=3)  # fmt: skip
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


def _share(protocol: str, fraction: float) -> str:
    """How an arm was trained, and with which share of the labels, in a legend."""
    return f"{protocol}, {100 * fraction:g} %"


def plot_enrichment(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Relevance mass over chance of each attribution, a panel a class, with the largest that is possible.

    table has the columns class, attribution, value, low, high and ceiling, one row a point.
    """
    _require_columns(table, ("class", "attribution", "value", "low", "high", "ceiling"), "table of enrichments")
    panels, names = list(pd.unique(table["class"])), list(pd.unique(table["attribution"]))[::-1]
    colours = dict(zip(names[::-1], sns.color_palette("husl", len(names))))
    figure, grid = plt.subplots(1, len(panels), figsize=(2.8 + 2.3 * len(panels), 1.3 + 0.32 * len(names)),
                                sharey=True, squeeze=False, layout="constrained")  # fmt: skip
    for axes, panel in zip(grid[0], panels, strict=True):
        rows = table[table["class"] == panel]
        axes.axvline(1, color="0.5", linewidth=1)
        axes.axvline(rows["ceiling"].mean(), color="0.5", linewidth=1, linestyle=":")
        for row in rows.itertuples():
            height = names.index(row.attribution)
            axes.plot([row.low, row.high], [height, height], color=colours[row.attribution], linewidth=1.6)
            axes.plot(row.value, height, "o", color=colours[row.attribution], markersize=5)
        axes.set_xscale("log")
        ticks = [tick for tick in (0.5, 1, 2, 3, 5, 10, 20, 50) if tick <= 1.2 * rows["ceiling"].mean()]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        axes.set_title(panel, fontsize=10)
        axes.grid(axis="x", color="0.9")
    grid[0, 0].set_yticks(range(len(names)), names)
    figure.supxlabel("Mass in the region over chance (1: chance, dotted: the largest possible)", fontsize=9)
    figure.suptitle("\n".join(textwrap.wrap(title or "", 100)), fontsize=11)
    sns.despine(figure)
    plt.close(figure)
    return figure


def plot_randomisation(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Rank correlation with the trained network's attribution as its layers lose what they learned, from the head down.

    table has the columns layer (in order), attribution, signed (whether of a or of |a|) and value.
    """
    _require_columns(table, ("layer", "attribution", "signed", "value"), "table of randomisations")
    layers, names = list(pd.unique(table["layer"])), list(pd.unique(table["attribution"]))
    colours = dict(zip(names, sns.color_palette("colorblind", len(names))))
    figure, grid = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for axes, signed, name in ((grid[0], False, "|a|, where it points"), (grid[1], True, "a, with its sign")):
        axes.axhspan(-0.1, 0.1, color="0.92")
        for place, attribution in enumerate(names):
            rows = table[(table["attribution"] == attribution) & (table["signed"] == signed)].set_index("layer")
            axes.plot(range(len(layers)), rows["value"].reindex(layers), marker=MARKERS[place % len(MARKERS)],
                      color=colours[attribution], markersize=4, label=attribution)  # fmt: skip
        axes.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
        axes.set_title(name, fontsize=10)
        axes.grid(axis="y", color="0.9")
    grid[0].set_ylabel("Rank correlation (grey: below 0.1)")
    grid[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.suptitle("\n".join(textwrap.wrap(title or "", 100)), fontsize=11)
    figure.supxlabel("Randomised from the head down to", fontsize=9)
    sns.despine(figure)
    plt.close(figure)
    return figure


def plot_attributed_ecgs(
    examples: Sequence[tuple[str, np.ndarray, np.ndarray]], sampling_rate: float, title: str | None = None,
    seconds: float = 10.0,
) -> Figure:  # fmt: skip
    """ECGs on ECG paper, one below the other, each with the relevance of its samples as shade behind the traces.

    examples are (text, signals `(12, time)` in mV, relevance of the same shape). A record's darkest shade is its 99.5 %
    quantile of relevance, so shades compare within a record, not between records.
    """
    if not examples:
        raise DataError("There is no example to draw; choose a record.")
    sheets = [(text, *_segments(millivolts, sampling_rate, "standard", seconds), relevance)
              for text, millivolts, relevance in examples]  # fmt: skip
    stacked = [_stack_rows(segments, GAIN) for _, segments, _, _ in sheets]
    left, room = MARGIN + 2 * PULSE_WIDTH, TITLE_LINE + 6
    width = max(left + max(shown for _, _, shown, _ in sheets) * PAPER_SPEED + MARGIN, SMALLEST_WIDTH)
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
                _shade_segment(axes, segment, relevance, largest, sampling_rate, left, floor + baseline)
                _draw_segment(axes, segment, left, floor + baseline, GAIN)
    axes.text(MARGIN, 2, f"{PAPER_SPEED:g} mm/s   {GAIN:g} mm/mV", va="bottom", ha="left", fontsize=8)
    axes.set(xlim=(0, width), ylim=(0, top))
    plt.close(figure)
    return figure


def _shade_segment(axes: Axes, segment: _Segment, relevance: np.ndarray, largest: float, rate: float, left: float,
                   baseline: float) -> None:  # fmt: skip
    """The relevance of one lead's stretch as a band of shade as high as its trace."""
    first = round(segment.time[0] * rate)
    values = relevance[LEADS.index(segment.lead), first : first + len(segment.time)]
    colours = np.zeros((1, len(values), 4))
    colours[0, :, :3] = mpl.colors.to_rgb("#0072b2")
    colours[0, :, 3] = 0.75 * np.clip(values / largest, 0, 1)
    sides = left + PAPER_SPEED * (segment.time[[0, -1]] + np.array([-0.5, 0.5]) / rate)
    low, high = baseline + min(segment.low * GAIN, -4) - 1, baseline + max(segment.high * GAIN, 4) + 1
    axes.imshow(colours, extent=(*sides, low, high), aspect="auto", interpolation="nearest", zorder=1)
