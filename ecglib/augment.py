"""Augmentations of Mehari & Strodthoff 2022 and of CE-SSL (Zhou et al. 2024), a whole batch at a
time on the device.

Every transform maps `(batch, leads, time)` mV to the same shape, never writes into its input, and
draws each record's randomness from the `torch.Generator` given. The values are the published
defaults. What each does to the label is said where it matters: a gain per lead breaks voltage
criteria (hypertrophy), a time warp breaks rate and interval criteria. CE-SSL's views, at the end,
are drawn once for the whole batch, as published.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ecglib.errors import DataError

Transform = Callable[[Tensor, Generator], Tensor]


def apply(transforms: Sequence[Transform], signals: Tensor, generator: Generator) -> Tensor:
    """Every transform in the order given, each always applied."""
    for transform in transforms:
        signals = transform(signals, generator)
    return signals


def _uniform(signals, generator, *shape, low=0.0, high=1.0):
    """Uniform numbers of `shape`, or one per record, of the type and on the device of `signals`."""
    drawn = signals.new_empty(shape or (len(signals), 1, 1))
    return low + (high - low) * drawn.uniform_(generator=generator)


def _normal(signals, generator, *shape):
    """Standard normal numbers of `shape`, of the type and on the device of `signals`."""
    return signals.new_empty(shape).normal_(generator=generator)


def _numbers(values, count):
    """0 to `count` - 1, of the type and on the device of `values`."""
    return torch.arange(count, dtype=values.dtype, device=values.device)


def _within(start, length, size):
    """Which of `size` places lie in the `length` places from `start` on, bool `(..., size)`."""
    places = _numbers(start, size)
    return (places >= start) & (places < start + length)


def gaussian_noise(signals: Tensor, generator: Generator, scale: float = 0.005) -> Tensor:
    """Adds white noise of standard deviation `scale` mV to every value."""
    return signals + scale * _normal(signals, generator, *signals.shape)


def gaussian_blur(signals: Tensor, generator: Generator) -> Tensor:
    """Smooths each lead with the five taps (0.1, 0.2, 0.4, 0.2, 0.1), zeros beyond the ends."""
    leads = signals.shape[1]
    taps = signals.new_tensor([0.1, 0.2, 0.4, 0.2, 0.1]).expand(leads, 1, 5)
    return F.conv1d(signals, taps, padding=2, groups=leads)


def channel_resize(
    signals: Tensor, generator: Generator, low: float = 0.5, high: float = 2.0
) -> Tensor:
    """Multiplies each lead by its own gain, log-uniform from `low` to `high`; breaks Einthoven's
    law on purpose.
    """
    gain = _uniform(
        signals, generator, *signals.shape[:2], 1, low=math.log(low), high=math.log(high)
    )
    return signals * gain.exp()


def time_out(signals: Tensor, generator: Generator, low: float = 0.2, high: float = 0.4) -> Tensor:
    """Sets one window of a random fraction `low` to `high` of the time to zero, on all leads of a
    record.
    """
    time = signals.shape[2]
    length = (_uniform(signals, generator, low=low, high=high) * time).floor()
    start = (_uniform(signals, generator) * (time - length + 1)).floor()
    return signals.masked_fill(_within(start, length, time), 0.0)


def _sample_at(signals, positions):
    """Linear interpolation of `(batch, leads, time)` at fractional sample positions `(batch, 1,
    time)`.
    """
    last = signals.shape[2] - 1
    left = positions.long().clamp(0, last)
    index = left.expand_as(signals)
    following = signals.gather(2, (index + 1).clamp(max=last))
    return torch.lerp(signals.gather(2, index), following, (positions - left).to(signals))


def random_resized_crop(
    signals: Tensor, generator: Generator, low: float = 0.5, high: float = 1.0
) -> Tensor:
    """A random window of a fraction `low` to `high`, its samples put at random sorted places of the
    full grid.

    Both ends are pinned and gaps are interpolated: a crop and a random, non-uniform time warp in
    one, on all leads.
    """
    time = signals.shape[2]
    kept = (_uniform(signals, generator, low=low, high=high) * time).floor().clamp(2, time)
    start = (_uniform(signals, generator) * (time - kept + 1)).floor()
    # A random subset of `kept` places of the grid: those with the smallest random keys, the ends
    # always among them.
    keys = torch.empty_like(signals[:, :1], dtype=torch.float64).uniform_(generator=generator)
    keys[:, :, [0, -1]] = -1.0
    chosen = keys <= keys.sort(dim=2).values.gather(2, kept.long() - 1)
    rank = chosen.cumsum(dim=2) - 1  # the sample that stands at the last chosen place up to here
    clock = _numbers(rank, time)
    before = torch.where(chosen, clock, -1).cummax(dim=2).values
    after = torch.where(chosen, clock, time).flip(2).cummin(dim=2).values.flip(2)
    fraction = (clock - before) / (after - before).clamp_min(1)
    return _sample_at(signals, start + rank + fraction)


def dynamic_time_warp(signals: Tensor, generator: Generator, warps: int = 3) -> Tensor:
    """`warps` times: 41 samples around a random centre shrink to 21, the rest stretches. Signals
    of no more than 41 samples stay as they are.
    """
    last = signals.shape[2] - 1
    reach = 20  # samples to both sides of the centre
    if 2 * reach >= last:
        return signals
    clock = _numbers(signals, last + 1) * (1 - reach / last)
    for _ in range(warps):
        begin = _uniform(signals, generator) * (last - 2 * reach)
        signals = _sample_at(signals, clock + (clock - begin).clamp(0, reach))
    return signals


def baseline_wander(
    signals: Tensor, generator: Generator, largest: float = 0.1, sampling_rate: float = 100.0
) -> Tensor:
    """Adds 50 slow cosines (0 to 0.49 Hz), together scaled by U(0, `largest`) mV, the same trace on
    all leads.
    """
    shape = (len(signals), 1, 50)
    size = _uniform(signals, generator, high=largest)
    amplitude = _uniform(signals, generator, *shape)
    phase = _uniform(signals, generator, *shape, high=math.tau)
    frequency = 0.01 * _numbers(signals, 50)
    clock = _numbers(signals, signals.shape[2]) / sampling_rate
    angle = math.tau * frequency[:, None] * clock
    # cos(angle + phase) by the addition theorem: two small products instead of a cosine per record,
    # term and sample.
    wander = (amplitude * phase.cos()) @ angle.cos() - (amplitude * phase.sin()) @ angle.sin()
    return signals + size * wander


def powerline_noise(
    signals: Tensor,
    generator: Generator,
    largest: float = 0.2,
    sampling_rate: float = 100.0,
    mains: float = 50.0,
    folded: bool = False,
) -> Tensor:
    """Adds the mains tone and its harmonics below half the sampling rate: U(0, `largest`)^2 mV
    times a gain per lead.

    The published transform adds all three harmonics at 100 Hz, where they alias, which `folded`
    does as well; without it those are left out, so that at 100 Hz nothing remains and the signals
    come back unchanged.
    """
    batch, leads, time = signals.shape
    size = _uniform(signals, generator, high=largest).square()
    gain = _uniform(signals, generator, batch, leads, 1, low=-1.0)
    amplitude = _uniform(signals, generator, batch, 1, 3)
    phase = _uniform(signals, generator, high=math.tau)
    harmonics = mains * (1 + _numbers(signals, 3))
    if not folded:
        amplitude = amplitude * (harmonics < sampling_rate / 2)
    clock = _numbers(signals.double(), time) / sampling_rate
    tones = torch.cos(math.tau * harmonics[:, None] * clock + phase).to(signals)
    return signals + size * gain * (amplitude @ tones)


def muscle_noise(signals: Tensor, generator: Generator, largest: float = 0.5) -> Tensor:
    """Adds white noise of standard deviation U(0, `largest`) mV, independent per value (the paper's
    "EM noise").
    """
    size = _uniform(signals, generator, high=largest)
    return signals + size * _normal(signals, generator, *signals.shape)


def baseline_shift(
    signals: Tensor, generator: Generator, largest: float = 1.0, sampling_rate: float = 100.0
) -> Tensor:
    """Adds a plateau of about 3 s and height U(-1, 1) x U(0, `largest`) mV, with a gain around +-1
    a lead.

    The number of plateaus is uniform from 0 to round(0.3 / s x duration); a later one replaces
    an earlier one.
    """
    batch, leads, time = signals.shape
    seconds = time / sampling_rate
    most = max(round(0.3 * seconds), 1)
    count = torch.randint(most + 1, (batch, 1, 1), generator=generator, device=signals.device)
    clock = _numbers(signals, time) / sampling_rate
    plateau = 0.0
    for number in range(most):
        centre = _uniform(signals, generator, high=seconds)
        length = 3.0 + 0.6 * _normal(signals, generator, batch, 1, 1)
        height = _uniform(signals, generator, low=-1.0)
        within = ((clock - centre).abs() <= length / 2) & (number < count)
        plateau = torch.where(within, height, plateau)
    size = _uniform(signals, generator, high=largest)
    sign = torch.where(_uniform(signals, generator, batch, leads, 1) < 0.5, -1.0, 1.0)
    gain = sign * (1.0 + _normal(signals, generator, batch, leads, 1))
    return signals + size * gain * plateau


TRANSFORMS = {
    function.__name__: function
    for function in (
        gaussian_noise,
        gaussian_blur,
        channel_resize,
        time_out,
        random_resized_crop,
        dynamic_time_warp,
        baseline_wander,
        powerline_noise,
        muscle_noise,
        baseline_shift,
    )
}


def named_transforms(settings: dict[str, dict]) -> list[Transform]:
    """Transforms by name with their settings, `{"time_out": {"low": 0.1, "high": 0.3}}`, as they
    stand in configs.
    """
    for name in settings:
        if name not in TRANSFORMS:
            raise ValueError(
                f"There is no transform {name!r}; choose from {', '.join(TRANSFORMS)}."
            )
    return [partial(TRANSFORMS[name], **values) for name, values in settings.items()]


def beta(signals: Tensor, generator: Generator, alpha: float, *shape: int) -> Tensor:
    """Numbers of `shape` from Beta(alpha, alpha) on the device of `signals`; DataError unless alpha
    is above 0.
    """
    if not alpha > 0:
        raise DataError(
            f"Records cannot be mixed with alpha = {alpha}; choose a value above 0, published is "
            "0.75."
        )
    # The share of one of two gammas: torch's own Beta distribution takes no generator.
    sizes = signals.new_full((2, *shape), alpha, dtype=torch.float64)
    gammas = torch._standard_gamma(sizes, generator=generator)
    return (gammas[0] / gammas.sum(dim=0)).to(signals.dtype)


def cutmix(
    signals: Tensor, targets: Tensor, generator: Generator, alpha: float = 0.75
) -> tuple[Tensor, Tensor]:
    """Pastes one rectangle of leads and time from another record of the batch, the same rectangle
    for every record.

    Its sides are the share sqrt(1 - Beta(alpha, alpha)) of leads and time, its centre is anywhere,
    and what would lie outside is cut off. `targets` `(batch, classes)` are mixed by the area that
    was really pasted. Neighbouring leads then show two hearts: what a class means by its lead is
    gone where the rectangle lies.
    """
    batch, leads, time = signals.shape
    side = (1.0 - beta(signals, generator, alpha)).sqrt()
    rows = _around_a_place(side, leads, generator)
    pasted = rows[:, None] & _around_a_place(side, time, generator)
    partner = torch.randperm(batch, generator=generator, device=signals.device)
    mixed = torch.where(pasted, signals[partner], signals)
    return mixed, torch.lerp(targets, targets[partner], pasted.to(targets).mean())


def _around_a_place(side, size, generator):
    """Which of `size` places lie within the share `side` around a random one, bool `(size,)`."""
    half = (size * side / 2).floor()
    centre = torch.randint(size, (), generator=generator, device=side.device)
    return _within(centre - half, 2 * half, size)


def mixup(
    signals: Tensor, targets: Tensor, generator: Generator, alpha: float = 0.75
) -> tuple[Tensor, Tensor]:
    """Each record's signals and `targets` `(batch, classes)` averaged with those of another record
    of the batch.

    The record's own share is max(b, 1 - b) with b from Beta(alpha, alpha): it stays mostly itself,
    as in MixMatch (Berthelot et al. 2019), where a row must still count as labelled or unlabelled.
    """
    other = beta(signals, generator, alpha, len(signals))
    other = torch.minimum(other, 1.0 - other)
    partner = torch.randperm(len(signals), generator=generator, device=signals.device)
    mixed = torch.lerp(signals, signals[partner], other[:, None, None])
    return mixed, torch.lerp(targets, targets[partner], other[:, None].to(targets))


def time_reversal(signals: Tensor, generator: Generator) -> Tensor:
    """Runs time backwards: rate and regularity stay, the order of waves within a beat does not."""
    return signals.flip(2)


def burst_dropout(signals: Tensor, generator: Generator) -> Tensor:
    """Sets one window of each lead to zero, of 0 to nearly all samples; every record loses the
    same.
    """
    _, leads, time = signals.shape
    length = 2 * _uniform(signals, generator, leads, 1, high=time // 2).floor()
    start = (_uniform(signals, generator, leads, 1) * (time - length)).floor()
    return signals.masked_fill(_within(start, length, time), 0.0)


def lead_permutation(signals: Tensor, generator: Generator) -> Tensor:
    """Shuffles the leads, alike in every record; axis, infarct site and bundle branch can then not
    be told.
    """
    return signals[:, torch.randperm(signals.shape[1], generator=generator, device=signals.device)]


def relative_noise(signals: Tensor, generator: Generator, noise: float = 0.05) -> Tensor:
    """Adds white noise of `noise` times the standard deviation that each lead of a record has over
    the crop.

    The published noise has a fixed size, on leads that were brought to unit variance before.
    """
    scale = noise * signals.std(dim=2, correction=0, keepdim=True)
    return signals + scale * _normal(signals, generator, *signals.shape)


def strong_view(
    signals: Tensor, generator: Generator, noise: float = 0.5, draws: int = 4
) -> Tensor:
    """CE-SSL's strong view: those of reversal, burst dropout, noise and lead permutation that four
    `draws` with replacement hit, each at its first draw: as random an order as shuffling them, and
    no further draw.
    """
    noisy = partial(relative_noise, noise=noise)
    steps = (time_reversal, burst_dropout, noisy, lead_permutation)
    drawn = torch.randint(len(steps), (draws,), generator=generator, device=signals.device)
    for number in dict.fromkeys(drawn.tolist()):
        signals = steps[number](signals, generator)
    return signals


def weak_view(signals: Tensor, generator: Generator, noise: float = 0.05) -> Tensor:
    """CE-SSL's weak view: one of the four steps of the strong one, drawn once for the batch.

    The paper calls it weak, yet only the noise surely leaves the label as it was.
    """
    return strong_view(signals, generator, noise, draws=1)
