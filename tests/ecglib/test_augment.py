"""Each augmentation against what its table row says, on batches."""

import math

import numpy as np
import pytest
import torch

from ecglib.augment import (
    TRANSFORMS,
    apply,
    baseline_shift,
    baseline_wander,
    channel_resize,
    dynamic_time_warp,
    gaussian_blur,
    gaussian_noise,
    muscle_noise,
    named_transforms,
    powerline_noise,
    random_resized_crop,
    time_out,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def signals() -> torch.Tensor:
    return torch.randn(16, 12, 250, generator=generator(7))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_shape_input_untouched_and_repeatable(name, signals):
    before = signals.clone()
    first = TRANSFORMS[name](signals, generator(1))
    assert (
        first.shape == signals.shape
        and first.dtype == signals.dtype
        and torch.isfinite(first).all()
    )
    assert torch.equal(signals, before), (
        "a transform must not write into the array that both views share"
    )
    assert torch.equal(first, TRANSFORMS[name](signals, generator(1)))
    if name not in ("powerline_noise", "gaussian_blur"):
        assert not torch.equal(first, TRANSFORMS[name](signals, generator(2)))


def test_gaussian_noise_has_its_scale(signals):
    added = gaussian_noise(signals, generator(), scale=0.02) - signals
    assert added.std().item() == pytest.approx(0.02, rel=0.02) and abs(added.mean()) < 1e-3


def test_blur_equals_numpy_convolution(signals):
    blurred = gaussian_blur(signals, generator())
    expected = np.convolve(signals[3, 5].numpy(), [0.1, 0.2, 0.4, 0.2, 0.1], "same")
    np.testing.assert_allclose(blurred[3, 5], expected, atol=1e-6)


def test_channel_resize_is_one_gain_a_lead(signals):
    gain = channel_resize(signals, generator()) / signals
    assert torch.allclose(gain, gain[..., :1].expand_as(gain), rtol=1e-4)
    assert gain.min() >= 0.5 - 1e-4 and gain.max() <= 2 + 1e-4
    assert gain[..., 0].log().mean().abs() < 0.1


def test_time_out_hides_one_window_on_all_leads(signals):
    hidden = time_out(signals, generator()) == 0
    assert (hidden == hidden[:, :1]).all()
    edges = hidden[:, 0].int().diff(dim=1).abs().sum(dim=1)
    assert (edges <= 2).all()
    share = hidden[:, 0].float().mean(dim=1)
    assert (share >= 0.19).all() and (share <= 0.4).all()


def test_resized_crop_keeps_order_and_pins_the_ends():
    ramp = torch.arange(250.0).expand(32, 12, 250).contiguous()
    warped = random_resized_crop(ramp, generator())
    steps = warped.diff(dim=2)
    assert (steps >= -1e-4).all(), "time never runs backwards"
    span = warped[:, 0, -1] - warped[:, 0, 0] + 1
    assert (span >= 124).all() and (span <= 250).all() and span.std() > 10
    # Both ends are samples of the record themselves.
    assert torch.allclose(warped[:, :, [0, -1]], warped[:, :, [0, -1]].round(), atol=1e-3)
    assert torch.allclose(warped, warped[:, :1].expand_as(warped), atol=1e-3), (
        "all leads are warped alike"
    )


def test_resized_crop_of_everything_changes_nothing(signals):
    assert torch.allclose(
        random_resized_crop(signals, generator(), low=1.0, high=1.0), signals, atol=1e-5
    )


def test_time_warp_squeezes_by_the_step():
    ramp = torch.arange(250.0).expand(8, 12, 250).contiguous()
    warped = dynamic_time_warp(ramp, generator(), warps=1)
    slopes = warped[:, 0].diff(dim=1)
    assert (slopes > 0).all()
    assert torch.allclose(warped[:, 0, 0], torch.zeros(8), atol=1e-3)
    assert torch.allclose(warped[:, 0, -1], torch.full((8,), 249.0), atol=1e-2)
    ratio = slopes.max(dim=1).values / slopes.median(dim=1).values
    assert torch.allclose(ratio, torch.full((8,), 2.0), rtol=0.05)


def test_wander_is_slow_and_equal_on_all_leads(signals):
    added = baseline_wander(signals, generator()) - signals
    assert torch.allclose(added, added[:, :1].expand_as(added), atol=1e-5)
    assert added.diff(dim=2).abs().max() < 2 * math.pi * 0.5 / 100 * 0.1 * 50


def test_powerline_leaves_out_what_would_alias(signals):
    assert torch.equal(powerline_noise(signals, generator(), sampling_rate=100.0), signals)
    at_500 = powerline_noise(
        torch.zeros(64, 12, 2500), generator(), largest=1.0, sampling_rate=500.0
    )
    spectrum = torch.fft.rfft(at_500).abs().square().mean(dim=(0, 1))
    frequency = torch.fft.rfftfreq(2500, 1 / 500)
    strong = frequency[spectrum > 1e-3 * spectrum.max()]
    assert set(strong.round().tolist()) <= {50.0, 100.0, 150.0}


def test_muscle_noise_is_white_with_a_level_a_record(signals):
    added = muscle_noise(torch.zeros(200, 12, 250), generator(), largest=0.5)
    level = added.std(dim=(1, 2))
    assert (
        level.max() <= 0.52
        and level.min() < 0.1
        and level.mean().item() == pytest.approx(0.25, abs=0.05)
    )


def test_shift_is_a_plateau():
    added = baseline_shift(torch.zeros(64, 12, 1000), generator())
    distinct = [len(torch.unique((lead * 1e4).round())) for record in added for lead in record[:2]]
    assert max(distinct) <= 8
    assert (added != 0).any(dim=2).any(dim=1).float().mean() > 0.4


def test_named_transforms_refuse_an_unknown_name(signals):
    steps = named_transforms(
        {"time_out": {"low": 0.1, "high": 0.1}, "gaussian_noise": {"scale": 0.0}}
    )
    assert (apply(steps, signals, generator()) == 0).float().mean().item() == pytest.approx(
        0.1, abs=0.005
    )
    with pytest.raises(ValueError, match="no transform 'flip'"):
        named_transforms({"flip": {}})
