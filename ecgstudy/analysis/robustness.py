"""What noise does to trained classifiers: macro AUROC over the signal-to-noise ratio, and where it
begins to fall.

Every classifier sees the same noise, drawn for each record from a seed, its record_id and the kind.
Losses are paired: clean and noisy scores, and those of two classifiers, are measured on the same
patient draws.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ecglib.evaluate.draws import percentile_interval
from ecglib.noise import KINDS
from ecglib.records import LEADS
from ecgstudy.analysis.figures import MARKERS, arm_label, require_columns, share_label
from ecgstudy.arms.noise import ARM, CLEAN, NoiseScores, arm_of
from ecgstudy.runs import Run, find_run

NOISE_NAMES = {
    "lead_loss": "lost leads",
    "powerline": "mains hum",
    "white": "white noise",
    "muscle": "muscle noise",
}
TWINS = {
    "frozen": ":",
    "fine-tuned": "-",
    "supervised": "-",
}  # line styles; "--" for other protocols


def _noise_name(kind: str) -> str:
    """A kind of noise in a figure."""
    return NOISE_NAMES.get(kind, kind.replace("_", " "))


def plot_noise_kinds(
    clean: np.ndarray, noisy: dict[str, np.ndarray], sampling_rate: float, title: str | None = None
) -> Figure:
    """The worst hit lead of an ECG under each kind of noise (left), the spectrum of what was added
    (right).

    clean and each of `noisy` are `(12, time)` in mV; the spectra are Welch's, of all leads
    together, in dB, grey the clean ECG's.
    """
    from scipy.signal import welch

    clean, clock = np.nan_to_num(clean), np.arange(clean.shape[1]) / sampling_rate
    figure, grid = plt.subplots(
        len(noisy),
        2,
        figsize=(12, 1.25 * len(noisy) + 0.8),
        sharex="col",
        squeeze=False,
        width_ratios=(3, 1),
        layout="constrained",
    )
    pieces = min(clean.shape[1], round(4 * sampling_rate))

    def spectrum(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        frequency, power = welch(values, sampling_rate, nperseg=pieces, detrend=False)
        return frequency, 10 * np.log10(np.maximum(power.sum(axis=0), 1e-12))

    colour = sns.color_palette("colorblind")[3]
    for (trace, spectra), (kind, values) in zip(grid, noisy.items(), strict=True):
        values = np.nan_to_num(values)
        place = int(np.square(values - clean).sum(axis=1).argmax())
        trace.plot(clock, values[place], color=colour, linewidth=0.7)
        trace.plot(clock, clean[place], color="0.3", linewidth=0.7)
        trace.set_ylabel("mV", fontsize=8)
        trace.set_title(f"{_noise_name(kind)}, lead {LEADS[place]}", fontsize=9, loc="left", pad=2)
        spectra.plot(*spectrum(clean), color="0.6", linewidth=1)
        spectra.plot(*spectrum(values - clean), color=colour, linewidth=1)
        spectra.set_ylim(-70, 10)
        spectra.set_ylabel("dB", fontsize=8)
        for axes in (trace, spectra):
            axes.grid(color="0.92")
            axes.tick_params(labelsize=8)
    grid[-1, 0].set_xlabel("Time (s)")
    grid[-1, 1].set_xlabel("Frequency (Hz)")
    handles = [
        plt.Line2D([], [], color="0.3", label="clean"),
        plt.Line2D([], [], color=colour, label="with noise"),
    ]
    figure.legend(handles=handles, frameon=False, ncols=2, loc="outside lower center")
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


def plot_robustness(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Macro AUROC over the signal-to-noise ratio, a panel a kind of noise, a line an arm; clean
    stands on the right.

    table has method, protocol, encoder, fraction, kind, snr_db (infinite: clean), auroc, see
    `robustness.robustness_table`. Colours are methods (supervised black, random grey), dotted lines
    frozen encoders, dashed ones arms with few labels; the markers tell encoders apart.
    """
    columns = ("method", "protocol", "encoder", "fraction", "kind", "snr_db", "auroc")
    require_columns(table, columns, "robustness table")
    methods = [name for name in pd.unique(table["method"]) if name not in ("supervised", "random")]
    shades = [*sns.color_palette("colorblind"), (0.45, 0.0, 0.1)]
    del shades[7]  # a grey
    colours = {name: shades[place % len(shades)] for place, name in enumerate(methods)} | {
        "supervised": "black",
        "random": "0.6",
    }
    markers = dict(zip(sorted(pd.unique(table["encoder"])), MARKERS))
    levels = sorted(pd.unique(table.loc[np.isfinite(table["snr_db"]), "snr_db"]))
    gap = levels[-1] + (max(levels[-1] - levels[-2], 1) if len(levels) > 1 else 6)
    kinds = list(pd.unique(table["kind"]))
    rows = -(-(len(kinds) + 1) // 4)
    figure, grid = plt.subplots(
        rows,
        4,
        figsize=(15, 4.1 * rows + 0.4),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    arms = list(table.groupby(["method", "protocol", "encoder", "fraction"], sort=False))
    for axes, kind in zip(grid.flat, kinds):
        for (method, protocol, encoder, fraction), all_kinds in arms:
            own = all_kinds[all_kinds["kind"] == kind].sort_values("snr_db")
            x = own["snr_db"].replace(np.inf, gap)
            axes.plot(
                x,
                own["auroc"],
                color=colours[method],
                linestyle=TWINS.get(protocol, "--"),
                linewidth=1.2,
                marker=markers[encoder],
                markersize=3.2,
                label=f"{arm_label(method, encoder)}, {share_label(protocol, fraction)}",
            )
        axes.set_title(_noise_name(kind), fontsize=10)
        axes.axhline(0.5, color="0.7", linewidth=0.8)
        axes.grid(color="0.93")
        axes.set_xticks([*levels, gap], [*(f"{level:g}" for level in levels), "clean"])
        axes.tick_params(labelsize=8, labelbottom=True)
    for axes in grid.flat[len(kinds) :]:
        axes.axis("off")
    grid[0, 0].invert_xaxis()
    for axes in grid[:, 0]:
        axes.set_ylabel("Macro AUROC")
    figure.supxlabel("Signal-to-noise ratio (dB)", fontsize=10)
    # There is always a panel left for it.
    grid.flat[-1].legend(
        *grid[0, 0].get_legend_handles_labels(),
        frameon=False,
        fontsize=7.5,
        loc="center",
        handlelength=3,
    )
    figure.suptitle(title)
    sns.despine(figure)
    plt.close(figure)
    return figure


LIMIT = 0.05  # of macro AUROC, that a classifier may lose
# The augmentations that show a network a kind of noise.
TAUGHT = {
    "gaussian_noise": "white",
    "baseline_wander": "baseline_wander",
    "powerline_noise": "powerline",
    "muscle_noise": "white",
    "baseline_shift": "baseline_shift",
}


def robustness_table(scores: NoiseScores) -> pd.DataFrame:
    """A row an arm, kind and SNR (infinite: clean): auroc, and loss against clean with its paired
    interval.
    """
    rows = []
    for place, run in enumerate(scores.arms):
        for kind in scores.kinds:
            shared = {**arm_of(run), "kind": kind, "n": scores.n}
            clean = float(scores.auroc[place, 0])
            rows.append(
                {**shared, "snr_db": CLEAN, "auroc": clean, "loss": 0.0, "low": 0.0, "high": 0.0}
            )
            for snr, loss, drawn in zip(*scores.losses(place, kind), strict=True):
                interval = percentile_interval(loss, drawn)
                rows.append(
                    {
                        **shared,
                        "snr_db": snr,
                        "auroc": clean - loss,
                        "loss": loss,
                        "low": interval.low,
                        "high": interval.high,
                    }
                )
    columns = [*ARM, "kind", "snr_db", "auroc", "loss", "low", "high", "n"]
    return pd.DataFrame(rows, columns=columns)


def snr_where_lost(snr_db: Sequence[float], losses: Sequence[float], limit: float = LIMIT) -> float:
    """The SNR at which the loss first reaches `limit` on the way down, on straight lines between
    the levels.

    infinity: lost at the highest level already; minus infinity: not lost at the lowest.
    """
    for place, loss in enumerate(losses):
        if loss >= limit:
            if place == 0:
                return math.inf
            share = (limit - losses[place - 1]) / (loss - losses[place - 1])
            return float(snr_db[place - 1] + share * (snr_db[place] - snr_db[place - 1]))
    return -math.inf


def threshold_table(scores: NoiseScores, limit: float = LIMIT) -> pd.DataFrame:
    """A row an arm and kind: `snr_db` at which `limit` of the macro AUROC is lost, its interval,
    and both in words.

    The question is asked anew on every patient draw. See `snr_where_lost` for infinite values.
    """
    rows = []
    for place, run in enumerate(scores.arms):
        for kind in scores.kinds:
            snr, losses, drawn = scores.losses(place, kind)
            # An infinite answer is an answer, so no interpolation between draws.
            found, low, high = percentile_interval(
                snr_where_lost(snr, losses, limit),
                [snr_where_lost(snr, each, limit) for each in drawn.T],
                method="inverted_cdf",
            )
            rows.append(
                {
                    **arm_of(run),
                    "kind": kind,
                    "clean": scores.auroc[place, 0],
                    "limit": limit,
                    "snr_db": found,
                    "low": low,
                    "high": high,
                    "told": _told(found, low, high, snr),
                }
            )
    return pd.DataFrame(rows)


def _told(found: float, low: float, high: float, snr_db: np.ndarray) -> str:
    """A threshold with its interval in words."""

    def word(value: float) -> str:
        if math.isinf(value):
            return f"before {snr_db[0]:g} dB" if value > 0 else "never"
        return f"{round(value)} dB"

    return f"{word(found)} [{word(low)} to {word(high)}]"


def taught_kinds(runs: Sequence[Run], results: str | Path) -> tuple[str, ...]:
    """Kinds of noise that the augmentation of any of the runs, or of their pretraining, has shown
    to a network.
    """
    names: set[str] = set()
    for run in runs:
        names |= set(run.spec.settings.get("transforms", {}))
        if "pretraining" in run.spec.settings:
            pretrained = find_run(run.spec.settings["pretraining"], results)
            names |= set(pretrained.spec.settings.get("transforms", {})) if pretrained else set()
    return tuple(
        kind for kind in KINDS if kind in {TAUGHT[name] for name in names if name in TAUGHT}
    )


def loss_differences(scores: NoiseScores, families: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """How much more a pretrained arm loses than supervised training of the same encoder with the
    same labels.

    A row an arm and family of kinds: difference of the losses, mean over the family's kinds and all
    ratios, with its paired interval; below zero pretraining helps. Rows of the method "all" are the
    means over the arms of a protocol.
    """
    cells = {
        tuple(arm_of(run)[name] for name in ("method", "protocol", "encoder", "fraction")): place
        for place, run in enumerate(scores.arms)
    }
    pairs = [
        (cell, place, cells.get(("supervised", "supervised", *cell[2:])))
        for cell, place in cells.items()
        if cell[1] in ("frozen", "fine-tuned") and cell[0] != "random"
    ]
    rows = []
    for family, kinds in families.items():
        kinds = [kind for kind in kinds if kind in scores.kinds]
        by_protocol: dict[str, list] = {}
        for (method, protocol, encoder, fraction), place, control in pairs:
            if control is None or not kinds:
                continue
            value, drawn = (
                own - other
                for own, other in zip(
                    _mean_loss(scores, place, kinds), _mean_loss(scores, control, kinds)
                )
            )
            by_protocol.setdefault(protocol, []).append((value, drawn))
            rows.append(_difference_row(family, method, protocol, encoder, fraction, value, drawn))
        for protocol, each in by_protocol.items():
            value, drawn = (np.mean(parts, axis=0) for parts in zip(*each))
            rows.append(_difference_row(family, "all", protocol, "all", np.nan, value, drawn))
    return pd.DataFrame(rows)


def _mean_loss(scores: NoiseScores, arm: int, kinds: Sequence[str]) -> tuple[float, np.ndarray]:
    """Mean loss over kinds and ratios, and on each draw `(draws,)`."""
    each = [scores.losses(arm, kind)[1:] for kind in kinds]
    return float(np.mean([values for values, _ in each])), np.mean(
        [drawn for _, drawn in each], axis=(0, 1)
    )


def _difference_row(
    family: str,
    method: str,
    protocol: str,
    encoder: str,
    fraction: float,
    value: float,
    drawn: np.ndarray,
) -> dict:
    interval = percentile_interval(value, drawn)
    return {
        "family": family,
        "method": method,
        "protocol": protocol,
        "encoder": encoder,
        "fraction": fraction,
        "difference": interval.value,
        "low": interval.low,
        "high": interval.high,
    }
