"""How many labels each arm needs: tables and figures of the label curve."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ecglib.evaluate.draws import labels_needed
from ecglib.evaluate.metrics import macro_auroc
from ecglib.probe import probe_subsets
from ecglib.records import Records
from ecgstudy.analysis.figures import MARKERS, arm_label, label_axis, require_columns
from ecgstudy.analysis.summary import seed_scores
from ecgstudy.runs import Run
from ecgstudy.study import label_grid


def plot_label_curve(
    table: pd.DataFrame,
    training_records: int | None = None,
    metric: str = "Macro AUROC",
    title: str | None = None,
) -> Figure:
    """Mean over seeds of `value` against the share of labels, one line a method; small dots are the
    seeds.

    table has the columns method, fraction, seed, value, low, high; the bars are the means of low
    and of high. training_records is the number of records at fraction 1: with it, each tick also
    tells the number of records.
    """
    require_columns(table, ("method", "fraction", "seed", "value", "low", "high"), "label curve")
    methods = list(pd.unique(table["method"]))
    colours = sns.color_palette("colorblind", len(methods))
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    for place, method in enumerate(methods):
        rows = table[table["method"] == method]
        shift = 1.035 ** (
            place - (len(methods) - 1) / 2
        )  # beside each other, so that no bar hides another
        mean = rows.groupby("fraction")[["value", "low", "high"]].mean()
        bars = np.clip([mean["value"] - mean["low"], mean["high"] - mean["value"]], 0, None)
        axes.plot(
            rows["fraction"] * shift,
            rows["value"],
            ".",
            color=colours[place],
            alpha=0.35,
            markersize=4,
        )
        axes.errorbar(
            mean.index * shift,
            mean["value"],
            bars,
            color=colours[place],
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            capsize=2,
            label=method,
            linestyle="-" if place < 10 else "--",
        )
    label_axis(axes, sorted(table["fraction"].unique()), training_records)
    axes.set(ylabel=f"{metric} (mean, 95 % interval)", title=title)
    axes.grid(axis="y", color="0.9")
    sns.despine(figure)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    plt.close(figure)
    return figure


def plot_label_efficiency(
    summary: pd.DataFrame, training_records: int, title: str | None = None
) -> Figure:
    """Macro AUROC against the share of labels, frozen on the left and fine-tuned on the right, a
    line an arm.

    summary has method, encoder, protocol, fraction, value, low, high (see `runs.seed_summary`). The
    controls stand in both panels: trained from scratch black, random filters (frozen only) grey,
    another line style for each encoder.
    """
    require_columns(
        summary,
        ("method", "encoder", "protocol", "fraction", "value", "low", "high"),
        "label summary",
    )
    arms = summary.groupby(["protocol", "method", "encoder"], sort=False)
    methods = [
        name for name in pd.unique(summary["method"]) if name not in ("supervised", "random")
    ]
    colours = dict(zip(methods, sns.color_palette("colorblind", len(methods)))) | {
        "supervised": "black",
        "random": "0.6",
    }
    styles = dict(zip(sorted(pd.unique(summary["encoder"])), ("-", "--", ":", "-.")))
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.2), sharey=True, layout="constrained")
    for axes, protocol in zip(panels, ("frozen", "fine-tuned"), strict=True):
        shown = [
            (key, rows.sort_values("fraction"))
            for key, rows in arms
            if key[0] in (protocol, "supervised")
        ]
        for place, ((_, method, encoder), rows) in enumerate(shown):
            x = rows["fraction"] * 1.02 ** (place - (len(shown) - 1) / 2)
            bars = np.clip([rows["value"] - rows["low"], rows["high"] - rows["value"]], 0, None)
            axes.errorbar(
                x,
                rows["value"],
                bars,
                color=colours[method],
                linestyle=styles[encoder],
                marker="o",
                label=arm_label(method, encoder),
                markersize=3.5,
                linewidth=1.4,
                elinewidth=0.7,
                capsize=1.5,
            )
        label_axis(axes, sorted(summary["fraction"].unique()), training_records)
        axes.set_title(f"{protocol} encoders")
        axes.grid(axis="y", color="0.9")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    panels[0].set_ylabel("Macro AUROC (mean over subsets, 95 % interval)")
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


def frozen_validation(
    records: Records, features: Mapping[str, np.ndarray], fractions: Sequence[float], seeds: int
) -> pd.DataFrame:
    """Macro AUROC on fold 9 of linear probes: a row for each of the named feature matrices, a
    column a fraction.

    Mean over `seeds` label subsets. The penalty is chosen on the same fold, so this is for looking
    while one learns; what counts is measured on fold 10 in notebook 09.
    """
    split = records.split
    grid = label_grid(fractions, seeds, seeds)
    subsets = {(cell.fraction, cell.seed): cell.positions(records) for cell in grid}
    rows = {}
    for name, values in features.items():
        probes = probe_subsets(values, records.targets, subsets, split, classes=records.classes)
        scores = {
            key: macro_auroc(
                records.targets[split["validation"]], probe["validation/probabilities"]
            )
            for key, probe in probes.items()
        }
        rows[name] = {
            fraction: np.mean([scores[fraction, seed] for seed in range(seeds)])
            for fraction in fractions
        }
    return pd.DataFrame(rows).T


def labels_needed_table(runs: Sequence[Run], records: Records, draws: int = 1000) -> pd.DataFrame:
    """Share of the labels with which each arm reaches the same encoder trained from scratch with
    all labels.

    A row an arm: goal (macro AUROC to be reached), needed with its interval `low` to `high`, see
    `labels_needed`, and `records` that this share means.
    """
    split = records.split
    targets, patients = records.split_truth("test")
    arms: dict[tuple, dict[float, np.ndarray]] = {}
    for (*arm, fraction), scores in seed_scores(
        runs, "test", ("method", "encoder", "protocol", "fraction")
    ).items():
        arms.setdefault(tuple(arm), {})[fraction] = scores
    rows = []
    for (method, encoder, protocol), curve in sorted(arms.items()):
        supervised = arms["supervised", encoder, "supervised"]
        goal = supervised[max(supervised)]
        needed = labels_needed(targets, curve, goal, patients, draws, classes=records.classes)
        level = np.mean([macro_auroc(targets, one, records.classes) for one in goal])
        rows.append(
            {
                "method": method,
                "encoder": encoder,
                "protocol": protocol,
                "goal": level,
                "needed": needed.value,
                "low": needed.low,
                "high": needed.high,
                "records": needed.value * len(split["train"]),
            }
        )
    return pd.DataFrame(rows).sort_values(["needed", "method"], ignore_index=True)
