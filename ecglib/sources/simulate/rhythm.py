"""When a heart beats and what its atria do: sinus rhythm, fibrillation, flutter, premature
beats.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.random import Generator

# Kinds of beat; the last two are premature.
NORMAL = "normal"
VENTRICULAR = "ventricular"
ATRIAL = "atrial"
LEAD_IN = 1.5  # seconds simulated before the record begins, so that its first waves are complete
SHORTEST = 0.30  # seconds; the atrioventricular node conducts nothing faster


@dataclass
class Rhythm:
    """How n records beat.

    beats: one row per beat, in the order of records and times: record, time (of R, s), interval
    (RR before it, s), kind (normal, ventricular, atrial), beat (its number in the record).
    atria `(n,)`: sinus, AFIB or AFLT. cycle `(n,)`: the time (s) that a flutter takes for a round.
    """

    beats: pd.DataFrame
    atria: np.ndarray
    cycle: np.ndarray

    def atrial_waves(self, rng: Generator, sampling_rate: float, samples: int) -> np.ndarray:
        """Dipole `(n, 3, time)` in mV of fibrillating atria (4-8 a second, wandering) or fluttering
        ones, else zero.
        """
        active = np.flatnonzero(self.atria != "sinus")
        one_each = (len(active), 1)
        flutter = self.atria[active, None] == "AFLT"
        rate = np.where(flutter, 1 / self.cycle[active, None], rng.uniform(4.5, 7.5, one_each))
        knots = (len(active), max(int(2 * samples / sampling_rate), 2))

        def wandering(share):
            """Factors `(active, time)`: 1 in flutter, wandering about 1 in fibrillation."""
            return np.where(flutter, 1, 1 + share * smooth(rng.normal(0, 1, knots), samples))

        turns = np.cumsum(rate * wandering(0.16), axis=1) / sampling_rate
        phase = 2 * np.pi * (turns + rng.random(one_each))
        swell = wandering(0.45)
        fine = np.abs(rng.normal(0.035, 0.025, one_each)) + 0.008
        swell = swell * np.where(flutter, rng.uniform(0.08, 0.20, one_each), fine)
        # Flutter circles in the right atrium: negative in II, III, aVF; f-waves are largest in V1.
        direction = np.where(flutter, (0.10, -0.90, -0.35), (-0.45, 0.55, -0.80))
        direction += rng.normal(0, 0.15, direction.shape)
        shifted = phase + rng.uniform(-0.4, 0.4, (3, *one_each))
        saw = np.sin(shifted) + np.where(flutter, 0.45, 0.25) * np.sin(2 * shifted)
        waves = np.zeros((len(self.atria), 3, samples), np.float32)
        waves[active] = np.swapaxes(direction.T[:, :, None] * swell * saw, 0, 1)
        return waves


def draw_rhythm(rng: Generator, traits: Mapping[str, np.ndarray], seconds: float) -> Rhythm:
    """The rhythm of n records with all beats whose waves can reach into the record; where premature
    beats are wanted there is at least one.

    traits, each `(n,)`: atria (sinus, AFIB, AFLT), rate (a minute), breathing (respiratory
    variability as a share of RR), ventricular and atrial (whether there are such premature beats).
    """
    atria = traits["atria"]
    count = len(atria)
    usual = 60 / traits["rate"]
    wander = np.abs(rng.normal(0.008, 0.008, count))  # random variability as a share of RR
    ventricular = traits["ventricular"] * rng.uniform(0.02, 0.22, count)
    atrial = (traits["atrial"] & (atria == "sinus")) * rng.uniform(0.02, 0.15, count)
    cycle = rng.uniform(0.19, 0.25, count)
    limit = int(np.ceil((seconds + LEAD_IN + 1) / SHORTEST))
    breath = rng.uniform(0.18, 0.35, count)
    phase = rng.uniform(0, 2 * np.pi, count)
    forced = rng.uniform(0.2, 0.7, count) * seconds
    noise, irregular = rng.normal(0, 1, (2, limit, count))
    chance = rng.random((limit, count))
    coupling = rng.uniform(0.55, 0.75, (limit, count))
    time = -LEAD_IN + rng.random(count) * usual
    conducted = _conducted(atria, usual, cycle, irregular)
    drawn = np.select([chance > 1 - ventricular, chance < atrial], [VENTRICULAR, ATRIAL], NORMAL)
    late = np.where(ventricular > 0, VENTRICULAR, ATRIAL)
    kind = np.full(count, NORMAL)
    slow = np.zeros(count)
    lacking = ventricular + atrial > 0  # no premature beat so far, though wanted
    rows = []
    for step in range(limit):
        slow = 0.8 * slow + 0.6 * noise[step]
        breathing = traits["breathing"] * np.sin(2 * np.pi * breath * time + phase)
        sinus = usual * (1 + breathing + wander * slow)
        basic = np.where(atria == "sinus", sinus, conducted[step])
        # No premature beat follows another.
        following = np.select(
            [kind != NORMAL, drawn[step] != NORMAL, lacking & (time > forced)],
            [NORMAL, drawn[step], late],
            NORMAL,
        )
        # A ventricular beat is followed by a compensatory pause, an atrial one resets the sinus
        # node.
        pause = np.select(
            [following != NORMAL, atria == "AFLT", kind == VENTRICULAR, kind == ATRIAL],
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
    return Rhythm(_beats(rows, seconds), atria, cycle)


def _conducted(atria, usual, cycle, irregular):
    """RR `(steps, n)` that disordered atria leave: irregular in fibrillation, a whole number of
    cycles in flutter.
    """
    jump = np.where(np.abs(irregular) > 1.5, np.sign(irregular), 0)
    fluttering = np.maximum(np.rint(usual / cycle + jump), 2) * cycle
    return np.where(atria == "AFLT", fluttering, usual * np.exp(0.21 * irregular))


def _beats(rows, seconds):
    """One row per beat, without those far outside the record, from the times, intervals and kinds
    `(n,)` of each step.
    """
    time, interval, kind = (np.stack(column, axis=1) for column in zip(*rows))
    inside = np.nonzero((time > -1.0) & (time < seconds + 0.5))
    beats = pd.DataFrame(
        {
            "record": inside[0],
            "time": time[inside],
            "interval": interval[inside],
            "kind": kind[inside],
        }
    )
    return beats.assign(beat=beats.groupby("record").cumcount())


def smooth(knots: np.ndarray, samples: int) -> np.ndarray:
    """Slow curves `(n, samples)` through values `(n, k)`, linear between them."""
    position = np.linspace(0, knots.shape[1] - 1, samples)
    left = np.minimum(position.astype(int), knots.shape[1] - 2)
    share = position - left
    return knots[:, left] * (1 - share) + knots[:, left + 1] * share
