"""When a heart beats and what its atria do: sinus rhythm, fibrillation, flutter, premature
beats.
"""

from dataclasses import dataclass

import numpy as np

NORMAL, VENTRICULAR, ATRIAL = 0, 1, 2  # kinds of beat; the last two are premature
LEAD_IN = 1.5  # seconds simulated before the record begins, so that its first waves are complete
SHORTEST = 0.30  # seconds; the atrioventricular node conducts nothing faster


@dataclass
class Beats:
    """Beats by record and time, each `(b,)`: record, time of R (s), RR before it (s), kind, number
    in its record.
    """

    record: np.ndarray
    time: np.ndarray
    interval: np.ndarray
    kind: np.ndarray
    ordinal: np.ndarray


@dataclass
class Pacing:
    """What sets the beats of n records, each `(n,)`.

    Mean RR (s); respiratory and random variability as shares of it; shares of premature beats,
    ventricular and atrial; whether the atria fibrillate; cycle of a flutter (s, 0 where there is
    none).
    """

    interval: np.ndarray
    breathing: np.ndarray
    wander: np.ndarray
    ventricular: np.ndarray
    atrial: np.ndarray
    fibrillation: np.ndarray
    flutter_cycle: np.ndarray

    @property
    def has_p(self) -> np.ndarray:
        """Whether the atria beat in order, so that there are P waves, `(n,)`."""
        return ~self.fibrillation & (self.flutter_cycle == 0)


def draw_beats(rng: np.random.Generator, pacing: Pacing, seconds: float) -> Beats:
    """All beats whose waves can reach into the record; where premature beats are wanted there is at
    least one.
    """
    count = len(pacing.interval)
    limit = int(np.ceil((seconds + LEAD_IN + 1) / SHORTEST))
    breath = rng.uniform(0.18, 0.35, count)
    phase = rng.uniform(0, 2 * np.pi, count)
    forced = rng.uniform(0.2, 0.7, count) * seconds
    noise, irregular = rng.normal(0, 1, (2, limit, count))
    chance = rng.random((limit, count))
    coupling = rng.uniform(0.55, 0.75, (limit, count))
    time = -LEAD_IN + rng.random(count) * pacing.interval
    kind = np.zeros(count, int)
    slow = np.zeros(count)
    lacking = pacing.ventricular + pacing.atrial > 0  # no premature beat so far, though wanted
    rows = []
    for step in range(limit):
        slow = 0.8 * slow + 0.6 * noise[step]
        breathing = pacing.breathing * np.sin(2 * np.pi * breath * time + phase)
        sinus = pacing.interval * (1 + breathing + pacing.wander * slow)
        basic = _next_interval(pacing, sinus, irregular[step])
        following = _next_kind(pacing, kind, chance[step], lacking & (time > forced))
        # A ventricular beat is followed by a compensatory pause, an atrial one resets the sinus
        # node.
        pause = np.select(
            [following > 0, pacing.flutter_cycle > 0, kind == VENTRICULAR, kind == ATRIAL],
            [coupling[step], 1.0, 1.40, 1.08],
            1.0,
        )
        interval = np.maximum(basic * pause, SHORTEST)
        time = time + interval
        kind = following
        lacking &= (kind == NORMAL) | (time <= 0.5)
        rows.append((time, interval, kind))
        if time.min() > seconds + 1:
            break
    return _flatten(rows, seconds)


def _next_interval(pacing: Pacing, sinus: np.ndarray, irregular: np.ndarray) -> np.ndarray:
    """RR of n records: sinus, or irregular in fibrillation, or a whole number of flutter cycles."""
    fibrillating = pacing.interval * np.exp(0.21 * irregular)
    cycle = np.maximum(pacing.flutter_cycle, 1e-3)
    jump = np.where(np.abs(irregular) > 1.5, np.sign(irregular), 0)
    fluttering = np.maximum(np.rint(pacing.interval / cycle + jump), 2) * cycle
    atria = [pacing.fibrillation, pacing.flutter_cycle > 0]
    return np.select(atria, [fibrillating, fluttering], sinus)


def _next_kind(
    pacing: Pacing, kind: np.ndarray, chance: np.ndarray, late: np.ndarray
) -> np.ndarray:
    """Kind of the next beat; no premature beat follows another."""
    wanted = np.where(late, np.where(pacing.ventricular > 0, VENTRICULAR, ATRIAL), NORMAL)
    wanted = np.where(chance < pacing.atrial, ATRIAL, wanted)
    wanted = np.where(chance > 1 - pacing.ventricular, VENTRICULAR, wanted)
    return np.where(kind > 0, NORMAL, wanted)


def _flatten(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]], seconds: float) -> Beats:
    """One array a quantity, beats of one record together, those far outside the record left out."""
    time, interval, kind = (np.stack(column, axis=1) for column in zip(*rows, strict=True))
    keep = (time > -1.0) & (time < seconds + 0.5)
    record = np.nonzero(keep)[0]
    ordinal = (np.cumsum(keep, axis=1) - 1)[keep]
    return Beats(record, time[keep], interval[keep], kind[keep], ordinal)


def atrial_waves(
    rng: np.random.Generator, pacing: Pacing, sampling_rate: float, samples: int
) -> np.ndarray:
    """Dipole `(n, 3, time)` in mV of fibrillating atria (4-8 a second, wandering) or fluttering
    ones, else zero.
    """
    waves = np.zeros((len(pacing.interval), 3, samples), np.float32)
    active = np.flatnonzero(~pacing.has_p)
    many = len(active)
    if not many:
        return waves
    cycle = pacing.flutter_cycle[active, None]
    flutter = cycle > 0
    rate = np.where(flutter, 1 / np.maximum(cycle, 1e-3), rng.uniform(4.5, 7.5, (many, 1)))
    knots = (many, max(int(2 * samples / sampling_rate), 2))

    def wandering(share: float) -> np.ndarray:
        """Factors `(many, time)`: 1 in flutter, wandering about 1 in fibrillation."""
        return np.where(flutter, 1, 1 + share * smooth(rng.normal(0, 1, knots), samples))

    turns = np.cumsum(rate * wandering(0.16), axis=1) / sampling_rate
    phase = 2 * np.pi * (turns + rng.random((many, 1)))
    swell = wandering(0.45)
    fine = np.abs(rng.normal(0.035, 0.025, (many, 1))) + 0.008
    swell = swell * np.where(flutter, rng.uniform(0.08, 0.20, (many, 1)), fine)
    # Flutter circles in the right atrium: negative in II, III, aVF; f-waves are largest in V1.
    direction = np.where(flutter, (0.10, -0.90, -0.35), (-0.45, 0.55, -0.80))
    direction += rng.normal(0, 0.15, (many, 3))
    for axis in range(3):
        shifted = phase + rng.uniform(-0.4, 0.4, (many, 1))
        saw = np.sin(shifted) + np.where(flutter, 0.45, 0.25) * np.sin(2 * shifted)
        waves[active, axis] = direction[:, axis, None] * swell * saw
    return waves


def smooth(knots: np.ndarray, samples: int) -> np.ndarray:
    """Slow curves `(n, samples)` through values `(n, k)`, linear between them."""
    position = np.linspace(0, knots.shape[1] - 1, samples)
    left = np.minimum(position.astype(int), knots.shape[1] - 2)
    share = position - left
    return knots[:, left] * (1 - share) + knots[:, left + 1] * share
