"""What noise does to trained classifiers: macro AUROC over the signal-to-noise ratio, and where it
begins to fall.

Every classifier sees the same noise, drawn for each record from a seed, its record_id and the kind.
Losses are paired: clean and noisy scores, and those of two classifiers, are measured on the same
patient draws.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ecglib.errors import DataError
from ecglib.evaluate.draws import Interval, first_crossing, percentile_interval
from ecglib.noise import KINDS
from ecglib.records import LEADS, Records
from ecgstudy.analysis.figures import (
    MARKERS,
    PALETTE,
    arm_label,
    finish,
    legend_line,
    looks,
    method_colours,
    panels,
    require_columns,
)
from ecgstudy.analysis.gains import gain_row
from ecgstudy.arms.noise import CLEAN, NoiseScores, arm_of
from ecgstudy.methods import METHODS, method
from ecgstudy.runs import Run, find_run, kept_runs

STUDIES = ("label_efficiency", "semi_supervised", "self_evolving", "fusion")
LIMIT = 0.05  # of macro AUROC, that a classifier may lose
# The augmentations that show a network a kind of noise.
TAUGHT = {
    "gaussian_noise": "white",
    "baseline_wander": "baseline_wander",
    "powerline_noise": "powerline",
    "muscle_noise": "white",
    "baseline_shift": "baseline_shift",
}
NOISE_NAMES = {
    "lead_loss": "lost leads",
    "powerline": "mains hum",
    "white": "white noise",
    "muscle": "muscle noise",
}
STYLES = {"frozen": ":", "fine-tuned": "-", "supervised": "-"}  # "--" for other protocols


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
    clean, clock = np.nan_to_num(clean), np.arange(clean.shape[1]) / sampling_rate
    colour = PALETTE[3]
    size = 12, 1.25 * len(noisy) + 0.8
    figure, grid = panels(2, size, rows=len(noisy), sharex="col", width_ratios=(3, 1))
    for (trace, spectra), (kind, values) in zip(grid, noisy.items(), strict=True):
        values = np.nan_to_num(values)
        place = int(np.square(values - clean).sum(axis=1).argmax())
        trace.plot(clock, values[place], color=colour, linewidth=0.7)
        trace.plot(clock, clean[place], color="0.3", linewidth=0.7)
        trace.set_ylabel("mV")
        trace.set_title(f"{_noise_name(kind)}, lead {LEADS[place]}", fontsize=9, loc="left", pad=2)
        _draw_spectrum(spectra, clean, sampling_rate, "0.6")
        _draw_spectrum(spectra, values - clean, sampling_rate, colour)
        spectra.set(ylim=(-70, 10), ylabel="dB")
    grid[-1, 0].set_xlabel("Time (s)")
    grid[-1, 1].set_xlabel("Frequency (Hz)")
    legend = [legend_line("clean", "0.3"), legend_line("with noise", colour)]
    return finish(figure, title, legend)


def _draw_spectrum(axes: Axes, values: np.ndarray, sampling_rate: float, colour: object) -> None:
    from scipy.signal import welch

    pieces = min(values.shape[1], round(4 * sampling_rate))
    frequency, power = welch(values, sampling_rate, nperseg=pieces, detrend=False)
    decibels = 10 * np.log10(np.maximum(power.sum(axis=0), 1e-12))
    axes.plot(frequency, decibels, color=colour, linewidth=1)


def plot_robustness(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Macro AUROC over the signal-to-noise ratio, a panel per kind of noise, a line per arm; clean
    stands on the right.

    table has method, protocol, encoder, fraction, kind, snr_db (infinite: clean), auroc, see
    `robustness_table`. Colours are methods (supervised black, random grey), dotted lines frozen
    encoders, dashed ones arms with few labels; the markers tell encoders apart.
    """
    columns = ("method", "protocol", "encoder", "fraction", "kind", "snr_db", "auroc")
    require_columns(table, columns, "robustness table")
    colours = method_colours(table["method"])
    markers = looks(sorted(pd.unique(table["encoder"])), MARKERS)
    levels = sorted(set(table["snr_db"]) - {CLEAN})
    clean = levels[-1] + (max(levels[-1] - levels[-2], 1) if len(levels) > 1 else 6)
    kinds = list(pd.unique(table["kind"]))
    rows = -(-(len(kinds) + 1) // 4)  # a panel is left for the legend
    figure, grid = panels(4, (15, 4.1 * rows + 0.4), rows=rows, sharex=True, sharey=True)
    for axes, kind in zip(grid.flat, kinds):
        own = table[table["kind"] == kind].sort_values("snr_db").replace({"snr_db": {CLEAN: clean}})
        for arm, line in own.groupby(list(columns[:4]), sort=False):
            name, protocol, encoder, fraction = arm
            look = {"color": colours[name], "marker": markers[encoder], "markersize": 3.2}
            label = f"{arm_label(name, encoder)}, {protocol}, {100 * fraction:g} %"
            style = STYLES.get(protocol, "--")
            axes.plot(line["snr_db"], line["auroc"], linestyle=style, label=label, **look)
        axes.set_title(_noise_name(kind))
        axes.axhline(0.5, color="0.7", linewidth=0.8)
        axes.set_xticks([*levels, clean], [*(f"{level:g}" for level in levels), "clean"])
        axes.tick_params(labelsize=8, labelbottom=True)
    for axes in grid.flat[len(kinds) :]:
        axes.axis("off")
    grid[0, 0].invert_xaxis()
    for axes in grid[:, 0]:
        axes.set_ylabel("Macro AUROC")
    figure.supxlabel("Signal-to-noise ratio (dB)", fontsize=10)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    grid.flat[-1].legend(handles, labels, frameon=False, fontsize=7.5, loc="center", handlelength=3)
    return finish(figure, title)


def noise_arms(
    results: str | Path,
    records: Records,
    fraction: float = 1.0,
    studies: Sequence[str] = STUDIES,
    methods: Sequence[str] = (),
) -> list[Run]:
    """The runs to be scored under noise: all arms of notebook 09 at `fraction`, seed 0, and a run
    of each method of the notebooks 12, 13 and 10 whose entry in `METHODS` says so.

    That one is from the simulated start, at the last stage, of the largest fraction and of the
    smallest seed, as far as there are several. `methods`, where given, leaves others out. DataError
    where a study's list is missing or has no run at `fraction`.
    """
    unknown = [study for study in studies if study not in STUDIES]
    if unknown:
        raise DataError(f"There is no study {unknown[0]!r}; choose from {', '.join(STUDIES)}.")
    arms = []
    for study in studies:
        runs = kept_runs(study, results, records)
        whole = study == "label_efficiency"
        arms += _at_fraction(runs, fraction) if whole else _one_per_method(runs)
    chosen = [run for run in arms if not methods or run.spec.method in methods]
    if not chosen:
        raise DataError(
            f"No run of {', '.join(studies)} is by {', '.join(methods)}; choose other methods."
        )
    return chosen


def _at_fraction(runs: Sequence[Run], fraction: float) -> list[Run]:
    """The runs at one fraction, seed 0."""
    found = [run for run in runs if run.spec.fraction == fraction and run.spec.seed == 0]
    if not found:
        there = ", ".join(f"{value:g}" for value in sorted({run.spec.fraction for run in runs}))
        raise DataError(
            f"No arm of notebook 09 was run at a fraction of {fraction:g}; choose one of {there}."
        )
    return found


def _one_per_method(runs: Sequence[Run]) -> list[Run]:
    """The run of each method in the order of `METHODS`, those without an entry at the end."""

    def preference(run: Run) -> tuple:
        other = run.spec.value("start") not in (None, "simulated")
        return other, -run.spec.settings.get("stage", 0), -run.spec.fraction, run.spec.seed

    first: dict[str, Run] = {}
    for run in sorted(runs, key=preference):
        first.setdefault(run.spec.method, run)
    names = [name for name in dict.fromkeys([*METHODS, *first]) if name in first]
    return [first[name] for name in names if method(name).noise]


def robustness_table(scores: NoiseScores) -> pd.DataFrame:
    """One row per arm, kind and SNR (infinite: clean): auroc, and loss against clean with its
    paired interval.
    """
    rows = []
    for place, run in enumerate(scores.arms):
        clean = float(scores.auroc[place, 0])
        for kind in scores.kinds:
            losses = {CLEAN: Interval(0.0, 0.0, 0.0)}
            for snr, loss, drawn in zip(*scores.losses(place, kind), strict=True):
                losses[snr] = percentile_interval(loss, drawn)
            for snr, (loss, low, high) in losses.items():
                measured = {"auroc": clean - loss, "loss": loss, "low": low, "high": high}
                shared = {**arm_of(run), "kind": kind, "snr_db": snr}
                rows.append({**shared, **measured, "n": scores.n})
    return pd.DataFrame(rows)


def snr_where_lost(snr_db: Sequence[float], losses: Sequence[float], limit: float = LIMIT) -> float:
    """The SNR at which the loss first reaches `limit` on the way down, on straight lines between
    the levels.

    infinity: lost at the highest level already; minus infinity: not lost at the lowest.
    """
    place = first_crossing(losses, limit)
    if place in (0, math.inf):
        return -math.inf if place else math.inf
    return float(np.interp(place, range(len(snr_db)), snr_db))


def threshold_table(scores: NoiseScores, limit: float = LIMIT) -> pd.DataFrame:
    """One row per arm and kind: `snr_db` at which `limit` of the macro AUROC is lost, its interval,
    and both in words.

    The question is asked anew on every patient draw. See `snr_where_lost` for infinite values.
    """
    rows = []
    for place, run in enumerate(scores.arms):
        for kind in scores.kinds:
            snr, losses, drawn = scores.losses(place, kind)
            found = percentile_interval(
                snr_where_lost(snr, losses, limit),
                [snr_where_lost(snr, each, limit) for each in drawn.T],
                method="inverted_cdf",  # an infinite answer is an answer, so none is interpolated
            )
            value, low, high = (_threshold_name(limit, snr[0]) for limit in found)
            shared = {**arm_of(run), "kind": kind, "clean": scores.auroc[place, 0], "limit": limit}
            limits = {"snr_db": found.value, "low": found.low, "high": found.high}
            rows.append({**shared, **limits, "told": f"{value} [{low} to {high}]"})
    return pd.DataFrame(rows)


def _threshold_name(snr: float, highest: float) -> str:
    """A threshold in words."""
    if math.isinf(snr):
        return f"before {highest:g} dB" if snr > 0 else "never"
    return f"{round(snr)} dB"


def taught_kinds(runs: Sequence[Run], results: str | Path) -> tuple[str, ...]:
    """Kinds of noise that the augmentation of any of the runs, or of their pretraining, has shown
    to a network.
    """
    keys = [run.spec.settings.get("pretraining") for run in runs]
    pretrained = [find_run(key, results) for key in keys if key]
    shown = {
        TAUGHT.get(name)
        for run in [*runs, *filter(None, pretrained)]
        for name in run.spec.settings.get("transforms", {})
    }
    return tuple(kind for kind in KINDS if kind in shown)


def loss_gains(scores: NoiseScores, families: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """How much more a pretrained arm loses than supervised training of the same encoder with the
    same labels, as a gain table with a column `family`.

    The gain is the difference of the losses, mean over the family's kinds and all ratios; below
    zero pretraining helps. Rows of the method "all" are the means over the arms of a protocol.
    """
    names = ("method", "protocol", "encoder", "fraction")
    cells = {
        tuple(arm_of(run)[name] for name in names): place for place, run in enumerate(scores.arms)
    }
    rows = []

    def add(family: str, cell: tuple, value: float, drawn: np.ndarray) -> None:
        own = {"family": family, **dict(zip(names, cell, strict=True))}
        gain = percentile_interval(value, drawn)
        rows.append(gain_row(own, {"method": "supervised"}, "loss", gain))

    for family, kinds in families.items():
        kinds = [kind for kind in kinds if kind in scores.kinds]
        by_protocol: dict[str, list] = {}
        for cell, place in cells.items():
            name, protocol, encoder, fraction = cell
            control = cells.get(("supervised", "supervised", encoder, fraction))
            pretrained = protocol in ("frozen", "fine-tuned") and name != "random"
            if not kinds or control is None or not pretrained:
                continue
            value, drawn = _mean_loss(scores, place, kinds)
            other, other_drawn = _mean_loss(scores, control, kinds)
            by_protocol.setdefault(protocol, []).append((value - other, drawn - other_drawn))
            add(family, cell, value - other, drawn - other_drawn)
        for protocol, each in by_protocol.items():
            value, drawn = (np.mean(parts, axis=0) for parts in zip(*each))
            add(family, ("all", protocol, "all", np.nan), value, drawn)
    return pd.DataFrame(rows)


def _mean_loss(scores: NoiseScores, arm: int, kinds: Sequence[str]) -> tuple[float, np.ndarray]:
    """Mean loss over kinds and ratios, and on each draw `(draws,)`."""
    _, values, drawn = zip(*(scores.losses(arm, kind) for kind in kinds))
    return float(np.mean(values)), np.mean(drawn, axis=(0, 1))
