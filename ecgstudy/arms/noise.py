"""Trained classifiers under noise as runs: all arms read the same noisy records of fold 10."""

import math
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ecglib.batches import to_millivolts
from ecglib.evaluate.draws import PatientDraws, auroc, together
from ecglib.evaluate.windows import score_signals
from ecglib.noise import KINDS, FlatLeadWarning, prepare_noise, record_generator
from ecglib.records import MISSING, Records
from ecgstudy.arms.trained import trained_classifier
from ecgstudy.runs import Result, Run, find_run
from ecgstudy.study import Job, Study

SNRS = (24.0, 18.0, 12.0, 6.0, 0.0, -6.0)  # dB
CLEAN = math.inf  # dB
TOGETHER = 256  # records to which noise is added, or that are scored, at once


def arm_of(run: Run) -> dict:
    """What tells an arm apart: method, protocol, encoder, fraction and seed of a run."""
    spec = run.spec
    members = spec.value("members")
    encoder = f"{members.count('+') + 1} encoders" if members else spec.value("encoder")
    return {
        "method": spec.method,
        "protocol": spec.value("protocol") or f"{spec.value('start')} start",
        "encoder": encoder or spec.value("backbone"),
        "fraction": spec.fraction,
        "seed": spec.seed,
    }


@dataclass(frozen=True)
class NoiseGrid:
    """The conditions: clean, then every kind of noise at every ratio in dB.

    `seed` draws the noise, `mains` is the frequency of the hum in Hz, `draws` counts the patient
    samples behind an interval.
    """

    kinds: Sequence[str] = KINDS
    snr_db: Sequence[float] = SNRS
    seed: int = 0
    mains: float = 50.0
    draws: int = 1000

    @property
    def conditions(self) -> list[tuple[str, float]]:
        """(kind, SNR in dB) of every condition."""
        pairs = [(kind, float(snr)) for kind in self.kinds for snr in self.snr_db]
        return [("clean", CLEAN), *pairs]


@dataclass(frozen=True)
class NoisySignals:
    """Signals of some records under every condition of a grid, in a file.

    `path` holds int16 counts `(conditions, n, 12, time)`, -32768 where a sample is missing;
    `scales` `(conditions, n)` mV per count. A scale for each record leaves room for whatever noise
    does to it.
    """

    path: Path
    scales: np.ndarray
    conditions: list[tuple[str, float]]
    sampling_rate: float

    def millivolts(self, condition: int, part: slice, device: str = "cpu") -> Tensor:
        """Signals `(n, 12, time)` of one condition, missing samples 0."""
        counts = np.array(np.load(self.path, mmap_mode="r")[condition, part])
        scales = torch.from_numpy(self.scales[condition, part]).to(device)
        return to_millivolts(torch.from_numpy(counts).to(device), 1.0) * scales[:, None, None]


def make_noisy(
    records: Records, indices: np.ndarray, path: str | Path, grid: NoiseGrid
) -> NoisySignals:
    """Write the records at `indices` under every condition to `path`. A kind's noise is drawn once
    for all ratios.
    """
    conditions, rate = grid.conditions, records.sampling_rate
    shape = (len(conditions), len(indices), *records.signals.shape[1:])
    file = np.lib.format.open_memmap(path, "w+", np.int16, shape)
    scales = np.empty(shape[:2], np.float32)
    names = records.table["record_id"].astype(str).to_numpy()[indices]
    for start in range(0, len(indices), TOGETHER):
        part = slice(start, start + TOGETHER)
        clean = torch.from_numpy(records.millivolts(indices[part]))
        file[0, part], scales[0, part] = records.signals[indices[part]], records.scale
        for kind in grid.kinds:
            generators = [record_generator(grid.seed, name, kind) for name in names[part]]
            with warnings.catch_warnings():  # the notebook says how many records have a flat lead
                warnings.simplefilter("ignore", FlatLeadWarning)
                noise = prepare_noise(clean, kind, rate, generators, mains=grid.mains)
            for snr in grid.snr_db:
                place = conditions.index((kind, float(snr)))
                file[place, part], scales[place, part] = _counts(noise.at(snr))
    file.flush()
    return NoisySignals(Path(path), scales, conditions, rate)


def _counts(signals: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Signals `(n, 12, time)` as int16 counts, and mV per count of each record, the smallest scale
    that holds it.
    """
    values = signals.numpy()
    largest = np.nan_to_num(np.abs(values)).max(axis=(1, 2))
    scales = (np.maximum(largest, 1e-6) / 32767).astype(np.float32)
    counts = np.rint(np.nan_to_num(values / scales[:, None, None], nan=0.0))
    counts = counts.clip(-32767, 32767).astype(np.int16)
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


@dataclass(frozen=True)
class UnderNoise(Job):
    """Scores under noise of runs that share an encoder, and so its features.

    `noisy` are the signals of fold 10 under the conditions of the grid.
    """

    scored: Sequence[Run]
    grid: NoiseGrid
    noisy: NoisySignals | None = None

    @property
    def method(self) -> str:
        """The method of the first run."""
        return self.scored[0].spec.method

    @property
    def seed(self) -> int:
        """The seed of the first run."""
        return self.scored[0].spec.seed

    @property
    def fraction(self) -> float:
        """The labelled share of the first run."""
        return self.scored[0].spec.fraction

    def settings(self) -> Mapping:
        keys = [run.spec.key for run in self.scored]
        return {**asdict(self.grid), "protocol": "noise", "scored": keys}

    def reaches(self) -> tuple[type]:
        return (NoisySignals,)  # with signals or without, the key is the same

    def compute(self, study: Study, workspace: Path) -> Result:
        started = time.perf_counter()
        pairs = [trained_classifier(run, study.records, study.results) for run in self.scored]
        networks = [network for network, _ in pairs]
        targets, patients = study.records.split_truth("test")
        draws = PatientDraws(patients, self.grid.draws)
        kept = {}
        scores = score_conditions(networks, self.noisy, pairs[0][1], study.device)
        for run, own in zip(self.scored, scores, strict=True):
            values, drawn = draws.sample(together(*(auroc(targets, each) for each in own)))
            arrays = {"probabilities": own, "auroc": values, "drawn": drawn.astype(np.float32)}
            kept |= {f"{run.spec.key}/{name}": array for name, array in arrays.items()}
        return Result([], kept, seconds=time.perf_counter() - started)


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
        found = {snr: place for place, (name, snr) in enumerate(self.conditions) if name == kind}
        snrs = sorted(found, reverse=True)
        places = [found[snr] for snr in snrs]
        values, drawn = self.auroc[arm], self.drawn[arm]
        return np.array(snrs), values[0] - values[places], drawn[0] - drawn[places]


def score_under_noise(study: Study, arms: Sequence[Run], grid: NoiseGrid) -> NoiseScores:
    """Every arm under every condition on fold 10, a kept run per network; a killed call goes on.

    Frozen arms of one encoder share its features.
    """
    groups: dict[str, list[Run]] = {}
    for run in arms:
        shared = run.spec.value("pretraining") if run.spec.value("protocol") == "frozen" else None
        groups.setdefault(shared or run.spec.key, []).append(run)
    jobs = [UnderNoise(tuple(group), grid) for group in groups.values()]
    test = study.records.split["test"]
    with tempfile.TemporaryDirectory() as folder:
        if not all(find_run(study.spec(job).key, study.results) for job in jobs):
            noisy = make_noisy(study.records, test, Path(folder) / "noisy.npy", grid)
            jobs = [replace(job, noisy=noisy) for job in jobs]
        kept = {}
        for run in study.grid(jobs):
            kept |= run.predictions()
    values, drawn = (
        np.stack([kept[f"{run.spec.key}/{name}"] for run in arms]) for name in ("auroc", "drawn")
    )
    return NoiseScores(list(arms), grid.conditions, values, drawn, len(test))
