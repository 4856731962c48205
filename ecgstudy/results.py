"""Where the study keeps its tables, `tables/NAME.csv`, and figures, `figures/NAME.svg`."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ecglib.errors import DataError
from ecglib.files import atomic_file


def save_table(frame: pd.DataFrame, name: str, results: str | Path, index: bool = False) -> Path:
    """Write a table as CSV below `results`, atomically; returns its path."""
    path = Path(results) / "tables" / f"{name}.csv"
    with atomic_file(path) as temporary:
        frame.to_csv(temporary, index=index)
    return path


def save_figure(figure: Figure, name: str, results: str | Path) -> Path:
    """Write a figure as SVG below `results`, atomically, and close it; returns its path.

    The same figure gives the same bytes. DataError where the name has another ending.
    """
    path = Path(results) / "figures" / f"{name}.svg"
    if "." in path.stem:
        raise DataError(f"{name}: figures are kept as SVG; give a name without an ending.")
    with mpl.rc_context({"svg.hashsalt": "ecglib"}), atomic_file(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)
    return path


def interval_table(
    table: pd.DataFrame,
    index: str | Sequence[str],
    columns: str = "fraction",
    value: str = "value",
    form: str = ".3f",
) -> pd.DataFrame:
    """A table for reading, with `value [low, high]` of each row in a cell, by the columns `index`
    and `columns`; fractions are in per cent.
    """
    cells = [
        f"{row[value]:{form}} [{row['low']:{form}}, {row['high']:{form}}]"
        for row in table.to_dict("records")
    ]
    shown = table.assign(cell=cells).pivot(index=index, columns=columns, values="cell")
    return shown.rename(columns="{:.0%}".format) if columns == "fraction" else shown
