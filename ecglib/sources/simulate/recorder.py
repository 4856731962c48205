"""What a recorder writes down of a beating heart: twelve leads with its noise, and where each wave
begins and ends.
"""

import numpy as np
import pandas as pd

from ecglib.records import LIMB_FROM_I_AND_II, to_counts
from ecglib.sources.simulate.heart import LEVEL, Heart, Wave, ectopic_heart, gaussians, wave_limits
from ecglib.sources.simulate.rhythm import ATRIAL, VENTRICULAR, Beats, Pacing, atrial_waves, smooth

FILTER_WIDTH = 0.33  # samples; a Gaussian anti-alias filter with -3 dB at 0.4 of the sampling rate
MAINS = 50.0  # Hz
# Hz; at lower sampling rates the anti-alias filter has removed the hum.
MAINS_KEPT_FROM = 2.5 * MAINS


def record_hearts(
    rng: np.random.Generator,
    heart: Heart,
    field: np.ndarray,
    pacing: Pacing,
    beats: Beats,
    sampling_rate: float,
    samples: int,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Signals `(n, 12, time)` int16 of n hearts seen through lead fields `(n, 8, 3)`, and the marks
    of all waves.

    The marks have one row per wave that lies wholly inside the record: record, beat, kind, wave,
    onset, offset (samples).
    """
    count = len(field)
    size = rng.lognormal(0, 0.03, len(beats.time))
    premature = rng.uniform(-0.8, 0.5, count)[beats.record]
    atrial_size = np.where(beats.kind == ATRIAL, premature, 1.0) * size
    shortening = _shortening(beats, count)
    stretches = {"P": shortening**0.5, "QRS": np.ones_like(shortening), "T": shortening}
    ectopic = beats.kind == VENTRICULAR
    eight = np.zeros((count, 8, samples), np.float32)
    marks = []
    for waves, chosen in ((heart, ~ectopic), (ectopic_heart(rng, count), ectopic)):
        amplitudes = {name: wave.leads(field) for name, wave in waves.items()}
        limits = {
            name: wave_limits(wave, amplitudes[name], LEVEL[name]) for name, wave in waves.items()
        }
        for name, wave in waves.items():
            rows = np.flatnonzero(chosen & pacing.has_p[beats.record] if name == "P" else chosen)
            stretch = stretches[name][rows]
            height = (atrial_size if name == "P" else size)[rows]
            _add_waves(eight, wave, amplitudes[name], beats, rows, stretch, height, sampling_rate)
            spans = _spans(name, limits, beats.record[rows], stretch)
            marks.append(_marks(name, spans, beats, rows, sampling_rate, samples))
    eight += field.astype(np.float32) @ atrial_waves(rng, pacing, sampling_rate, samples)
    eight += recorder_noise(rng, count, sampling_rate, samples)
    table = pd.concat(marks).sort_values(["record", "beat", "onset"], ignore_index=True)
    return twelve_leads(eight), table


def _shortening(beats: Beats, count: int) -> np.ndarray:
    """Cube root of RR `(b,)` (Fridericia), from the record's usual RR and the last one, since QT
    follows slowly.
    """
    beaten = np.bincount(beats.record, minlength=count)
    usual = np.bincount(beats.record, beats.interval, count) / np.maximum(beaten, 1)
    followed = 0.6 * usual[beats.record] + 0.4 * np.clip(beats.interval, 0.5, 1.4)
    return np.clip(followed, 0.35, 1.6) ** (1 / 3)


def _add_waves(
    eight: np.ndarray,
    wave: Wave,
    amplitudes: np.ndarray,
    beats: Beats,
    rows: np.ndarray,
    stretch: np.ndarray,
    height: np.ndarray,
    sampling_rate: float,
) -> None:
    """Add one wave of some beats to `eight (n, 8, time)`, each Gaussian widened as the anti-alias
    filter does it.
    """
    if not len(rows):
        return
    record = beats.record[rows]
    centre = wave.centre[record] * stretch[:, None]
    width = wave.width[record] * stretch[:, None]
    filtered = np.sqrt(width**2 + (FILTER_WIDTH / sampling_rate) ** 2)
    low = (centre - 4 * filtered).min()
    high = (centre + 4 * filtered).max()
    first = np.floor((beats.time[rows] + low) * sampling_rate).astype(int)
    steps = np.arange(int(np.ceil((high - low) * sampling_rate)) + 2)
    times = (first[:, None] + steps) / sampling_rate - beats.time[rows, None]
    heights = amplitudes[record] * (width / filtered * height[:, None])[:, None]
    bells = gaussians(times.astype(np.float32), centre, filtered)
    shapes = heights.astype(np.float32) @ bells
    for signal, begin, shape in zip(record, first, shapes, strict=True):
        start = max(begin, 0)
        stop = min(begin + len(steps), eight.shape[2])
        if start < stop:
            eight[signal, :, start:stop] += shape[:, start - begin : stop - begin]


def _spans(
    name: str, limits: dict[str, np.ndarray], record: np.ndarray, stretch: np.ndarray
) -> np.ndarray:
    """Onset and offset `(b, 2)` in seconds after R of one wave of some beats; P ends before QRS, T
    begins after it.
    """
    spans = limits[name][record] * stretch[:, None]
    if name == "P":
        return np.minimum(spans, limits["QRS"][record, :1])
    return np.maximum(spans, limits["QRS"][record, 1:]) if name == "T" else spans


def _marks(
    name: str, spans: np.ndarray, beats: Beats, rows: np.ndarray, sampling_rate: float, samples: int
) -> pd.DataFrame:
    """Marks of one wave of some beats in samples, of those waves that lie wholly inside the
    record.
    """
    onset, offset = np.rint((beats.time[rows, None] + spans) * sampling_rate).astype(int).T
    inside = (onset >= 0) & (offset < samples)
    rows = rows[inside]
    return pd.DataFrame(
        {
            "record": beats.record[rows],
            "beat": beats.ordinal[rows],
            "kind": beats.kind[rows],
            "wave": name,
            "onset": onset[inside],
            "offset": offset[inside],
        }
    )


def twelve_leads(eight: np.ndarray) -> np.ndarray:
    """int16 counts `(n, 12, time)` of I, II, V1-V6 `(n, 8, time)` in mV: limb leads by Einthoven
    and Goldberger.
    """
    limb = np.einsum("lk,nkt->nlt", LIMB_FROM_I_AND_II, eight[:, :2])
    return to_counts(np.concatenate([limb, eight[:, 2:]], axis=1))


def recorder_noise(
    rng: np.random.Generator, count: int, sampling_rate: float, samples: int
) -> np.ndarray:
    """Noise `(n, 8, time)` in mV at a random level: wander, muscle, white and mains, made at nine
    electrodes.

    The limb electrodes are part of every lead, so that the leads' noise is related as in a real
    recorder.
    """
    level = rng.lognormal(0, 0.5, (count, 1, 1))
    noise = level * (_wander(rng, count, sampling_rate, samples) + _muscle(rng, count, samples))
    noise += 0.0015 * level * rng.standard_normal((count, 9, samples), dtype=np.float32)
    noise += _slips(rng, count, sampling_rate, samples)
    if sampling_rate >= MAINS_KEPT_FROM:
        time = np.arange(samples) / sampling_rate
        hum = np.sin(2 * np.pi * (MAINS * time + rng.random((count, 9, 1))))
        noise += level * np.abs(rng.normal(0, 0.003, (count, 9, 1))) * hum
    noise = noise.astype(np.float32)
    right_arm, left_arm, leg = noise[:, 0:1], noise[:, 1:2], noise[:, 2:3]
    terminal = (right_arm + left_arm + leg) / 3  # Wilson's
    return np.concatenate([left_arm - right_arm, leg - right_arm, noise[:, 3:] - terminal], axis=1)


def _wander(rng: np.random.Generator, count: int, sampling_rate: float, samples: int) -> np.ndarray:
    """Baseline wander `(n, 9, time)` of electrodes: slow waves, the slowest largest."""
    frequencies = np.array([0.05, 0.09, 0.15, 0.22, 0.3, 0.42])  # Hz
    angles = 2 * np.pi * np.outer(frequencies, np.arange(samples) / sampling_rate)
    weights = rng.normal(0, 1, (count, 9, 12)) * np.tile((0.15 / frequencies) ** 0.7, 2)
    weights *= rng.lognormal(-4.7, 0.7, (count, 1, 1))
    waves = np.concatenate([np.sin(angles), np.cos(angles)])
    return weights.astype(np.float32) @ waves.astype(np.float32)


def _muscle(rng: np.random.Generator, count: int, samples: int) -> np.ndarray:
    """Muscle noise `(n, 9, time)` of electrodes: high frequencies that swell and fade."""
    rough = np.diff(rng.standard_normal((count, 9, samples + 1), dtype=np.float32), axis=2)
    swell = smooth(np.abs(rng.normal(0, 1, (count, 6))), samples)[:, None]
    return (0.0022 * rng.lognormal(0, 0.6, (count, 9, 1)) * swell).astype(np.float32) * rough


def _slips(rng: np.random.Generator, count: int, sampling_rate: float, samples: int) -> np.ndarray:
    """Electrodes that slip `(n, 9, time)`: in one of a hundred the potential jumps and then returns
    within seconds.
    """
    here = rng.random((count, 9)) < 0.01
    start = rng.uniform(-2, samples / sampling_rate, (count, 9))
    jump = rng.normal(0, 0.4, (count, 9))
    fading = rng.uniform(0.3, 2.0, (count, 9))
    noise = np.zeros((count, 9, samples), np.float32)
    since = np.arange(samples) / sampling_rate - start[here][:, None]
    faded = jump[here][:, None] * np.exp(-np.maximum(since, 0) / fading[here][:, None])
    noise[here] = np.where(since > 0, faded, 0)
    return noise
