"""What the figures of the study share: names, markers, axes, and how a figure is kept."""

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ecglib.errors import DataError

MARKERS = "osD^vPXhp*"


def label_axis(axes: Axes, fractions: list[float], training_records: int | None) -> None:
    """A logarithmic x-axis with a tick at each fraction, in percent and in records."""
    names = [f"{100 * fraction:g} %" for fraction in fractions]
    label = "Labelled share of the training records"
    if training_records:
        names = [
            f"{100 * fraction:g} %\n{round(fraction * training_records):,}"
            for fraction in fractions
        ]
        label += "\n(below: number of labelled records)"
    axes.set_xscale("log")
    axes.set_xticks(fractions, names)
    axes.minorticks_off()
    axes.set_xlabel(label)


def arm_label(method: str, encoder: str) -> str:
    """An arm's name in a figure."""
    return f"{method_label(method)}, {encoder}"


def method_label(method: str) -> str:
    """A method's name in a figure."""
    return (
        method.replace("ce_ssl", "CE-SSL")
        .replace("distl", "DISTL")
        .replace("dvme", "DVME")
        .replace("_", " ")
    )


def plot_intervals(
    table: pd.DataFrame,
    colours: Sequence[str],
    width: float,
    title: str | None,
    one_scale: bool = True,
) -> Figure:
    """gain with low and high of each panel, row and colour, in the order in which panels and rows
    come in `table`.

    A point is filled where its interval lies on one side of zero; `width` is that of a panel in
    inches, `one_scale` says whether the panels show the same measure.
    """
    panels, rows = pd.unique(table["panel"]), list(pd.unique(table["row"]))[::-1]
    palette = dict(zip(colours, sns.color_palette("colorblind", len(colours))))
    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(2.6 + width * len(panels), 1.2 + 0.42 * len(rows)),
        sharex=one_scale,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        axes.axvline(0, color="0.5", linewidth=1)
        for row in table[table["panel"] == panel].itertuples():
            height = rows.index(row.row) + 0.6 * (
                0.5 - (colours.index(row.colour) + 0.5) / len(colours)
            )
            colour, sure = palette[row.colour], row.low > 0 or row.high < 0
            axes.plot([row.low, row.high], [height, height], color=colour, linewidth=1.4)
            axes.plot(
                row.gain,
                height,
                "o",
                color=colour,
                markerfacecolor=colour if sure else "white",
                markersize=5,
            )
        axes.set(title=panel, xlabel="Gain")
        axes.title.set_size(10)
        axes.grid(axis="x", color="0.9")
        axes.locator_params(axis="x", nbins=3 if width < 2 else 5)
    grid[0, 0].set_yticks(range(len(rows)), rows)
    handles = [
        plt.Line2D([], [], color=colour, marker="o", label=name) for name, colour in palette.items()
    ]
    figure.legend(handles=handles, frameon=False, ncols=len(handles), loc="outside lower center")
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


def method_looks(methods: Iterable[str]) -> dict[str, tuple]:
    """Colour by what is trained (CE-SSL, low-rank pairs, every weight), marker by method."""
    seen: dict[int, int] = {}
    looks = {}
    for method in methods:
        family = 0 if method.startswith("ce_ssl") else 1 if "lora" in method else 2
        looks[method] = (sns.color_palette("colorblind")[family], "osD^vP"[seen.get(family, 0) % 6])
        seen[family] = seen.get(family, 0) + 1
    return looks


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


def share_label(protocol: str, fraction: float) -> str:
    """How an arm was trained, and with which share of the labels, in a legend."""
    return f"{protocol}, {100 * fraction:g} %"
