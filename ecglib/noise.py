"""Noise on 12-lead ECGs at an exact signal-to-noise ratio, and the noise levels of Mehari &
Strodthoff 2022.

The ratio of a record is 10 log10(sum s^2 / sum n^2) over its leads and samples, s the clean signal
as it is, its offset included. A missing sample (NaN) stays missing, a flat lead stays as it is, and
neither counts on either side.

Noise arises at the nine electrodes, and the leads follow from these as in a recorder, so that
Einthoven's law holds for it. It is made at 500 Hz or more and decimated behind an anti-alias
filter, then scaled: made at 100 Hz, much of it would fold back to where it does not belong.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from scipy.signal import firwin, kaiserord
from torch import Generator, Tensor

from ecglib.augment import baseline_shift, baseline_wander, muscle_noise, powerline_noise
from ecglib.errors import DataError
from ecglib.records import FLAT_RANGE, LEADS, LIMB_FROM_I_AND_II
from ecglib.sources.assemble import resample
from ecglib.sources.wfdb_files import read_header, read_millivolts

ADDITIVE = ("baseline_wander", "muscle", "powerline", "electrode_motion", "white", "baseline_shift")
KINDS = (*ADDITIVE, "lead_loss")
MIXED = "mixed"
ELECTRODES = ("RA", "LA", "LL", "V1", "V2", "V3", "V4", "V5", "V6")
RECORDED_RATE = 360.0  # Hz, of the MIT-BIH Noise Stress Test Database
RECORDED = {"baseline_wander": "bw", "electrode_motion": "em", "muscle": "ma"}  # its records

SMALLEST_RATE = 50.0  # Hz of a record; below, half of the kinds lie above half the rate
MAKING_RATE = 500.0  # Hz, at least, at which noise is made
PASSED, STOPPED = (
    0.42,
    0.5,
)  # of the record's rate: where the anti-alias filter passes all, and nothing
ATTENUATION = 60.0  # dB, of that filter
PERIOD = 20.0  # s; noise of a band repeats after this or the record's length, whichever is longer
MAINS_WANDER = 0.1  # Hz, as far as the mains frequency wanders
MAINS_MARGIN = 0.5  # Hz, that a tone and all its wandering stay below half the rate
HARMONICS = (1.0, 0.15, 0.3, 0.05, 0.15)  # usual heights of the mains tone and its harmonics

# The amplifier's channels I, II, V1-V6 from the electrodes (V against Wilson's terminal), the leads
# from the channels.
CHANNELS_FROM_ELECTRODES = np.concatenate(
    [np.eye(9)[[1, 2]] - np.eye(9)[0], np.eye(9)[3:] - np.eye(9)[:3].mean(axis=0)]
).astype(np.float32)
LEADS_FROM_CHANNELS = np.zeros((len(LEADS), 8), np.float32)
LEADS_FROM_CHANNELS[:6, :2], LEADS_FROM_CHANNELS[6:, 2:] = LIMB_FROM_I_AND_II, np.eye(6)

# Largest amplitudes in mV of the published protocol; 2 is the strength of its pretraining. Its "EM
# noise" is white.
PUBLISHED_LEVELS: dict[int, dict[str, float]] = {
    level: dict(zip(("baseline_wander", "muscle", "powerline", "baseline_shift"), sizes))
    for level, sizes in enumerate(
        [
            (0.05, 0.25, 0.1, 0.5),
            (0.1, 0.5, 0.2, 1.0),
            (0.1, 1.0, 0.2, 2.0),
            (0.2, 1.0, 0.4, 2.0),
            (0.2, 1.5, 0.4, 2.5),
            (0.3, 2.0, 0.5, 3.0),
        ],
        start=1,
    )
}


class FlatLeadWarning(UserWarning):
    """Some records have a flat lead: a dead input, which stays as it is and does not count."""


class Draws:
    """Random numbers of a batch, each record's from its own generator, so that no record depends on
    its batch.
    """

    def __init__(self, generators: Sequence[Generator], device: torch.device | str = "cpu") -> None:
        self.generators, self.device = list(generators), device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers `(records, *shape)`."""
        return self._drawn(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers `(records, *shape)` uniform in [0, 1)."""
        return self._drawn(torch.rand, shape)

    def sizes(self, spread: float) -> Tensor:
        """How strong the noise of each electrode is, log-normal `(records, 9, 1)`."""
        return (spread * self.normal(len(ELECTRODES), 1)).exp()

    def _drawn(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        each = [draw(shape, generator=own, device=own.device) for own in self.generators]
        return torch.stack(each).to(self.device)


def record_generator(seed: int, record_id: object, kind: str = "") -> Generator:
    """A generator of one record, from a seed, its record_id and the kind of noise, the same in
    every batch and run.
    """
    digest = hashlib.sha256(f"{seed}\0{record_id}\0{kind}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def add_noise(
    signals: Tensor,
    kind: str,
    snr_db: float | Sequence[float] | Tensor,
    sampling_rate: float,
    generator: Generator | Sequence[Generator],
    *,
    mains: float = 50.0,
    recorded: Mapping[str, np.ndarray] | None = None,
) -> Tensor:
    """Noisy `signals` `(batch, 12, time)` in mV at `snr_db`, one number or one per record.

    kind: one of KINDS, or "mixed", all additive ones in equal parts. generator: one for the batch,
    or one per record (see `record_generator`). mains: 50 or 60 Hz. recorded: excerpts of these
    recordings (see `read_nstdb`) instead of synthetic noise of their kinds. The ratio is met as
    closely as float32 can, up to about 80 dB. A record without power stays unchanged; a
    `FlatLeadWarning` counts these and those with a flat lead. DataError for a bad input.
    """
    options = {"mains": mains, "recorded": recorded}
    return prepare_noise(signals, kind, sampling_rate, generator, **options).at(snr_db)


def prepare_noise(
    signals: Tensor,
    kind: str,
    sampling_rate: float,
    generator: Generator | Sequence[Generator],
    *,
    mains: float = 50.0,
    recorded: Mapping[str, np.ndarray] | None = None,
) -> "PreparedNoise":
    """The noise of `add_noise`, drawn once: `.at(snr_db)` gives the same noise at any ratio."""
    _check(signals, kind, sampling_rate, mains)
    _check_recorded(recorded or {})
    draws = Draws(_generators(generator, len(signals)), signals.device)
    known = _known(signals)
    make = Maker(draws, signals.shape[2], float(sampling_rate), mains, recorded or {})
    if kind == "lead_loss":
        return LeadLoss(signals, known, make)
    return AdditiveNoise(signals, known, make, kind)


class PreparedNoise:
    """Noise drawn for `signals` `(batch, 12, time)`, to be had at any ratio; `known` are the
    samples that count.
    """

    def __init__(self, signals: Tensor, known: Tensor) -> None:
        self.signals, self.known = signals, known
        self.clean = torch.where(known, signals, 0.0)

    def at(self, snr_db: float | Sequence[float] | Tensor) -> Tensor:
        """The noisy signals at `snr_db`, one number or one per record; the clean ones stay as they
        are.
        """
        ratio = torch.as_tensor(snr_db, dtype=torch.float64, device=self.signals.device)
        if tuple(ratio.shape) not in ((), (len(self.signals),)):
            raise DataError(
                f"Ratios of shape {tuple(ratio.shape)} do not fit {len(self.signals)} records; "
                "give one number or one per record."
            )
        if not bool(torch.isfinite(ratio).all()):
            raise DataError(
                f"A signal-to-noise ratio of {snr_db} dB is not a finite number; give dB such as "
                "12."
            )
        return torch.where(self.known, self._noisy(ratio.expand(len(self.signals))), self.signals)

    def _noisy(self, snr_db: Tensor) -> Tensor:
        """Noisy signals; what they are at samples that do not count does not matter."""
        raise NotImplementedError


class AdditiveNoise(PreparedNoise):
    """s + c n, with n as strong as s and c = 10^(-SNR / 20)."""

    def __init__(self, signals: Tensor, known: Tensor, make: "Maker", kind: str) -> None:
        super().__init__(signals, known)
        parts = [self._unit(make.leads(name)) for name in (ADDITIVE if kind == MIXED else (kind,))]
        self.noise = parts[0] if len(parts) == 1 else self._unit(torch.stack(parts).sum(dim=0))

    def _unit(self, noise: Tensor) -> Tensor:
        """Noise as strong as each record's signal, 0 at samples that do not count."""
        noise = torch.where(self.known, noise, 0.0)
        signal_power, noise_power = _energy(self.clean), _energy(noise)
        if bool(((noise_power == 0) & (signal_power > 0)).any()):
            raise DataError(
                "The recorded noise is silent where a record needs it; give recordings without "
                "gaps."
            )
        gain = (signal_power / noise_power.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        return noise * gain[:, None, None].to(noise.dtype)

    def _noisy(self, snr_db: Tensor) -> Tensor:
        size = (10 ** (-snr_db / 20)).to(self.noise.dtype)
        return self.signals + self.noise * size[:, None, None]


class LeadLoss(PreparedNoise):
    """Contact is lost, and a lead reads 0: lead after lead in a random order, each from a random
    start round its end.

    As many samples are lost as hold the energy that the ratio asks for; the last one fades. At 0 dB
    all is lost; below, the open inputs add white noise w of the size c for which |c w - s|^2 is
    what the ratio asks for.
    """

    def __init__(self, signals: Tensor, known: Tensor, make: "Maker") -> None:
        super().__init__(signals, known)
        self.make = make
        leads, time = signals.shape[1:]
        order = make.draws.uniform(leads).argsort(dim=1)
        start = (make.draws.uniform(leads) * time).long()
        clock = torch.arange(time, device=signals.device)
        # (records, leads x time): the samples of each record in the order in which they are lost.
        self.path = (order[:, :, None] * time + (clock + start[:, :, None]) % time).flatten(1)
        energies = self.clean.double().square().flatten(1).gather(1, self.path)
        self.energies, self.lost = energies, energies.cumsum(dim=1)

    @cached_property
    def white(self) -> Tensor:
        """The open inputs' noise."""
        return torch.where(self.known, self.make.leads("white"), 0.0)

    def _noisy(self, snr_db: Tensor) -> Tensor:
        wanted = (10 ** (-snr_db / 10) * self.lost[:, -1])[:, None]
        kept = (self.lost > wanted).double()
        last = torch.searchsorted(self.lost, wanted, right=True).clamp(max=self.lost.shape[1] - 1)
        before = (self.lost - self.energies).gather(1, last)
        part = (wanted - before).clamp_min(0) / self.energies.gather(1, last).clamp_min(1e-300)
        part = part.sqrt().clamp(max=1)
        kept.scatter_(1, last, kept.gather(1, last) * (1 - part))
        places = torch.zeros_like(kept).scatter_(1, self.path, kept)
        noisy = self.clean * places.view(self.clean.shape).to(self.clean.dtype)
        below = snr_db < 0
        if bool(below.any()):
            noisy = noisy + self._open_inputs(wanted[:, 0]) * below[:, None, None]
        return noisy

    def _open_inputs(self, wanted: Tensor) -> Tensor:
        """c w with |c w - s|^2 = `wanted` `(records,)`."""
        white, energy = _energy(self.white), self.lost[:, -1]
        both = (self.clean.double() * self.white.double()).sum(dim=(1, 2))
        root = (both.square() + white * (wanted - energy).clamp_min(0)).sqrt()
        size = (both + root) / white.clamp_min(1e-300)
        return self.white * size[:, None, None].to(self.white.dtype)


@dataclass
class Maker:
    """Makes noise `(records, 12, samples)` of any additive kind at the rate of the records, at no
    particular size.
    """

    draws: Draws
    samples: int
    rate: float
    mains: float
    recorded: Mapping[str, np.ndarray]

    def leads(self, kind: str) -> Tensor:
        """Noise of one kind in the twelve leads."""
        device = self.draws.device
        channels = torch.from_numpy(LEADS_FROM_CHANNELS).to(device)
        if kind == "white":
            return channels @ self._decimated(lambda _, samples, __: self.draws.normal(8, samples))
        leads = channels @ torch.from_numpy(CHANNELS_FROM_ELECTRODES).to(device)
        if kind in self.recorded:
            return leads @ excerpts(self.draws, self.recorded[kind], self.samples, self.rate)
        if kind == "powerline":
            # A sum of tones below half the rate: there is nothing for a filter to remove.
            return leads @ mains_tones(self.draws, self.samples, self.rate, self.mains)
        return leads @ self._decimated(WAVES[kind])

    def _decimated(self, make: Callable[[Draws, int, float], Tensor]) -> Tensor:
        """What `make(draws, samples, rate)` gives at the making rate, low-passed and every
        factor-th sample taken.
        """
        factor = math.ceil(MAKING_RATE / self.rate)
        if factor == 1:
            return make(self.draws, self.samples, self.rate)
        taps = anti_alias_taps(factor)
        # The filter sees real noise before the first and after the last sample, so that no end is
        # weaker.
        blocks = self.samples + len(taps) // factor - 1
        waves = make(self.draws, blocks * factor, self.rate * factor)
        phases = waves.flatten(0, 1).unflatten(1, (blocks, factor)).transpose(1, 2)
        kernel = torch.from_numpy(taps).to(waves).reshape(1, -1, factor).transpose(1, 2)
        return F.conv1d(phases, kernel).reshape(*waves.shape[:2], self.samples)


@cache
def anti_alias_taps(factor: int) -> np.ndarray:
    """Low-pass for decimation by `factor`: a Kaiser window's, its length a multiple of the factor,
    float32.
    """
    count, beta = kaiserord(ATTENUATION, 2 * (STOPPED - PASSED) / factor)
    count = factor * math.ceil(count / factor)
    return firwin(count, (PASSED + STOPPED) / factor, window=("kaiser", beta)).astype(np.float32)


def band_noise(
    draws: Draws, samples: int, rate: float, low: float, high: float, slope: float = 0.0
) -> Tensor:
    """Gaussian noise of electrodes, `(records, 9, samples)` of variance 1 from `low` to `high` Hz,
    amplitude as f^-slope.
    """
    length = next_fast_len(max(samples, math.ceil(PERIOD * rate)), real=True)
    frequency = torch.arange(length // 2 + 1, device=draws.device) * (rate / length)
    inside = ((frequency >= low) & (frequency <= high)).nonzero()[:, 0]
    weights = frequency[inside] ** -slope
    weights = weights * (length / (2 * weights.square().sum().sqrt()))
    drawn = draws.normal(len(ELECTRODES), 2, len(inside)) * weights
    shape = (*drawn.shape[:2], len(frequency))
    spectrum = torch.zeros(shape, dtype=torch.complex64, device=draws.device)
    spectrum[:, :, inside] = torch.complex(drawn[:, :, 0], drawn[:, :, 1])
    return torch.fft.irfft(spectrum, n=length)[:, :, :samples]


def bursts(draws: Draws, samples: int, rate: float) -> Tensor:
    """An envelope `(records, 9, samples)` that is mostly low and swells now and then, never 0."""
    return 0.1 + torch.relu(band_noise(draws, samples, rate, 0.1, 1.0) - 0.3).square()


def wander(draws: Draws, samples: int, rate: float) -> Tensor:
    """Baseline wander of electrodes by breath and skin: 0.05 to 0.5 Hz, the slowest largest."""
    waves = band_noise(draws, samples, rate, 0.05, 0.5, slope=1.0)
    return draws.sizes(0.5) * waves


def muscle(draws: Draws, samples: int, rate: float) -> Tensor:
    """Muscle noise of electrodes: 20 to 150 Hz in bursts."""
    waves = band_noise(draws, samples, rate, 20.0, 150.0) * bursts(draws, samples, rate)
    return draws.sizes(0.5) * waves


def motion(draws: Draws, samples: int, rate: float) -> Tensor:
    """Electrode motion: transients of 1 to 10 Hz, which look like beats, as those of the NSTDB
    record em.
    """
    waves = band_noise(draws, samples, rate, 1.0, 10.0, slope=1.0) * bursts(draws, samples, rate)
    return draws.sizes(1.0) * waves


def shifts(draws: Draws, samples: int, rate: float) -> Tensor:
    """Levels of electrodes that jump every 1 to 5 s, most by little, one or two by much."""
    stretches = math.ceil(samples / rate) + 2
    lengths = rate * (1.0 + 4.0 * draws.uniform(len(ELECTRODES), stretches))
    ends = lengths.cumsum(dim=2) - lengths[:, :, :1] * draws.uniform(len(ELECTRODES), 1)
    clock = torch.arange(samples, device=draws.device, dtype=torch.float32)
    clock = clock.repeat(*ends.shape[:2], 1)
    levels = draws.normal(len(ELECTRODES), stretches) * draws.sizes(1.0)
    return levels.gather(2, torch.searchsorted(ends, clock).clamp(max=stretches - 1))


def mains_tones(draws: Draws, samples: int, rate: float, mains: float) -> Tensor:
    """Mains hum of electrodes `(records, 9, samples)`: a tone and the harmonics below half the
    rate, all wandering.

    The frequency wanders by 0.1 Hz, the amplitude by a fifth, within many seconds. Where the tone
    sits at half the rate (50 Hz at 100 Hz) it is moved 0.5 Hz below it, so that no part of it folds
    back. Harmonics above are left out.
    """
    tone = min(mains, rate / 2 - MAINS_MARGIN)
    count = min(max(1, math.floor(rate / 2 / (tone + MAINS_MARGIN))), len(HARMONICS))
    clock = torch.arange(samples, device=draws.device, dtype=torch.float64) / rate
    slow = 0.03 + 0.07 * draws.uniform(2, 1).double()  # Hz, of the frequency and of the amplitude
    phase = 2 * math.pi * draws.uniform(2, 1).double()
    # The phase is the integral of the frequency: f + MAINS_WANDER cos(2 pi slow t).
    turned = torch.sin(2 * math.pi * slow[:, 0] * clock + phase[:, 0]) * MAINS_WANDER / slow[:, 0]
    angle = 2 * math.pi * tone * clock + turned
    swell = 1 + 0.2 * torch.sin(2 * math.pi * slow[:, 1] * clock + phase[:, 1])
    heights = torch.tensor(HARMONICS, device=draws.device) * draws.normal(len(HARMONICS)).abs()
    heights[:, 0] = 1.0
    offsets = 2 * math.pi * draws.uniform(len(ELECTRODES), len(HARMONICS)).double()
    tones = 0.0
    for order in range(count):
        own = (order + 1) * angle[:, None] + offsets[:, :, order, None]
        tones = tones + heights[:, order, None, None] * torch.cos(own)
    return draws.sizes(0.5) * (swell[:, None] * tones).float()


WAVES = {  # of electrodes, by kind
    "baseline_wander": wander,
    "muscle": muscle,
    "electrode_motion": motion,
    "baseline_shift": shifts,
}


def excerpts(draws: Draws, recording: np.ndarray, samples: int, rate: float) -> Tensor:
    """Electrodes `(records, 9, samples)` from a noise recording `(channels, time)` at 360 Hz.

    Each record gets an excerpt from a random start, without its offset, and each electrode a random
    mixture of the recording's channels. DataError where the recording is shorter than the records.
    """
    recording = np.asarray(recording, dtype=np.float32)
    needed = math.ceil(samples * RECORDED_RATE / rate) + 1
    if recording.shape[1] < needed:
        raise DataError(
            f"Noise recorded for {recording.shape[1] / RECORDED_RATE:.1f} s cannot be laid over "
            f"records of {samples / rate:.1f} s; give a longer recording."
        )
    starts = (draws.uniform().cpu().double() * (recording.shape[1] - needed + 1)).long().tolist()
    parts = np.stack([recording[:, start : start + needed] for start in starts])
    parts = resample(parts - parts.mean(axis=2, keepdims=True), RECORDED_RATE, rate)[:, :, :samples]
    mixture = draws.normal(len(ELECTRODES), len(recording))
    return mixture @ torch.from_numpy(np.ascontiguousarray(parts)).to(mixture)


def read_nstdb(folder: str | Path) -> dict[str, np.ndarray]:
    """The noise recordings of the MIT-BIH Noise Stress Test Database, mV `(2, time)` at 360 Hz, for
    `add_noise`.

    DataError where the folder or a record is missing.
    """
    folder = Path(folder)
    lacking = [name for name in RECORDED.values() if not (folder / f"{name}.hea").exists()]
    if lacking:
        raise DataError(
            f"{folder}: the noise record {lacking[0]!r} is not there; fetch it with `python -m "
            f"ecglib.sources.download nstdb {folder}`."
        )
    recorded = {}
    for kind, name in RECORDED.items():
        header = read_header(folder / f"{name}.hea")
        if header.sampling_rate != RECORDED_RATE:
            raise DataError(
                f"{header.path}: recorded at {header.sampling_rate:g} Hz, not {RECORDED_RATE:g}; "
                "fetch the database again."
            )
        recorded[kind] = read_millivolts(header)
    return recorded


def published_noise(
    signals: Tensor, level: int, sampling_rate: float, generator: Generator | Sequence[Generator]
) -> Tensor:
    """Noisy copies of windows `(batch, 12, time)` in mV by the published protocol (code of Mehari &
    Strodthoff 2022).

    All four kinds, each of a random amplitude up to that of PUBLISHED_LEVELS, are added to every
    window. Literally, so with its flaws: the wander is the same trace in all leads and has a
    constant part; the mains tone enters with its amplitude squared, and at 100 Hz it and its
    harmonics fold to an alternating sign and an offset; "EM noise" is white and breaks Einthoven's
    law, as the shift does with a gain of its own in each lead. No level fixes a ratio. DataError
    for an unknown level.
    """
    _check_signals(signals, sampling_rate)
    if level not in PUBLISHED_LEVELS:
        raise DataError(
            f"There is no published noise level {level!r}; choose one of {min(PUBLISHED_LEVELS)} "
            f"to {max(PUBLISHED_LEVELS)}."
        )
    if not isinstance(generator, Generator):
        each = zip(signals.split(1), _generators(generator, len(signals)), strict=True)
        return torch.cat([published_noise(one, level, sampling_rate, own) for one, own in each])
    largest = PUBLISHED_LEVELS[level]
    noisy = baseline_wander(signals, generator, largest["baseline_wander"], sampling_rate)
    noisy = powerline_noise(noisy, generator, largest["powerline"], sampling_rate, folded=True)
    noisy = muscle_noise(noisy, generator, largest["muscle"])
    return baseline_shift(noisy, generator, largest["baseline_shift"], sampling_rate)


def measured_snr(clean: Tensor, noisy: Tensor, by_variance: bool = False) -> Tensor:
    """The ratio of each record in dB, 10 log10(sum s^2 / sum n^2), float64 `(batch,)`; missing
    samples do not count.

    With `by_variance` each lead's mean is taken from signal and noise before, so that offsets do
    not count.
    """
    known = torch.isfinite(clean) & torch.isfinite(noisy)
    parts = []
    for values in (clean, noisy.double() - clean.double()):
        values = torch.where(known, values.double(), 0.0)
        if by_variance:
            count = known.sum(dim=2, keepdim=True).clamp_min(1)
            values = torch.where(known, values - values.sum(dim=2, keepdim=True) / count, 0.0)
        parts.append(_energy(values))
    return 10 * torch.log10(parts[0] / parts[1])


def _energy(values: Tensor) -> Tensor:
    """Sum of squares of each record, float64 `(batch,)`."""
    return values.double().square().sum(dim=(1, 2))


def _known(signals: Tensor) -> Tensor:
    """Samples that count: those that are there, in leads that move. Warns of flat leads and records
    without power.
    """
    finite = torch.isfinite(signals)
    high = torch.where(finite, signals, -torch.inf).amax(dim=2)
    low = torch.where(finite, signals, torch.inf).amin(dim=2)
    flat = high - low < FLAT_RANGE  # of a lead without any sample the range is minus infinity
    known = finite & ~flat[:, :, None]
    some = int((flat & finite.any(dim=2)).any(dim=1).sum())
    none = int((~known.flatten(1).any(dim=1)).sum())
    if some or none:
        whole = f"; {none} have no lead that moves and stay unchanged" if none else ""
        warnings.warn(
            f"{some} of {len(signals)} records have a flat lead, which stays as it is and does not "
            f"count{whole}.",
            FlatLeadWarning,
            stacklevel=4,
        )
    return known


def _generators(generator: Generator | Sequence[Generator], count: int) -> list[Generator]:
    """One generator per record: those given, or new ones with seeds from the one given."""
    if isinstance(generator, Generator):
        seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device)
        return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    if len(generator) != count:
        raise DataError(
            f"{len(generator)} generators were given for {count} records; give one, or one a "
            "record."
        )
    return list(generator)


def _check(signals: Tensor, kind: str, sampling_rate: float, mains: float) -> None:
    """DataError where this noise cannot be added to these signals."""
    kinds = (*KINDS, MIXED)
    if kind not in kinds:
        raise DataError(f"There is no noise of kind {kind!r}; choose one of {', '.join(kinds)}.")
    _check_signals(signals, sampling_rate)
    if kind in ("powerline", MIXED) and not 0 < mains <= sampling_rate / 2:
        raise DataError(
            f"Mains of {mains:g} Hz lie above {sampling_rate / 2:g} Hz, half the sampling rate, "
            "where a recorder's filter has removed them; take records of a higher rate or another "
            "kind of noise."
        )


def _check_signals(signals: Tensor, sampling_rate: float) -> None:
    """DataError where noise cannot be added to these signals."""
    twelve_leads = signals.ndim == 3 and signals.shape[1] == len(LEADS)
    if not (twelve_leads and signals.is_floating_point() and signals.numel()):
        raise DataError(
            f"Noise is added to float signals (batch, 12, time) in mV, not {signals.dtype} "
            f"{tuple(signals.shape)}; give at least one record as mV."
        )
    if not (SMALLEST_RATE <= sampling_rate < math.inf):
        raise DataError(
            f"At {sampling_rate} Hz there is no telling noise from heart; resample to "
            f"{SMALLEST_RATE:g} Hz or more."
        )


def _check_recorded(recorded: Mapping[str, np.ndarray]) -> None:
    """DataError where recordings of noise are of an unknown kind or form."""
    for kind, recording in recorded.items():
        if kind not in RECORDED:
            raise DataError(
                f"Recorded noise of kind {kind!r} is not known; give {', '.join(RECORDED)}."
            )
        if np.ndim(recording) != 2 or not np.isfinite(recording).all():
            raise DataError(
                f"The recorded {kind} must be finite numbers (channels, time), not of shape "
                f"{np.shape(recording)}; give what read_nstdb gives."
            )
