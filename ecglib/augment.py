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


def _uniform(
    signals: Tensor, generator: Generator, *shape: int, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Uniform numbers of `shape`, of the type and on the device of `signals`."""
    drawn = torch.rand(shape, generator=generator, device=signals.device, dtype=signals.dtype)
    return low + (high - low) * drawn


def _normal(signals: Tensor, generator: Generator, *shape: int) -> Tensor:
    """Standard normal numbers of `shape`, of the type and on the device of `signals`."""
    return torch.randn(shape, generator=generator, device=signals.device, dtype=signals.dtype)


def _within(start: Tensor, end: Tensor, size: int) -> Tensor:
    """Which of `size` places lie from `start` to before `end`, bool `(..., size)`."""
    places = torch.arange(size, device=start.device)
    return (places >= start) & (places < end)


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
    shape = (*signals.shape[:2], 1)
    gain = _uniform(signals, generator, *shape, low=math.log(low), high=math.log(high))
    return signals * gain.exp()


def time_out(signals: Tensor, generator: Generator, low: float = 0.2, high: float = 0.4) -> Tensor:
    """Sets one window of a random fraction `low` to `high` of the time to zero, on all leads of a
    record.
    """
    batch, _, time = signals.shape
    length = (_uniform(signals, generator, batch, 1, low=low, high=high) * time).floor()
    start = (_uniform(signals, generator, batch, 1) * (time - length + 1)).floor()
    return signals.masked_fill(_within(start, start + length, time)[:, None], 0.0)


def _sample_at(signals: Tensor, positions: Tensor) -> Tensor:
    """Linear interpolation of `(batch, leads, time)` at fractional sample positions `(batch, new
    time)`.
    """
    last = signals.shape[2] - 1
    left = positions.floor().clamp(0, max(last - 1, 0)).long()
    weight = (positions - left)[:, None, :].to(signals.dtype)
    index = left[:, None, :].expand(-1, signals.shape[1], -1)
    return torch.lerp(
        signals.gather(2, index), signals.gather(2, (index + 1).clamp(max=last)), weight
    )


def _inverse_map(knots: Tensor, values: Tensor, time: int) -> Tensor:
    """Piecewise linear function through (knots, values), both `(batch, k)` with rising knots, at
    0..time-1.
    """
    clock = torch.arange(time, device=knots.device, dtype=knots.dtype).repeat(len(knots), 1)
    right = torch.searchsorted(knots, clock, right=True).clamp(1, knots.shape[1] - 1)
    (x0, x1), (y0, y1) = (
        (ends.gather(1, right - 1), ends.gather(1, right)) for ends in (knots, values)
    )
    return y0 + (y1 - y0) * (clock - x0) / (x1 - x0).clamp_min(1e-6)


def random_resized_crop(
    signals: Tensor, generator: Generator, low: float = 0.5, high: float = 1.0
) -> Tensor:
    """A random window of a fraction `low` to `high`, its samples put at random sorted places of the
    full grid.

    Both ends are pinned and gaps are interpolated: a crop and a random, non-uniform time warp in
    one, on all leads.
    """
    batch, _, time = signals.shape
    kept = _uniform(signals, generator, batch, 1, low=low, high=high) * time
    kept = kept.floor().clamp(2, time)
    start = (_uniform(signals, generator, batch, 1) * (time - kept + 1)).floor()
    # A random subset of `kept` places of the grid: those with the smallest random keys, the ends
    # always among them.
    shape, device = (batch, time), signals.device
    keys = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    keys[:, [0, -1]] = -1.0
    chosen = keys <= keys.sort(dim=1).values.gather(1, kept.long() - 1)
    rank = chosen.cumsum(dim=1) - 1  # the sample that stands at the last chosen place up to here
    clock = torch.arange(time, device=device).expand(shape)
    before = torch.where(chosen, clock, -1).cummax(dim=1).values
    after = torch.where(chosen, clock, time).flip(1).cummin(dim=1).values.flip(1)
    fraction = (clock - before) / (after - before).clamp_min(1)
    return _sample_at(signals, start + rank + fraction)


def dynamic_time_warp(
    signals: Tensor, generator: Generator, warps: int = 3, radius: int = 10, step: int = 2
) -> Tensor:
    """`warps` times: 2 * radius * step + 1 samples around a random centre shrink by `step`, the
    rest stretches.
    """
    batch, _, time = signals.shape
    reach = radius * step
    if 2 * reach + 2 > time:
        return signals
    last, shrunk = time - 1, time - 1 - 2 * reach + 2 * radius
    for _ in range(warps):
        centre = reach + _uniform(signals, generator, batch, 1) * (last - 2 * reach)
        begin, first = centre - reach, torch.zeros_like(centre)
        knots = torch.cat([first, begin, begin + 2 * radius, first + shrunk], dim=1)
        values = torch.cat([first, begin, centre + reach, first + last], dim=1)
        signals = _sample_at(signals, _inverse_map(knots * (last / shrunk), values, time))
    return signals


def _clock(signals: Tensor, sampling_rate: float) -> Tensor:
    """Time of each sample in seconds."""
    samples = torch.arange(signals.shape[2], device=signals.device, dtype=signals.dtype)
    return samples / sampling_rate


def baseline_wander(
    signals: Tensor, generator: Generator, largest: float = 0.1, sampling_rate: float = 100.0
) -> Tensor:
    """Adds 50 slow cosines (0 to 0.49 Hz), together scaled by U(0, `largest`) mV, the same trace on
    all leads.
    """
    batch, terms = signals.shape[0], 50
    size = _uniform(signals, generator, batch, 1, high=largest)
    amplitude = _uniform(signals, generator, batch, terms)
    phase = _uniform(signals, generator, batch, terms, high=2 * math.pi)
    frequency = 0.01 * torch.arange(terms, device=signals.device, dtype=signals.dtype)
    angle = 2 * math.pi * frequency[:, None] * _clock(signals, sampling_rate)
    # cos(angle + phase) by the addition theorem: two small products instead of a cosine per record,
    # term and sample.
    wander = (amplitude * phase.cos()) @ angle.cos() - (amplitude * phase.sin()) @ angle.sin()
    return signals + (size * wander)[:, None, :]


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
    batch, leads, _ = signals.shape
    size = _uniform(signals, generator, batch, 1, 1, high=largest).square()
    gain = _uniform(signals, generator, batch, leads, 1, low=-1.0)
    amplitude = _uniform(signals, generator, batch, 3)
    phase = _uniform(signals, generator, batch, 1, 1, high=2 * math.pi)
    harmonics = mains * torch.arange(1, 4, device=signals.device)
    if not folded:
        amplitude = amplitude * (harmonics < sampling_rate / 2)
    angle = 2 * math.pi * harmonics[:, None] * _clock(signals.double(), sampling_rate)
    tones = torch.cos(angle + phase).to(signals.dtype)
    return signals + size * gain * torch.einsum("bk,bkt->bt", amplitude, tones)[:, None]


def muscle_noise(signals: Tensor, generator: Generator, largest: float = 0.5) -> Tensor:
    """Adds white noise of standard deviation U(0, `largest`) mV, independent per value (the paper's
    "EM noise").
    """
    size = _uniform(signals, generator, len(signals), 1, 1, high=largest)
    return signals + size * _normal(signals, generator, *signals.shape)


def baseline_shift(
    signals: Tensor,
    generator: Generator,
    largest: float = 1.0,
    sampling_rate: float = 100.0,
    a_second: float = 0.3,
) -> Tensor:
    """Adds a plateau of about 3 s and height U(-1, 1) x U(0, `largest`) mV, with a gain around +-1
    a lead.

    The number of plateaus is uniform from 0 to round(`a_second` x duration); a later one replaces
    an earlier one.
    """
    batch, leads, time = signals.shape
    most = max(round(a_second * time / sampling_rate), 1)
    count = torch.randint(0, most + 1, (batch, 1), generator=generator, device=signals.device)
    clock = _clock(signals, sampling_rate)
    plateau = signals.new_zeros(batch, time)
    for number in range(most):
        centre = _uniform(signals, generator, batch, 1, high=time / sampling_rate)
        length = (3.0 + 0.6 * _normal(signals, generator, batch, 1)).clamp_min(0.0)
        height = _uniform(signals, generator, batch, 1, low=-1.0)
        within = ((clock - centre).abs() <= length / 2) & (number < count)
        plateau = torch.where(within, height, plateau)
    size = _uniform(signals, generator, batch, 1, 1, high=largest)
    sign = torch.where(_uniform(signals, generator, batch, leads, 1) < 0.5, -1.0, 1.0)
    gain = sign * (1.0 + _normal(signals, generator, batch, leads, 1))
    return signals + size * gain * plateau[:, None, :]


TRANSFORMS: dict[str, Transform] = {
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
    unknown = [name for name in settings if name not in TRANSFORMS]
    if unknown:
        raise ValueError(
            f"There is no transform {unknown[0]!r}; choose from {', '.join(TRANSFORMS)}."
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
    sizes = torch.full((2, *shape), alpha, device=signals.device, dtype=torch.float64)
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
    rows, columns = (_around_a_place(side, size, generator) for size in (leads, time))
    pasted = rows[:, None] & columns
    partner = torch.randperm(batch, generator=generator, device=signals.device)
    share = pasted.sum() / pasted.numel()
    mixed = torch.where(pasted, signals[partner], signals)
    return mixed, torch.lerp(targets, targets[partner], share.to(targets))


def _around_a_place(side: Tensor, size: int, generator: Generator) -> Tensor:
    """Which of `size` places lie within the share `side` around a random one, bool `(size,)`."""
    half = (size * side / 2).floor()
    centre = torch.randint(size, (), generator=generator, device=side.device)
    return _within(centre - half, centre + half, size)


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
    half = _uniform(signals, generator, leads, 1, high=time // 2).floor()
    centre = half + (_uniform(signals, generator, leads, 1) * (time - 2 * half)).floor()
    return signals.masked_fill(_within(centre - half, centre + half, time), 0.0)


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


VIEW_STEPS: tuple[Transform, ...] = (time_reversal, burst_dropout, relative_noise, lead_permutation)


def _view(signals: Tensor, generator: Generator, noise: float, count: int) -> Tensor:
    """Those of VIEW_STEPS that `count` draws with replacement hit, each at its first draw: as
    random an order as shuffling them, and no further draw.
    """
    shape, device = (count,), signals.device
    draws = torch.randint(len(VIEW_STEPS), shape, generator=generator, device=device).tolist()
    for number in dict.fromkeys(draws):
        step = VIEW_STEPS[number]
        options = {"noise": noise} if step is relative_noise else {}
        signals = step(signals, generator, **options)
    return signals


def weak_view(signals: Tensor, generator: Generator, noise: float = 0.05) -> Tensor:
    """CE-SSL's weak view: one of reversal, burst dropout, noise and lead permutation, drawn once
    for the batch.

    The paper calls it weak, yet only the noise surely leaves the label as it was.
    """
    return _view(signals, generator, noise, 1)


def strong_view(signals: Tensor, generator: Generator, noise: float = 0.5) -> Tensor:
    """CE-SSL's strong view: those of the four that four draws with replacement hit, in random
    order.
    """
    return _view(signals, generator, noise, 4)
