"""A heart as a dipole in three dimensions, the conditions that change it, and the eight leads that
see it.

The dipole is a sum of Gaussian waves over the beat's phase (McSharry et al., IEEE Trans Biomed Eng
2003, in three dimensions by Sameni et al., EURASIP J Adv Signal Process 2007). Axes as Frank's: x
to the left, y to the feet, z to the back, in millivolts. The phase is given in seconds after the R
wave at 60 beats a minute; faster hearts shorten the ST-T part with the cube root of RR (Fridericia
1920) and leave the QRS as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

# Leads seen by a dipole (Dower et al., Clin Cardiol 1980): one row per lead, columns x, y, z.
LEAD_FIELD = np.array(
    [
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)

# A healthy beat: axis, phase (radians), amplitude (mV), width (radians). After Sameni 2007, whose
# one subject had a flat P in II and a steep S in III: P and the y and z forces are set to median
# amplitudes of PTB-XL's normal ECGs, and the broadest T waves are narrowed so that the ST segment
# is level.
HEALTHY = {
    "P": (
        (0, -1.09, 0.03, 0.09),
        (0, -0.85, 0.07, 0.10),
        (1, -1.06, 0.05, 0.09),
        (1, -0.86, 0.065, 0.11),
        (2, -1.08, -0.03, 0.08),
        (2, -0.82, 0.03, 0.09),
    ),
    "QRS": (
        (0, -0.19, -0.13, 0.0453),
        (0, -0.07, 0.85, 0.0378),
        (0, 0.0, 1.11, 0.0332),
        (0, 0.06, 0.75, 0.0302),
        (0, 0.22, 0.06, 0.0378),
        (1, -0.08, 0.22, 0.055),
        (1, 0.005, 0.42, 0.037),
        (1, 0.09, -0.08, 0.0604),
        (2, -0.15, -0.40, 0.045),
        (2, 0.085, 0.42, 0.048),
        (2, 0.155, 0.58, 0.058),
    ),
    "T": (
        (0, 1.15, 0.05, 0.40),
        (0, 1.50, 0.16, 0.28),
        (0, 1.74, 0.21, 0.1812),
        (1, 1.35, 0.04, 0.35),
        (1, 1.70, 0.11, 0.22),
        (2, 1.15, -0.05, 0.40),
        (2, 1.48, -0.14, 0.30),
        (2, 1.72, -0.17, 0.20),
    ),
}
QT_SCALE = 1.08  # that subject's QTc was 0.37 s; adults have 0.41 s
# From this severity on a condition is present; below it is a borderline finding, not a disease.
PLAIN = 0.15
# A wave lasts while its size is above this share of its peak.
LEVEL = {"P": 0.10, "QRS": 0.035, "T": 0.10}

# Unit vectors from the heart's centre to the three walls of the left ventricle.
TOWARD = {"AMI": (0.20, -0.10, -0.97), "IMI": (0.05, 0.95, 0.30), "LMI": (0.85, -0.35, -0.40)}
# What single chest electrodes see of a near wall beyond the dipole: V1 to V6.
NEAR = {
    "AMI": (0.4, 1.0, 1.0, 0.6, 0.1, 0.0),
    "IMI": (0, 0, 0, 0, 0, 0),
    "LMI": (0, 0, 0, 0.2, 0.9, 1.0),
}


@dataclass
class Wave:
    """k Gaussian waves of n records: centre and width (s) `(n, k)`, dipole `(n, k, 3)`, near `(n,
    k, 6)` in mV.

    `near` is what the chest electrodes V1-V6 see of a wall close to them beyond the dipole.
    """

    centre: np.ndarray
    width: np.ndarray
    dipole: np.ndarray
    near: np.ndarray

    def take(self, rows: np.ndarray) -> "Wave":
        """The waves of some rows, copied."""
        return Wave(self.centre[rows], self.width[rows], self.dipole[rows], self.near[rows])

    def add(
        self,
        centre: float | np.ndarray,
        width: float | np.ndarray,
        size: np.ndarray,
        direction: ArrayLike,
        near: np.ndarray | float = 0.0,
    ) -> None:
        """Append one Gaussian wave: times (s) scalar or `(n,)`, a dipole of size `(n,)` in a
        direction `(3,)` or `(n, 3)`, near `(n, 6)`.
        """
        dipole = size[:, None] * np.asarray(direction)
        for name, value in (
            ("centre", centre),
            ("width", width),
            ("dipole", dipole),
            ("near", near),
        ):
            waves = getattr(self, name)
            column = np.broadcast_to(value, waves[:, 0].shape)[:, None]
            setattr(self, name, np.concatenate([waves, column], axis=1))

    def leads(self, field: np.ndarray) -> np.ndarray:
        """Amplitude of each wave in the eight independent leads, `(n, 8, k)`, through lead fields
        `(n, 8, 3)`.
        """
        amplitudes = field @ self.dipole.transpose(0, 2, 1)
        amplitudes[:, 2:] += self.near.transpose(0, 2, 1)
        return amplitudes


Heart = dict[str, Wave]


def rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation matrices `(n, 3, 3)` for angles `(n, 3)` in radians about x, y and z, in that
    order.
    """
    cosine, sine = np.cos(angles), np.sin(angles)
    matrices = np.tile(np.eye(3), (3, len(angles), 1, 1))
    for axis in range(3):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        matrices[axis, :, first, first] = matrices[axis, :, second, second] = cosine[:, axis]
        matrices[axis, :, first, second] = -sine[:, axis]
        matrices[axis, :, second, first] = sine[:, axis]
    return matrices[2] @ matrices[1] @ matrices[0]


def turn(wave: Wave, angles: np.ndarray) -> None:
    """Turn all dipoles of a wave by angles `(n, 3)` in radians."""
    wave.dipole = wave.dipole @ rotation(angles).transpose(0, 2, 1)


def draw_heart(rng: np.random.Generator, age: np.ndarray, male: np.ndarray) -> Heart:
    """A healthy heart for each of n people, with their own wave shapes, directions and sizes."""
    count = len(age)
    heart = {}
    for name, rows in HEALTHY.items():
        axis, phase, amplitude, width = (np.array(column) for column in zip(*rows, strict=True))
        shape = (count, len(rows))
        spread = 0.0022 if name == "QRS" else 0.010
        dipole = np.zeros((*shape, 3))
        sizes = amplitude * rng.lognormal(0, 0.20, shape)
        dipole[:, np.arange(len(rows)), axis.astype(int)] = sizes
        centre = phase / (2 * np.pi) + rng.normal(0, spread, shape)
        width = width / (2 * np.pi) * rng.lognormal(0, 0.10, shape)
        heart[name] = Wave(centre, width, dipole, np.zeros((*shape, 6)))
    _stretch(heart["QRS"], 1.08 * rng.lognormal(0, 0.06, count))
    _stretch(heart["T"], QT_SCALE * rng.lognormal(0, 0.045, count) * np.where(male, 1.0, 1.025))
    heart["P"].centre += np.clip(rng.normal(-0.004, 0.016, count), -0.03, 0.022)[:, None]
    _draw_directions(rng, heart, age)
    _draw_sizes(rng, heart, age, male)
    _draw_normal_variants(rng, heart, age, male)
    return heart


def _stretch(wave: Wave, factor: np.ndarray) -> None:
    """Scale the times of a wave about the R wave by `(n,)`."""
    wave.centre = wave.centre * factor[:, None]
    wave.width = wave.width * factor[:, None]


def _draw_directions(rng: np.random.Generator, heart: Heart, age: np.ndarray) -> None:
    """Position of the heart in the chest: all of it turns, older ones to the left, and each wave a
    little more.
    """
    count = len(age)
    whole = rng.normal(0, 1, (count, 3)) * np.radians((10, 14, 13))
    whole[:, 2] += np.radians(9) - np.radians(0.42) * (age - 45)
    whole[:, 2] = np.clip(whole[:, 2], np.radians(-55), np.radians(55))
    for name, share, own in (("P", 0.7, 10), ("QRS", 1.0, 6), ("T", 0.7, 12)):
        turn(heart[name], whole * share + rng.normal(0, np.radians(own), (count, 3)))


def _draw_sizes(rng: np.random.Generator, heart: Heart, age: np.ndarray, male: np.ndarray) -> None:
    """Voltages: habitus for all waves, less with age and in women, T smaller with age."""
    count = len(age)
    habitus = rng.lognormal(0.0, 0.20, count) * np.where(male, 1.0, 0.90)
    heart["P"].dipole *= (habitus**0.5 * rng.lognormal(0, 0.25, count))[:, None, None]
    heart["QRS"].dipole *= (habitus * (1.08 - 0.0025 * (age - 40)))[:, None, None]
    size = habitus * rng.lognormal(0, 0.36, count) * (1.12 - 0.006 * (age - 40))
    size *= np.where(male, 1.1, 0.85)
    heart["T"].dipole *= np.clip(size, 0.3, 2.2)[:, None, None]


def _draw_normal_variants(
    rng: np.random.Generator, heart: Heart, age: np.ndarray, male: np.ndarray
) -> None:
    """What looks like disease: early repolarisation, T inversion in V1-V3, small inferior Q, poor R
    in V1-V3.
    """

    def some(share: np.ndarray | float, low: float, high: float) -> np.ndarray:
        """Sizes from low to high for that share of people, zero for the others."""
        count = len(age)
        return (rng.random(count) < share) * rng.uniform(low, high, count)

    early = some(np.where(male & (age < 45), 0.35, 0.08), 0.03, 0.12)
    heart["T"].add(0.11, 0.035, early, (0.5, 0.2, -0.8))
    juvenile = some(np.where(male, 0.05, 0.14), 0.1, 0.35)
    heart["T"].add(0.27, 0.035, juvenile, (-0.1, 0.0, 0.9))
    heart["QRS"].add(-0.025, 0.008, some(0.15, 0.05, 0.22), (0.0, -1.0, 0.0))
    heart["QRS"].add(-0.022, 0.010, some(0.15, 0.1, 0.4), (0.0, 0.0, 0.8))


def draw_lead_field(rng: np.random.Generator, count: int) -> np.ndarray:
    """Dower's lead field for n torsos `(n, 8, 3)`: chest electrodes nearer or farther, and placed
    beside their spot.
    """
    field = np.tile(LEAD_FIELD, (count, 1, 1))
    # In electrode distances, towards the next one.
    shift = np.clip(rng.normal(0, 0.22, (count, 6, 1)), -0.6, 0.6)
    ends = np.concatenate([LEAD_FIELD[2:3], LEAD_FIELD[2:], LEAD_FIELD[7:]])
    toward = np.where(shift > 0, ends[2:] - ends[1:-1], ends[1:-1] - ends[:-2])
    field[:, 2:] = (LEAD_FIELD[2:] + shift * toward) * rng.lognormal(0, 0.12, (count, 6, 1))
    field[:, :2] *= rng.lognormal(0, 0.08, (count, 1, 1))
    return field


def apply_conditions(
    rng: np.random.Generator, heart: Heart, severity: Mapping[str, np.ndarray]
) -> None:
    """Change hearts in place by conditions of severity 0 (absent) to 1, each `(n,)`."""
    _hypertrophy(rng, heart, severity["LVH"])
    _left_anterior_block(heart, severity["LAFB"])
    for wall in ("AMI", "IMI", "LMI"):
        _infarct(rng, heart, wall, severity[wall])
    _left_bundle_block(rng, heart, severity["CLBBB"])
    _right_bundle_block(rng, heart, severity["CRBBB"], severity["IRBBB"])
    _st_t_change(rng, heart, severity)
    _first_degree_block(heart, severity["1AVB"])


def _present(severity: np.ndarray) -> np.ndarray:
    """How much of a finding is there, from 0 (absent) to 1 (plain)."""
    return np.clip(severity / PLAIN, 0, 1)


def _before(wave: Wave, time: float, width: float) -> np.ndarray:
    """A step `(n, k)` over the waves: 1 for those that come before a time (s), 0 after it; the
    other way round for a negative width.
    """
    return 1 / (1 + np.exp((wave.centre - time) / width))


def _first_degree_block(heart: Heart, severity: np.ndarray) -> None:
    """1AVB: the P wave earlier, PR 0.2 s and longer."""
    interval = -0.05 - (heart["P"].centre - 2 * heart["P"].width).min(axis=1)
    wanted = 0.185 + 0.025 * _present(severity) + 0.10 * severity
    heart["P"].centre -= np.where(severity > 0, np.clip(wanted - interval, 0, None), 0)[:, None]


def _hypertrophy(rng: np.random.Generator, heart: Heart, severity: np.ndarray) -> None:
    """LVH: taller forces to the left and back after the septum, slightly wider; strain turns ST-T
    away from V5.
    """
    qrs, wave_t = heart["QRS"], heart["T"]
    main = severity[:, None] * _before(qrs, -0.014, -0.003)
    qrs.dipole *= 1 + main[:, :, None] * np.array([1.05, 0.50, 1.0])
    _stretch(qrs, 1 + 0.12 * severity)
    strain = np.clip(severity - 0.25, 0, None) * rng.lognormal(0, 0.4, len(severity))
    wave_t.dipole *= np.clip(1 - strain, 0.1, 1)[:, None, None]
    wave_t.add(0.13, 0.045, strain, (-0.20, -0.04, 0.12))
    wave_t.add(0.27, 0.035, strain, (-0.42, -0.10, 0.10))


def _left_anterior_block(heart: Heart, severity: np.ndarray) -> None:
    """LAFB: the first forces point down, then the main forces swing up to the left; little
    widening.
    """
    qrs = heart["QRS"]
    angle = np.radians(28 + 42 * severity) * _present(severity)
    angle = angle[:, None] * _before(qrs, -0.010, -0.004)
    x, y, _ = np.moveaxis(qrs.dipole.copy(), 2, 0)
    qrs.dipole[..., 0] = x * np.cos(angle) + y * np.sin(angle)
    qrs.dipole[..., 1] = y * np.cos(angle) - x * np.sin(angle)
    qrs.add(-0.026, 0.008, severity, (-0.08, 0.22, 0.0))
    qrs.add(0.028, 0.010, severity, (0.10, -0.40, 0.05))


def _infarct(rng: np.random.Generator, heart: Heart, wall: str, severity: np.ndarray) -> None:
    """Infarct of one wall: early forces turn away from it (Q, lost R); ST toward it when fresh, T
    away when older.
    """
    count = len(severity)
    toward = np.array(TOWARD[wall])
    near = np.array(NEAR[wall])
    lost = (0.14 + 0.78 * severity) * _present(severity) * rng.lognormal(0, 0.25, count)
    away = lost[:, None] * (-toward + rng.normal(0, 0.22, (count, 3)))
    time = -0.023 + rng.normal(0, 0.003, count)
    width = 0.0095 + 0.004 * severity
    whole = np.ones(count)
    heart["QRS"].add(time, width, whole, away * 0.75, np.outer(-0.40 * lost, near))
    heart["QRS"].add(0.002, 0.012, whole, away * 0.25, np.outer(-0.35 * lost, near))
    fresh = rng.random(count) < 0.22
    elevation = np.where(fresh, rng.uniform(0.08, 0.35, count), rng.uniform(0, 0.06, count))
    elevation *= severity
    heart["T"].add(0.12, 0.05, elevation, toward, np.outer(0.5 * elevation, near))
    inversion = np.where(fresh, rng.uniform(-0.2, 0.3, count), rng.uniform(0.0, 0.6, count))
    inversion *= severity
    heart["T"].add(0.28, 0.038, -inversion, toward, np.outer(-0.35 * inversion, near))


def _left_bundle_block(rng: np.random.Generator, heart: Heart, severity: np.ndarray) -> None:
    """LBBB: no septal forces, the left ventricle late and slow to the left and back with a notch,
    ST-T discordant.
    """
    qrs, wave_t = heart["QRS"], heart["T"]
    present = severity > 0
    septal = 1 - 0.85 * present[:, None] * _before(qrs, -0.012, 0.003)
    qrs.dipole *= (septal * (1 - 0.5 * present[:, None]))[:, :, None]
    _stretch(qrs, 1 + (0.45 + 0.20 * severity) * present)
    wide = 0.018 + 0.003 * severity
    qrs.add(0.012, wide, present * (0.25 + 0.4 * severity), (0.7, 0.25, 1.1))
    late = 0.048 + 0.012 * severity
    qrs.add(late, wide, present * (0.35 + 0.45 * severity), (1.0, 0.15, 0.55))
    flip = present * (0.55 + 0.5 * severity) * rng.lognormal(0, 0.2, len(severity))
    wave_t.dipole *= np.clip(1 - 0.9 * flip, 0.1, 1)[:, None, None]
    wave_t.centre += 0.040 * present[:, None]
    wave_t.add(0.17, 0.050, flip, (-0.18, -0.03, -0.24))
    wave_t.add(0.31, 0.040, flip, (-0.32, -0.10, -0.34))


def _right_bundle_block(
    rng: np.random.Generator, heart: Heart, complete: np.ndarray, incomplete: np.ndarray
) -> None:
    """RBBB: the right ventricle last, to the right and front (R' in V1, wide S in I and V6), T away
    from it.
    """
    qrs, wave_t = heart["QRS"], heart["T"]
    right = np.array([-0.62, 0.0, -0.70]) + rng.normal(0, 0.15, (len(complete), 3))
    full = (complete > 0) * (0.45 + 0.65 * complete)
    qrs.add(0.056 + 0.012 * complete, 0.0155 + 0.003 * complete, full, right)
    partial = _present(incomplete) * (0.22 + 0.40 * incomplete)
    qrs.add(0.040 + 0.006 * incomplete, 0.0095, partial, right)
    wave_t.centre += (0.02 * (complete > 0))[:, None]
    wave_t.add(0.27, 0.040, 0.35 * full + 0.12 * partial, (0.15, 0.0, 0.9))


def _st_t_change(
    rng: np.random.Generator, heart: Heart, severity: Mapping[str, np.ndarray]
) -> None:
    """Ischaemia of a region (ST and T point away from it) and non-diagnostic low or inverted T of
    the whole heart.
    """
    wave_t = heart["T"]
    diffuse = severity["NDT"]
    count = len(diffuse)
    for code, region in (("ISCAL", (0.82, 0.10, -0.55)), ("ISCIN", (0.10, 0.98, 0.05))):
        away = -(np.array(region) + rng.normal(0, 0.15, (count, 3)))
        depression = severity[code] * rng.uniform(0.05, 0.22, count)
        wave_t.dipole *= (1 - 0.35 * severity[code])[:, None, None]
        wave_t.add(0.12, 0.045, depression, away)
        wave_t.add(0.28, 0.040, severity[code] * rng.uniform(0.35, 0.80, count), away)
    flat = _present(diffuse) * (0.22 + 0.88 * diffuse)
    wave_t.dipole *= (1 - flat * rng.uniform(0.75, 1.2, count))[:, None, None]


def ectopic_heart(rng: np.random.Generator, count: int) -> Heart:
    """A ventricular extrasystole for each of n records: no P, wide QRS from one ventricle, T the
    other way.
    """
    left = rng.random((count, 1)) < 0.5
    direction = np.where(left, (-0.7, 0.0, -0.7), (0.7, 0.2, 0.65))
    direction += rng.normal(0, 0.45, (count, 3))
    direction *= (rng.uniform(0.8, 1.7, count) / np.linalg.norm(direction, axis=1))[:, None]
    skew = rng.normal(0, 0.3, (count, 3))
    early, late = rng.uniform(0, 0.006, (2, count))
    dipoles = np.stack([0.8 * direction + 0.5 * skew, 0.9 * direction - 0.4 * skew], axis=1)
    near = np.zeros((count, 2, 6))
    pair = np.ones((count, 1))
    widths = np.stack([0.020 + early, 0.022 + late], axis=1)
    return {
        "QRS": Wave(pair * (-0.010, 0.030), widths, dipoles, near),
        "T": Wave(
            pair * (0.16, 0.30),
            pair * (0.060, 0.055),
            np.stack([-0.18 * direction, -0.42 * direction], axis=1),
            near,
        ),
    }


def wave_limits(
    wave: Wave, amplitudes: np.ndarray, level: float, step: float = 0.004
) -> np.ndarray:
    """Onset and offset `(n, 2)` in seconds after R: where the size over the leads is above `level`
    times its peak.
    """
    low = float((wave.centre - 3 * wave.width).min())
    high = float((wave.centre + 3 * wave.width).max())
    grid = np.arange(low, high + step, step, dtype=np.float32)
    bells = gaussians(grid[None], wave.centre, wave.width)
    size = np.square(amplitudes.astype(np.float32) @ bells).sum(axis=1)
    above = size >= np.float32(level) ** 2 * size.max(axis=1, keepdims=True)
    first = above.argmax(axis=1)
    last = above.shape[1] - 1 - above[:, ::-1].argmax(axis=1)
    return grid[np.stack([first, last], axis=1)]


def gaussians(times: np.ndarray, centre: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Bells `(b, k, w)` of height 1 at times `(b or 1, w)` for centres and widths `(b, k)`,
    float32.
    """
    centre = centre[:, :, None].astype(np.float32)
    width = width[:, :, None].astype(np.float32)
    scaled = (times[:, None, :] - centre) / width
    return np.exp(np.float32(-0.5) * np.square(scaled))
