"""Does an attribution point where the evidence is? Measures against known regions, and their
chance levels.

Relevance `(n, 12, time)` is never negative (`saliency.relevance`); a `Region` says where the
evidence lies and which samples count at all. Every measure gives one number per record, NaN where
there is no evidence or no relevance, so that intervals resample patients and compare methods on the
same records.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import combinations

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import nn

from ecglib.errors import DataError
from ecglib.evaluate.draws import Interval, PatientDraws, mean
from ecglib.evaluate.windows import score_signals
from ecglib.saliency import PATCH, bridged, find_r_peaks
from ecgstudy.analysis.evidence import Region
from ecgstudy.analysis.figures import (
    MARKERS,
    PALETTE,
    draw_dot,
    finish,
    looks,
    panels,
    require_columns,
)

SIZES = ("|input|", "|input|²")  # of the signal, which every attribution is compared with
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)  # of the patches that are deleted
TOLERANCE = 0.05  # seconds that the pointing game forgives
# Published thresholds of each measure: the lower limit of the interval must exceed this (times
# chance for the second).
ABOVE = {"enrichment": 1.5, "localisation_auc": 0.6, "lead_enrichment": 1.3}
ABOVE_CHANCE = {"pointing_game": 2.0, "rank_accuracy": 1.0, "mass": 1.0}


def plot_enrichment(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Relevance mass over chance of each attribution, a panel per class, with the largest that is
    possible.

    table has the columns class, attribution, value, low, high and ceiling, one row per point.
    """
    columns = ("class", "attribution", "value", "low", "high", "ceiling")
    require_columns(table, columns, "table of enrichments")
    classes, names = list(pd.unique(table["class"])), list(pd.unique(table["attribution"]))[::-1]
    colours = dict(zip(names[::-1], sns.color_palette("husl", len(names))))
    size = 2.8 + 2.3 * len(classes), 1.3 + 0.32 * len(names)
    figure, grid = panels(len(classes), size, grid="x", sharey=True)
    for axes, name in zip(grid[0], classes):
        rows = table[table["class"] == name]
        ceiling = rows["ceiling"].mean()
        axes.axvline(1, color="0.5", linewidth=1)
        axes.axvline(ceiling, color="0.5", linewidth=1, linestyle=":")
        for row in rows.to_dict("records"):
            draw_dot(axes, names.index(row["attribution"]), row, colours[row["attribution"]])
        axes.set(title=name, xscale="log")
        ticks = [tick for tick in (0.5, 1, 2, 3, 5, 10, 20, 50) if tick <= 1.2 * ceiling]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    grid[0, 0].set_yticks(range(len(names)), names)
    label = "Mass in the region over chance (1: chance, dotted: the largest possible)"
    figure.supxlabel(label, fontsize=9)
    return finish(figure, title)


def plot_randomisation(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Rank correlation with the trained network's attribution as its layers lose what they learned,
    from the head down.

    table has the columns layer (in order), attribution, signed (whether of a or of |a|) and value.
    """
    require_columns(table, ("layer", "attribution", "signed", "value"), "table of randomisations")
    layers = list(pd.unique(table["layer"]))
    colours, markers = (looks(table["attribution"], choices) for choices in (PALETTE, MARKERS))
    figure, grid = panels(2, (10, 3.8), grid="y", sharey=True)
    for axes, signed in zip(grid[0], (False, True)):
        axes.axhspan(-0.1, 0.1, color="0.92")
        for attribution, rows in table[table["signed"] == signed].groupby(
            "attribution", sort=False
        ):
            values = rows.set_index("layer")["value"].reindex(layers)
            look = {"color": colours[attribution], "marker": markers[attribution]}
            axes.plot(range(len(layers)), values, **look, markersize=4, label=attribution)
        axes.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
        axes.set_title("a, with its sign" if signed else "|a|, where it points")
    grid[0, 0].set_ylabel("Rank correlation (grey: below 0.1)")
    grid[0, 1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.supxlabel("Randomised from the head down to", fontsize=9)
    return finish(figure, title)


# Measures: relevance (n, 12, time) and where the evidence lies -> one number per record


def chance_mass(region: Region) -> np.ndarray:
    """Share of the counted lead-samples that the region covers, f_S `(n,)`; NaN where none."""
    return _share(region.evidence, region.counted, region)


def relevance_mass(relevance: np.ndarray, region: Region) -> np.ndarray:
    """Share of the relevance that lies in the region `(n,)` (M1); by chance `chance_mass`."""
    counted = relevance * region.counted
    return _share(counted * region.mask, counted, region)


def enrichment(relevance: np.ndarray, region: Region) -> np.ndarray:
    """Relevance mass over its chance `(n,)`; at most 1 / f_S."""
    return relevance_mass(relevance, region) / chance_mass(region)


def dilated(region: Region, sampling_rate: float) -> Region:
    """The region, longer by `TOLERANCE` on both sides in time."""
    from scipy.ndimage import maximum_filter1d

    width = 2 * round(TOLERANCE * sampling_rate) + 1
    longer = maximum_filter1d(region.evidence.astype(np.uint8), width, axis=2).astype(bool)
    return Region(longer, region.counted)


def pointing_game(relevance: np.ndarray, region: Region, sampling_rate: float) -> np.ndarray:
    """Whether the largest relevance lies within 50 ms of the region `(n,)` (M2); of equal ones, the
    share that does.

    By chance it is the share that the longer region covers.
    """
    inside = np.where(region.counted, relevance, -np.inf)
    top = (inside == inside.max(axis=(1, 2), keepdims=True)) & region.counted
    return _share(top & dilated(region, sampling_rate).mask, top, region)


def rank_accuracy(relevance: np.ndarray, region: Region) -> np.ndarray:
    """Share of the |S| most relevant lead-samples that lie in the region S `(n,)` (M3); equal ones
    count by their share.

    By chance it is f_S.
    """

    def of_record(values: np.ndarray, hits: np.ndarray) -> float:
        size = int(hits.sum())
        if not size:
            return np.nan
        limit = np.partition(values, len(values) - size)[len(values) - size]
        above, equal = values > limit, values == limit
        tied = hits[equal].sum() * (size - above.sum()) / equal.sum()
        return (hits[above].sum() + tied) / size

    return _per_record(of_record, relevance, region)


def localisation_auc(relevance: np.ndarray, region: Region) -> np.ndarray:
    """ROC area of relevance against the region `(n,)` (M4); 0.5 by chance."""
    from scipy.stats import rankdata

    def of_record(values: np.ndarray, hits: np.ndarray) -> float:
        positives, negatives = int(hits.sum()), int((~hits).sum())
        if not positives or not negatives:
            return np.nan
        won = rankdata(values)[hits].sum() - positives * (positives + 1) / 2
        return won / (positives * negatives)

    return _per_record(of_record, relevance, region)


def lead_mass(relevance: np.ndarray, region: Region) -> np.ndarray:
    """Share of the relevance in the leads that the region names `(n,)` (M5); by chance their number
    over 12.
    """
    leads = region.evidence.any(axis=2, keepdims=True)
    return relevance_mass(
        relevance, Region(np.broadcast_to(leads, region.mask.shape), region.counted)
    )


def gini(relevance: np.ndarray, region: Region) -> np.ndarray:
    """Gini coefficient of what is counted `(n,)` (M10): 0 where all is equally relevant, near 1
    where one lead-sample has everything.
    """

    def of_record(values: np.ndarray, hits: np.ndarray) -> float:
        values = np.sort(values.astype(np.float64))
        total, count = values.sum(), len(values)
        ranks = 2 * np.arange(1, count + 1) - count - 1
        return float(ranks @ values) / (count * total) if total > 0 else np.nan

    return _per_record(of_record, relevance, region)


def _share(part: np.ndarray, whole: np.ndarray, region: Region) -> np.ndarray:
    """Sum of part over that of whole in each record `(n,)`, NaN without evidence or without
    anything to divide.
    """
    part, whole = (each.sum(axis=(1, 2)).astype(np.float64) for each in (part, whole))
    known = region.evidence.any(axis=(1, 2)) & (whole > 0)
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=known)


def _per_record(
    measure: Callable[[np.ndarray, np.ndarray], float], relevance: np.ndarray, region: Region
) -> np.ndarray:
    """`measure(relevance, evidence)` of the lead-samples of each record that count, `(n,)`."""
    rows = zip(relevance, region.evidence, region.counted, strict=True)
    return np.array([measure(values[inside], hits[inside]) for values, hits, inside in rows], float)


def measure(relevance: np.ndarray, region: Region, sampling_rate: float) -> dict[str, np.ndarray]:
    """All measures by name, each `(n,)`."""
    leads = region.evidence.any(axis=2).mean(axis=1)
    in_leads = lead_mass(relevance, region)
    return {
        "mass": relevance_mass(relevance, region),
        "enrichment": enrichment(relevance, region),
        "pointing_game": pointing_game(relevance, region, sampling_rate),
        "rank_accuracy": rank_accuracy(relevance, region),
        "localisation_auc": localisation_auc(relevance, region),
        "lead_mass": in_leads,
        "gini": gini(relevance, region),
        "lead_enrichment": in_leads / np.where(leads > 0, leads, np.nan),
    }


def chances(region: Region, sampling_rate: float) -> dict[str, float]:
    """What each measure is by chance, mean over records; 0 without any evidence."""
    share = _known_mean(chance_mass(region))
    return {
        "mass": share,
        "enrichment": 1.0,
        "pointing_game": _known_mean(chance_mass(dilated(region, sampling_rate))),
        "rank_accuracy": share,
        "localisation_auc": 0.5,
        "lead_mass": float(region.evidence.any(axis=2).mean()),
        "lead_enrichment": 1.0,
        "gini": np.nan,
        "mass over chance": 1.0,
    }


def _known_mean(values: np.ndarray) -> float:
    """Mean of the values that are known, 0 where none is."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else 0.0


def passes(name: str, low: float, chance: float) -> bool | None:
    """Whether the lower limit of a measure exceeds its published threshold; None where there is no
    threshold.
    """
    if name not in ABOVE | ABOVE_CHANCE:
        return None
    return bool(low > (ABOVE[name] if name in ABOVE else ABOVE_CHANCE[name] * chance))


def measure_rows(
    relevances: Mapping[str, np.ndarray],
    region: Region,
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
    found = {name: measure(each, region, sampling_rate) for name, each in relevances.items()}
    chance = chances(region, sampling_rate)
    rows = []
    for name, values in found.items():
        values = values | {"mass over chance": values["mass"] / (chance["mass"] or np.nan)}
        for which, numbers in values.items():
            interval = mean_interval(numbers, patients, draws)
            row = {"attribution": name, "measure": which, **interval._asdict()}
            level = chance[which]
            rows.append({**row, "chance": level, "passes": passes(which, interval.low, level)})
        for size in SIZES:
            if size in found and size != name:
                over = values["enrichment"] - found[size]["enrichment"]
                row = difference_row(f"enrichment over {size}", over, patients, draws)
                rows.append({"attribution": name, **row})
    return rows


def difference_row(measure: str, values: np.ndarray, patients: Sequence, draws: int) -> dict:
    """Mean of one difference per record `(n,)` with its interval; it passes above zero."""
    interval = mean_interval(values, patients, draws)
    found = {"measure": measure, **interval._asdict()}
    return {**found, "chance": 0.0, "passes": interval.low > 0}


def baseline_maps(millivolts: np.ndarray, sampling_rate: float) -> dict[str, np.ndarray]:
    """What a method must beat, each float32 `(n, 12, time)`.

    Random numbers, |input| and its square (against which squared relevance is fair), and 50 ms
    about the R peaks.
    """
    filled = np.nan_to_num(millivolts).astype(np.float32)
    return {
        "random": np.random.default_rng(0).random(filled.shape, np.float32),
        "|input|": np.abs(filled),
        "|input|²": filled**2,
        "R peaks": np.stack([_near_r_peaks(signal, sampling_rate) for signal in filled]),
    }


def _near_r_peaks(signal: np.ndarray, sampling_rate: float) -> np.ndarray:
    """Gaussians of 50 ms about the R peaks of one record, alike in all leads."""
    peaks = find_r_peaks(signal, sampling_rate)
    time = np.arange(signal.shape[1]) / sampling_rate
    distance = (time[None] - peaks[:, None] / sampling_rate) / 0.05
    near = np.exp(-0.5 * distance**2).sum(axis=0) if len(peaks) else np.ones(len(time))
    return np.broadcast_to(near, signal.shape).astype(np.float32)


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
    signals = torch.from_numpy(np.nan_to_num(millivolts).astype(np.float32)).to(device)
    scores = score_signals([network], signals, sampling_rate, window_seconds)
    return scores[0, :, class_index].cpu().numpy()


def deletion_area(
    network: nn.Module,
    millivolts: np.ndarray,
    relevance: np.ndarray,
    class_index: int,
    sampling_rate: float,
    window_seconds: float,
) -> np.ndarray:
    """Area between the probability curves when the least and when the most relevant patches go
    first `(n,)` (M6).

    A patch is `PATCH` samples of one lead and goes by the straight line between its neighbours; the
    area is over `SHARES` of the patches, divided by their range. 0 by chance; large where what
    is called relevant is what the network uses.
    """
    filled = np.nan_to_num(millivolts).astype(np.float32)
    records, leads, time = filled.shape
    without = bridged(torch.from_numpy(filled), PATCH).numpy()
    weight = np.add.reduceat(relevance, np.arange(0, time, PATCH), axis=2).reshape(records, -1)
    # Ties are broken by chance.
    weight = weight + 1e-9 * np.random.default_rng(0).random(weight.shape) * (weight.max() + 1e-12)
    rank = weight.argsort(axis=1).argsort(axis=1)  # (n, leads x patches), 0: the least relevant

    def probabilities(gone: np.ndarray) -> np.ndarray:
        gone = gone.reshape(records, leads, -1).repeat(PATCH, axis=2)[:, :, :time]
        signals = np.where(gone, without, filled)
        return record_probabilities(network, signals, class_index, sampling_rate, window_seconds)

    curve = []
    for share in SHARES:
        count = round(share * rank.shape[1])
        curve.append(probabilities(rank < count) - probabilities(rank >= rank.shape[1] - count))
    return np.trapezoid(np.array(curve), np.array(SHARES), axis=0) / SHARES[-1]


def randomised_cascade(network: nn.Module, seed: int = 0) -> list[tuple[str, nn.Module]]:
    """Copies of the network with ever more of its layers' weights drawn anew, from the head down
    (M7).

    Every number of a layer is drawn from a normal distribution with the mean and deviation of its
    tensor; the running variances of batch norm are shuffled instead, since they must stay positive.
    """
    generator = torch.Generator().manual_seed(seed)
    copies = []
    current = network
    for name, layer in _layers_from_the_head(network):
        current = deepcopy(current)
        for module in map(current.get_submodule, layer):
            for key, value in [*module.named_parameters(), *module.named_buffers()]:
                if value.is_floating_point() and value.numel() > 1:
                    value.data.copy_(_anew(key, value.detach().cpu(), generator))
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
    for place, layer in reversed(list(enumerate(encoder.layers(), start=1))):
        # A slice of a sequence is no module of the network.
        parts = [layer] if layer in names else layer
        found.append((f"layer {place}", [names[part] for part in parts]))
    return found


def rank_correlation(first: np.ndarray, second: np.ndarray, signed: bool = False) -> np.ndarray:
    """Spearman's correlation of |a| of each record, `(n, 12, time)` twice -> `(n,)`; 0 where one is
    constant.

    With `signed` it is that of a itself: |a| also agrees where both are small because nothing
    happens in the signal.
    """
    from scipy.stats import rankdata

    first, second = (
        rankdata((each if signed else np.abs(each)).reshape(len(each), -1), axis=1)
        for each in (first, second)
    )
    first, second = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (first, second))
    size = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    product = (first * second).sum(axis=1)
    return np.divide(product, size, out=np.zeros(len(size)), where=size > 0)


def agreement(attributions: Sequence[np.ndarray]) -> np.ndarray:
    """Mean rank correlation over the pairs of attributions to the same records `(n,)` (M8);
    DataError for a single one.
    """
    if len(attributions) < 2:
        raise DataError("Agreement needs the attributions of two networks or more.")
    pairs = [rank_correlation(*pair) for pair in combinations(attributions, 2)]
    return np.mean(pairs, axis=0)


def matched_negatives(
    rates: Mapping[int, float], positives: np.ndarray, candidates: np.ndarray
) -> np.ndarray:
    """For each positive the candidate with the nearest heart rate, each taken once; DataError where
    they are too few.

    rates gives each record's beats a minute by its position.
    """
    if len(candidates) < len(positives):
        raise DataError(
            f"{len(positives)} records need as many without the finding, {len(candidates)} are "
            "there; take fewer records."
        )
    free, chosen = list(candidates), []
    for place in positives:
        nearest = min(free, key=lambda other: abs(rates[other] - rates[place]))
        free.remove(nearest)
        chosen.append(nearest)
    return np.array(chosen)


def mean_interval(values: np.ndarray, patients: Sequence, draws: int = 1000) -> Interval:
    """Mean of one number per record `(n,)` with its patient-bootstrap interval; NaN counts for
    nothing.

    For two methods on the same records give the differences: the interval is then paired.
    """
    values = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(values)
    if not known.any():
        return Interval(np.nan, np.nan, np.nan)
    return PatientDraws(np.asarray(patients)[known], draws).interval(mean(values[known]))
