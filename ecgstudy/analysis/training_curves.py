"""How a training went, as a figure."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ecgstudy.analysis.figures import require_columns


def plot_training(history: pd.DataFrame, title: str | None = None) -> Figure:
    """Losses and learning rate over training steps; columns step, learning_rate, loss and others
    that end in loss.
    """
    require_columns(history, ("step", "loss", "learning_rate"), "training history")
    losses = [column for column in history if column.endswith("loss")]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.5, 4.8), sharex=True, layout="constrained", height_ratios=(3, 1)
    )
    for column, colour in zip(losses, sns.color_palette("colorblind", len(losses)), strict=True):
        rows = history[["step", column]].dropna()  # a validation loss is known at a few steps only
        above.plot(
            rows["step"], rows[column], color=colour, linewidth=1.5, label=_loss_name(column)
        )
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


WATCHED = {
    "loss": "Loss",
    "online_probe": "Online probe\n(macro AUROC, fold 9)",
    "alignment": "Alignment\n(0: views agree)",
    "uniformity": "Uniformity\n(0: collapsed)",
    "effective_rank": "Effective rank\n(1: collapsed)",
}


def plot_pretraining(history: pd.DataFrame, title: str | None = None) -> Figure:
    """What a pretraining learns, over its steps: loss, online probe, alignment, uniformity and
    effective rank.

    history has these columns and `step`; step 0 is the random start, drawn as a dotted line through
    each panel.
    """
    require_columns(history, ("step", *WATCHED), "pretraining history")
    figure, panels = plt.subplots(1, len(WATCHED), figsize=(13, 2.9), layout="constrained")
    for axes, (column, name) in zip(panels, WATCHED.items(), strict=True):
        axes.plot(
            history["step"],
            history[column],
            color=sns.color_palette("colorblind")[0],
            linewidth=1.5,
        )
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


def _loss_name(column: str) -> str:
    """How a loss column is called in the legend."""
    return "training loss" if column == "loss" else column.replace("_", " ")
