"""What each stage of self-evolving training brought."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ecglib.records import Records
from ecgstudy.analysis.figures import method_label, require_columns
from ecgstudy.analysis.summary import seed_summary
from ecgstudy.runs import Run


def plot_stages(summary: pd.DataFrame, title: str | None = None) -> Figure:
    """Macro AUROC (left, with the students' intervals) and calibration error (right) over the
    stages T, a line an arm.

    summary has method, network, stage, value, low, high, calibration_error (see
    `semisup.stages.stage_summary`). Dashed is the teacher of an arm, black the control with the
    same labels, grey the one that knows all labels.
    """
    columns = ("method", "network", "stage", "value", "low", "high", "calibration_error")
    require_columns(summary, columns, "table of stages")
    methods = [
        name for name in pd.unique(summary["method"]) if name not in ("supervised", "oracle")
    ]
    colours = dict(zip(methods, sns.color_palette("colorblind", len(methods)))) | {
        "supervised": "black",
        "oracle": "0.6",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    arms = list(summary.groupby(["method", "network"], sort=False))
    for place, ((method, network), rows) in enumerate(arms):
        rows, shift = rows.sort_values("stage"), 0.025 * (place - (len(arms) - 1) / 2)
        look = {
            "color": colours[method],
            "linestyle": "--" if network == "teacher" else "-",
            "marker": "o",
            "markersize": 4,
            "linewidth": 1.4,
        }
        name = method_label(method) + (", teacher" if network == "teacher" else "")
        left.plot(rows["stage"] + shift, rows["value"], **look, label=name)
        if (
            network == "student"
        ):  # a teacher's interval is as wide as its student's, and the start is the same for all
            barred = rows if place == 0 else rows[rows["stage"] > 0]
            left.vlines(
                barred["stage"] + shift,
                barred["low"],
                barred["high"],
                color=colours[method],
                linewidth=0.7,
            )
        right.plot(rows["stage"], rows["calibration_error"], **look)
    stages = sorted(summary["stage"].unique())
    for axes, label in ((left, "Macro AUROC, 95 % interval"), (right, "Calibration error")):
        axes.set(xlabel="Stage T", ylabel=label, xticks=stages)
        axes.grid(axis="y", color="0.9")
    right.set_ylim(0, None)
    figure.legend(
        *left.get_legend_handles_labels(),
        frameon=False,
        ncols=4,
        loc="outside lower center",
        fontsize=9,
    )
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


def with_teacher(runs: Sequence[Run]) -> list[Run]:
    """Those of the runs that kept a teacher's scores as well."""
    return [run for run in runs if any(row["network"] == "teacher" for row in run.about["metrics"])]


def stage_summary(runs: Sequence[Run], records: Records, split: str = "test") -> pd.DataFrame:
    """Macro AUROC with its interval and calibration error, means over seeds: a row a method,
    network and stage.

    Every arm has the common start as its stage 0.
    """
    taught = with_teacher(runs)
    cell, key = (
        ("method", "stage", "data", "labels", "fraction"),
        ["method", "network", "stage", "fraction"],
    )
    frames = [seed_summary(runs, records, split, cell).assign(network="student")]
    if taught:
        frames.append(
            seed_summary(taught, records, split, cell, "teacher").assign(network="teacher")
        )
    table = pd.concat(frames, ignore_index=True)
    errors = pd.DataFrame([row for run in runs for row in run.rows() if row["split"] == split])
    errors = errors[errors["metric"] == "expected_calibration_error"]
    errors = errors.groupby(key, as_index=False)["value"].mean()
    table = table.merge(errors.rename(columns={"value": "calibration_error"}), on=key)
    start = table[table["stage"] == 0]
    arms = table.loc[table["stage"] > 0, ["method", "network"]].drop_duplicates()
    starts = [start.assign(method=arm.method, network=arm.network) for arm in arms.itertuples()]
    return pd.concat([*starts, table[table["stage"] > 0]], ignore_index=True)
