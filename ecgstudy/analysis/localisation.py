"""Does an attribution point where the evidence is? Expected regions, measures against them, and
their chance levels.

Relevance `(n, 12, time)` is never negative (`saliency.relevance`); a mask of the same shape says
where the evidence lies, and `counted (n, 1, time)` which samples were marked at all. Every measure
gives one number a record, NaN where there is no evidence or no relevance, so that intervals
resample patients and compare methods on the same records.
"""

import textwrap
from collections.abc import Mapping, Sequence
from copy import deepcopy

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import nn

from ecglib.errors import DataError
from ecglib.evaluate.draws import Interval, PatientDraws, mean
from ecglib.evaluate.windows import score_signals
from ecglib.records import LEADS
from ecglib.saliency import PATCH, bridged, find_r_peaks
from ecgstudy.analysis.figures import MARKERS, require_columns


def plot_enrichment(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Relevance mass over chance of each attribution, a panel a class, with the largest that is
    possible.

    table has the columns class, attribution, value, low, high and ceiling, one row a point.
    """
    require_columns(
        table, ("class", "attribution", "value", "low", "high", "ceiling"), "table of enrichments"
    )
    panels, names = list(pd.unique(table["class"])), list(pd.unique(table["attribution"]))[::-1]
    colours = dict(zip(names[::-1], sns.color_palette("husl", len(names))))
    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(2.8 + 2.3 * len(panels), 1.3 + 0.32 * len(names)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        rows = table[table["class"] == panel]
        axes.axvline(1, color="0.5", linewidth=1)
        axes.axvline(rows["ceiling"].mean(), color="0.5", linewidth=1, linestyle=":")
        for row in rows.itertuples():
            height = names.index(row.attribution)
            axes.plot(
                [row.low, row.high], [height, height], color=colours[row.attribution], linewidth=1.6
            )
            axes.plot(row.value, height, "o", color=colours[row.attribution], markersize=5)
        axes.set_xscale("log")
        ticks = [
            tick for tick in (0.5, 1, 2, 3, 5, 10, 20, 50) if tick <= 1.2 * rows["ceiling"].mean()
        ]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        axes.set_title(panel, fontsize=10)
        axes.grid(axis="x", color="0.9")
    grid[0, 0].set_yticks(range(len(names)), names)
    figure.supxlabel(
        "Mass in the region over chance (1: chance, dotted: the largest possible)", fontsize=9
    )
    figure.suptitle("\n".join(textwrap.wrap(title or "", 100)), fontsize=11)
    sns.despine(figure)
    plt.close(figure)
    return figure


def plot_randomisation(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Rank correlation with the trained network's attribution as its layers lose what they learned,
    from the head down.

    table has the columns layer (in order), attribution, signed (whether of a or of |a|) and value.
    """
    require_columns(table, ("layer", "attribution", "signed", "value"), "table of randomisations")
    layers, names = list(pd.unique(table["layer"])), list(pd.unique(table["attribution"]))
    colours = dict(zip(names, sns.color_palette("colorblind", len(names))))
    figure, grid = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for axes, signed, name in (
        (grid[0], False, "|a|, where it points"),
        (grid[1], True, "a, with its sign"),
    ):
        axes.axhspan(-0.1, 0.1, color="0.92")
        for place, attribution in enumerate(names):
            rows = table[
                (table["attribution"] == attribution) & (table["signed"] == signed)
            ].set_index("layer")
            axes.plot(
                range(len(layers)),
                rows["value"].reindex(layers),
                marker=MARKERS[place % len(MARKERS)],
                color=colours[attribution],
                markersize=4,
                label=attribution,
            )
        axes.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
        axes.set_title(name, fontsize=10)
        axes.grid(axis="y", color="0.9")
    grid[0].set_ylabel("Rank correlation (grey: below 0.1)")
    grid[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.suptitle("\n".join(textwrap.wrap(title or "", 100)), fontsize=11)
    figure.supxlabel("Randomised from the head down to", fontsize=9)
    sns.despine(figure)
    plt.close(figure)
    return figure


SIZES = ("|input|", "|input|²")  # of the signal, which every attribution is compared with
TOLERANCE = 0.05  # seconds that the pointing game forgives
MEASURES = (
    "mass",
    "enrichment",
    "pointing_game",
    "rank_accuracy",
    "localisation_auc",
    "lead_mass",
    "gini",
)
# Published thresholds of each measure: the lower limit of the interval must exceed this (times
# chance for the second).
ABOVE = {"enrichment": 1.5, "localisation_auc": 0.6, "lead_enrichment": 1.3}
ABOVE_CHANCE = {"pointing_game": 2.0, "rank_accuracy": 1.0, "mass": 1.0}


# Measures: relevance and mask (n, 12, time), counted (n, 1, time) -> one number a record


def chance_mass(mask: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Share of the counted lead-samples that the mask covers, f_S `(n,)`; NaN where it covers none."""
    mask, counted = _both(mask, counted)
    return _quotient((mask & counted).sum(axis=(1, 2)), counted.sum(axis=(1, 2)), mask & counted)


def relevance_mass(
    relevance: np.ndarray, mask: np.ndarray, counted: np.ndarray | None = None
) -> np.ndarray:
    """Share of the relevance that lies in the mask `(n,)` (M1); by chance `chance_mass`."""
    mask, counted = _both(mask, counted)
    relevance = relevance * counted
    return _quotient(
        (relevance * mask).sum(axis=(1, 2)), relevance.sum(axis=(1, 2)), mask & counted
    )


def enrichment(
    relevance: np.ndarray, mask: np.ndarray, counted: np.ndarray | None = None
) -> np.ndarray:
    """Relevance mass over its chance `(n,)`; at most 1 / f_S."""
    return relevance_mass(relevance, mask, counted) / chance_mass(mask, counted)


def dilated(mask: np.ndarray, sampling_rate: float, seconds: float = TOLERANCE) -> np.ndarray:
    """The mask, longer by `seconds` on both sides in time."""
    from scipy.ndimage import maximum_filter1d

    return maximum_filter1d(
        mask.astype(np.uint8), 2 * round(seconds * sampling_rate) + 1, axis=2
    ).astype(bool)


def pointing_game(
    relevance: np.ndarray,
    mask: np.ndarray,
    counted: np.ndarray | None = None,
    *,
    sampling_rate: float,
) -> np.ndarray:
    """Whether the largest relevance lies within 50 ms of the mask `(n,)` (M2); of equal ones, the
    share that does.

    By chance it is the share that the longer mask covers.
    """
    mask, counted = _both(mask, counted)
    inside = np.where(counted, relevance, -np.inf)
    top = (inside == inside.max(axis=(1, 2), keepdims=True)) & counted
    hit = top & dilated(mask & counted, sampling_rate)
    return _quotient(hit.sum(axis=(1, 2)), top.sum(axis=(1, 2)), mask & counted)


def rank_accuracy(
    relevance: np.ndarray, mask: np.ndarray, counted: np.ndarray | None = None
) -> np.ndarray:
    """Share of the |S| most relevant lead-samples that lie in the mask S `(n,)` (M3); equal ones
    count by their share.

    By chance it is f_S.
    """
    mask, counted = _both(mask, counted)
    rows = []
    for one, here, inside in zip(relevance, mask & counted, counted, strict=True):
        values, hits, size = one[inside], here[inside], int(here.sum())
        if not size:
            rows.append(np.nan)
            continue
        limit = np.partition(values, len(values) - size)[len(values) - size]
        above, equal = values > limit, values == limit
        rows.append(
            (hits[above].sum() + hits[equal].sum() * (size - above.sum()) / equal.sum()) / size
        )
    return np.array(rows, dtype=float)


def localisation_auc(
    relevance: np.ndarray, mask: np.ndarray, counted: np.ndarray | None = None
) -> np.ndarray:
    """ROC area of relevance against the mask `(n,)` (M4); 0.5 by chance."""
    from scipy.stats import rankdata

    mask, counted = _both(mask, counted)
    rows = []
    for one, here, inside in zip(relevance, mask, counted, strict=True):
        hits = here[inside]
        positives, negatives = int(hits.sum()), int((~hits).sum())
        if not positives or not negatives:
            rows.append(np.nan)
            continue
        won = rankdata(one[inside])[hits].sum() - positives * (positives + 1) / 2
        rows.append(won / (positives * negatives))
    return np.array(rows, dtype=float)


def lead_mass(
    relevance: np.ndarray, mask: np.ndarray, counted: np.ndarray | None = None
) -> np.ndarray:
    """Share of the relevance in the leads that the mask names `(n,)` (M5); by chance their number
    over 12.
    """
    mask, counted = _both(mask, counted)
    leads = (mask & counted).any(axis=2, keepdims=True)
    return relevance_mass(relevance, np.broadcast_to(leads, mask.shape), counted)


def gini(relevance: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Gini coefficient `(n,)` (M10): 0 where all is equally relevant, near 1 where one lead-sample
    has everything.
    """
    _, counted = _both(np.ones(relevance.shape, bool), counted)
    rows = []
    for one, inside in zip(relevance, counted, strict=True):
        values = np.sort(one[inside].astype(np.float64))
        total, count = values.sum(), len(values)
        ranks = 2 * np.arange(1, count + 1) - count - 1
        rows.append(float(ranks @ values) / (count * total) if total > 0 else np.nan)
    return np.array(rows)


def measure(
    relevance: np.ndarray, mask: np.ndarray, counted: np.ndarray, sampling_rate: float
) -> dict:
    """All measures of `MEASURES` and `lead_enrichment`, each `(n,)`."""
    leads = (mask & counted).any(axis=2).sum(axis=1) / len(LEADS)
    found = {
        "mass": relevance_mass(relevance, mask, counted),
        "enrichment": enrichment(relevance, mask, counted),
        "pointing_game": pointing_game(relevance, mask, counted, sampling_rate=sampling_rate),
        "rank_accuracy": rank_accuracy(relevance, mask, counted),
        "localisation_auc": localisation_auc(relevance, mask, counted),
        "lead_mass": lead_mass(relevance, mask, counted),
        "gini": gini(relevance, counted),
    }
    return found | {"lead_enrichment": found["lead_mass"] / np.where(leads > 0, leads, np.nan)}


def chances(mask: np.ndarray, counted: np.ndarray, sampling_rate: float) -> dict[str, float]:
    """What each measure is by chance, mean over records."""
    share = float(np.nanmean(_or_nan(chance_mass(mask, counted))))
    wider = float(np.nanmean(_or_nan(chance_mass(dilated(mask & counted, sampling_rate), counted))))
    leads = float((mask & counted).any(axis=2).mean())
    return {
        "mass": share,
        "enrichment": 1.0,
        "pointing_game": wider,
        "rank_accuracy": share,
        "localisation_auc": 0.5,
        "lead_mass": leads,
        "lead_enrichment": 1.0,
        "gini": np.nan,
    }


def passes(name: str, low: float, chance: float) -> object:
    """Whether the lower limit of a measure exceeds its published threshold; None where there is no
    threshold.
    """
    if name in ABOVE:
        return bool(low > ABOVE[name])
    return bool(low > ABOVE_CHANCE[name] * chance) if name in ABOVE_CHANCE else None


def measure_rows(
    relevances: Mapping[str, np.ndarray],
    mask: np.ndarray,
    counted: np.ndarray,
    patients: Sequence,
    sampling_rate: float,
    draws: int = 1000,
) -> list[dict]:
    """Rows attribution, measure, value, low, high, chance, passes of several attributions to the
    same records.

    Beside the measures of `measure` there are the mass of all records together over their chance
    ("mass over chance") and, paired, how much more the enrichment is than that of each attribution
    of `SIZES` that is among them.
    """
    found = {
        name: measure(relevance, mask, counted, sampling_rate)
        for name, relevance in relevances.items()
    }
    chance, share = chances(mask, counted, sampling_rate), chance_mass(mask, counted)
    share = float(np.nanmean(_or_nan(share)))
    rows = []
    for name, values in found.items():
        extra = {"mass over chance": values["mass"] / (share or np.nan)}
        extra |= {
            f"enrichment over {other}": values["enrichment"] - found[other]["enrichment"]
            for other in SIZES
            if other in found and other != name
        }
        for which, each in (values | extra).items():
            interval = mean_interval(each, patients, draws)
            level = chance.get(which, 1.0 if which in extra and "over chance" in which else 0.0)
            passed = (
                interval.low > 0
                if which.startswith("enrichment over")
                else passes(which, interval.low, level)
            )
            rows.append(
                {
                    "attribution": name,
                    "measure": which,
                    **interval._asdict(),
                    "chance": level,
                    "passes": passed,
                }
            )
    return rows


def baseline_maps(
    millivolts: np.ndarray, sampling_rate: float, seed: int = 0
) -> dict[str, np.ndarray]:
    """What a method must beat, each float32 `(n, 12, time)`.

    Random numbers, |input| and its square (against which squared relevance is fair), and 50 ms
    about the R peaks.
    """
    filled = np.nan_to_num(millivolts).astype(np.float32)
    generator = np.random.default_rng(seed)
    return {
        "random": generator.random(filled.shape, np.float32),
        "|input|": np.abs(filled),
        "|input|²": filled**2,
        "R peaks": np.stack([_heat(signal, sampling_rate) for signal in filled]),
    }


def _heat(signal: np.ndarray, sampling_rate: float) -> np.ndarray:
    """Gaussians of 50 ms about the R peaks of one record, alike in all leads."""
    peaks = find_r_peaks(signal, sampling_rate)
    time = np.arange(signal.shape[1]) / sampling_rate
    distance = (time[None] - peaks[:, None] / sampling_rate) / 0.05
    heat = np.exp(-0.5 * distance**2).sum(axis=0) if len(peaks) else np.ones(len(time))
    return np.broadcast_to(heat, signal.shape).astype(np.float32)


# What asks the network


def record_probabilities(
    network: nn.Module,
    millivolts: np.ndarray,
    class_index: int,
    sampling_rate: float,
    window_seconds: float,
) -> np.ndarray:
    """The class's probability of signals `(n, 12, time)` in mV, as in `score_signals`, `(n,)`."""
    device = next(iter(network.parameters())).device
    signals = torch.from_numpy(np.nan_to_num(millivolts).astype(np.float32))
    parts = [
        score_signals([network], part.to(device), sampling_rate, window_seconds)[0, :, class_index]
        for part in signals.split(256)
    ]
    return torch.cat(parts).cpu().numpy()


def deletion_area(
    network: nn.Module,
    millivolts: np.ndarray,
    relevance: np.ndarray,
    class_index: int,
    sampling_rate: float,
    window_seconds: float,
    patch: int = PATCH,
    shares: Sequence[float] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5),
) -> np.ndarray:
    """Area between the probability curves when the least and when the most relevant patches go
    first `(n,)` (M6).

    A patch is `patch` samples of one lead and goes by the straight line between its neighbours; the
    area is over the `shares` of the patches, divided by their range. 0 by chance; large where what
    is called relevant is what the network uses.
    """
    filled = np.nan_to_num(millivolts).astype(np.float32)
    without = bridged(torch.from_numpy(filled), patch).numpy()
    starts = np.arange(0, filled.shape[2], patch)
    weight = np.add.reduceat(relevance, starts, axis=2).reshape(
        len(filled), -1
    )  # (n, leads x patches)
    weight = weight + 1e-9 * np.random.default_rng(0).random(weight.shape) * (weight.max() + 1e-12)
    rank = weight.argsort(axis=1).argsort(axis=1)  # 0: the least relevant
    curves = {"least": [], "most": []}
    for share in shares:
        count = round(share * weight.shape[1])
        for which, gone in (("least", rank < count), ("most", rank >= weight.shape[1] - count)):
            gone = gone.reshape(len(filled), filled.shape[1], -1).repeat(patch, axis=2)[
                :, :, : filled.shape[2]
            ]
            curves[which].append(
                record_probabilities(
                    network,
                    np.where(gone, without, filled),
                    class_index,
                    sampling_rate,
                    window_seconds,
                )
            )
    difference = np.array(curves["least"]) - np.array(curves["most"])  # (shares, n)
    return np.trapezoid(difference, np.asarray(shares), axis=0) / (shares[-1] - shares[0])


def randomised_cascade(network: nn.Module, seed: int = 0) -> list[tuple[str, nn.Module]]:
    """Copies of the network with ever more of its layers' weights drawn anew, from the head down
    (M7).

    Every number of a layer is drawn from a normal distribution with the mean and deviation of its
    tensor; the running variances of batch norm are shuffled instead, since they must stay positive.
    """
    generator, copies = torch.Generator().manual_seed(seed), []
    current = deepcopy(network)
    for name, layer in _layers_from_the_head(network):
        current = deepcopy(current)
        own = [current.get_submodule(part) for part in layer]
        with torch.no_grad():
            for module in own:
                for key, value in [*module.named_parameters(), *module.named_buffers()]:
                    if value.is_floating_point() and value.numel() > 1:
                        value.copy_(_anew(key, value.cpu(), generator))
        copies.append((name, current))
    return copies


def _anew(key: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random numbers in place of one tensor."""
    if key.endswith("running_var"):
        return value.flatten()[torch.randperm(value.numel(), generator=generator)].view_as(value)
    return value.mean() + value.std() * torch.randn(value.shape, generator=generator)


def _layers_from_the_head(network: nn.Module) -> list[tuple[str, list[str]]]:
    """(name, its modules) from the head down to the input: the head, then the encoder's layers."""
    encoder = getattr(network, "encoder", network)
    names = {module: name for name, module in network.named_modules()}
    found = []
    if encoder is not network:
        found.append(("head", [name for name, _ in network.named_children() if name != "encoder"]))
    for place, layer in reversed(list(enumerate(encoder.layers()))):
        parts = (
            [layer] if layer in names else list(layer)
        )  # a slice of a sequence is no module of the network
        found.append((f"layer {place + 1}", [names[part] for part in parts]))
    return found


def rank_correlation(first: np.ndarray, second: np.ndarray, signed: bool = False) -> np.ndarray:
    """Spearman's correlation of |a| of each record, `(n, 12, time)` twice -> `(n,)`; 0 where one is
    constant.

    With `signed` it is that of a itself: |a| also agrees where both are small because nothing
    happens in the signal.
    """
    from scipy.stats import rankdata

    ranks = [
        rankdata((each if signed else np.abs(each)).reshape(len(each), -1), axis=1)
        for each in (first, second)
    ]
    ranks = [each - each.mean(axis=1, keepdims=True) for each in ranks]
    size = np.sqrt((ranks[0] ** 2).sum(axis=1) * (ranks[1] ** 2).sum(axis=1))
    return np.divide(
        (ranks[0] * ranks[1]).sum(axis=1), size, out=np.zeros(len(size)), where=size > 0
    )


def agreement(attributions: Sequence[np.ndarray]) -> np.ndarray:
    """Mean rank correlation over the pairs of attributions to the same records `(n,)` (M8);
    DataError for one alone.
    """
    if len(attributions) < 2:
        raise DataError("Agreement needs the attributions of two networks or more.")
    pairs = [(a, b) for a in range(len(attributions)) for b in range(a)]
    return np.mean([rank_correlation(attributions[a], attributions[b]) for a, b in pairs], axis=0)


def matched_negatives(
    rates: Mapping[int, float], positives: np.ndarray, candidates: np.ndarray
) -> np.ndarray:
    """For each positive the candidate with the nearest heart rate, each taken once; DataError where
    they are too few.

    rates gives each record's beats a minute by its position.
    """
    if len(candidates) < len(positives):
        raise DataError(
            f"{len(positives)} records need as many without the finding, {len(candidates)} are there; "
            "take fewer records."
        )
    free, chosen = list(candidates), []
    for place in positives:
        nearest = min(free, key=lambda other: abs(rates[other] - rates[place]))
        free.remove(nearest)
        chosen.append(nearest)
    return np.array(chosen)


def mean_interval(
    values: np.ndarray, patients: Sequence, draws: int = 1000, seed: int = 0
) -> Interval:
    """Mean of one number a record `(n,)` with its patient-bootstrap interval; NaN counts for
    nothing.

    For two methods on the same records give the differences: the interval is then paired.
    """
    values = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(values)
    if not known.any():
        return Interval(np.nan, np.nan, np.nan)
    return PatientDraws(np.asarray(patients)[known], draws, seed).interval(mean(values[known]))


def _both(mask: np.ndarray, counted: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Mask and what counts, both bool `(n, 12, time)`; DataError where the mask has another form."""
    mask = np.asarray(mask)
    if mask.ndim != 3 or mask.dtype != bool:
        raise DataError(f"A mask is bool (records, leads, time), not {mask.dtype} {mask.shape}.")
    return mask, np.broadcast_to(True if counted is None else counted, mask.shape)


def _quotient(part: np.ndarray, whole: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """part / whole of each record, NaN without evidence or without anything to divide."""
    whole = np.where(mask.any(axis=(1, 2)), whole, 0).astype(np.float64)
    return np.divide(
        part.astype(np.float64), whole, out=np.full(len(whole), np.nan), where=whole > 0
    )


def _or_nan(values: np.ndarray) -> np.ndarray:
    """The values, with one NaN-proof zero where all of them are missing."""
    return values if np.isfinite(values).any() else np.zeros(1)
