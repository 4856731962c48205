"""What a recorder writes down of a beating heart: twelve leads with its noise, and where each wave
begins and ends.
"""

import numpy as np
import pandas as pd
from numpy.random import Generator

from ecglib.records import LIMB_FROM_I_AND_II, to_counts
from ecglib.sources.simulate.heart import LEVEL, Heart, ectopic_heart, gaussians, wave_limits
from ecglib.sources.simulate.rhythm import ATRIAL, VENTRICULAR, Rhythm, smooth

FILTER_WIDTH = 0.33  # samples; a Gaussian anti-alias filter with -3 dB at 0.4 of the sampling rate
MAINS = 50.0  # Hz
# Hz; at lower sampling rates the anti-alias filter has removed the hum.
MAINS_KEPT_FROM = 2.5 * MAINS


def record_hearts(
    rng: Generator,
    heart: Heart,
    field: np.ndarray,
    rhythm: Rhythm,
    sampling_rate: float,
    samples: int,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Signals `(n, 12, time)` int16 of n hearts seen through lead fields `(n, 8, 3)`, and the marks
    of all waves.

    The marks have one row per wave that lies wholly inside the record: record, beat, kind, wave,
    onset, offset (samples).
    """
    beats = rhythm.beats
    record = beats["record"].to_numpy()
    kind = beats["kind"].to_numpy()
    count = len(field)
    size = rng.lognormal(0, 0.03, len(beats))
    premature = rng.uniform(-0.8, 0.5, count)[record]
    # Cube root of RR (Fridericia), from the record's usual RR and the last one, since QT follows
    # slowly.
    interval = beats["interval"].to_numpy()
    beaten = np.bincount(record, minlength=count)
    usual = np.bincount(record, interval, count) / np.maximum(beaten, 1)
    followed = 0.6 * usual[record] + 0.4 * np.clip(interval, 0.5, 1.4)
    shortening = np.clip(followed, 0.35, 1.6) ** (1 / 3)
    stretch = {"P": shortening**0.5, "QRS": np.ones(len(beats)), "T": shortening}
    height = {"P": np.where(kind == ATRIAL, premature, 1.0) * size, "QRS": size, "T": size}
    shown = {"P": (rhythm.atria == "sinus")[record], "QRS": True, "T": True}
    ectopic = kind == VENTRICULAR
    eight = np.zeros((count, 8, samples), np.float32)
    marks = []
    for waves, chosen in ((heart, ~ectopic), (ectopic_heart(rng, count), ectopic)):
        limits = {name: wave_limits(wave, field, LEVEL[name]) for name, wave in waves.items()}
        for name, wave in waves.items():
            rows = np.flatnonzero(chosen & shown[name])
            if len(rows):
                seen = beats.take(rows)
                factor = stretch[name][rows, None]
                tall = height[name][rows, None]
                _add_waves(eight, wave, wave.leads(field), seen, factor, tall, sampling_rate)
                marks.append(_marks(name, limits, seen, factor, sampling_rate, samples))
    eight += field.astype(np.float32) @ rhythm.atrial_waves(rng, sampling_rate, samples)
    eight += recorder_noise(rng, count, sampling_rate, samples)
    limb = np.einsum("lk,nkt->nlt", LIMB_FROM_I_AND_II, eight[:, :2])
    table = pd.concat(marks).sort_values(["record", "beat", "onset"], ignore_index=True)
    return to_counts(np.concatenate([limb, eight[:, 2:]], axis=1)), table


def _add_waves(eight, wave, amplitudes, beats, stretch, height, sampling_rate):
    """Add one wave of some beats to `eight (n, 8, time)`, each Gaussian widened as the anti-alias
    filter does it.
    """
    record = beats["record"].to_numpy()
    time = beats["time"].to_numpy()[:, None]
    centre = wave.centre[record] * stretch
    width = wave.width[record] * stretch
    filtered = np.sqrt(width**2 + (FILTER_WIDTH / sampling_rate) ** 2)
    low = (centre - 4 * filtered).min()
    high = (centre + 4 * filtered).max()
    first = np.floor((time + low) * sampling_rate).astype(int)
    steps = np.arange(int(np.ceil((high - low) * sampling_rate)) + 2)
    times = (first + steps) / sampling_rate - time
    heights = amplitudes[record] * (width / filtered * height)[:, None]
    bells = gaussians(times.astype(np.float32), centre, filtered)
    shapes = heights.astype(np.float32) @ bells
    for signal, begin, shape in zip(record, first[:, 0], shapes):
        start = max(begin, 0)
        stop = min(begin + len(steps), eight.shape[2])
        if start < stop:
            eight[signal, :, start:stop] += shape[:, start - begin : stop - begin]


def _marks(name, limits, beats, stretch, sampling_rate, samples):
    """Marks of one wave of some beats, of those waves that lie wholly inside the record; P ends
    before QRS, T begins after it.
    """
    record = beats["record"].to_numpy()
    spans = limits[name][record] * stretch
    if name == "P":
        spans = np.minimum(spans, limits["QRS"][record, :1])
    if name == "T":
        spans = np.maximum(spans, limits["QRS"][record, 1:])
    times = beats["time"].to_numpy()[:, None] + spans
    onset, offset = np.rint(times * sampling_rate).astype(int).T
    marks = beats.assign(wave=name, onset=onset, offset=offset)
    return marks.take(np.flatnonzero((onset >= 0) & (offset < samples)))


def recorder_noise(rng: Generator, count: int, sampling_rate: float, samples: int) -> np.ndarray:
    """Noise `(n, 8, time)` in mV at a random level: wander, muscle, white and mains, made at nine
    electrodes.

    The limb electrodes are part of every lead, so that the leads' noise is related as in a real
    recorder.
    """
    time = np.arange(samples) / sampling_rate
    shape = (count, 9, samples)
    level = rng.lognormal(0, 0.5, (count, 1, 1))
    # Baseline wander: slow waves, the slowest largest.
    frequencies = np.array([0.05, 0.09, 0.15, 0.22, 0.3, 0.42])  # Hz
    angles = 2 * np.pi * np.outer(frequencies, time)
    waves = np.concatenate([np.sin(angles), np.cos(angles)])
    weights = rng.normal(0, 1, (count, 9, 12)) * np.tile((0.15 / frequencies) ** 0.7, 2)
    weights *= rng.lognormal(-4.7, 0.7, (count, 1, 1))
    wander = weights.astype(np.float32) @ waves.astype(np.float32)
    # Muscle: high frequencies that swell and fade.
    rough = np.diff(rng.standard_normal((count, 9, samples + 1), dtype=np.float32), axis=2)
    swell = smooth(np.abs(rng.normal(0, 1, (count, 6))), samples)[:, None]
    swell = 0.0022 * rng.lognormal(0, 0.6, (count, 9, 1)) * swell
    noise = level * (wander + swell.astype(np.float32) * rough)
    noise += 0.0015 * level * rng.standard_normal(shape, dtype=np.float32)
    noise += _slips(rng, count, time, samples / sampling_rate)
    if sampling_rate >= MAINS_KEPT_FROM:
        hum = np.sin(2 * np.pi * (MAINS * time + rng.random((count, 9, 1))))
        noise += level * np.abs(rng.normal(0, 0.003, (count, 9, 1))) * hum
    noise = noise.astype(np.float32)
    right_arm, left_arm, leg = np.split(noise[:, :3], 3, axis=1)
    terminal = (right_arm + left_arm + leg) / 3  # Wilson's
    return np.concatenate([left_arm - right_arm, leg - right_arm, noise[:, 3:] - terminal], axis=1)


def _slips(rng, count, time, seconds):
    """Electrodes that slip `(n, 9, time)`: in one of a hundred the potential jumps and then returns
    within seconds.
    """
    here = rng.random((count, 9)) < 0.01
    start = rng.uniform(-2, seconds, here.shape)[here]
    jump = rng.normal(0, 0.4, here.shape)[here]
    fading = rng.uniform(0.3, 2.0, here.shape)[here]
    since = time - start[:, None]
    faded = jump[:, None] * np.exp(-np.maximum(since, 0) / fading[:, None])
    noise = np.zeros((count, 9, len(time)), np.float32)
    noise[here] = np.where(since > 0, faded, 0)
    return noise
