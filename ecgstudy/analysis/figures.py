"""The one look of the study's figures: panels, lines and dots with intervals, names and colours."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ecglib.errors import DataError
from ecgstudy.methods import SPARE_COLOURS, method

MARKERS = "osD^vPXhp*"
LETTERS = 10  # of a title, in an inch
LINE_STYLES = ("-", "--", ":", "-.", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)))
PALETTE = [colour for place, colour in enumerate(sns.color_palette("colorblind")) if place != 7]


def method_label(name: str) -> str:
    """A method's name in a figure."""
    return method(name).label


def arm_label(method: str, encoder: str) -> str:
    """An arm's name in a figure."""
    return f"{method_label(method)}, {encoder}"


def percent_label(fraction: float) -> str:
    """A share of the labels in a figure."""
    return f"{100 * fraction:g} % of the labels"


def method_colours(names: Iterable[str]) -> dict[str, str]:
    """Each method's colour. The later one of two methods that share one gets a spare colour; the
    controls stay black and grey.
    """
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        colour = method(name).colour
        if colour in set(found.values()) - {"black", "0.6"}:
            spare = [*SPARE_COLOURS, *sns.husl_palette(len(found) + 1, l=0.5).as_hex()]
            colour = next(each for each in spare if each not in found.values())
        found[name] = colour
    return found


def looks(names: Iterable, choices: Sequence) -> dict:
    """A marker, line style or colour for each name, begun anew where there are more names."""
    return dict(zip(dict.fromkeys(names), cycle(choices)))


def panels(
    columns: int, size: tuple[float, float], rows: int = 1, grid: str = "both", **options
) -> tuple[Figure, np.ndarray]:
    """A figure of `size` inches and its panels `(rows, columns)`; options of `pyplot.subplots`."""
    figure, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **options
    )
    for each in axes.flat:
        each.grid(axis=grid, color="0.9")
        each.title.set_size(10)
    return figure, axes


def finish(figure: Figure, title: str | None = None, legend: Sequence[Artist] = ()) -> Figure:
    """The figure with its title, a legend below where one is given, and open frames.

    It is closed, so that a notebook shows it once.
    """
    if legend:
        columns = min(len(legend), 5)
        figure.legend(
            handles=legend, frameon=False, ncols=columns, loc="outside lower center", fontsize=9
        )
    letters = int(LETTERS * figure.get_figwidth())
    figure.suptitle("\n".join(textwrap.wrap(title or "", letters)), fontsize=11)
    sns.despine(figure)
    plt.close(figure)
    return figure


def legend_line(label: str, colour: object, **look) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], label=label, color=colour, **look)


def draw_line(axes: Axes, x: pd.Series, rows: pd.DataFrame, **look) -> None:
    """A line through `value` with bars from `low` to `high`."""
    bars = np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None)
    axes.errorbar(x, rows["value"], bars, elinewidth=0.8, capsize=2, **look)


def draw_dot(axes: Axes, height: float, row: Mapping, colour: object, filled: bool = True) -> None:
    """A dot at `value` on a bar from `low` to `high`."""
    axes.plot([row["low"], row["high"]], [height, height], color=colour, linewidth=1.5)
    face = colour if filled else "white"
    axes.plot(row["value"], height, "o", color=colour, markerfacecolor=face, markersize=5)


def label_axis(axes: Axes, fractions: list[float], training_records: int | None) -> None:
    """A logarithmic x-axis with a tick at each fraction, in percent and in records."""
    names = [f"{100 * fraction:g} %" for fraction in fractions]
    label = "Labelled share of the training records"
    if training_records:
        counts = [f"{round(fraction * training_records):,}" for fraction in fractions]
        names = [f"{name}\n{count}" for name, count in zip(names, counts)]
        label += "\n(below: number of labelled records)"
    axes.set_xscale("log")
    axes.set_xticks(fractions, names)
    axes.minorticks_off()
    axes.set_xlabel(label)


def require_columns(table: pd.DataFrame, columns: Iterable[str], what: str) -> None:
    """DataError where a table to be drawn lacks a column or has no row."""
    lacking = [column for column in columns if column not in table]
    if lacking:
        raise DataError(
            f"The {what} lacks the column {lacking[0]!r}; it needs {', '.join(columns)}."
        )
    if not len(table):
        raise DataError(
            f"The {what} has no row, so there is nothing to draw; run the earlier notebooks first."
        )
