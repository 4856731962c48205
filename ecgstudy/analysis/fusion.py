"""What fused encoders know in common, and which of them the fusion listens to."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ecgstudy.analysis.figures import method_label, require_columns


def plot_similarity(similarity: pd.DataFrame, title: str | None = None) -> Figure:
    """Heat map of a symmetric table of similarities from 0 to 1, such as CKA between encoders, with
    its numbers.
    """
    require_columns(similarity, similarity.index, "table of similarities")
    names, size = [method_label(name) for name in similarity], 2.2 + 0.6 * len(similarity)
    figure, axes = plt.subplots(figsize=(size + 0.9, size), layout="constrained")
    sns.heatmap(
        similarity.to_numpy(),
        vmin=0,
        vmax=1,
        cmap="viridis",
        annot=True,
        fmt=".2f",
        square=True,
        ax=axes,
        xticklabels=names,
        yticklabels=names,
        cbar_kws={"label": "Linear CKA"},
    )
    axes.tick_params(axis="x", rotation=45)
    axes.tick_params(axis="y", rotation=0)
    figure.suptitle(title, fontsize=10)
    plt.close(figure)
    return figure


def plot_token_weights(weights: pd.DataFrame, title: str | None = None) -> Figure:
    """Share of each member for each class, a panel a measure; the dotted line is an equal share.

    weights has measure, class, member and share, see `fusion.token_weights`.
    """
    require_columns(weights, ("measure", "class", "member", "share"), "table of token weights")
    measures, members = pd.unique(weights["measure"]), list(pd.unique(weights["member"]))
    classes = list(pd.unique(weights["class"]))
    figure, panels = plt.subplots(
        1,
        len(measures),
        figsize=(1.5 + 4.5 * len(measures), 1.6 + 0.42 * len(members)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, measure in zip(panels[0], measures, strict=True):
        table = weights[weights["measure"] == measure].pivot(
            index="member", columns="class", values="share"
        )
        for place, (name, colour) in enumerate(
            zip(classes, sns.color_palette("colorblind", len(classes)))
        ):
            heights = np.arange(len(members))[::-1] + 0.5 * (0.5 - (place + 0.5) / len(classes))
            axes.plot(
                table.loc[members, name], heights, "o", color=colour, markersize=5, label=name
            )
        axes.axvline(1 / len(members), color="0.5", linestyle=":", linewidth=1)
        axes.set(title=measure, xlabel="Share", xlim=(0, None))
        axes.grid(axis="x", color="0.9")
    panels[0, 0].set_yticks(range(len(members)), [method_label(name) for name in members[::-1]])
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        frameon=False,
        ncols=len(classes),
        loc="outside lower center",
    )
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure
