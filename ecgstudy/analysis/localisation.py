"""Does an attribution point where the evidence is? Measures against known regions, and their
chance levels.

Relevance `(n, 12, time)` is never negative (`saliency.relevance`); a `Region` says where the
evidence lies and which samples count at all. Every measure gives one number per record, NaN where
there is no evidence or no relevance, so that intervals resample patients and compare methods on the
same records.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import combinations

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from scipy.ndimage import maximum_filter1d
from scipy.stats import rankdata
from torch import nn

from ecglib.errors import DataError
from ecglib.evaluate.draws import Interval, PatientDraws, mean
from ecglib.evaluate.metrics import mean_finite
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
# Published thresholds: how many times its chance the lower limit of a measure must exceed; None
# where there is no threshold.
TIMES_CHANCE = {
    "enrichment": 1.5,
    "localisation_auc": 1.2,
    "lead_enrichment": 1.3,
    "pointing_game": 2.0,
    "rank_accuracy": 1.0,
    "mass": 1.0,
    "lead_mass": None,
    "gini": None,
    "mass over chance": None,
}


def plot_enrichment(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Relevance mass over chance of each attribution, a panel per class, with the largest that is
    possible.

    table has the columns class, attribution, value, low, high and ceiling, one row per point.
    """
    columns = ("class", "attribution", "value", "low", "high", "ceiling")
    require_columns(table, columns, "table of enrichments")
    names = list(pd.unique(table["attribution"]))
    colours = looks(names, sns.color_palette("husl", len(names)))
    classes = table.groupby("class", sort=False)
    size = 2.8 + 2.3 * len(classes), 1.3 + 0.32 * len(names)
    figure, grid = panels(len(classes), size, grid="x", sharey=True)
    for axes, (name, rows) in zip(grid[0], classes):
        ceiling = rows["ceiling"].mean()
        for place, style in ((1, "-"), (ceiling, ":")):
            axes.axvline(place, color="0.5", linewidth=1, linestyle=style)
        for row in rows.to_dict("records"):
            draw_dot(axes, names.index(row["attribution"]), row, colours[row["attribution"]])
        axes.set(title=name, xscale="log")
        ticks = [tick for tick in (0.5, 1, 2, 3, 5, 10, 20, 50) if tick <= 1.2 * ceiling]
        axes.set_xticks(ticks, map("{:g}".format, ticks))
        axes.minorticks_off()
    grid[0, 0].set_yticks(range(len(names)), names)
    grid[0, 0].invert_yaxis()  # the first attribution on top
    label = "Mass in the region over chance (1: chance, dotted: the largest possible)"
    figure.supxlabel(label, fontsize=9)
    return finish(figure, title)


def plot_randomisation(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Rank correlation with the trained network's attribution as its layers lose what they learned,
    from the head down.

    table has the columns layer (in order), attribution, signed (whether of a or of |a|) and value.
    """
    require_columns(table, ("layer", "attribution", "signed", "value"), "table of randomisations")
    layers = pd.unique(table["layer"])
    colours = looks(table["attribution"], PALETTE)
    markers = looks(table["attribution"], MARKERS)
    figure, grid = panels(2, (10, 3.8), grid="y", sharey=True)
    for axes, (signed, half) in zip(grid[0], table.groupby("signed")):
        axes.axhspan(-0.1, 0.1, color="0.92")
        for name, rows in half.groupby("attribution", sort=False):
            values = rows.set_index("layer")["value"].reindex(layers)
            look = {"color": colours[name], "marker": markers[name], "markersize": 4}
            axes.plot(range(len(layers)), values, label=name, **look)
        axes.set_xticks(range(len(layers)), layers, rotation=30, ha="right")
        axes.set_title("a, with its sign" if signed else "|a|, where it points")
    grid[0, 0].set_ylabel("Rank correlation (grey: below 0.1)")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.supxlabel("Randomised from the head down to", fontsize=9)
    return finish(figure, title)


# Measures: relevance (n, 12, time) and where the evidence lies -> one number per record


def chance_mass(region: Region) -> np.ndarray:
    """Share of the counted lead-samples that the region covers, f_S `(n,)`; NaN where none."""
    return _share(region.evidence, region.counted, region)


def enrichment(relevance: np.ndarray, region: Region) -> np.ndarray:
    """Share of the relevance in the region over `chance_mass`, `(n,)`; at most 1 / f_S."""
    counted = relevance * region.counted
    return _share(counted * region.mask, counted, region) / chance_mass(region)


def measure(
    relevance: np.ndarray,
    region: Region,
    sampling_rate: float,
) -> dict[str, np.ndarray]:
    """All measures by name, each `(n,)`; `chances` tells what they are by chance.

    mass: share of the relevance in the region S (M1), enrichment: the same over its chance.
    pointing_game: whether the largest relevance lies within 50 ms of the region, of equal ones the
    share that does (M2). rank_accuracy: share of the |S| most relevant lead-samples that lie in S,
    equal ones by their share (M3). localisation_auc: ROC area of relevance against the region (M4).
    lead_mass: share of the relevance in the leads that the region names (M5), lead_enrichment: the
    same over its chance. gini: Gini coefficient of what is counted, 0 where all is equally
    relevant, near 1 where one lead-sample has everything (M10).
    """
    counted = relevance * region.counted
    leads = region.evidence.any(axis=2, keepdims=True)
    mass = _share(counted * region.mask, counted, region)
    lead_mass = _share(counted * leads, counted, region)
    inside = np.where(region.counted, relevance, -np.inf)
    largest = (inside == inside.max(axis=(1, 2), keepdims=True)) & region.counted
    rows = zip(relevance, region.evidence, region.counted, strict=True)
    ranked = np.array([_ranked(values[each], hits[each]) for values, hits, each in rows])
    return {
        "mass": mass,
        "enrichment": mass / chance_mass(region),
        "pointing_game": _share(largest & _near(region, sampling_rate), largest, region),
        "rank_accuracy": ranked[:, 0],
        "localisation_auc": ranked[:, 1],
        "lead_mass": lead_mass,
        "gini": ranked[:, 2],
        "lead_enrichment": lead_mass / leads.mean(axis=(1, 2)),
        "mass over chance": mass / mean_finite(chance_mass(region)),
    }


def chances(region: Region, sampling_rate: float) -> dict[str, float]:
    """What each measure is by chance, mean over records; 0 without any evidence."""
    near = _near(region, sampling_rate)
    mass, pointing = (
        float(np.nan_to_num(mean_finite(_share(part, region.counted, region))))
        for part in (region.evidence, near)
    )
    return {
        "mass": mass,
        "enrichment": 1.0,
        "pointing_game": pointing,
        "rank_accuracy": mass,
        "localisation_auc": 0.5,
        "lead_mass": float(region.evidence.any(axis=2).mean()),
        "gini": np.nan,
        "lead_enrichment": 1.0,
        "mass over chance": 1.0,
    }


def _share(
    part: np.ndarray,
    whole: np.ndarray,
    region: Region,
) -> np.ndarray:
    """Sum of part over that of whole in each record `(n,)`, NaN without evidence or without
    anything to divide.
    """
    part, whole = (each.sum(axis=(1, 2)).astype(np.float64) for each in (part, whole))
    known = region.evidence.any(axis=(1, 2)) & (whole > 0)
    return part / np.where(known, whole, np.nan)


def _near(region: Region, sampling_rate: float) -> np.ndarray:
    """What is counted within `TOLERANCE` of the evidence, in time."""
    width = 2 * round(TOLERANCE * sampling_rate) + 1
    return maximum_filter1d(region.evidence, width, axis=2) & region.counted


@np.errstate(invalid="ignore")
def _ranked(values: np.ndarray, hits: np.ndarray) -> tuple[float, float, float]:
    """rank_accuracy, localisation_auc and gini of one record's counted lead-samples."""
    count = len(values)
    size = hits.sum()
    ordered = np.sort(values.astype(np.float64))
    limit = ordered[count - size :].min(initial=np.inf)
    above = values > limit
    equal = values == limit
    tied = hits[equal].sum() * (size - above.sum()) / equal.sum()
    won = rankdata(values)[hits].sum() - size * (size + 1) / 2
    ranks = 2 * np.arange(1, count + 1) - count - 1
    spread = ranks @ ordered / (count * ordered.sum())
    return (hits[above].sum() + tied) / size, won / (size * (count - size)), spread


def measure_rows(
    relevances: Mapping[str, np.ndarray],
    region: Region,
    patients: Sequence,
    sampling_rate: float,
    draws: int = 1000,
) -> list[dict]:
    """Rows attribution, measure, value, low, high, chance, passes of several attributions to the
    same records.

    Beside the measures of each record there are the mass of all records together over their chance
    ("mass over chance") and, paired, how much more the enrichment is than that of each attribution
    of `SIZES` that is among them. passes: whether the lower limit exceeds the published threshold;
    None where there is none.
    """
    found = {name: measure(each, region, sampling_rate) for name, each in relevances.items()}
    chance = chances(region, sampling_rate)
    rows = []
    for name, values in found.items():
        for size in SIZES:
            if size in found and size != name:
                over = values["enrichment"] - found[size]["enrichment"]
                values[f"enrichment over {size}"] = over
        for which, numbers in values.items():
            row = interval_row(which, numbers, patients, draws, chance.get(which, 0.0))
            rows.append({"attribution": name, **row})
    return rows


def interval_row(
    measure: str, values: np.ndarray, patients: Sequence, draws: int, chance: float = 0.0
) -> dict:
    """Mean of one number per record `(n,)` with its interval, such as the difference of two methods
    on the same records.

    It passes where the lower limit exceeds its chance as many times as `TIMES_CHANCE` says, once if
    it says nothing of this measure; None where there is no threshold.
    """
    interval = mean_interval(values, patients, draws)
    times = TIMES_CHANCE.get(measure, 1.0)
    passes = None if times is None else interval.low > times * chance
    return {"measure": measure, **interval._asdict(), "chance": chance, "passes": passes}


def mean_interval(values: np.ndarray, patients: Sequence, draws: int = 1000) -> Interval:
    """Mean of one number per record `(n,)` with its patient-bootstrap interval; NaN counts for
    nothing.

    For two methods on the same records give the differences: the interval is then paired.
    """
    known = ~np.isnan(values)
    if not known.any():
        return Interval(np.nan, np.nan, np.nan)
    return PatientDraws(np.asarray(patients)[known], draws).interval(mean(values[known]))


def baseline_maps(millivolts: np.ndarray, sampling_rate: float) -> dict[str, np.ndarray]:
    """What a method must beat, each float32 `(n, 12, time)`.

    Random numbers, |input| and its square (against which squared relevance is fair), and Gaussians
    of 50 ms about the R peaks, alike in all leads.
    """
    filled = np.nan_to_num(millivolts).astype(np.float32)
    seconds = np.arange(filled.shape[2]) / sampling_rate
    near = []
    for signal in filled:
        peaks = find_r_peaks(signal, sampling_rate)
        distance = (seconds - peaks[:, None] / sampling_rate) / 0.05
        bumps = np.exp(-0.5 * distance**2).sum(axis=0) if len(peaks) else 1.0
        near.append(np.broadcast_to(bumps, signal.shape).astype(np.float32))
    return {
        "random": np.random.default_rng(0).random(filled.shape, np.float32),
        "|input|": np.abs(filled),
        "|input|²": filled**2,
        "R peaks": np.stack(near),
    }


# What asks the network


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
    is called relevant is what the network uses. Probabilities are those of `score_signals`.
    """
    device = next(network.parameters()).device
    filled = torch.from_numpy(np.nan_to_num(millivolts).astype(np.float32))
    without = bridged(filled, PATCH)
    records, leads, time = filled.shape
    weight = np.add.reduceat(relevance, np.arange(0, time, PATCH), axis=2).reshape(records, -1)
    # Ties are broken by chance.
    weight = weight + 1e-9 * np.random.default_rng(0).random(weight.shape) * (weight.max() + 1e-12)
    patches = weight.shape[1]
    rank = weight.argsort(axis=1).argsort(axis=1).reshape(records, leads, -1)  # 0: least relevant
    rank = torch.from_numpy(rank.repeat(PATCH, axis=2)[:, :, :time])

    def probabilities(gone: torch.Tensor) -> np.ndarray:
        signals = torch.where(gone, without, filled).to(device)
        scores = score_signals([network], signals, sampling_rate, window_seconds)
        return scores[0, :, class_index].cpu().numpy()

    curve = []
    for share in SHARES:
        count = round(share * patches)
        curve.append(probabilities(rank < count) - probabilities(rank >= patches - count))
    return np.trapezoid(curve, SHARES, axis=0) / SHARES[-1]


def randomised_cascade(network: nn.Module, seed: int = 0) -> list[tuple[str, nn.Module]]:
    """Copies of the network with ever more of its layers' weights drawn anew, from the head down
    (M7): "head", where there is one, and the encoder's layers down to "layer 1".

    Every number of a layer is drawn from a normal distribution with the mean and deviation of its
    tensor; the running variances of batch norm are shuffled instead, since they must stay positive.
    """
    generator = torch.Generator().manual_seed(seed)
    copies = []
    for place in reversed(range(len(_parts(network)))):
        network = deepcopy(network)
        name, modules = _parts(network)[place]
        for module in modules:
            for key, value in [*module.named_parameters(), *module.named_buffers()]:
                if not value.is_floating_point() or value.numel() == 1:
                    continue
                old = value.detach().cpu()
                if key.endswith("running_var"):
                    new = old[torch.randperm(len(old), generator=generator)]
                else:
                    new = old.mean() + old.std() * torch.randn(old.shape, generator=generator)
                value.data.copy_(new)
        copies.append((name, network))
    return copies


def _parts(network: nn.Module) -> list[tuple[str, Iterable[nn.Module]]]:
    """(name, modules) of the encoder's layers and, last, of the head where there is one."""
    encoder = getattr(network, "encoder", network)
    registered = set(network.modules())
    # A slice of a sequence is no module of the network.
    layers = [[layer] if layer in registered else layer for layer in encoder.layers()]
    parts = [(f"layer {place}", layer) for place, layer in enumerate(layers, start=1)]
    head = [child for child in network.children() if child is not encoder]
    return parts if encoder is network else [*parts, ("head", head)]


def rank_correlation(
    first: np.ndarray,
    second: np.ndarray,
    signed: bool = False,
) -> np.ndarray:
    """Spearman's correlation of |a| of each record, `(n, 12, time)` twice -> `(n,)`; 0 where one is
    constant.

    With `signed` it is that of a itself: |a| also agrees where both are small because nothing
    happens in the signal.
    """
    first, second = (
        rankdata((each if signed else np.abs(each)).reshape(len(each), -1), axis=1)
        for each in (first, second)
    )
    first -= first.mean(axis=1, keepdims=True)
    second -= second.mean(axis=1, keepdims=True)
    size = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return (first * second).sum(axis=1) / np.where(size > 0, size, 1)


def agreement(attributions: Sequence[np.ndarray]) -> np.ndarray:
    """Mean rank correlation over the pairs of attributions to the same records `(n,)` (M8);
    DataError for a single one.
    """
    if len(attributions) < 2:
        raise DataError("Agreement needs the attributions of two networks or more.")
    return np.mean([rank_correlation(*pair) for pair in combinations(attributions, 2)], axis=0)


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
    free = list(candidates)
    chosen = []
    for place in positives:
        chosen.append(min(free, key=lambda other: abs(rates[other] - rates[place])))
        free.remove(chosen[-1])
    return np.array(chosen)
