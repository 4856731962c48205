"""How many labels each arm needs: tables and figures of the label curve."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ecglib.evaluate.draws import labels_needed
from ecglib.evaluate.metrics import macro_auroc
from ecglib.probe import probe_subsets
from ecglib.records import Records
from ecgstudy.analysis.figures import (
    LINE_STYLES,
    MARKERS,
    PALETTE,
    arm_label,
    draw_line,
    finish,
    label_axis,
    looks,
    method_colours,
    panels,
    require_columns,
)
from ecgstudy.analysis.summary import seed_scores
from ecgstudy.runs import Run
from ecgstudy.study import label_grid


def plot_label_curve(
    table: pd.DataFrame,
    training_records: int | None = None,
    title: str | None = None,
) -> Figure:
    """Mean over seeds of `value` against the share of labels, one line per method; small dots are
    the seeds.

    table has the columns method, fraction, seed, value, low, high; the bars are the means of low
    and of high. training_records is the number of records at fraction 1: with it, each tick also
    tells the number of records.
    """
    require_columns(table, ("method", "fraction", "seed", "value", "low", "high"), "label curve")
    methods = list(pd.unique(table["method"]))
    colours, markers = looks(methods, PALETTE), looks(methods, MARKERS)
    figure, grid = panels(1, (8.5, 4.8), grid="y")
    axes = grid[0, 0]
    for method, shift in zip(methods, _shifts(len(methods), 1.035)):
        rows = table[table["method"] == method]
        mean = rows.groupby("fraction")[["value", "low", "high"]].mean()
        colour, marker = colours[method], markers[method]
        x = rows["fraction"] * shift
        axes.plot(x, rows["value"], ".", color=colour, alpha=0.35, markersize=4)
        draw_line(axes, mean.index * shift, mean, color=colour, marker=marker, label=method)
    label_axis(axes, sorted(table["fraction"].unique()), training_records)
    axes.set_ylabel("Macro AUROC (mean, 95 % interval)")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return finish(figure, title)


def plot_label_efficiency(
    summary: pd.DataFrame, training_records: int, title: str | None = None
) -> Figure:
    """Macro AUROC against the share of labels, frozen on the left and fine-tuned on the right, a
    line per arm.

    summary has method, encoder, protocol, fraction, value, low, high (see `summary.seed_summary`).
    The controls stand in both panels: trained from scratch black, random filters (frozen only)
    grey, another line style for each encoder.
    """
    columns = ("method", "encoder", "protocol", "fraction", "value", "low", "high")
    require_columns(summary, columns, "label summary")
    colours = method_colours(summary["method"])
    styles = looks(sorted(pd.unique(summary["encoder"])), LINE_STYLES)
    figure, grid = panels(2, (13, 5.2), grid="y", sharey=True)
    for axes, protocol in zip(grid[0], ("frozen", "fine-tuned"), strict=True):
        shown = summary[summary["protocol"].isin((protocol, "supervised"))]
        arms = shown.groupby(["protocol", "method", "encoder"], sort=False)
        for ((_, method, encoder), rows), shift in zip(arms, _shifts(arms.ngroups, 1.02)):
            rows = rows.sort_values("fraction")
            look = {"color": colours[method], "linestyle": styles[encoder], "marker": "o"}
            name = arm_label(method, encoder)
            draw_line(axes, rows["fraction"] * shift, rows, label=name, markersize=3.5, **look)
        label_axis(axes, sorted(summary["fraction"].unique()), training_records)
        axes.set_title(f"{protocol} encoders")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    grid[0, 0].set_ylabel("Macro AUROC (mean over subsets, 95 % interval)")
    return finish(figure, title)


def _shifts(count: int, factor: float) -> np.ndarray:
    """Factors that put `count` lines beside each other, so that no bar hides another."""
    return factor ** (np.arange(count) - (count - 1) / 2)


def frozen_validation(
    records: Records, features: Mapping[str, np.ndarray], fractions: Sequence[float], seeds: int
) -> pd.DataFrame:
    """Macro AUROC on fold 9 of linear probes: one row per named feature matrix, one
    column per fraction.

    Mean over `seeds` label subsets. The penalty is chosen on the same fold, so this is for looking
    while one learns; what counts is measured on fold 10 in notebook 09.
    """
    grid = label_grid(fractions, seeds, seeds)
    subsets = {(cell.fraction, cell.seed): cell.positions(records) for cell in grid}
    targets, _ = records.split_truth("validation")
    rows = []
    for name, values in features.items():
        probes = probe_subsets(
            values, records.targets, subsets, records.split, classes=records.classes
        )
        for (fraction, _), probe in probes.items():
            score = macro_auroc(targets, probe["validation/probabilities"])
            rows.append({"features": name, "fraction": fraction, "score": score})
    table = pd.DataFrame(rows).pivot_table("score", "features", "fraction")
    return table.loc[list(features), list(fractions)]


def labels_needed_table(runs: Sequence[Run], records: Records, draws: int = 1000) -> pd.DataFrame:
    """Share of the labels with which each arm reaches the same encoder trained from scratch with
    all labels.

    One row per arm: goal (macro AUROC to be reached), needed with its interval `low` to `high`, see
    `labels_needed`, and `records` that this share means.
    """
    targets, patients = records.split_truth("test")
    names = ("method", "encoder", "protocol")
    arms: dict[tuple, dict[float, np.ndarray]] = {}
    for cell, scores in seed_scores(runs, cell=(*names, "fraction")).items():
        arms.setdefault(cell[:-1], {})[cell[-1]] = scores
    rows = []
    for arm, curve in sorted(arms.items()):
        supervised = arms["supervised", arm[1], "supervised"]
        goal = supervised[max(supervised)]
        needed = labels_needed(targets, curve, goal, patients, draws, classes=records.classes)
        level = np.mean([macro_auroc(targets, seed, records.classes) for seed in goal])
        measured = {"goal": level, "needed": needed.value, "low": needed.low, "high": needed.high}
        count = needed.value * len(records.split["train"])
        rows.append({**dict(zip(names, arm, strict=True)), **measured, "records": count})
    return pd.DataFrame(rows).sort_values(["needed", "method"], ignore_index=True)
