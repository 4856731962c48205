"""Does an attribution point where the evidence is? Expected regions, measures against them, and their chance levels.

Relevance `(n, 12, time)` is never negative (`saliency.relevance`); a mask of the same shape says where the evidence
lies, and `counted (n, 1, time)` which samples were marked at all. Every measure gives one number a record, NaN where
there is no evidence or no relevance, so that intervals resample patients and compare methods on the same records.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from ecglib.batches import Batch, CropBatches
from ecglib.encoders import make_encoder
from ecglib.errors import DataError
from ecglib.evaluate import Interval, draw_weights, encode_windows, window_starts
from ecglib.labels import split_indices
from ecglib.records import LEADS, Records
from ecglib.saliency import PATCH, bridged, find_r_peaks
from ecglib.sources.ludb import INDEX, read_ludb, read_ludb_marks
from ecglib.sources.simulate import ALL, Simulation
from ecglib.supervised import Classifier
from ecglib.train import fit

# What a network may say, by the superclass that it knows and the statements that have a place in the beat.
GROUPS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "infarction": ("MI", ("AMI", "IMI", "LMI", "STEMI", "scar", "ischaemia or scar")),
    "bundle branch block": ("CD", ("CLBBB", "CRBBB", "IRBBB", "ILBBB")),
    "ST-T change": ("STTC", ("ISCAL", "ISCIN", "NDT", "ischaemia", "repolarisation")),
    "hypertrophy": ("HYP", ("LVH",)),
    "AV block": ("CD", ("1AVB",)),
}
# Where the evidence lies in LUDB, whose statements name no wall: leads, from which mark, to which mark.
FROM_QRS = (ALL, "QRS onset", "T offset")
REPOLARISATION = (ALL, "QRS offset", "T offset")
LUDB_EVIDENCE = {
    **dict.fromkeys(("CLBBB", "CRBBB", "IRBBB", "ILBBB"), (ALL, "QRS onset", "QRS offset")),
    **dict.fromkeys(("STEMI", "scar", "ischaemia or scar"), FROM_QRS),
    **dict.fromkeys(("ischaemia", "repolarisation"), REPOLARISATION),
    "LVH": ("I aVL V1 V2 V5 V6", "QRS onset", "QRS offset"),
    "1AVB": (ALL, "P onset", "QRS onset"),
}
SIZES = ("|input|", "|input|²")  # of the signal, which every attribution is compared with
TOLERANCE = 0.05  # seconds that the pointing game forgives
FETCH = "python -m ecglib.sources.download ludb ../data/ludb"
MEASURES = ("mass", "enrichment", "pointing_game", "rank_accuracy", "localisation_auc", "lead_mass", "gini")
# Published thresholds of each measure: the lower limit of the interval must exceed this (times chance for the second).
ABOVE = {"enrichment": 1.5, "localisation_auc": 0.6, "lead_enrichment": 1.3}
ABOVE_CHANCE = {"pointing_game": 2.0, "rank_accuracy": 1.0, "mass": 1.0}


@dataclass(eq=False)
class Truth:
    """Records whose evidence is known.

    codes: each record's statements. split: positions on which choices may be made ("validation") and that are reported
    ("test"). find: from positions and the statements to look for to the mask `(n, 12, time)`. marked: from positions to
    `counted (n, 1, time)`. note: what the reader must know, such as that nothing is marked.
    """

    name: str
    records: Records
    codes: list[set[str]]
    split: dict[str, np.ndarray]
    find: Callable[[np.ndarray, Sequence[set[str]]], np.ndarray]
    marked: Callable[[np.ndarray], np.ndarray]
    note: str = ""

    def stated(self, group: str) -> list[set[str]]:
        """Each record's statements that belong to a group of `GROUPS`."""
        if group not in GROUPS:
            raise DataError(f"There is no group {group!r} of statements; choose one of {', '.join(GROUPS)}.")
        return [codes & set(GROUPS[group][1]) for codes in self.codes]

    def positions(self, group: str, split: str = "test") -> np.ndarray:
        """The records of a split with a statement of the group, in their order; DataError where there is none."""
        stated = self.stated(group)
        found = np.array([place for place in self.split[split] if stated[place]], dtype=np.int64)
        if not len(found):
            raise DataError(f"{self.name}: no {split} record has a statement of {group} "
                            f"({', '.join(GROUPS[group][1])}); choose another group or more records.")  # fmt: skip
        return found

    def regions(self, group: str, positions: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
        """Where the evidence of the group lies, bool `(n, 12, time)`.

        With `like`, where it would lie had each record the statements of another one: for records without the disease.
        """
        stated = self.stated(group)
        return self.find(positions, [stated[place] for place in (positions if like is None else like)])

    def groups(self, split: str = "test", least: int = 3) -> tuple[str, ...]:
        """The groups with at least `least` records in a split."""
        return tuple(group for group in GROUPS
                     if sum(bool(self.stated(group)[place]) for place in self.split[split]) >= least)  # fmt: skip


def ground_truth(records: Records, results: str | Path, ludb: Path | None = None) -> Truth:
    """The truth that belongs to a study's records: evidence of the simulated cohort, or LUDB's marks for real ones.

    Real records without LUDB give a Truth whose masks are empty and whose note says how to fetch it.
    """
    if records.about.get("simulated"):
        return simulated_truth(Simulation.load(Path(results) / "records"))
    return targets_truth(records) if ludb is None else ludb_truth(ludb, records.sampling_rate)


def find_ludb(*folders: str | Path) -> Path | None:
    """The first of the folders that holds LUDB, itself or in a folder `ludb` below or beside it; None if none does."""
    for folder in (Path(folder) for folder in folders if str(folder)):
        for place in (folder, folder / "ludb", folder.resolve().parent / "ludb"):
            if (place / INDEX).is_file():
                return place
    return None


def simulated_truth(simulation: Simulation) -> Truth:
    """Fold 9 to choose on and fold 10 to report, with the cohort's own evidence."""
    records = simulation.records
    fold = records.table["fold"].to_numpy()

    def find(positions: np.ndarray, wanted: Sequence[set[str]]) -> np.ndarray:
        part = records.select(positions)
        part.table["statements"] = [" ".join(codes) for codes in wanted]
        waves = simulation.waves[simulation.waves["record_id"].isin(part.table["record_id"])]
        known, every = Simulation(part, waves), np.arange(len(part))
        masks = [known.evidence(every, code) for code in sorted(set().union(*wanted))]
        return np.any(masks, axis=0) if masks else np.zeros((len(part), *records.signals.shape[1:]), bool)

    codes = [set(text.split()) for text in records.table["statements"]]
    split = {"validation": np.flatnonzero(fold == 9), "test": np.flatnonzero(fold == 10)}
    return Truth("simulated cohort", records, codes, split, find, _all_counted(records))


def ludb_truth(folder: str | Path, sampling_rate: float) -> Truth:
    """All of LUDB to report on, with the marks of its cardiologists; only what lies between marks is counted.

    Beats at the ends of its records carry no marks, so the first onset and the last offset bound what is counted.
    """
    records = read_ludb(folder, sampling_rate=sampling_rate)
    marks = read_ludb_marks(folder, records.table["record_id"], sampling_rate=sampling_rate)
    beats = {key: lead_beats(rows) for key, rows in marks.groupby(["record_id", "lead"], sort=False)}
    names, time = records.table["record_id"].tolist(), records.signals.shape[2]

    def find(positions: np.ndarray, wanted: Sequence[set[str]]) -> np.ndarray:
        mask = np.zeros((len(positions), len(LEADS), time), bool)
        for row, (place, codes) in enumerate(zip(positions, wanted, strict=True)):
            for code in codes:
                leads, first, last = LUDB_EVIDENCE[code]
                for lead in leads.split():
                    known = beats.get((names[place], lead))
                    for onset, offset in [] if known is None else known[[first, last]].dropna().to_numpy(int):
                        mask[row, LEADS.index(lead), onset : offset + 1] = True
        return mask

    spans = marks.groupby("record_id").agg(first=("onset", "min"), last=("offset", "max"))

    def marked(positions: np.ndarray) -> np.ndarray:
        counted = np.zeros((len(positions), 1, time), bool)
        for row, place in enumerate(positions):
            if names[place] in spans.index:
                counted[row, 0, int(spans.loc[names[place], "first"]) : int(spans.loc[names[place], "last"]) + 1] = True
        return counted

    codes = [{name for name, here in zip(records.classes, row, strict=True) if here} for row in records.targets]
    split = {"validation": np.array([], int), "test": np.arange(len(records))}
    return Truth("LUDB", records, codes, split, find, marked, "every record of LUDB is a test record")


def targets_truth(records: Records) -> Truth:
    """Records with classes but without marks: each class stands for its groups' first statement, masks are empty."""
    stands_for = {class_name: codes[0] for class_name, codes in reversed(GROUPS.values())}
    codes = [{stands_for[name] for name, here in zip(records.classes, row, strict=True) if here and name in stands_for}
             for row in records.targets]  # fmt: skip
    split = split_indices(records)
    shape = records.signals.shape[1:]
    return Truth(records.name, records, codes, {name: split[name] for name in ("validation", "test")},
                 lambda positions, wanted: np.zeros((len(positions), *shape), bool), _all_counted(records),
                 f"no wave is marked; `{FETCH}` fetches LUDB, where cardiologists marked them")  # fmt: skip


def lead_beats(marks: pd.DataFrame) -> pd.DataFrame:
    """One row a beat of one lead's marks: onset and offset of its P, QRS and T in samples, NaN where absent.

    A P belongs to the QRS that follows it, a T to the one before it.
    """
    waves = {wave: rows.sort_values("peak") for wave, rows in marks.groupby("wave")}
    columns = [f"{wave} {end}" for wave in ("P", "QRS", "T") for end in ("onset", "offset")]
    if "QRS" not in waves:
        return pd.DataFrame(columns=columns, dtype=float)
    peaks = waves["QRS"]["peak"].to_numpy(float)
    beats = pd.DataFrame(np.nan, index=range(len(peaks)), columns=columns)
    for wave, rows in waves.items():
        at = rows["peak"].to_numpy(float)
        own = {"QRS": np.arange(len(peaks)), "P": np.searchsorted(peaks, at), "T": np.searchsorted(peaks, at) - 1}[wave]
        inside = (own >= 0) & (own < len(peaks))
        for end in ("onset", "offset"):
            beats.loc[own[inside], f"{wave} {end}"] = rows[end].to_numpy(float, na_value=np.nan)[inside]
    return beats


def _all_counted(records: Records) -> Callable[[np.ndarray], np.ndarray]:
    """Every sample of every record counts."""
    return lambda positions: np.ones((len(positions), 1, records.signals.shape[2]), bool)


# Measures: relevance and mask (n, 12, time), counted (n, 1, time) -> one number a record


def chance_mass(mask: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Share of the counted lead-samples that the mask covers, f_S `(n,)`; NaN where it covers none."""
    mask, counted = _both(mask, counted)
    return _quotient((mask & counted).sum(axis=(1, 2)), counted.sum(axis=(1, 2)), mask & counted)


def relevance_mass(relevance: np.ndarray, mask: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Share of the relevance that lies in the mask `(n,)` (M1); by chance `chance_mass`."""
    mask, counted = _both(mask, counted)
    relevance = relevance * counted
    return _quotient((relevance * mask).sum(axis=(1, 2)), relevance.sum(axis=(1, 2)), mask & counted)


def enrichment(relevance: np.ndarray, mask: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Relevance mass over its chance `(n,)`; at most 1 / f_S."""
    return relevance_mass(relevance, mask, counted) / chance_mass(mask, counted)


def dilated(mask: np.ndarray, sampling_rate: float, seconds: float = TOLERANCE) -> np.ndarray:
    """The mask, longer by `seconds` on both sides in time."""
    from scipy.ndimage import maximum_filter1d

    return maximum_filter1d(mask.astype(np.uint8), 2 * round(seconds * sampling_rate) + 1, axis=2).astype(bool)


def pointing_game(relevance: np.ndarray, mask: np.ndarray, counted: np.ndarray | None = None, *,
                  sampling_rate: float) -> np.ndarray:  # fmt: skip
    """Whether the largest relevance lies within 50 ms of the mask `(n,)` (M2); of equal ones, the share that does.

    By chance it is the share that the longer mask covers.
    """
    mask, counted = _both(mask, counted)
    inside = np.where(counted, relevance, -np.inf)
    top = (inside == inside.max(axis=(1, 2), keepdims=True)) & counted
    hit = top & dilated(mask & counted, sampling_rate)
    return _quotient(hit.sum(axis=(1, 2)), top.sum(axis=(1, 2)), mask & counted)


def rank_accuracy(relevance: np.ndarray, mask: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Share of the |S| most relevant lead-samples that lie in the mask S `(n,)` (M3); equal ones count by their share.

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
        rows.append((hits[above].sum() + hits[equal].sum() * (size - above.sum()) / equal.sum()) / size)
    return np.array(rows, dtype=float)


def localisation_auc(relevance: np.ndarray, mask: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
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


def lead_mass(relevance: np.ndarray, mask: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Share of the relevance in the leads that the mask names `(n,)` (M5); by chance their number over 12."""
    mask, counted = _both(mask, counted)
    leads = (mask & counted).any(axis=2, keepdims=True)
    return relevance_mass(relevance, np.broadcast_to(leads, mask.shape), counted)


def gini(relevance: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Gini coefficient `(n,)` (M10): 0 where all is equally relevant, near 1 where one lead-sample has everything."""
    _, counted = _both(np.ones(relevance.shape, bool), counted)
    rows = []
    for one, inside in zip(relevance, counted, strict=True):
        values = np.sort(one[inside].astype(np.float64))
        total, count = values.sum(), len(values)
        ranks = 2 * np.arange(1, count + 1) - count - 1
        rows.append(float(ranks @ values) / (count * total) if total > 0 else np.nan)
    return np.array(rows)


def measure(relevance: np.ndarray, mask: np.ndarray, counted: np.ndarray, sampling_rate: float) -> dict:
    """All measures of `MEASURES` and `lead_enrichment`, each `(n,)`."""
    leads = (mask & counted).any(axis=2).sum(axis=1) / len(LEADS)
    found = {"mass": relevance_mass(relevance, mask, counted), "enrichment": enrichment(relevance, mask, counted),
             "pointing_game": pointing_game(relevance, mask, counted, sampling_rate=sampling_rate),
             "rank_accuracy": rank_accuracy(relevance, mask, counted),
             "localisation_auc": localisation_auc(relevance, mask, counted),
             "lead_mass": lead_mass(relevance, mask, counted), "gini": gini(relevance, counted)}  # fmt: skip
    return found | {"lead_enrichment": found["lead_mass"] / np.where(leads > 0, leads, np.nan)}


def chances(mask: np.ndarray, counted: np.ndarray, sampling_rate: float) -> dict[str, float]:
    """What each measure is by chance, mean over records."""
    share = float(np.nanmean(_or_nan(chance_mass(mask, counted))))
    wider = float(np.nanmean(_or_nan(chance_mass(dilated(mask & counted, sampling_rate), counted))))
    leads = float((mask & counted).any(axis=2).mean())
    return {"mass": share, "enrichment": 1.0, "pointing_game": wider, "rank_accuracy": share, "localisation_auc": 0.5,
            "lead_mass": leads, "lead_enrichment": 1.0, "gini": np.nan}  # fmt: skip


def passes(name: str, low: float, chance: float) -> object:
    """Whether the lower limit of a measure exceeds its published threshold; None where there is no threshold."""
    if name in ABOVE:
        return bool(low > ABOVE[name])
    return bool(low > ABOVE_CHANCE[name] * chance) if name in ABOVE_CHANCE else None


def measure_rows(relevances: Mapping[str, np.ndarray], mask: np.ndarray, counted: np.ndarray, patients: Sequence,
                 sampling_rate: float, draws: int = 1000) -> list[dict]:  # fmt: skip
    """Rows attribution, measure, value, low, high, chance, passes of several attributions to the same records.

    Beside the measures of `measure` there are the mass of all records together over their chance ("mass over chance")
    and, paired, how much more the enrichment is than that of each attribution of `SIZES` that is among them.
    """
    found = {name: measure(relevance, mask, counted, sampling_rate) for name, relevance in relevances.items()}
    chance, share = chances(mask, counted, sampling_rate), chance_mass(mask, counted)
    share = float(np.nanmean(_or_nan(share)))
    rows = []
    for name, values in found.items():
        extra = {"mass over chance": values["mass"] / (share or np.nan)}
        extra |= {f"enrichment over {other}": values["enrichment"] - found[other]["enrichment"]
                  for other in SIZES if other in found and other != name}  # fmt: skip
        for which, each in (values | extra).items():
            interval = mean_interval(each, patients, draws)
            level = chance.get(which, 1.0 if which in extra and "over chance" in which else 0.0)
            passed = interval.low > 0 if which.startswith("enrichment over") else passes(which, interval.low, level)
            rows.append({"attribution": name, "measure": which, **interval._asdict(), "chance": level,
                         "passes": passed})  # fmt: skip
    return rows


def baseline_maps(millivolts: np.ndarray, sampling_rate: float, seed: int = 0) -> dict[str, np.ndarray]:
    """What a method must beat, each float32 `(n, 12, time)`.

    Random numbers, |input| and its square (against which squared relevance is fair), and 50 ms about the R peaks.
    """
    filled = np.nan_to_num(millivolts).astype(np.float32)
    generator = np.random.default_rng(seed)
    return {"random": generator.random(filled.shape, np.float32), "|input|": np.abs(filled), "|input|²": filled**2,
            "R peaks": np.stack([_heat(signal, sampling_rate) for signal in filled])}  # fmt: skip


def _heat(signal: np.ndarray, sampling_rate: float) -> np.ndarray:
    """Gaussians of 50 ms about the R peaks of one record, alike in all leads."""
    peaks = find_r_peaks(signal, sampling_rate)
    time = np.arange(signal.shape[1]) / sampling_rate
    distance = (time[None] - peaks[:, None] / sampling_rate) / 0.05
    heat = np.exp(-0.5 * distance**2).sum(axis=0) if len(peaks) else np.ones(len(time))
    return np.broadcast_to(heat, signal.shape).astype(np.float32)


# What asks the network


def record_probabilities(network: nn.Module, millivolts: np.ndarray, class_index: int, sampling_rate: float,
                         window_seconds: float) -> np.ndarray:  # fmt: skip
    """Mean over windows, one after the other, of the class's probability `(n,)`."""
    window = max(1, round(window_seconds * sampling_rate))
    starts = window_starts(millivolts.shape[2], window, window)
    signals, device = torch.from_numpy(np.nan_to_num(millivolts).astype(np.float32)), _device(network)
    with torch.inference_mode():
        parts = [network(part.to(device))[:, class_index].sigmoid().unflatten(0, (len(starts), -1)).mean(dim=0).cpu()
                 for chunk in signals.split(64)
                 for part in [torch.cat([chunk[:, :, start : start + window] for start in starts])]]  # fmt: skip
    return torch.cat(parts).numpy()


def deletion_area(network: nn.Module, millivolts: np.ndarray, relevance: np.ndarray, class_index: int,
                  sampling_rate: float, window_seconds: float, patch: int = PATCH,
                  shares: Sequence[float] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)) -> np.ndarray:  # fmt: skip
    """Area between the probability curves when the least and when the most relevant patches go first `(n,)` (M6).

    A patch is `patch` samples of one lead and goes by the straight line between its neighbours; the area is over the
    `shares` of the patches, divided by their range. 0 by chance; large where what is called relevant is what the
    network uses.
    """
    filled = np.nan_to_num(millivolts).astype(np.float32)
    without = bridged(torch.from_numpy(filled), patch).numpy()
    starts = np.arange(0, filled.shape[2], patch)
    weight = np.add.reduceat(relevance, starts, axis=2).reshape(len(filled), -1)  # (n, leads x patches)
    weight = weight + 1e-9 * np.random.default_rng(0).random(weight.shape) * (weight.max() + 1e-12)
    rank = weight.argsort(axis=1).argsort(axis=1)  # 0: the least relevant
    curves = {"least": [], "most": []}
    for share in shares:
        count = round(share * weight.shape[1])
        for which, gone in (("least", rank < count), ("most", rank >= weight.shape[1] - count)):
            gone = gone.reshape(len(filled), filled.shape[1], -1).repeat(patch, axis=2)[:, :, : filled.shape[2]]
            curves[which].append(record_probabilities(
                network, np.where(gone, without, filled), class_index, sampling_rate, window_seconds))  # fmt: skip
    difference = np.array(curves["least"]) - np.array(curves["most"])  # (shares, n)
    return np.trapezoid(difference, np.asarray(shares), axis=0) / (shares[-1] - shares[0])


def randomised_cascade(network: nn.Module, seed: int = 0) -> list[tuple[str, nn.Module]]:
    """Copies of the network with ever more of its layers' weights drawn anew, from the head down (M7).

    Every number of a layer is drawn from a normal distribution with the mean and deviation of its tensor; the running
    variances of batch norm are shuffled instead, since they must stay positive.
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
        parts = [layer] if layer in names else list(layer)  # a slice of a sequence is no module of the network
        found.append((f"layer {place + 1}", [names[part] for part in parts]))
    return found


def rank_correlation(first: np.ndarray, second: np.ndarray, signed: bool = False) -> np.ndarray:
    """Spearman's correlation of |a| of each record, `(n, 12, time)` twice -> `(n,)`; 0 where one is constant.

    With `signed` it is that of a itself: |a| also agrees where both are small because nothing happens in the signal.
    """
    from scipy.stats import rankdata

    ranks = [rankdata((each if signed else np.abs(each)).reshape(len(each), -1), axis=1) for each in (first, second)]
    ranks = [each - each.mean(axis=1, keepdims=True) for each in ranks]
    size = np.sqrt((ranks[0] ** 2).sum(axis=1) * (ranks[1] ** 2).sum(axis=1))
    return np.divide((ranks[0] * ranks[1]).sum(axis=1), size, out=np.zeros(len(size)), where=size > 0)


def agreement(attributions: Sequence[np.ndarray]) -> np.ndarray:
    """Mean rank correlation over the pairs of attributions to the same records `(n,)` (M8); DataError for one alone."""
    if len(attributions) < 2:
        raise DataError("Agreement needs the attributions of two networks or more.")
    pairs = [(a, b) for a in range(len(attributions)) for b in range(a)]
    return np.mean([rank_correlation(attributions[a], attributions[b]) for a, b in pairs], axis=0)


def matched_negatives(rates: Mapping[int, float], positives: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """For each positive the candidate with the nearest heart rate, each taken once; DataError where they are too few.

    rates gives each record's beats a minute by its position.
    """
    if len(candidates) < len(positives):
        raise DataError(f"{len(positives)} records need as many without the finding, {len(candidates)} are there; "
                        "take fewer records.")  # fmt: skip
    free, chosen = list(candidates), []
    for place in positives:
        nearest = min(free, key=lambda other: abs(rates[other] - rates[place]))
        free.remove(nearest)
        chosen.append(nearest)
    return np.array(chosen)


def mean_interval(values: np.ndarray, patients: Sequence, draws: int = 1000, seed: int = 0) -> Interval:
    """Mean of one number a record `(n,)` with its patient-bootstrap interval; NaN counts for nothing.

    For two methods on the same records give the differences: the interval is then paired.
    """
    values = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(values)
    if not known.any():
        return Interval(np.nan, np.nan, np.nan)
    values, patients = values[known], np.asarray(patients)[known]
    drawn = np.concatenate([values @ weights / weights.sum(axis=0)
                            for weights in draw_weights(patients, len(values), draws, seed)])  # fmt: skip
    return Interval(float(values.mean()), *(float(limit) for limit in np.quantile(drawn, [0.025, 0.975])))


def _both(mask: np.ndarray, counted: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Mask and what counts, both bool `(n, 12, time)`; DataError where the mask has another form."""
    mask = np.asarray(mask)
    if mask.ndim != 3 or mask.dtype != bool:
        raise DataError(f"A mask is bool (records, leads, time), not {mask.dtype} {mask.shape}.")
    return mask, np.broadcast_to(True if counted is None else counted, mask.shape)


def _quotient(part: np.ndarray, whole: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """part / whole of each record, NaN without evidence or without anything to divide."""
    whole = np.where(mask.any(axis=(1, 2)), whole, 0).astype(np.float64)
    return np.divide(part.astype(np.float64), whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _or_nan(values: np.ndarray) -> np.ndarray:
    """The values, with one NaN-proof zero where all of them are missing."""
    return values if np.isfinite(values).any() else np.zeros(1)


def _device(network: nn.Module) -> torch.device:
    """Where the network's weights lie."""
    return next(iter(network.parameters())).device


# Regressors of wave heights, for which the true place is known

HEIGHTS = {"P": ("P", "II"), "R": ("QRS", "V5"), "T": ("T", "V3")}  # output: wave and lead


def wave_heights(simulation: Simulation) -> np.ndarray:
    """Height of each wave of `HEIGHTS` in its lead, mV `(n, 3)`: from the wave's first sample to its farthest point.

    The median over a record's normal beats; for R the highest point. NaN where there is no such wave.
    """
    signals, rows = simulation.records.millivolts(), []
    for record, signal in zip(simulation.records.table["record_id"], signals, strict=True):
        beats = simulation.beats.get(record)
        rows.append([np.nan if beats is None else _height(signal[LEADS.index(lead)], beats, wave)
                     for wave, lead in HEIGHTS.values()])  # fmt: skip
    return np.array(rows)


def _height(trace: np.ndarray, beats: pd.DataFrame, wave: str) -> float:
    """Median height of one wave in the trace of its lead."""
    normal = beats.loc[beats["kind"] == "normal", [f"{wave} onset", f"{wave} offset"]].dropna().to_numpy(int)
    over = [trace[onset : offset + 1] - trace[onset] for onset, offset in normal]
    tops = [part.max() if wave == "QRS" else part[np.abs(part).argmax()] for part in over if len(part)]
    return float(np.median(tops)) if tops else np.nan


def wave_masks(simulation: Simulation, positions: np.ndarray, output: str) -> np.ndarray:
    """Where the height of an output of `HEIGHTS` is measured, bool `(n, 12, time)`: its wave, in its lead alone."""
    wave, lead = HEIGHTS[output]
    mask = np.zeros((len(positions), *simulation.records.signals.shape[1:]), bool)
    for row, record in enumerate(simulation.records.table["record_id"].iloc[positions]):
        beats = simulation.beats[record]
        normal = beats.loc[beats["kind"] == "normal", [f"{wave} onset", f"{wave} offset"]].dropna().to_numpy(int)
        for onset, offset in normal:
            mask[row, LEADS.index(lead), onset : offset + 1] = True
    return mask


class HeightRegression(nn.Module):
    """Mean squared error of standardised heights; each lead gets a gain of its own, and its height with it.

    Only so is the place known: with the gains drawn apart, no other lead tells the height of this one.
    """

    def __init__(self, network: nn.Module, heights: np.ndarray) -> None:
        """`heights (n, outputs)` in mV are those of the training records."""
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(heights.mean(axis=0), dtype=torch.float32))
        self.register_buffer("deviation", torch.tensor(heights.std(axis=0), dtype=torch.float32))
        self.leads = [LEADS.index(lead) for _, lead in HEIGHTS.values()]

    def loss(self, batch: Batch) -> torch.Tensor:
        """Scalar loss of one batch, whose targets are heights in mV `(batch, outputs)`."""
        signals = batch.signals
        gains = 0.5 + torch.rand(signals.shape[:2], generator=batch.generator, device=signals.device)
        wanted = (batch.targets * gains[:, self.leads] - self.mean) / self.deviation
        return nn.functional.mse_loss(self.network(signals * gains[:, :, None]).float(), wanted)


def height_regressor(simulation: Simulation, *, steps: int = 400, batch_size: int = 64, seconds: float = 2.5,
                     learning_rate: float = 0.01, encoder: str = "xresnet1d_narrow",
                     seed: int = 0) -> tuple[nn.Module, np.ndarray, pd.Series]:  # fmt: skip
    """A network that was taught wave heights, the records it was not taught with, and its R2 on these by output.

    Folds 1-8 of the cohort teach, fold 10 is asked. R2 is that of the mean over a record's windows.
    """
    records, heights = simulation.records, wave_heights(simulation)
    usable, fold = ~np.isnan(heights).any(axis=1), simulation.records.table["fold"].to_numpy()
    taught, asked = np.flatnonzero(usable & (fold <= 8)), np.flatnonzero(usable & (fold == 10))
    if not len(taught) or not len(asked):
        raise DataError(f"{len(records)} simulated records are too few to teach and to ask; simulate more patients.")
    torch.manual_seed(seed)
    objective = HeightRegression(Classifier(make_encoder(encoder), len(HEIGHTS)), heights[taught])
    crops = CropBatches(records, taught, batch_size, seconds, seed)

    def batches(step: int) -> Batch:
        batch = crops(step)
        return replace(batch, targets=torch.as_tensor(heights[taught[batch.indices.numpy()]], dtype=torch.float32))

    fit(objective, batches, steps, learning_rate=learning_rate, seed=seed)
    network = objective.network.eval()
    said = encode_windows(network, records, asked, seconds, seconds / 2)
    said = said * objective.deviation.numpy() + objective.mean.numpy()
    r2 = 1 - ((said - heights[asked]) ** 2).mean(axis=0) / heights[asked].var(axis=0)
    return network, asked, pd.Series(r2, index=list(HEIGHTS))
