"""Robustness: the same noise for all, losses paired with clean, thresholds, comparison with
training from scratch.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from ecglib.errors import DataError
from ecglib.evaluate.metrics import macro_auroc
from ecglib.evaluate.windows import predict_windows, score_signals
from ecglib.noise import add_noise, measured_snr, record_generator
from ecglib.records import Records
from ecglib.supervised import Training
from ecgstudy.analysis import robustness
from ecgstudy.analysis.robustness import (
    loss_gains,
    noise_arms,
    plot_noise_kinds,
    plot_robustness,
    robustness_table,
    snr_where_lost,
    taught_kinds,
    threshold_table,
)
from ecgstudy.arms import noise
from ecgstudy.arms.noise import (
    NoiseGrid,
    NoiseScores,
    UnderNoise,
    arm_of,
    make_noisy,
    score_conditions,
    score_under_noise,
)
from ecgstudy.arms.pretrain import Encode
from ecgstudy.arms.supervised import FromScratch
from ecgstudy.arms.trained import trained_classifier
from ecgstudy.arms.transfer import frozen_arms
from ecgstudy.runs import Run, RunSpec, keep_runs, open_run
from ecgstudy.study import LabelSubset, Study, label_grid

KINDS, SNRS = ("white", "lead_loss"), (6.0, -6.0)
SETTINGS = Training(
    encoder="xresnet1d_narrow",
    steps=20,
    batch_size=16,
    crop_seconds=1.0,
    learning_rate=0.01,
    weight_decay=0.0,
    dropout=0.0,
    transforms={"gaussian_noise": {"scale": 0.03}},
)


@pytest.fixture(scope="module")
def arms(records, folder) -> list[Run]:
    """A supervised run and two frozen ones of one random encoder, at two fractions, as notebook 09
    lists them.
    """
    study = Study(records, folder)
    runs = [study.run(FromScratch(LabelSubset(1.0, 0, (1.0,)), SETTINGS))]
    about = {"transforms": {"baseline_wander": {}}}
    start = study.run(Encode("random", "xresnet1d_narrow", 1.0, about=about))
    runs += study.grid(frozen_arms(study, start, label_grid([0.5, 1.0], 1)), progress_bar=False)
    keep_runs(runs, "label_efficiency", folder)
    return runs


@pytest.fixture(scope="module")
def scores(records, folder, arms) -> NoiseScores:
    return score_under_noise(Study(records, folder), arms, NoiseGrid(KINDS, SNRS, draws=50))


def test_noisy_signals_are_those_of_add_noise(records, tmp_path):
    test = records.split["test"]
    gap = records.signals.copy()
    gap[test[1], :, 20:40] = -32768
    records = Records(
        gap,
        records.scale,
        100,
        records.table,
        records.targets,
        records.classes,
        about=records.about,
    )
    noisy = make_noisy(records, test, tmp_path / "noisy.npy", NoiseGrid(KINDS, SNRS))
    clean = torch.from_numpy(records.millivolts(test))
    assert noisy.conditions == [
        ("clean", math.inf),
        *((kind, snr) for kind in KINDS for snr in SNRS),
    ]
    assert torch.allclose(noisy.millivolts(0, slice(None)), clean.nan_to_num(), atol=1e-3)
    names = records.table["record_id"].to_numpy()[test]
    for place, (kind, snr) in enumerate(noisy.conditions[1:], start=1):
        found = noisy.millivolts(place, slice(None))
        wanted = add_noise(
            clean, kind, snr, 100, [record_generator(0, name, kind) for name in names]
        )
        assert (
            torch.allclose(found, wanted.nan_to_num(), atol=1e-3)
            and (found[1, :, 20:40] == 0).all()
        )
        there = torch.where(torch.isnan(clean), torch.nan, found)
        assert (measured_snr(clean, there) - snr).abs().max() < 0.02


def test_large_amplitudes_are_not_clipped(records, tmp_path):
    test = records.split["test"][:2]
    loud = records.signals.copy()
    loud[test] = np.clip(loud[test].astype(int) * 8, -32000, 32000)
    records = Records(
        loud,
        records.scale,
        100,
        records.table,
        records.targets,
        records.classes,
        about=records.about,
    )
    noisy = make_noisy(records, test, tmp_path / "loud.npy", NoiseGrid(("white",), (-20.0,)))
    clean = torch.from_numpy(records.millivolts(test))
    assert noisy.millivolts(1, slice(None)).abs().max() > 40  # more than int16 microvolts hold
    assert (measured_snr(clean, noisy.millivolts(1, slice(None))) + 20).abs().max() < 0.02


def test_clean_scores_are_those_that_the_runs_kept(
    records, folder, arms, scores, tmp_path, small_fusion
):
    """One score of a classifier, a frozen probe and a DVME, wherever it is printed."""
    fused, _ = small_fusion(tmp_path, (1.0, 0.5))  # whose members have windows of their own
    fused_scores = score_under_noise(
        Study(records, tmp_path), [fused], NoiseGrid(("white",), (6.0,), draws=20)
    )
    assert robustness_table(fused_scores)["encoder"].unique().tolist() == ["2 encoders"]
    test = records.split["test"]
    noisy = make_noisy(records, test, tmp_path / "clean.npy", NoiseGrid((), ()))
    printed = [*scores.auroc[:, 0], fused_scores.auroc[0, 0]]
    for run, value in zip([*arms, fused], printed, strict=True):
        kept = run.predictions()["test/probabilities"]
        network, window = trained_classifier(run, records, run.folder.parents[1])
        signals = torch.from_numpy(np.nan_to_num(records.millivolts(test)))
        for again in (
            score_conditions([network], noisy, window)[0, 0],
            predict_windows(network, records, test, window),
            score_signals([network], signals, 100, window)[0].numpy(),
        ):
            np.testing.assert_allclose(again, kept, atol=1e-5)
        assert value == pytest.approx(macro_auroc(records.targets[test], kept))


def test_frozen_runs_with_one_encoder_share_its_features(
    records, folder, arms, tmp_path, monkeypatch
):
    noisy = make_noisy(records, records.split["test"], tmp_path / "n.npy", NoiseGrid((), ()))
    networks = [trained_classifier(run, records, folder)[0] for run in arms[1:]]
    monkeypatch.setattr(networks[1].encoders[0], "forward", None)  # would fail if asked
    assert score_conditions(networks, noisy, 1.0).shape[0] == 2


def test_a_scored_arm_is_kept_and_not_scored_again(records, folder, arms, scores, monkeypatch):
    monkeypatch.setattr(noise, "make_noisy", None)
    grid = NoiseGrid(KINDS, SNRS, draws=50)
    again = score_under_noise(Study(records, folder), arms, grid)
    assert np.array_equal(again.auroc, scores.auroc) and np.array_equal(again.drawn, scores.drawn)
    assert scores.auroc.shape == (3, 5) and scores.drawn.shape == (3, 5, 50)
    assert len(list((folder / "runs").glob("*-noise-*"))) == 2  # one for each network


def test_another_seed_is_another_noise(records, folder, arms, scores):
    grid = NoiseGrid(KINDS, SNRS, seed=1, draws=50)
    other = score_under_noise(Study(records, folder), arms[:1], grid)
    kept = sorted((folder / "runs").glob("supervised-noise-*"))
    first, second = (
        open_run(path).predictions()[f"{arms[0].spec.key}/probabilities"] for path in kept
    )
    assert other.auroc[0, 0] == scores.auroc[0, 0] and np.array_equal(first[0], second[0])
    assert not np.allclose(first[1], second[1], atol=1e-3)


def test_the_work_can_be_sent_to_other_processes(records, folder, arms):
    cloudpickle = pytest.importorskip("cloudpickle")  # what joblib sends work with
    job = UnderNoise(arms[:1], NoiseGrid(KINDS, SNRS))
    assert cloudpickle.loads(cloudpickle.dumps(job)).settings() == job.settings()


def test_table_has_clean_and_every_ratio(scores):
    table = robustness_table(scores)
    assert len(table) == 3 * len(KINDS) * (1 + len(SNRS)) and set(table["n"]) == {12}
    clean = table[np.isinf(table["snr_db"])]
    assert (clean["loss"] == 0).all() and len(clean) == 3 * len(KINDS)
    row = table[
        (table["method"] == "supervised") & (table["kind"] == "lead_loss") & (table["snr_db"] == -6)
    ].iloc[0]
    place = scores.conditions.index(("lead_loss", -6.0))
    assert math.isclose(row["auroc"], scores.auroc[0, place]) and row["protocol"] == "supervised"
    assert (
        math.isclose(row["loss"], scores.auroc[0, 0] - scores.auroc[0, place])
        and row["low"] <= row["high"]
    )


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.0, 0.02, 0.08], 3.0),
        ([0.06, 0.02, 0.08], math.inf),
        ([0.0, 0.01, 0.02], -math.inf),
        ([0.0, 0.05, 0.0], 6.0),
        ([-0.01, 0.0, 0.05], 0.0),
    ],
)
def test_where_it_is_lost(losses, expected):
    assert snr_where_lost([12.0, 6.0, 0.0], losses) == pytest.approx(expected)


def made_scores(arms: list[dict], auroc: list[list[float]], draws: int = 400) -> NoiseScores:
    """Scores of arms by hand; each draw shifts all arms alike, and each noisy condition a little on
    its own.
    """
    runs = [
        Run(
            RunSpec(
                a["method"], "made", "key", "ab", 1.0, 0, {k: a[k] for k in ("protocol", "encoder")}
            ),
            None,
            {},
        )
        for a in arms
    ]
    generator, values = np.random.default_rng(0), np.array(auroc)
    shared = 0.05 * generator.normal(size=(1, 1, draws))
    drawn = values[:, :, None] + shared + 0.002 * generator.normal(size=(*values.shape, draws))
    conditions = NoiseGrid(("white", "muscle"), (6.0, 0.0)).conditions
    return NoiseScores(runs, conditions, values, drawn, 100)


ARMS = [
    {"method": "supervised", "protocol": "supervised", "encoder": "x"},
    {"method": "simclr", "protocol": "fine-tuned", "encoder": "x"},
    {"method": "cpc", "protocol": "frozen", "encoder": "other"},
    {"method": "random", "protocol": "frozen", "encoder": "x"},
]
AUROC = [[0.9, 0.9, 0.80, 0.88, 0.70], [0.95, 0.95, 0.90, 0.8, 0.75], [0.8] * 5, [0.6] * 5]


def test_thresholds_in_words_and_with_intervals():
    table = threshold_table(made_scores(ARMS, AUROC)).set_index(["method", "kind"])
    row = table.loc[("supervised", "white")]
    assert row["snr_db"] == pytest.approx(3.0) and 2.5 < row["low"] < 3.0 < row["high"] < 3.5
    assert row["told"].startswith("3 dB [3 dB to 3 dB")
    assert table.loc[("simclr", "muscle"), "told"] == "before 6 dB [before 6 dB to before 6 dB]"
    assert table.loc[("cpc", "white"), "told"] == "never [never to never]"


def test_differences_are_paired_with_the_control_of_the_same_encoder():
    table = loss_gains(
        made_scores(ARMS, AUROC), {"white": ["white"], "both": ["white", "muscle"], "none": []}
    )
    assert (
        list(table["method"]) == ["simclr", "all"] * 2
    )  # cpc has no control, random is not pretrained
    own = table.set_index(["family", "method"])["gain"]
    assert own["white", "simclr"] == pytest.approx((0.0 + 0.05) / 2 - (0.0 + 0.1) / 2)
    assert own["both", "all"] == pytest.approx((0.05 + 0.15 + 0.2) / 4 - (0.1 + 0.02 + 0.2) / 4)
    assert (table["high"] - table["low"] < 0.02).all()  # what all arms share on a draw has gone


def test_arms_are_chosen_by_study_fraction_and_method(records, folder, arms):
    chosen = noise_arms(folder, records, 1.0, ["label_efficiency"])
    assert [arm_of(run)["method"] for run in chosen] == ["supervised", "random"]
    assert noise_arms(folder, records, 0.5, ["label_efficiency"])[0].spec.fraction == 0.5
    assert len(noise_arms(folder, records, 1.0, ["label_efficiency"], ["random"])) == 1
    for arguments, said in (
        ((0.3, ["label_efficiency"]), "at a fraction of 0.3; choose one of 0.5, 1"),
        ((1.0, ["semi_supervised"]), "is missing; run notebook 12_semi_supervised first"),
        ((1.0, ["other"]), "no study 'other'"),
        ((1.0, ["label_efficiency"], ["byol"]), "No run of .* is by byol"),
    ):
        with pytest.raises(DataError, match=said):
            noise_arms(folder, records, *arguments)


def test_one_run_a_method_of_the_other_notebooks(monkeypatch, records):
    def made(method: str, fraction: float, seed: int, **settings) -> Run:
        return Run(
            RunSpec(method, "made", records.fingerprint, "ab", fraction, seed, settings), None, {}
        )

    lists = {
        "semi_supervised": [
            made(m, f, s, start=start, backbone="b")
            for m in ("ce_ssl", "fixmatch", "softmatch")
            for f in (0.05, 0.1)
            for s in (2, 1)
            for start in ("random", "simulated")
        ],
        "self_evolving": [
            made(m, 0.1, 0, stage=stage, encoder="v", protocol=f"stage{stage}")
            for m in ("distl", "supervised_noised", "oracle")
            for stage in (0, 3)
        ],
        "fusion": [
            made(m, f, s, protocol="frozen", members="p+q+r")
            for m in ("alone", "dvme", "perceptron")
            for f in (0.1, 1.0)
            for s in (1, 0)
        ],
    }
    monkeypatch.setattr(robustness, "kept_runs", lambda name, *_: lists[name])
    found = [arm_of(run) for run in noise_arms("", records, 1.0, list(lists))]
    assert [(arm["method"], arm["protocol"], arm["fraction"], arm["seed"]) for arm in found] == [
        ("ce_ssl", "simulated start", 0.1, 1),
        ("fixmatch", "simulated start", 0.1, 1),
        ("distl", "stage3", 0.1, 0),
        ("supervised_noised", "stage3", 0.1, 0),
        ("dvme", "frozen", 1.0, 0),
    ]
    assert found[-1]["encoder"] == "3 encoders"


def test_kinds_that_the_augmentation_has_shown(folder, arms):
    assert taught_kinds(arms[:1], folder) == ("white",)
    assert taught_kinds(arms, folder) == (
        "baseline_wander",
        "white",
    )  # with those of the pretraining


def test_figures_show_what_the_tables_say(scores):
    table, open_before = robustness_table(scores), plt.get_fignums()
    figure = plot_robustness(table, "A title")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["white noise", "lost leads"]
    line = panels[0].lines[0].get_xydata()
    own = table[(table["method"] == "supervised") & (table["kind"] == "white")].sort_values(
        "snr_db"
    )
    assert (
        np.allclose(line[:, 1], own["auroc"]) and line[-1, 0] > 6 and len(panels[0].lines) == 3 + 1
    )
    with pytest.raises(DataError, match="'kind'"):
        plot_robustness(table.drop(columns="kind"))
    clean = np.random.default_rng(0).normal(size=(12, 1000))
    louder = clean.copy()
    louder[7] += 1.0
    figure = plot_noise_kinds(clean, {"white": louder, "lead_loss": louder}, 100.0)
    assert figure.axes[0].get_title(loc="left") == "white noise, lead V2" and len(figure.axes) == 4
    assert plt.get_fignums() == open_before
