"""Noise: the ratio asked for, electrodes, spectra without folding, seeds, recordings, and bad
input.
"""

import threading
import warnings
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import wfdb

from ecglib import noise
from ecglib.errors import DataError
from ecglib.noise import (
    KINDS,
    MIXED,
    PUBLISHED_LEVELS,
    FlatLeadWarning,
    add_noise,
    prepare_noise,
    record_generator,
)
from ecglib.records import LIMB_FROM_I_AND_II
from ecglib.sources.download import DATASETS, download, main
from toolkit import heart_signal

EVERY = (*KINDS, MIXED)


def hearts(count: int = 3, rate: float = 100.0, seconds: float = 10.0) -> torch.Tensor:
    """Signals `(count, 12, time)` in mV."""
    return torch.from_numpy(
        np.stack([heart_signal(rate, seconds, seed) for seed in range(count)]).astype(np.float32)
    )


def ratio(clean: np.ndarray, noisy: np.ndarray) -> float:
    """The definition, for one record: mean squares over all samples that are there."""
    there = ~np.isnan(clean)
    signal, added = clean[there].astype(float), (noisy[there].astype(float) - clean[there])
    return 10 * np.log10((signal**2).mean() / (added**2).mean())


def generators(count: int, kind: str, seed: int = 0) -> list[torch.Generator]:
    return [record_generator(seed, name, kind) for name in range(count)]


@pytest.mark.parametrize("rate", [50, 100, 128, 257, 333.3, 360, 500, 1000])
@pytest.mark.parametrize("kind", EVERY)
def test_every_ratio_is_met_exactly(kind, rate):
    if kind in ("powerline", MIXED) and rate < 100:
        pytest.skip("no mains below half this rate")
    clean = hearts(2, rate, 4.0)
    clean[1] += 0.4  # an offset counts as signal
    prepared = prepare_noise(clean, kind, rate, torch.Generator().manual_seed(1))
    for snr in (24, 3.3, 0, -6, -20):
        for one, noisy in zip(clean.numpy(), prepared.at(snr).numpy(), strict=True):
            assert abs(ratio(one, noisy) - snr) < 0.01


def test_each_record_can_have_its_own_ratio_and_nothing_is_written_in_place():
    clean = hearts()
    before, wanted = clean.clone(), torch.tensor([20.0, 0.0, -6.0])
    for kind in EVERY:
        noisy = add_noise(clean, kind, wanted, 100.0, torch.Generator().manual_seed(0))
        assert torch.allclose(noise.measured_snr(clean, noisy).float(), wanted, atol=0.01), kind
        assert (
            noisy.dtype == torch.float32
            and torch.equal(clean, before)
            and noisy.data_ptr() != clean.data_ptr()
        )


@pytest.mark.parametrize("kind", EVERY)
def test_flat_and_missing_samples_stay_and_do_not_count(kind):
    clean = hearts(5)
    clean[1, 4] = 0.0
    clean[2, :, 100:220], clean[2, 7] = torch.nan, torch.nan
    clean[3] = 0.7  # nothing moves
    clean[4] = torch.nan
    with pytest.warns(
        FlatLeadWarning, match=r"2 of 5 records have a flat lead.*; 2 have no lead that moves"
    ):
        noisy = add_noise(clean, kind, -6.0, 100.0, torch.Generator().manual_seed(0))
    assert torch.equal(torch.isnan(noisy), torch.isnan(clean))
    assert (noisy[1, 4] == 0).all() and torch.equal(noisy[3], clean[3])
    for place in (0, 1, 2):
        assert abs(ratio(clean[place].numpy(), noisy[place].numpy()) + 6) < 0.01
    without = [lead for lead in range(12) if lead != 4]
    assert abs(ratio(clean[1, without].numpy(), noisy[1, without].numpy()) + 6) < 0.01


def test_a_dead_input_at_any_voltage_does_not_change_the_noise_of_the_others():
    clean = hearts(1)
    dead = clean.clone()
    clean[0, 9], dead[0, 9] = 0.0, 5.0
    with pytest.warns(
        FlatLeadWarning,
        match="1 of 1 records have a flat lead, which stays as it is and does not count",
    ):
        zero, stuck = (
            add_noise(x, "white", 6.0, 100.0, generators(1, "white")) for x in (clean, dead)
        )
    assert (
        torch.allclose((zero - clean)[0, :9], (stuck - dead)[0, :9], atol=1e-6)
        and (stuck[0, 9] == 5).all()
    )


def test_no_warning_without_cause():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in EVERY:
            add_noise(hearts(1), kind, 6.0, 100.0, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [*noise.ADDITIVE, MIXED])
def test_noise_obeys_einthoven_and_goldberger(kind):
    clean = hearts(2)
    added = prepare_noise(clean, kind, 100.0, torch.Generator().manual_seed(0)).noise
    expected = torch.einsum("lk,nkt->nlt", torch.from_numpy(LIMB_FROM_I_AND_II), added[:, :2])
    assert torch.allclose(added[:, :6], expected, atol=1e-5)
    rank = (
        2 if kind == "powerline" else 8
    )  # a tone has two phases; all else is another one in each channel
    assert np.linalg.matrix_rank(added[0].double().numpy(), tol=1e-3) == rank


def test_leads_are_differences_of_electrodes():
    channels = noise.CHANNELS_FROM_ELECTRODES
    right, left, leg, v1 = (channels[:, place] for place in (0, 1, 2, 3))
    assert np.allclose(
        channels.sum(axis=1), 0, atol=1e-6
    )  # a potential of the whole body is not seen
    assert right[0] == right[1] == -1 and left[0] == 1 and leg[1] == 1 and v1[2] == 1
    assert np.allclose(right[2:], -1 / 3) and np.allclose(leg[2:], -1 / 3)


def spectrum(added: torch.Tensor, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and the share of energy at each, of noise `(n, 12, time)` without its offset."""
    values = added.numpy() - added.numpy().mean(axis=2, keepdims=True)
    power = (np.abs(np.fft.rfft(values * np.hanning(values.shape[2]))) ** 2).sum(axis=(0, 1))
    return np.fft.rfftfreq(values.shape[2], 1 / rate), power / power.sum()


@pytest.mark.parametrize(
    ("kind", "rate", "low", "high"),
    [
        ("baseline_wander", 100, 0, 0.8),
        ("muscle", 1000, 17, 153),
        ("muscle", 100, 17, 50),
        ("electrode_motion", 257, 0, 13),
        ("baseline_shift", 500, 0, 5),
        ("powerline", 100, 49.0, 50),
        ("powerline", 1000, 49.5, 252),
    ],
)
def test_each_kind_lies_in_its_band(kind, rate, low, high):
    clean = hearts(8, rate)
    frequency, share = spectrum(
        prepare_noise(clean, kind, rate, torch.Generator().manual_seed(0)).noise, rate
    )
    assert share[(frequency >= low) & (frequency <= high)].sum() > 0.98


def test_harmonics_above_half_the_rate_are_removed_not_folded():
    """At 257 Hz the mains' third to fifth harmonics would fold to 107, 57 and 7 Hz."""
    clean = hearts(4, 257)
    frequency, share = spectrum(
        prepare_noise(clean, "powerline", 257, torch.Generator().manual_seed(0)).noise, 257
    )
    tones = (np.abs(frequency - 50) < 1.5) | (np.abs(frequency - 100) < 1.5)
    assert share[tones].sum() > 0.9999 and share[np.abs(frequency - 100) < 1.5].sum() > 1e-4


def test_sixty_hertz_mains():
    clean = hearts(2, 200)
    made = prepare_noise(
        clean, "powerline", 200, torch.Generator().manual_seed(0), mains=60.0
    ).noise
    frequency, share = spectrum(made, 200)
    assert share[np.abs(frequency - 60) < 1.5].sum() > 0.99


@pytest.mark.parametrize("factor", [2, 5, 10])
def test_the_anti_alias_filter_passes_and_stops(factor):
    taps = noise.anti_alias_taps(factor)
    frequency = np.linspace(0, 0.5, 2001)  # of the making rate
    gain = np.abs(np.exp(-2j * np.pi * np.outer(frequency, np.arange(len(taps)))) @ taps)
    assert (
        np.allclose(gain[frequency < 0.41 / factor], 1, atol=0.01)
        and gain[frequency > 0.51 / factor].max() < 0.002
    )


@pytest.mark.parametrize("kind", EVERY)
def test_a_records_noise_depends_on_seed_name_and_kind_alone(kind):
    clean = hearts(4)
    together = add_noise(clean, kind, 3.0, 100.0, generators(4, kind))
    alone = add_noise(clean[2:3], kind, 3.0, 100.0, [record_generator(0, 2, kind)])
    assert torch.allclose(together[2:3], alone, atol=1e-5)
    again = add_noise(clean, kind, 3.0, 100.0, generators(4, kind))
    other = add_noise(clean, kind, 3.0, 100.0, generators(4, kind, seed=1))
    assert torch.equal(together, again) and not torch.allclose(together, other, atol=1e-3)
    drawn = prepare_noise(clean, kind, 100.0, generators(4, kind))
    drawn.at(-20.0)  # a ratio asked for before changes nothing
    assert torch.equal(drawn.at(3.0), together)


def test_record_generators_differ():
    first = [
        torch.rand(1, generator=record_generator(*key)).item()
        for key in ((0, "a", "white"), (1, "a", "white"), (0, "b", "white"), (0, "a", "muscle"))
    ]
    assert len(set(first)) == 4


def test_additive_noise_keeps_its_shape_at_every_ratio():
    clean = hearts(2)
    drawn = prepare_noise(clean, "muscle", 100.0, torch.Generator().manual_seed(0))
    assert torch.allclose((drawn.at(-20.0) - clean) / 10, drawn.at(0.0) - clean, atol=1e-5)


def test_mixed_noise_holds_every_kind_in_equal_parts(monkeypatch):
    monkeypatch.setattr(noise, "ADDITIVE", ("powerline", "baseline_wander"))
    frequency, share = spectrum(
        prepare_noise(hearts(8), MIXED, 100.0, torch.Generator().manual_seed(0)).noise, 100
    )
    assert 0.35 < share[frequency > 40].sum() < 0.75  # the wander's offset is not in this spectrum


def test_leads_are_lost_one_after_the_other():
    clean = hearts(3)
    drawn = prepare_noise(clean, "lead_loss", 100.0, torch.Generator().manual_seed(0))
    for snr in (12.0, 3.0):
        lost = drawn.at(snr) == 0
        partly = (lost.any(dim=2) & ~lost.all(dim=2)).sum(dim=1)
        fading = ((drawn.at(snr) != clean) & ~lost).sum(dim=(1, 2))
        assert (partly <= 2).all() and (
            fading <= 1
        ).all()  # one lead is being lost, one sample fades
    assert ((drawn.at(3.0) == 0) | (drawn.at(12.0) != 0)).all()  # what is lost stays lost
    assert (drawn.at(0.0).abs() < 1e-6).all()
    assert torch.isfinite(drawn.at(-6.0)).all() and (drawn.at(-6.0).abs() > 0).float().mean() > 0.99


def write_nstdb(folder: Path) -> Path:
    """A folder in the layout of the database: three records of two channels, format 212, with their
    checksums.
    """
    folder.mkdir()
    clock = np.arange(360 * 30) / 360
    for name, tone in (("bw", 0.3), ("em", 4.0), ("ma", 30.0)):
        channels = np.stack(
            [np.sin(2 * np.pi * tone * clock), np.cos(2 * np.pi * tone * clock)], axis=1
        )
        wfdb.wrsamp(
            name,
            360,
            ["mV", "mV"],
            ["noise1", "noise2"],
            channels,
            fmt=["212"] * 2,
            adc_gain=[200.0] * 2,
            baseline=[0, 0],
            write_dir=str(folder),
        )
    files = sorted(folder.iterdir())
    sums = [f"{sha256(path.read_bytes()).hexdigest()} {path.name}" for path in files]
    (folder / "SHA256SUMS.txt").write_text("\n".join(sums) + "\n")
    return folder


def test_recorded_noise_is_downloaded_read_and_added(tmp_path, capsys):
    handler = partial(SimpleHTTPRequestHandler, directory=str(write_nstdb(tmp_path / "served")))
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    assert main(["nstdb", str(tmp_path / "nstdb"), "--address", address]) == 0
    download("nstdb", tmp_path / "nstdb", addresses=[address])
    server.shutdown()
    assert "nstdb/1.0.0" in DATASETS["nstdb"].addresses[0] and "complete" in capsys.readouterr().out
    recorded = noise.read_nstdb(tmp_path / "nstdb")
    assert {kind: each.shape for kind, each in recorded.items()} == dict.fromkeys(
        noise.RECORDED, (2, 10800)
    )
    for rate, kind, tone in (
        (100, "muscle", 30.0),
        (257, "electrode_motion", 4.0),
        (1000, "muscle", 30.0),
    ):
        clean = hearts(3, rate)
        drawn = prepare_noise(
            clean, kind, rate, torch.Generator().manual_seed(0), recorded=recorded
        )
        frequency, share = spectrum(drawn.noise, rate)
        assert share[np.abs(frequency - tone) < 0.5].sum() > 0.99
        assert (noise.measured_snr(clean, drawn.at(-6.0)) + 6).abs().max() < 0.01
    with pytest.raises(
        DataError, match="Noise recorded for 1.0 s cannot be laid over records of 10.0 s"
    ):
        add_noise(
            hearts(1),
            "muscle",
            0.0,
            100.0,
            torch.Generator(),
            recorded={"muscle": np.ones((2, 360))},
        )
    with pytest.raises(DataError, match="The recorded noise is silent"):
        add_noise(
            hearts(1),
            "muscle",
            0.0,
            100.0,
            torch.Generator(),
            recorded={"muscle": np.ones((2, 7200))},
        )


@pytest.mark.parametrize(
    ("level", "median"), [(1, 2.1), (2, -3.7), (3, -9.6), (4, -9.0), (5, -12.9), (6, -15.6)]
)
def test_published_levels_have_their_known_ratios(level, median):
    """Windows of 2.5 s with the mean power of PTB-XL, 0.0558 mV^2; medians of few hundred windows
    spread by a dB.
    """
    clean = hearts(1, 100, 2.5).expand(600, -1, -1)
    clean = clean * (0.0558 / clean[:1].square().mean()).sqrt()
    noisy = noise.published_noise(clean, level, 100.0, torch.Generator().manual_seed(level))
    assert abs(noise.measured_snr(clean, noisy).median() - median) < 2.0


@pytest.mark.parametrize(
    ("kind", "largest", "power"),
    [
        # Mean squares: C^2 is a third of the square of its largest value, 50 cosines have 50 / 6, a
        # height has 1 / 3, a gain 2, and a plateau is there in every other window, over 84 % of it.
        ("baseline_wander", 0.1, 0.01 / 3 * 50 / 6),
        ("muscle", 0.5, 0.25 / 3),
        ("baseline_shift", 1.0, 1 / 3 * 1 / 3 * 2 * 0.5 * 0.84),
    ],
)
def test_published_sizes_in_closed_form(monkeypatch, kind, largest, power):
    silent = dict.fromkeys(PUBLISHED_LEVELS[1], 0.0)
    monkeypatch.setitem(noise.PUBLISHED_LEVELS, 0, silent | {kind: largest})
    added = noise.published_noise(
        torch.zeros(3000, 12, 250), 0, 100.0, torch.Generator().manual_seed(0)
    )
    assert abs(added.square().mean() / power - 1) < 0.1


def test_published_noise_has_its_flaws(monkeypatch):
    clean, silent = torch.zeros(4, 12, 250), dict.fromkeys(PUBLISHED_LEVELS[1], 0.0)
    monkeypatch.setitem(noise.PUBLISHED_LEVELS, 0, silent | {"baseline_wander": 0.3})
    wander = noise.published_noise(clean, 0, 100.0, torch.Generator().manual_seed(0))
    assert wander.abs().max() > 0 and torch.allclose(wander, wander[:, :1].expand(-1, 12, -1))
    monkeypatch.setitem(noise.PUBLISHED_LEVELS, 0, silent | {"powerline": 1.0})
    hum = noise.published_noise(clean, 0, 100.0, torch.Generator().manual_seed(0))
    assert (
        torch.allclose(hum[:, :, 2:], hum[:, :, :-2], atol=1e-5)
        and hum.mean(dim=2).abs().max() > 0.01
    )
    single = noise.published_noise(clean[:1], 3, 100.0, generators(1, "published"))
    batch = noise.published_noise(clean, 3, 100.0, generators(4, "published"))
    assert torch.equal(single, batch[:1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "hiss"}, "There is no noise of kind 'hiss'; choose one of baseline_wander"),
        ({"snr_db": float("nan")}, "is not a finite number"),
        ({"snr_db": [1.0, float("inf"), 2.0]}, "not a finite number"),
        ({"snr_db": [1.0, 2.0]}, r"shape \(2,\) do not fit 3 records"),
        (
            {"signals": torch.zeros(3, 8, 100)},
            r"\(batch, 12, time\) in mV, not torch.float32 \(3, 8, 100\)",
        ),
        ({"signals": torch.zeros(3, 12, 100, dtype=torch.int16)}, "not torch.int16"),
        ({"signals": torch.zeros(0, 12, 100)}, "at least one record"),
        ({"sampling_rate": 20.0}, "resample to 50 Hz"),
        ({"sampling_rate": float("nan")}, "resample"),
        ({"generator": []}, "0 generators were given for 3 records"),
        (
            {"kind": "powerline", "mains": 60.0},
            "Mains of 60 Hz lie above 50 Hz, half the sampling rate",
        ),
        ({"kind": MIXED, "mains": 60.0}, "Mains of 60 Hz"),
        ({"recorded": {"white": np.ones((2, 9))}}, "Recorded noise of kind 'white' is not known"),
        ({"recorded": {"muscle": np.ones(9)}}, r"must be finite numbers \(channels, time\)"),
    ],
)
def test_bad_input(change, said):
    given = {
        "signals": hearts(),
        "kind": "white",
        "snr_db": 6.0,
        "sampling_rate": 100.0,
        "generator": torch.Generator(),
    } | change
    with pytest.raises(DataError, match=said):
        add_noise(**given)


def test_other_bad_input(tmp_path):
    with pytest.raises(DataError, match="no published noise level 7; choose one of 1 to 6"):
        noise.published_noise(hearts(), 7, 100.0, torch.Generator())
    with pytest.raises(
        DataError, match="'bw' is not there; fetch it with `python -m ecglib.sources.download nstdb"
    ):
        noise.read_nstdb(tmp_path / "nothing")
