"""What each stage of self-evolving training brought."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from ecglib.records import Records
from ecgstudy.analysis.figures import (
    finish,
    method_colours,
    method_label,
    panels,
    require_columns,
)
from ecgstudy.analysis.summary import STUDENT, seed_summary
from ecgstudy.runs import Run


def plot_stages(summary: pd.DataFrame, title: str | None = None) -> Figure:
    """Macro AUROC (left, with the students' intervals) and calibration error (right) over the
    stages T, a line per arm.

    summary has method, network, stage, value, low, high, calibration_error (see `stage_summary`).
    Dashed is the teacher of an arm, black the control with the same labels, grey the one that knows
    all labels.
    """
    columns = ("method", "network", "stage", "value", "low", "high", "calibration_error")
    require_columns(summary, columns, "table of stages")
    colours = method_colours(summary["method"])
    figure, grid = panels(2, (12, 4.8))
    left, right = grid[0]
    arms = list(summary.groupby(["method", "network"], sort=False))
    for place, ((method, network), rows) in enumerate(arms):
        rows = rows.sort_values("stage")
        shifted = rows["stage"] + 0.025 * (place - (len(arms) - 1) / 2)
        look = {"color": colours[method], "marker": "o", "markersize": 4, "linewidth": 1.4}
        look["linestyle"] = "-" if network == STUDENT else "--"
        name = method_label(method) + ("" if network == STUDENT else f", {network}")
        left.plot(shifted, rows["value"], **look, label=name)
        right.plot(rows["stage"], rows["calibration_error"], **look)
        # A teacher's interval is as wide as its student's, and the start is the same for all.
        if network == STUDENT:
            barred = rows[(rows["stage"] > 0) | (place == 0)]
            limits = (shifted[barred.index], barred["low"], barred["high"])
            left.vlines(*limits, color=colours[method], linewidth=0.7)
    stages = sorted(summary["stage"].unique())
    left.set(xlabel="Stage T", ylabel="Macro AUROC, 95 % interval", xticks=stages)
    right.set(xlabel="Stage T", ylabel="Calibration error", xticks=stages, ylim=(0, None))
    return finish(figure, title, left.get_legend_handles_labels()[0])


def stage_summary(runs: Sequence[Run], records: Records) -> pd.DataFrame:
    """Macro AUROC with its interval and calibration error, means over seeds: one row per method,
    network and stage.

    Every arm has the common start as its stage 0.
    """
    cell = ("network", "method", "stage", "data", "labels", "fraction")
    key = ["network", "method", "stage", "fraction"]
    rows = pd.DataFrame([row for run in runs for row in run.rows()])
    errors = rows.query("split == 'test' and metric == 'expected_calibration_error'")
    errors = errors.groupby(key)["value"].mean().rename("calibration_error")
    table = seed_summary(runs, records, cell=cell).join(errors, on=key)
    later = table[table["stage"] > 0]
    start = table[table["stage"] == 0].drop(columns=["method", "network"])
    starts = later[["method", "network"]].drop_duplicates().merge(start, "cross")
    return pd.concat([starts, later], ignore_index=True)[table.columns]
