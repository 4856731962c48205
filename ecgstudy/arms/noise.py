""""""

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ecglib.batches import to_millivolts
from ecglib.errors import DataError
from ecglib.evaluate.draws import PatientDraws, auroc, together
from ecglib.evaluate.windows import score_signals
from ecglib.noise import KINDS, FlatLeadWarning, prepare_noise, record_generator
from ecglib.records import MISSING, Records
from ecgstudy.arms.trained import trained_classifier
from ecgstudy.code import code_of
from ecgstudy.runs import RESULT, Result, Run, RunSpec, kept_runs, run_grid

SNRS = (24.0, 18.0, 12.0, 6.0, 0.0, -6.0)  # dB
CLEAN = math.inf  # dB
TOGETHER = 256  # records to which noise is added, or that are scored, at once
STUDIES = {
    "label_efficiency": "09_probe_and_fine_tune",
    "semi_supervised": "12_semi_supervised",
    "self_evolving": "13_self_evolving",
    "fusion": "10_fusion",
}
CHOSEN = {
    "semi_supervised": ("ce_ssl", "fixmatch", "supervised_cutmix"),
    "self_evolving": ("distl", "supervised_noised"),
    "fusion": ("dvme",),
}
ARM = ("method", "protocol", "encoder", "fraction", "seed")


def noise_arms(
    results: str | Path,
    records: Records,
    fraction: float = 1.0,
    studies: Sequence[str] = tuple(STUDIES),
    methods: Sequence[str] = (),
) -> list[Run]:
    """The runs to be scored under noise: all arms of notebook 09 at `fraction`, seed 0, and some of
    other notebooks.

    Of notebook 10 this is dvme on frozen encoders, of notebook 12 these are ce_ssl, fixmatch and
    supervised_cutmix from the simulated start, of notebook 13 distl and supervised_noised at the
    last stage, each at its study's largest fraction and smallest seed. `methods`, where given,
    leaves others out.
    DataError where a study's list is missing or has no run at `fraction`.
    """
    unknown = [study for study in studies if study not in STUDIES]
    if unknown:
        raise DataError(f"There is no study {unknown[0]!r}; choose from {', '.join(STUDIES)}.")
    arms = []
    for study in studies:
        runs = kept_runs(study, results, records)
        arms += (
            _all_methods(runs, fraction) if study == "label_efficiency" else _chosen(runs, study)
        )
    chosen = [run for run in arms if not methods or run.spec.method in methods]
    if not chosen:
        raise DataError(
            f"No run of {', '.join(studies)} is by {', '.join(methods)}; choose other methods."
        )
    return chosen


def _all_methods(runs: Sequence[Run], fraction: float) -> list[Run]:
    """The arms of notebook 09 at one fraction, seed 0."""
    found = [run for run in runs if run.spec.fraction == fraction and run.spec.seed == 0]
    if not found:
        there = ", ".join(f"{value:g}" for value in sorted({run.spec.fraction for run in runs}))
        raise DataError(
            f"No arm of notebook 09 was run at a fraction of {fraction:g}; choose one of {there}."
        )
    return found


def _chosen(runs: Sequence[Run], study: str) -> list[Run]:
    """One run a method of notebook 10, 12 or 13."""
    runs = [run for run in runs if run.spec.value("start") in (None, "simulated")]
    if study == "self_evolving":
        last = max(run.spec.settings["stage"] for run in runs)
        runs = [run for run in runs if run.spec.settings["stage"] == last]
    chosen = []
    for method in CHOSEN[study]:
        own = [run for run in runs if run.spec.method == method]
        chosen += sorted(own, key=lambda run: (-run.spec.fraction, run.spec.seed))[:1]
    return chosen


def arm_of(run: Run) -> dict:
    """What tells an arm apart: method, protocol, encoder, fraction and seed of a run."""
    start, members = run.spec.value("start"), run.spec.value("members")
    encoder = f"{members.count('+') + 1} encoders" if members else run.spec.value("encoder")
    return {
        "method": run.spec.method,
        "protocol": run.spec.value("protocol") or f"{start} start",
        "encoder": encoder or run.spec.value("backbone"),
        "fraction": run.spec.fraction,
        "seed": run.spec.seed,
    }


@dataclass(frozen=True)
class NoisySignals:
    """Signals of some records under every condition (kind, SNR in dB), the first of them clean, in
    a file.

    `path` holds int16 counts `(conditions, n, 12, time)`, -32768 where a sample is missing;
    `scales` `(conditions, n)` mV a count. A scale for each record leaves room for whatever noise
    does to it.
    """

    path: Path
    scales: np.ndarray
    conditions: list[tuple[str, float]]
    sampling_rate: float

    def millivolts(self, condition: int, part: slice, device: str = "cpu") -> Tensor:
        """Signals `(n, 12, time)` of one condition, missing samples 0."""
        counts = torch.from_numpy(np.array(np.load(self.path, mmap_mode="r")[condition, part])).to(
            device
        )
        scales = torch.from_numpy(self.scales[condition, part]).to(device)
        return to_millivolts(counts, 1.0) * scales[:, None, None]


def conditions_of(kinds: Sequence[str], snr_db: Sequence[float]) -> list[tuple[str, float]]:
    """Clean, then every kind at every ratio."""
    return [("clean", CLEAN), *((kind, float(snr)) for kind in kinds for snr in snr_db)]


def make_noisy(
    records: Records,
    indices: np.ndarray,
    path: str | Path,
    kinds: Sequence[str] = KINDS,
    snr_db: Sequence[float] = SNRS,
    seed: int = 0,
    mains: float = 50.0,
) -> NoisySignals:
    """Write the records at `indices` under every condition to `path`. A kind's noise is drawn once
    for all ratios.
    """
    conditions = conditions_of(kinds, snr_db)
    shape = (len(conditions), len(indices), *records.signals.shape[1:])
    file = np.lib.format.open_memmap(path, "w+", np.int16, shape)
    scales = np.empty(shape[:2], np.float32)
    ids = records.table["record_id"].astype(str).to_numpy()[indices]
    for start in range(0, len(indices), TOGETHER):
        part = slice(start, start + TOGETHER)
        clean = torch.from_numpy(records.millivolts(indices[part]))
        file[0, part], scales[0, part] = records.signals[indices[part]], records.scale
        for place, kind in enumerate(kinds):
            generators = [record_generator(seed, name, kind) for name in ids[part]]
            with (
                warnings.catch_warnings()
            ):  # the notebook says once how many records have a flat lead
                warnings.simplefilter("ignore", FlatLeadWarning)
                noise = prepare_noise(clean, kind, records.sampling_rate, generators, mains=mains)
            for level, snr in enumerate(snr_db):
                condition = 1 + place * len(snr_db) + level
                file[condition, part], scales[condition, part] = _counts(noise.at(snr))
    file.flush()
    return NoisySignals(Path(path), scales, conditions, records.sampling_rate)


def _counts(signals: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Signals `(n, 12, time)` as int16 counts, and mV a count of each record, the smallest scale
    that holds it.
    """
    values = signals.numpy()
    largest = np.nan_to_num(np.abs(values)).max(axis=(1, 2))
    scales = (np.maximum(largest, 1e-6) / 32767).astype(np.float32)
    counts = (
        np.rint(np.nan_to_num(values / scales[:, None, None], nan=0.0))
        .clip(-32767, 32767)
        .astype(np.int16)
    )
    counts[np.isnan(values)] = MISSING
    return counts, scales


def score_conditions(
    networks: Sequence[nn.Module], noisy: NoisySignals, window_seconds: float, device: str = "cpu"
) -> np.ndarray:
    """Probabilities `(networks, conditions, n, classes)` under every condition.

    Those of the clean signals are what the networks' runs kept: see `score_signals`.
    """
    networks = [network.to(device).eval() for network in networks]

    def scores(condition: int) -> Tensor:
        parts = []
        for start in range(0, noisy.scales.shape[1], TOGETHER):
            signals = noisy.millivolts(condition, slice(start, start + TOGETHER), device)
            parts.append(score_signals(networks, signals, noisy.sampling_rate, window_seconds))
        return torch.cat(parts, dim=1).cpu()

    return torch.stack([scores(place) for place in range(len(noisy.conditions))], dim=1).numpy()


def score_under_noise(
    arms: Sequence[Run],
    records: Records,
    results: str | Path,
    kinds: Sequence[str] = KINDS,
    snr_db: Sequence[float] = SNRS,
    *,
    seed: int = 0,
    mains: float = 50.0,
    draws: int = 1000,
    device: str = "cpu",
    workers: int = 1,
) -> "NoiseScores":
    """Every arm under every condition on fold 10, kept as a run a network below `results`; a killed
    call goes on.

    Frozen arms of one encoder share its features. `workers` processes of one thread take networks
    in turn.
    """
    groups: dict[str, list[Run]] = {}
    for run in arms:
        shared = run.spec.value("pretraining") if run.spec.value("protocol") == "frozen" else None
        groups.setdefault(shared or run.spec.key, []).append(run)
    settings = {
        "kinds": list(kinds),
        "snr_db": [float(snr) for snr in snr_db],
        "noise_seed": seed,
        "mains": mains,
        "draws": draws,
    }
    specs = {key: _noise_spec(group, settings) for key, group in groups.items()}
    missing = [
        spec
        for spec in specs.values()
        if not (Path(results) / "runs" / spec.name / RESULT).exists()
    ]
    with tempfile.TemporaryDirectory() as folder:
        noisy = None
        if missing:
            noisy = make_noisy(
                records,
                records.split["test"],
                Path(folder) / "noisy.npy",
                kinds,
                snr_db,
                seed,
                mains,
            )
        score = _scoring(
            {specs[key].key: group for key, group in groups.items()},
            records,
            results,
            noisy,
            device,
        )
        scored = run_grid(specs.values(), score, results, workers=workers)
    kept = {run.spec.key: run.predictions() for run in scored}
    own = {run.spec.key: kept[specs[key].key] for key, group in groups.items() for run in group}
    values = np.stack([own[run.spec.key][f"{run.spec.key}/auroc"] for run in arms])
    drawn = np.stack([own[run.spec.key][f"{run.spec.key}/drawn"] for run in arms])
    return NoiseScores(
        list(arms), conditions_of(kinds, snr_db), values, drawn, len(records.split["test"])
    )


def _noise_spec(group: Sequence[Run], settings: Mapping) -> RunSpec:
    """What identifies the scores under noise of runs that share a network."""
    first = group[0].spec
    own = {**settings, "protocol": "noise", "scored": [run.spec.key for run in group]}
    identity = (first.method, first.data, first.data_key, first.labels, first.fraction, first.seed)
    return RunSpec(*identity, own, code_of(score_conditions, auroc))


def _scoring(
    groups: Mapping[str, list[Run]],
    records: Records,
    results: str | Path,
    noisy: NoisySignals | None,
    device: str,
) -> Callable[[RunSpec, Path], Result]:
    """The function for `runs.run_grid`: probabilities, macro AUROC and its draws of each run in a
    group.
    """

    def run(spec: RunSpec, workspace: Path) -> Result:
        started, kept = time.perf_counter(), {}
        networks, seconds = zip(
            *(trained_classifier(run, records, results) for run in groups[spec.key])
        )
        targets, patients = records.split_truth("test")
        scores = score_conditions(networks, noisy, seconds[0], device)
        for own, each in zip(groups[spec.key], scores, strict=True):
            measure = together(*(auroc(targets, condition) for condition in each))
            values, drawn = PatientDraws(patients, spec.settings["draws"]).sample(measure)
            kept |= {
                f"{own.spec.key}/probabilities": each,
                f"{own.spec.key}/auroc": values,
                f"{own.spec.key}/drawn": drawn.astype(np.float32),
            }
        return Result([], kept, seconds=time.perf_counter() - started)

    return run


@dataclass(frozen=True)
class NoiseScores:
    """Macro AUROC of arms under conditions: `auroc` `(arms, conditions)`, on patient draws `(arms,
    conditions, draws)`.

    `n` is the number of test records. The first condition is clean.
    """

    arms: list[Run]
    conditions: list[tuple[str, float]]
    auroc: np.ndarray
    drawn: np.ndarray
    n: int

    @property
    def kinds(self) -> list[str]:
        """The kinds of noise, in order."""
        return list(dict.fromkeys(kind for kind, _ in self.conditions[1:]))

    def losses(self, arm: int, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """SNRs `(levels,)` from the highest on, the loss at each, and on each draw `(levels,
        draws)`.
        """
        places = [place for place, (name, _) in enumerate(self.conditions) if name == kind]
        places.sort(key=lambda place: -self.conditions[place][1])
        values = self.auroc[arm, 0] - self.auroc[arm, places]
        return (
            np.array([self.conditions[place][1] for place in places]),
            values,
            self.drawn[arm, 0] - self.drawn[arm, places],
        )
