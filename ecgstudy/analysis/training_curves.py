"""How a training went, as a figure."""

import pandas as pd
from matplotlib.figure import Figure

from ecgstudy.analysis.figures import PALETTE, finish, looks, panels, require_columns

WATCHED = {
    "loss": "Loss",
    "online_probe": "Online probe\n(macro AUROC, fold 9)",
    "alignment": "Alignment\n(0: views agree)",
    "uniformity": "Uniformity\n(0: collapsed)",
    "effective_rank": "Effective rank\n(1: collapsed)",
}


def plot_training(history: pd.DataFrame, title: str | None = None) -> Figure:
    """Losses and learning rate over training steps; columns step, learning_rate, loss and others
    that end in loss.
    """
    require_columns(history, ("step", "loss", "learning_rate"), "training history")
    colours = looks([column for column in history if column.endswith("loss")], PALETTE)
    figure, grid = panels(
        1,
        (7.5, 4.8),
        rows=2,
        sharex=True,
        height_ratios=(3, 1),
    )
    above, below = grid[:, 0]
    for column, colour in colours.items():
        rows = history[["step", column]].dropna()  # a validation loss is known at a few steps only
        name = "training loss" if column == "loss" else column.replace("_", " ")
        above.plot(rows["step"], rows[column], color=colour, label=name)
    below.plot(history["step"], history["learning_rate"], color="0.3")
    above.set_ylabel("Loss")
    below.set(ylabel="Learning rate", xlabel="Step (mini-batches)", ylim=(0, None))
    if len(colours) > 1:
        above.legend(frameon=False)
    figure.align_ylabels()
    return finish(figure, title)


def plot_pretraining(history: pd.DataFrame, title: str | None = None) -> Figure:
    """What a pretraining learns, over its steps: loss, online probe, alignment, uniformity and
    effective rank.

    history has these columns and `step`; step 0 is the random start, drawn as a dotted line through
    each panel.
    """
    require_columns(history, ("step", *WATCHED), "pretraining history")
    figure, grid = panels(len(WATCHED), (13, 2.9))
    for axes, (column, name) in zip(grid[0], WATCHED.items()):
        axes.plot(history["step"], history[column], color=PALETTE[0])
        for start in history.loc[history["step"] == 0, column].dropna():
            axes.axhline(start, color="0.5", linestyle=":", linewidth=1)
        axes.set(xlabel="Step", title=name)
    return finish(figure, title)
