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
from numpy.random import Generator

from ecglib.sources.simulate.tables import read_table

AXES = ["x", "y", "z"]
# Leads seen by a dipole: one row per lead (I, II, V1-V6), columns x, y, z.
LEAD_FIELD = read_table("lead_field")[AXES].to_numpy()
HEALTHY = dict(list(read_table("healthy_beat").groupby("wave", sort=False)))
FINDINGS = list(read_table("findings").itertuples())
REGIONS = read_table("regions").set_index("condition")
QT_SCALE = 1.08  # the QTc of the table's subject was 0.37 s; adults have 0.41 s
# From this severity on a condition is present; below it is a borderline finding, not a disease.
PLAIN = 0.15
# A wave lasts while its size is above this share of its peak.
LEVEL = {"P": 0.10, "QRS": 0.035, "T": 0.10}
STEP = 0.004  # seconds; how finely onset and offset are sought


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

    @classmethod
    def absent(cls, count: int) -> "Wave":
        """No wave yet for each of n records."""
        nothing = np.zeros((count, 0))
        return cls(nothing, nothing, np.zeros((count, 0, 3)), np.zeros((count, 0, 6)))

    def take(self, rows: np.ndarray) -> "Wave":
        """The waves of some rows, copied."""
        return Wave(*(values[rows] for values in vars(self).values()))

    def add(self, centre, width, dipole: np.ndarray, near=0.0) -> None:
        """Append one Gaussian wave: times (s) scalar or `(n,)`, dipole `(n, 3)`, near `(n, 6)`."""
        for name, added in zip(vars(self), (centre, width, dipole, near)):
            values = getattr(self, name)
            column = np.broadcast_to(added, (len(dipole), *values.shape[2:]))
            setattr(self, name, np.concatenate([values, column[:, None]], axis=1))

    def stretch(self, factor: np.ndarray) -> None:
        """Scale the times about the R wave by `(n,)`."""
        self.centre = self.centre * factor[:, None]
        self.width = self.width * factor[:, None]

    def scale(self, factor: np.ndarray) -> None:
        """Scale the dipoles by `(n,)`."""
        self.dipole *= factor[:, None, None]

    def leads(self, field: np.ndarray) -> np.ndarray:
        """Amplitude of each wave in the eight independent leads, `(n, 8, k)`, through lead fields
        `(n, 8, 3)`.
        """
        amplitudes = field @ self.dipole.transpose(0, 2, 1)
        amplitudes[:, 2:] += self.near.transpose(0, 2, 1)
        return amplitudes


Heart = dict[str, Wave]  # P, QRS and T; a ventricular beat has no P


def rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation matrices `(n, 3, 3)` for angles `(n, 3)` in radians about x, y and z, in that
    order.
    """
    matrices = np.tile(np.eye(3), (3, len(angles), 1, 1))
    for axis, (cosine, sine) in enumerate(zip(np.cos(angles).T, np.sin(angles).T)):
        first = (axis + 1) % 3
        second = (axis + 2) % 3
        matrices[axis, :, first, first] = cosine
        matrices[axis, :, second, second] = cosine
        matrices[axis, :, first, second] = -sine
        matrices[axis, :, second, first] = sine
    return matrices[2] @ matrices[1] @ matrices[0]


def draw_heart(rng: Generator, age: np.ndarray, male: np.ndarray) -> Heart:
    """A healthy heart for each of n people, with their own wave shapes, directions and sizes."""
    count = len(age)
    heart = {}
    for name, rows in HEALTHY.items():
        shape = (count, len(rows))
        dipole = rows[AXES].to_numpy() * rng.lognormal(0, 0.20, shape)[:, :, None]
        phase, width = rows[["phase", "width"]].to_numpy().T / (2 * np.pi)
        centre = phase + rng.normal(0, 0.0022 if name == "QRS" else 0.010, shape)
        width = width * rng.lognormal(0, 0.10, shape)
        heart[name] = Wave(centre, width, dipole, np.zeros((*shape, 6)))
    heart["QRS"].stretch(1.08 * rng.lognormal(0, 0.06, count))
    heart["T"].stretch(QT_SCALE * rng.lognormal(0, 0.045, count) * np.where(male, 1.0, 1.025))
    heart["P"].centre += np.clip(rng.normal(-0.004, 0.016, count), -0.03, 0.022)[:, None]
    _draw_directions(rng, heart, age)
    _draw_sizes(rng, heart, age, male)
    _draw_normal_variants(rng, heart, age, male)
    return heart


def _draw_directions(rng, heart, age):
    """Position of the heart in the chest: all of it turns, older ones to the left, and each wave a
    little more.
    """
    shape = (len(age), 3)
    whole = rng.normal(0, 1, shape) * np.radians((10, 14, 13))
    whole[:, 2] += np.radians(9) - np.radians(0.42) * (age - 45)
    whole[:, 2] = np.clip(whole[:, 2], *np.radians((-55, 55)))
    for name, share, own in (("P", 0.7, 10), ("QRS", 1.0, 6), ("T", 0.7, 12)):
        turn = rotation(whole * share + rng.normal(0, np.radians(own), shape))
        heart[name].dipole = heart[name].dipole @ turn.transpose(0, 2, 1)


def _draw_sizes(rng, heart, age, male):
    """Voltages: habitus for all waves, less with age and in women, T smaller with age."""
    count = len(age)
    habitus = rng.lognormal(0.0, 0.20, count) * np.where(male, 1.0, 0.90)
    heart["P"].scale(habitus**0.5 * rng.lognormal(0, 0.25, count))
    heart["QRS"].scale(habitus * (1.08 - 0.0025 * (age - 40)))
    size = habitus * rng.lognormal(0, 0.36, count) * (1.12 - 0.006 * (age - 40))
    heart["T"].scale(np.clip(size * np.where(male, 1.1, 0.85), 0.3, 2.2))


def _draw_normal_variants(rng, heart, age, male):
    """What looks like disease: each variant in a share of people, its size between two bounds."""
    count = len(age)
    young_man = male & (age < 45)
    for finding, share, low, high in (
        ("early repolarisation", np.where(young_man, 0.35, 0.08), 0.03, 0.12),
        ("juvenile T", np.where(male, 0.05, 0.14), 0.1, 0.35),
        ("small inferior Q", 0.15, 0.05, 0.22),
        ("poor R", 0.15, 0.1, 0.4),
    ):
        affected = rng.random(count) < share
        _add_finding(heart, finding, affected * rng.uniform(low, high, count))


def _add_finding(heart, finding, size):
    """Add the waves of a finding of size `(n,)`."""
    for row in FINDINGS:
        if row.finding == finding:
            heart[row.wave].add(row.centre, row.width, np.outer(size, (row.x, row.y, row.z)))


def draw_lead_field(rng: Generator, count: int) -> np.ndarray:
    """Dower's lead field for n torsos `(n, 8, 3)`: chest electrodes nearer or farther, and placed
    beside their spot.
    """
    chest = LEAD_FIELD[2:]
    # In electrode distances, towards the next one.
    shift = np.clip(rng.normal(0, 0.22, (count, 6, 1)), -0.6, 0.6)
    steps = np.diff(np.pad(chest, ((1, 1), (0, 0)), "edge"), axis=0)
    moved = chest + shift * np.where(shift > 0, steps[1:], steps[:-1])
    moved *= rng.lognormal(0, 0.12, (count, 6, 1))
    limb = LEAD_FIELD[:2] * rng.lognormal(0, 0.08, (count, 1, 1))
    return np.concatenate([limb, moved], axis=1)


def apply_conditions(rng: Generator, heart: Heart, severity: Mapping[str, np.ndarray]) -> None:
    """Change hearts in place by conditions of severity 0 (absent) to 1, each `(n,)`."""
    _hypertrophy(rng, heart, severity["LVH"])
    _left_anterior_block(heart, severity["LAFB"])
    for wall in ("AMI", "IMI", "LMI"):
        _infarct(rng, heart, wall, severity[wall])
    _left_bundle_block(rng, heart, severity["CLBBB"])
    _right_bundle_block(rng, heart, severity["CRBBB"], severity["IRBBB"])
    for region in ("ISCAL", "ISCIN"):
        _ischaemia(rng, heart["T"], region, severity[region])
    # NDT: low or inverted T of the whole heart.
    flat = _present(severity["NDT"]) * (0.22 + 0.88 * severity["NDT"])
    heart["T"].scale(1 - flat * rng.uniform(0.75, 1.2, len(flat)))
    _first_degree_block(heart["P"], severity["1AVB"])


def _present(severity):
    """How much of a finding is there, from 0 (absent) to 1 (plain)."""
    return np.clip(severity / PLAIN, 0, 1)


def _before(wave, time, width):
    """A step `(n, k)` over the waves: 1 for those that come before a time (s), 0 after it; the
    other way round for a negative width.
    """
    return 1 / (1 + np.exp((wave.centre - time) / width))


def _first_degree_block(wave_p, severity):
    """1AVB: the P wave earlier, PR 0.2 s and longer."""
    interval = -0.05 - (wave_p.centre - 2 * wave_p.width).min(axis=1)
    wanted = 0.185 + 0.025 * _present(severity) + 0.10 * severity
    wave_p.centre -= np.where(severity > 0, np.clip(wanted - interval, 0, None), 0)[:, None]


def _hypertrophy(rng, heart, severity):
    """LVH: taller forces to the left and back after the septum, slightly wider; strain turns ST-T
    away from V5.
    """
    qrs = heart["QRS"]
    main = severity[:, None] * _before(qrs, -0.014, -0.003)
    qrs.dipole *= 1 + main[:, :, None] * (1.05, 0.50, 1.0)
    qrs.stretch(1 + 0.12 * severity)
    strain = np.clip(severity - 0.25, 0, None) * rng.lognormal(0, 0.4, len(severity))
    heart["T"].scale(np.clip(1 - strain, 0.1, 1))
    _add_finding(heart, "strain", strain)


def _left_anterior_block(heart, severity):
    """LAFB: the first forces point down, then the main forces swing up to the left; little
    widening.
    """
    qrs = heart["QRS"]
    angle = np.radians(28 + 42 * severity) * _present(severity)
    angle = angle[:, None] * _before(qrs, -0.010, -0.004)
    x, y, z = np.moveaxis(qrs.dipole, 2, 0)
    left = x * np.cos(angle) + y * np.sin(angle)
    down = y * np.cos(angle) - x * np.sin(angle)
    qrs.dipole = np.stack([left, down, z], axis=2)
    _add_finding(heart, "LAFB", severity)


def _infarct(rng, heart, wall, severity):
    """Infarct of one wall: early forces turn away from it (Q, lost R); ST toward it when fresh, T
    away when older.
    """
    count = len(severity)
    toward, near = np.split(REGIONS.loc[wall].to_numpy(), [3])
    lost = (0.14 + 0.78 * severity) * _present(severity) * rng.lognormal(0, 0.25, count)
    away = lost[:, None] * (-toward + rng.normal(0, 0.22, (count, 3)))
    time = -0.023 + rng.normal(0, 0.003, count)
    width = 0.0095 + 0.004 * severity
    heart["QRS"].add(time, width, away * 0.75, np.outer(-0.40 * lost, near))
    heart["QRS"].add(0.002, 0.012, away * 0.25, np.outer(-0.35 * lost, near))
    fresh = rng.random(count) < 0.22
    raised = np.where(fresh, rng.uniform(0.08, 0.35, count), rng.uniform(0, 0.06, count))
    elevation = severity * raised
    heart["T"].add(0.12, 0.05, np.outer(elevation, toward), np.outer(0.5 * elevation, near))
    turned = np.where(fresh, rng.uniform(-0.2, 0.3, count), rng.uniform(0.0, 0.6, count))
    inversion = severity * turned
    heart["T"].add(0.28, 0.038, np.outer(-inversion, toward), np.outer(-0.35 * inversion, near))


def _left_bundle_block(rng, heart, severity):
    """LBBB: no septal forces, the left ventricle late and slow to the left and back with a notch,
    ST-T discordant.
    """
    qrs = heart["QRS"]
    present = severity > 0
    septal = 1 - 0.85 * present[:, None] * _before(qrs, -0.012, 0.003)
    qrs.dipole *= (septal * (1 - 0.5 * present[:, None]))[:, :, None]
    qrs.stretch(1 + (0.45 + 0.20 * severity) * present)
    wide = 0.018 + 0.003 * severity
    early = present * (0.25 + 0.4 * severity)
    qrs.add(0.012, wide, np.outer(early, (0.7, 0.25, 1.1)))
    late = present * (0.35 + 0.45 * severity)
    qrs.add(0.048 + 0.012 * severity, wide, np.outer(late, (1.0, 0.15, 0.55)))
    flip = present * (0.55 + 0.5 * severity) * rng.lognormal(0, 0.2, len(severity))
    heart["T"].scale(np.clip(1 - 0.9 * flip, 0.1, 1))
    heart["T"].centre += 0.040 * present[:, None]
    _add_finding(heart, "LBBB", flip)


def _right_bundle_block(rng, heart, complete, incomplete):
    """RBBB: the right ventricle last, to the right and front (R' in V1, wide S in I and V6), T away
    from it.
    """
    right = (-0.62, 0.0, -0.70) + rng.normal(0, 0.15, (len(complete), 3))
    full = (complete > 0) * (0.45 + 0.65 * complete)
    width = 0.0155 + 0.003 * complete
    heart["QRS"].add(0.056 + 0.012 * complete, width, full[:, None] * right)
    partial = _present(incomplete) * (0.22 + 0.40 * incomplete)
    heart["QRS"].add(0.040 + 0.006 * incomplete, 0.0095, partial[:, None] * right)
    heart["T"].centre += 0.02 * (complete > 0)[:, None]
    _add_finding(heart, "RBBB", 0.35 * full + 0.12 * partial)


def _ischaemia(rng, wave_t, region, severity):
    """Ischaemia of a region: ST and T point away from it."""
    count = len(severity)
    away = -(REGIONS.loc[region, AXES].to_numpy() + rng.normal(0, 0.15, (count, 3)))
    depression = severity * rng.uniform(0.05, 0.22, count)
    wave_t.scale(1 - 0.35 * severity)
    wave_t.add(0.12, 0.045, depression[:, None] * away)
    inversion = severity * rng.uniform(0.35, 0.80, count)
    wave_t.add(0.28, 0.040, inversion[:, None] * away)


def ectopic_heart(rng: Generator, count: int) -> Heart:
    """A ventricular extrasystole for each of n records: no P, wide QRS from one ventricle, T the
    other way.
    """
    left = rng.random((count, 1)) < 0.5
    direction = np.where(left, (-0.7, 0.0, -0.7), (0.7, 0.2, 0.65))
    direction += rng.normal(0, 0.45, (count, 3))
    direction *= (rng.uniform(0.8, 1.7, count) / np.linalg.norm(direction, axis=1))[:, None]
    skew = rng.normal(0, 0.3, (count, 3))
    early, late = rng.uniform(0, 0.006, (2, count))
    heart = {name: Wave.absent(count) for name in ("QRS", "T")}
    heart["QRS"].add(-0.010, 0.020 + early, 0.8 * direction + 0.5 * skew)
    heart["QRS"].add(0.030, 0.022 + late, 0.9 * direction - 0.4 * skew)
    heart["T"].add(0.16, 0.060, -0.18 * direction)
    heart["T"].add(0.30, 0.055, -0.42 * direction)
    return heart


def wave_limits(wave: Wave, field: np.ndarray, level: float) -> np.ndarray:
    """Onset and offset `(n, 2)` in seconds after R: where the size over the leads, seen through
    lead fields `(n, 8, 3)`, is above `level` times its peak.
    """
    low = (wave.centre - 3 * wave.width).min()
    high = (wave.centre + 3 * wave.width).max()
    grid = np.arange(low, high + STEP, STEP, dtype=np.float32)
    bells = gaussians(grid[None], wave.centre, wave.width)
    size = np.square(wave.leads(field).astype(np.float32) @ bells).sum(axis=1)
    above = size >= np.float32(level) ** 2 * size.max(axis=1, keepdims=True)
    onset = grid[above.argmax(axis=1)]
    offset = grid[::-1][above[:, ::-1].argmax(axis=1)]
    return np.stack([onset, offset], axis=1)


def gaussians(times: np.ndarray, centre: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Bells `(b, k, w)` of height 1 at times `(b or 1, w)` for centres and widths `(b, k)`,
    float32.
    """
    centre = centre[:, :, None].astype(np.float32)
    width = width[:, :, None].astype(np.float32)
    bells = times[:, None] - centre
    bells /= width
    bells *= bells
    bells *= -0.5
    return np.exp(bells, out=bells)
