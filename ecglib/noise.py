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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partialmethod
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from scipy.linalg import block_diag
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
ELECTRODES = 9  # RA, LA, LL, V1 to V6
RECORDED_RATE = 360.0  # Hz, of the MIT-BIH Noise Stress Test Database
RECORDED = {"baseline_wander": "bw", "electrode_motion": "em", "muscle": "ma"}  # its records

SMALLEST_RATE = 50.0  # Hz of a record; below, half of the kinds lie above half the rate
MAKING_RATE = 500.0  # Hz, at least, at which noise is made
PASSED = 0.42  # of the record's rate, up to which the anti-alias filter passes all
STOPPED = 0.5  # of the record's rate, from which it passes nothing
ATTENUATION = 60.0  # dB, of that filter
PERIOD = 20.0  # s; noise of a band repeats after this or the record's length, whichever is longer
MAINS_WANDER = 0.1  # Hz, as far as the mains frequency wanders
MAINS_MARGIN = 0.5  # Hz, that a tone and all its wandering stay below half the rate
TINY = 1e-300  # instead of a power of 0 in a quotient
HARMONICS = (1.0, 0.15, 0.3, 0.05, 0.15)  # usual heights of the mains tone and its harmonics

# The amplifier's channels I, II, V1-V6 from the electrodes (V against Wilson's terminal), the leads
# from the channels.
CHANNELS_FROM_ELECTRODES = np.eye(9)[1:].astype(np.float32)
CHANNELS_FROM_ELECTRODES[:2, 0] = -1
CHANNELS_FROM_ELECTRODES[2:, :3] = -1 / 3
LEADS_FROM_CHANNELS = block_diag(LIMB_FROM_I_AND_II, np.eye(6)).astype(np.float32)
LEADS_FROM_ELECTRODES = LEADS_FROM_CHANNELS @ CHANNELS_FROM_ELECTRODES

# Largest amplitudes in mV of the published protocol by kind, for each level; 2 is the strength of
# its pretraining. Its "EM noise" is white.
LEVELS_FILE = Path(__file__).with_name("published_noise_levels.csv")
PUBLISHED_LEVELS = pd.read_csv(LEVELS_FILE, index_col="level").to_dict("index")
Generators = Generator | Sequence[Generator]  # one for a batch, or one per record


class FlatLeadWarning(UserWarning):
    """Some records have a flat lead: a dead input, which stays as it is and does not count."""


@dataclass(frozen=True)
class Maker:
    """What noise is made from: each record's generator, so that no record's noise depends on its
    batch; samples and Hz wanted; the mains in Hz and recordings of noise by kind.
    """

    generators: Sequence[Generator]
    device: torch.device
    samples: int
    rate: float
    mains: float
    recorded: Mapping[str, np.ndarray]

    def _drawn(self, draw, *shape):
        """What `draw` gives each record, together."""
        each = [draw(shape, generator=own, device=own.device) for own in self.generators]
        return torch.stack(each).to(self.device)

    # Numbers `(records, *shape)`: standard normal ones, and uniform ones in [0, 1).
    normal = partialmethod(_drawn, torch.randn)
    uniform = partialmethod(_drawn, torch.rand)

    def sizes(self, spread: float) -> Tensor:
        """How strong the noise of each electrode is, log-normal `(records, 9, 1)`."""
        return (spread * self.normal(ELECTRODES, 1)).exp()

    @property
    def clock(self) -> Tensor:
        """The number of each sample."""
        return torch.arange(self.samples, device=self.device)


def record_generator(seed: int, record_id: object, kind: str = "") -> Generator:
    """A generator of one record, from a seed, its record_id and the kind of noise, the same in
    every batch and run.
    """
    digest = hashlib.sha256(f"{seed}\0{record_id}\0{kind}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def add_noise(
    signals: Tensor,
    kind: str,
    snr_db: float | Sequence[float] | Tensor,
    sampling_rate: float,
    generator: Generators,
    **options,
) -> Tensor:
    """Noisy `signals` `(batch, 12, time)` in mV at `snr_db`, one number or one per record.

    The other arguments and the `options` mains and recorded are those of `prepare_noise`. The ratio
    is met as closely as float32 can, up to about 80 dB. DataError for a bad input.
    """
    return prepare_noise(signals, kind, sampling_rate, generator, **options).at(snr_db)


def prepare_noise(
    signals: Tensor,
    kind: str,
    sampling_rate: float,
    generator: Generators,
    *,
    mains: float = 50.0,
    recorded: Mapping[str, np.ndarray] | None = None,
) -> "PreparedNoise":
    """Noise for `signals` `(batch, 12, time)` in mV, drawn once: `.at(snr_db)` gives the same noise
    at any ratio.

    kind: one of KINDS, or "mixed", all additive ones in equal parts. generator: one for the batch,
    or one per record (see `record_generator`). mains: 50 or 60 Hz. recorded: excerpts of these
    recordings (see `read_nstdb`) instead of synthetic noise of their kinds. A record without power
    stays unchanged; a `FlatLeadWarning` counts these and those with a flat lead. DataError for a
    bad input.
    """
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
    recorded = recorded or {}
    _check_recorded(recorded)
    maker = Maker(
        _generators(generator, len(signals)),
        signals.device,
        signals.shape[2],
        sampling_rate,
        mains,
        recorded,
    )
    if kind == "lead_loss":
        return LeadLoss(signals, maker)
    return AdditiveNoise(signals, maker, ADDITIVE if kind == MIXED else [kind])


class PreparedNoise:
    """Noise drawn for `signals` `(batch, 12, time)`, to be had at any ratio; `known` are the
    samples that count. Each kind of it says in `_noisy` what the signals are at a ratio
    `(batch, 1, 1)`; at samples that do not count, this does not matter.
    """

    def __init__(self, signals: Tensor) -> None:
        self.signals = signals
        self.known = _known(signals)
        self.clean = signals.where(self.known, 0.0)

    def at(self, snr_db: float | Sequence[float] | Tensor) -> Tensor:
        """The noisy signals at `snr_db`, one number or one per record; the clean ones stay as they
        are.
        """
        count = len(self.signals)
        ratio = torch.as_tensor(snr_db, dtype=torch.float64, device=self.signals.device)
        if ratio.shape not in ((), (count,)):
            raise DataError(
                f"Ratios of shape {tuple(ratio.shape)} do not fit {count} records; "
                "give one number or one per record."
            )
        if not ratio.isfinite().all():
            raise DataError(
                f"A signal-to-noise ratio of {snr_db} dB is not a finite number; give dB such as "
                "12."
            )
        noisy = self._noisy(ratio.expand(count)[:, None, None])
        return torch.where(self.known, noisy, self.signals)


class AdditiveNoise(PreparedNoise):
    """s + c n, with n as strong as s and c = 10^(-SNR / 20); n holds all `kinds` in equal parts."""

    def __init__(self, signals: Tensor, maker: Maker, kinds: Sequence[str]) -> None:
        super().__init__(signals)
        parts = [self._unit(_leads(maker, kind)) for kind in kinds]
        self.noise = parts[0] if len(parts) == 1 else self._unit(torch.stack(parts).sum(dim=0))

    def _unit(self, noise):
        """Noise as strong as each record's signal, 0 at samples that do not count."""
        noise = noise.where(self.known, 0.0)
        signal_power, noise_power = _energy(self.clean), _energy(noise)
        if ((noise_power == 0) & (signal_power > 0)).any():
            raise DataError(
                "The recorded noise is silent where a record needs it; give recordings without "
                "gaps."
            )
        gain = (signal_power / noise_power.clamp_min(TINY)).sqrt()
        return noise * gain.to(noise)

    def _noisy(self, snr_db):
        return self.signals + self.noise * (10 ** (-snr_db / 20)).to(self.noise)


class LeadLoss(PreparedNoise):
    """Contact is lost, and a lead reads 0: lead after lead in a random order, each from a random
    start round its end.

    As many samples are lost as hold the energy that the ratio asks for; the last one fades. At 0 dB
    all is lost; below, the open inputs add white noise w of the size c for which |c w - s|^2 is
    what the ratio asks for.
    """

    def __init__(self, signals: Tensor, maker: Maker) -> None:
        super().__init__(signals)
        self.maker = maker
        order = maker.uniform(len(LEADS), 1).argsort(dim=1)
        start = (maker.uniform(len(LEADS), 1) * maker.samples).long()
        # The samples of each record in the order in which they are lost.
        path = (order * maker.samples + (maker.clock + start) % maker.samples).flatten(1)
        energies = self.clean.double().square()
        lost = energies.flatten(1).gather(1, path).cumsum(dim=1)
        # The energy lost when a sample is, and before; all of it.
        self.lost = torch.empty_like(lost).scatter_(1, path, lost).view_as(energies)
        self.before = self.lost - energies
        self.energies = energies.clamp_min(TINY)
        self.total = lost[:, -1:, None]

    @cached_property
    def white(self) -> Tensor:
        """The open inputs' noise."""
        return _leads(self.maker, "white").where(self.known, 0.0)

    def _noisy(self, snr_db):
        wanted = 10 ** (-snr_db / 10) * self.total
        share = ((wanted - self.before) / self.energies).clamp_(0, 1).sqrt_()
        kept = (1 - share).masked_fill_(self.lost <= wanted, 0)
        noisy = self.clean * kept.to(self.clean)
        if (snr_db >= 0).all():
            return noisy
        energy = _energy(self.white)
        both = (self.clean.double() * self.white.double()).sum(dim=(1, 2), keepdim=True)
        root = (both.square() + energy * (wanted - self.total).clamp_min(0)).sqrt()
        size = (both + root) / energy.clamp_min(TINY)
        return torch.where(snr_db < 0, self.white * size.to(self.white), noisy)


def _leads(maker, kind):
    """Noise of one additive kind in the twelve leads, `(records, 12, samples)`, at no particular
    size.
    """
    if kind in maker.recorded:
        waves = _excerpts(maker, maker.recorded[kind])
    elif kind == "powerline":
        # A sum of tones below half the rate: there is nothing for a filter to remove.
        waves = _mains_tones(maker)
    else:
        waves = _decimated(maker, WAVES[kind])
    mixture = LEADS_FROM_CHANNELS if kind == "white" else LEADS_FROM_ELECTRODES
    return torch.from_numpy(mixture).to(waves) @ waves


def _decimated(maker, make):
    """What `make` gives at the making rate, low-passed and every factor-th sample taken."""
    factor = math.ceil(MAKING_RATE / maker.rate)
    if factor == 1:
        return make(maker)
    taps = anti_alias_taps(factor)
    # The filter sees real noise before the first and after the last sample, so that no end is
    # weaker.
    blocks = maker.samples + len(taps) // factor - 1
    waves = make(replace(maker, samples=blocks * factor, rate=maker.rate * factor))
    phases = waves.unflatten(2, (blocks, factor)).flatten(0, 1).mT
    kernel = torch.from_numpy(taps).to(waves).reshape(1, -1, factor).mT
    return F.conv1d(phases, kernel).view(*waves.shape[:2], -1)


@cache
def anti_alias_taps(factor: int) -> np.ndarray:
    """Low-pass for decimation by `factor`: a Kaiser window's, its length a multiple of the factor,
    float32.
    """
    count, beta = kaiserord(ATTENUATION, 2 * (STOPPED - PASSED) / factor)
    count = factor * math.ceil(count / factor)
    return firwin(count, (PASSED + STOPPED) / factor, window=("kaiser", beta)).astype(np.float32)


def _band_noise(maker, low, high, slope=0.0):
    """Gaussian noise of electrodes, `(records, 9, samples)` of variance 1 from `low` to `high` Hz,
    amplitude as f^-slope.
    """
    length = next_fast_len(max(maker.samples, math.ceil(PERIOD * maker.rate)), real=True)
    frequency = torch.arange(length // 2 + 1, device=maker.device) * (maker.rate / length)
    weights = frequency[(frequency >= low) & (frequency <= high)] ** -slope
    weights = weights * (length / (2 * weights.square().sum().sqrt()))
    drawn = maker.normal(ELECTRODES, 2, len(weights)) * weights
    below = int((frequency < low).sum())
    spectrum = F.pad(torch.complex(*drawn.unbind(2)), (below, 0))
    return torch.fft.irfft(spectrum, n=length)[:, :, : maker.samples]


def _bursts(maker):
    """An envelope `(records, 9, samples)` that is mostly low and swells now and then, never 0."""
    return 0.1 + torch.relu(_band_noise(maker, 0.1, 1.0) - 0.3).square()


def _wander(maker):
    """Baseline wander of electrodes by breath and skin: 0.05 to 0.5 Hz, the slowest largest."""
    return _band_noise(maker, 0.05, 0.5, slope=1.0) * maker.sizes(0.5)


def _muscle(maker):
    """Muscle noise of electrodes: 20 to 150 Hz in bursts."""
    return _band_noise(maker, 20.0, 150.0) * _bursts(maker) * maker.sizes(0.5)


def _motion(maker):
    """Electrode motion: transients of 1 to 10 Hz, which look like beats, as those of the NSTDB
    record em.
    """
    return _band_noise(maker, 1.0, 10.0, slope=1.0) * _bursts(maker) * maker.sizes(1.0)


def _shifts(maker):
    """Levels of electrodes that jump every 1 to 5 s, most by little, one or two by much."""
    stretches = math.ceil(maker.samples / maker.rate) + 2
    lengths = maker.rate * (1.0 + 4.0 * maker.uniform(ELECTRODES, stretches))
    ends = lengths.cumsum(dim=2) - lengths[:, :, :1] * maker.uniform(ELECTRODES, 1)
    levels = maker.normal(ELECTRODES, stretches) * maker.sizes(1.0)
    clock = maker.clock.float().repeat(*ends.shape[:2], 1)
    return levels.gather(2, torch.searchsorted(ends, clock))


WAVES = {  # by kind, made at MAKING_RATE or more
    "baseline_wander": _wander,
    "muscle": _muscle,
    "electrode_motion": _motion,
    "baseline_shift": _shifts,
    "white": lambda maker: maker.normal(8, maker.samples),  # of the channels
}


def _mains_tones(maker):
    """Mains hum of electrodes `(records, 9, samples)`: a tone and the harmonics below half the
    rate, all wandering.

    The frequency wanders by 0.1 Hz, the amplitude by a fifth, within many seconds. Where the tone
    sits at half the rate (50 Hz at 100 Hz) it is moved 0.5 Hz below it, so that no part of it folds
    back. Harmonics above are left out.
    """
    highest = maker.rate / 2
    tone = min(maker.mains, highest - MAINS_MARGIN)
    count = max(1, int(highest / (tone + MAINS_MARGIN)))
    clock = maker.clock.double() / maker.rate
    # (records, 2, 1): Hz and phase, of the frequency's wandering and of the amplitude's.
    slow = 0.03 + 0.07 * maker.uniform(2, 1).double()
    phase = math.tau * maker.uniform(2, 1).double()
    turn, swell = torch.sin(math.tau * slow * clock + phase).split(1, dim=1)
    # The phase is the integral of the frequency: f + MAINS_WANDER cos(2 pi slow t).
    angle = math.tau * tone * clock + turn * MAINS_WANDER / slow[:, :1]
    heights = maker.normal(len(HARMONICS)).abs()
    heights[:, 0] = 1.0
    offsets = math.tau * maker.uniform(ELECTRODES, len(HARMONICS)).double()
    tones = sum(
        usual * heights[:, k, None, None] * torch.cos((k + 1) * angle + offsets[:, :, k, None])
        for k, usual in enumerate(HARMONICS[:count])
    )
    return maker.sizes(0.5) * ((1 + 0.2 * swell) * tones).float()


def _excerpts(maker, recording):
    """Electrodes `(records, 9, samples)` from a noise recording `(channels, time)` at 360 Hz.

    Each record gets an excerpt from a random start, without its offset, and each electrode a random
    mixture of the recording's channels. DataError where the recording is shorter than the records.
    """
    recording = np.asarray(recording, dtype=np.float32)
    channels, time = recording.shape
    needed = math.ceil(maker.samples * RECORDED_RATE / maker.rate) + 1
    if time < needed:
        raise DataError(
            f"Noise recorded for {time / RECORDED_RATE:.1f} s cannot be laid over "
            f"records of {maker.samples / maker.rate:.1f} s; give a longer recording."
        )
    starts = (maker.uniform().double() * (time - needed + 1)).long().tolist()
    parts = np.stack([recording[:, start : start + needed] for start in starts])
    parts = resample(parts - parts.mean(axis=2, keepdims=True), RECORDED_RATE, maker.rate)
    mixture = maker.normal(ELECTRODES, channels)
    return mixture @ torch.tensor(parts[:, :, : maker.samples]).to(mixture)


def read_nstdb(folder: str | Path) -> dict[str, np.ndarray]:
    """The noise recordings of the MIT-BIH Noise Stress Test Database, mV `(2, time)` at 360 Hz, for
    `add_noise`.

    DataError where the folder or a record is missing.
    """
    recorded = {}
    for kind, name in RECORDED.items():
        path = Path(folder) / f"{name}.hea"
        if not path.exists():
            raise DataError(
                f"{folder}: the noise record {name!r} is not there; fetch it with `python -m "
                f"ecglib.sources.download nstdb {folder}`."
            )
        header = read_header(path)
        if header.sampling_rate != RECORDED_RATE:
            raise DataError(
                f"{path}: recorded at {header.sampling_rate:g} Hz, not {RECORDED_RATE:g}; "
                "fetch the database again."
            )
        recorded[kind] = read_millivolts(header)
    return recorded


def published_noise(
    signals: Tensor, level: int, sampling_rate: float, generator: Generators
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
        each = zip(signals.split(1), _generators(generator, len(signals)))
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
    known = clean.isfinite() & noisy.isfinite()

    def energy(values):
        values = values.where(known, torch.nan)
        if by_variance:
            values = values - values.nanmean(dim=2, keepdim=True)
        return values.square().nansum(dim=(1, 2))

    return 10 * torch.log10(energy(clean.double()) / energy(noisy.double() - clean.double()))


def _energy(values):
    """Sum of squares of each record, float64 `(batch, 1, 1)`."""
    return values.double().square().sum(dim=(1, 2), keepdim=True)


def _known(signals):
    """Samples that count: those that are there, in leads that move. Warns of flat leads and records
    without power.
    """
    finite = signals.isfinite()
    high = signals.where(finite, -torch.inf).amax(dim=2)
    low = signals.where(finite, torch.inf).amin(dim=2)
    flat = high - low < FLAT_RANGE  # of a lead without any sample the range is minus infinity
    known = finite & ~flat[:, :, None]
    some = int((flat & finite.any(dim=2)).any(dim=1).sum())
    none = int((~known).flatten(1).all(dim=1).sum())
    if some or none:
        whole = f"; {none} have no lead that moves and stay unchanged" if none else ""
        warnings.warn(
            f"{some} of {len(signals)} records have a flat lead, which stays as it is and does not "
            f"count{whole}.",
            FlatLeadWarning,
            stacklevel=6,
        )
    return known


def _generators(generator, count):
    """One generator per record: those given, or new ones with seeds from the one given."""
    if isinstance(generator, Generator):
        seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device)
        return [Generator().manual_seed(seed) for seed in seeds.tolist()]
    if len(generator) != count:
        raise DataError(
            f"{len(generator)} generators were given for {count} records; give one, or one a "
            "record."
        )
    return generator


def _check_signals(signals, sampling_rate):
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


def _check_recorded(recorded):
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
