"""What fused encoders know in common, and which of them the fusion listens to."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ecgstudy.analysis.figures import (
    PALETTE,
    finish,
    legend_line,
    looks,
    method_label,
    panels,
    require_columns,
)


def plot_similarity(similarity: pd.DataFrame, title: str | None = None) -> Figure:
    """Heat map of a symmetric table of similarities from 0 to 1, such as CKA between encoders, with
    its numbers.
    """
    require_columns(similarity, similarity.index, "table of similarities")
    size = 2.2 + 0.6 * len(similarity)
    figure, grid = panels(1, (size + 0.9, size))
    named = similarity.set_axis(map(method_label, similarity), axis=1)
    look = {
        "vmin": 0,
        "vmax": 1,
        "cmap": "viridis",
        "annot": True,
        "fmt": ".2f",
        "square": True,
    }
    bar = {"cbar_kws": {"label": "Linear CKA"}, "yticklabels": list(named)}
    axes = sns.heatmap(named, ax=grid[0, 0], **look, **bar)
    axes.tick_params(axis="x", rotation=45)
    axes.tick_params(axis="y", rotation=0)
    return finish(figure, title)


def plot_token_weights(weights: pd.DataFrame, title: str | None = None) -> Figure:
    """Share of each member for each class, a panel per measure; the dotted line is an equal share.

    weights has measure, class, member and share, see `fusion.token_weights`.
    """
    require_columns(weights, ("measure", "class", "member", "share"), "table of token weights")
    members = pd.unique(weights["member"])
    colours = looks(weights["class"], PALETTE)
    measures = weights.groupby("measure", sort=False)
    size = 1.5 + 4.5 * len(measures), 1.6 + 0.42 * len(members)
    figure, grid = panels(len(measures), size, grid="x", sharey=True)
    for axes, (measure, rows) in zip(grid[0], measures):
        table = rows.pivot(index="member", columns="class", values="share").loc[members]
        for place, (name, colour) in enumerate(colours.items()):
            heights = np.arange(len(members))[::-1] + 0.5 * (0.5 - (place + 0.5) / len(colours))
            axes.plot(table[name], heights, "o", color=colour, markersize=5)
        axes.axvline(1 / len(members), color="0.5", linestyle=":", linewidth=1)
        axes.set(title=measure, xlabel="Share", xlim=(0, None))
    grid[0, 0].set_yticks(range(len(members)), map(method_label, members[::-1]))
    legend = [legend_line(name, colour, marker="o") for name, colour in colours.items()]
    return finish(figure, title, legend)
