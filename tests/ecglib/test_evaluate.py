"""Measures against scikit-learn, the bootstrap against a slow loop, thresholds by brute force."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    coverage_error,
    fbeta_score,
    hamming_loss,
    label_ranking_loss,
    roc_auc_score,
)

from ecglib.errors import DataError
from ecglib.evaluate import draws, metrics, windows
from ecglib.evaluate.draws import bootstrap_interval, paired_difference
from ecglib.evaluate.metrics import AbsentClassWarning, macro_auroc
from ecglib.evaluate.windows import window_starts
from ecglib.records import MISSING, Records


def make_scores(
    n: int = 300, classes: int = 4, seed: int = 0, levels: int = 40
) -> tuple[np.ndarray, np.ndarray]:
    """Targets and informative scores with many ties."""
    generator = np.random.default_rng(seed)
    targets = generator.random((n, classes)) < np.linspace(0.1, 0.5, classes)
    scores = np.round((targets + generator.normal(size=(n, classes))) * levels / 8) / levels
    return targets.astype(np.int8), scores


columns = st.lists(
    st.tuples(st.booleans(), st.integers(-3, 3), st.integers(0, 3)), min_size=2, max_size=40
)


@settings(max_examples=80, deadline=None)
@given(columns)
def test_class_statistics_equal_scikit_learn_with_ties_and_weights(column):
    target, score, weight = (np.array(part) for part in zip(*column, strict=True))
    use = weight > 0
    pairs = [
        (metrics.class_auroc, draws.auroc, roc_auc_score),
        (
            metrics.class_average_precision,
            draws.average_precision,
            average_precision_score,
        ),
    ]
    for ours, measure, theirs in pairs:
        weighted = measure(target[:, None], score[:, None]).of(weight[:, None])[0]
        if 0 < target.sum() < len(target):
            assert abs(ours(target[:, None], score[:, None])[0] - theirs(target, score)) < 1e-12
        if 0 < target[use].sum() < use.sum():
            assert (
                abs(weighted - theirs(target[use], score[use], sample_weight=weight[use])) < 1e-12
            )
        else:
            assert np.isnan(weighted)


def test_draws_of_weights_give_one_column_each():
    targets, scores = make_scores()
    weights = np.random.default_rng(1).integers(0, 3, (len(targets), 5)).astype(float)
    areas = draws.class_areas(metrics.weighted_auroc, targets, scores)
    table = areas.of(weights)
    assert table.shape == (4, 5)
    assert np.array_equal(table[:, 2], areas.of(weights[:, [2]])[:, 0])
    assert np.array_equal(metrics.class_auroc(targets, scores), areas.of(np.ones((300, 1)))[:, 0])


def test_absent_classes_are_named_and_left_out():
    targets, scores = make_scores()
    targets[:, 1], targets[:, 3] = 0, 1
    assert metrics.absent_classes(targets, ["A", "B", "C", "D"]) == ("B", "D")
    expected = np.mean([roc_auc_score(targets[:, c], scores[:, c]) for c in (0, 2)])
    with pytest.warns(AbsentClassWarning, match="B, D"):
        assert abs(macro_auroc(targets, scores, ["A", "B", "C", "D"]) - expected) < 1e-12
    with pytest.warns(AbsentClassWarning, match="class 1, class 3"):
        macro_auroc(targets, scores)
    with pytest.warns(AbsentClassWarning, match="B, D"):
        bootstrap_interval(targets, scores, np.arange(300), 10, classes=["A", "B", "C", "D"])
    with pytest.raises(DataError, match="No class"):
        macro_auroc(targets[:, [1, 3]], scores[:, [1, 3]])


def test_a_complete_table_gives_no_warning():
    with warnings.catch_warnings(action="error"):
        macro_auroc(*make_scores())


@settings(max_examples=60, deadline=None)
@given(columns, st.sampled_from([0.5, 1.0, 2.0]))
def test_threshold_is_the_best_of_all_and_never_on_a_score(column, beta):
    target, score = (
        np.array([row[0] for row in column]),
        np.array([row[1] for row in column], np.float64),
    )
    if not target.any():
        with pytest.warns(AbsentClassWarning, match="AFIB"):
            assert np.isnan(
                metrics.choose_thresholds(target[:, None], score[:, None], beta, ["AFIB"])[0]
            )
        return
    threshold = metrics.choose_thresholds(target[:, None], score[:, None], beta)[0]
    reached = fbeta_score(target, score > threshold, beta=beta, zero_division=0)
    best = max(fbeta_score(target, score >= cut, beta=beta, zero_division=0) for cut in score)
    assert abs(reached - best) < 1e-12
    assert np.array_equal(score > threshold, score >= threshold)


def test_ranking_report_equals_scikit_learn():
    targets, scores = make_scores(400, 6)
    thresholds = metrics.choose_thresholds(*make_scores(400, 6, seed=1))
    report, predicted = metrics.ranking_report(targets, scores, thresholds), scores > thresholds
    hits, alarms = (targets * predicted).sum(axis=0), ((1 - targets) * predicted).sum(axis=0)
    missed = (targets * ~predicted).sum(axis=0)
    expected = {
        "ranking_loss": label_ranking_loss(targets, scores),
        "coverage": coverage_error(targets, scores),
        "macro_auroc": roc_auc_score(targets, scores, average="macro"),
        "mean_average_precision": average_precision_score(targets, scores, average="macro"),
        "macro_f2": fbeta_score(targets, predicted, beta=2, average="macro"),
        "macro_g2": np.mean(hits / (hits + alarms + 2 * missed)),
        "hamming_loss": hamming_loss(targets, predicted),
    }
    assert report.pop("absent") == report.pop("without_threshold") == ()
    assert report == pytest.approx(expected, abs=1e-12)


def test_ranking_report_names_what_it_leaves_out():
    targets, scores = make_scores(200, 4)
    thresholds = np.array([0.1, np.nan, 0.1, 0.1])
    targets[:, 2] = 0
    report = metrics.ranking_report(targets, scores, thresholds, ["A", "B", "C", "D"])
    assert report["absent"] == ("C",) and report["without_threshold"] == ("B",)
    kept = [0, 3]
    expected = fbeta_score(targets[:, kept], scores[:, kept] > 0.1, beta=2, average="macro")
    assert report["macro_f2"] == pytest.approx(expected)
    assert np.isfinite(
        [report[name] for name in ("macro_auroc", "macro_g2", "hamming_loss", "coverage")]
    ).all()


def resample(groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Record positions of one patient bootstrap draw, the slow way."""
    patients = np.unique(groups)
    chosen = patients[generator.integers(len(patients), size=len(patients))]
    return np.concatenate([np.flatnonzero(groups == patient) for patient in chosen])


def macro_of(targets: np.ndarray, scores: np.ndarray, measure) -> float:
    """Mean of a scikit-learn measure over the classes present."""
    present = [c for c in range(targets.shape[1]) if 0 < targets[:, c].sum() < len(targets)]
    return float(np.mean([measure(targets[:, c], scores[:, c]) for c in present]))


@pytest.mark.parametrize("statistic", ["auroc", "average_precision"])
def test_bootstrap_equals_a_slow_loop_on_the_same_draws(statistic):
    measure = {"auroc": roc_auc_score, "average_precision": average_precision_score}[statistic]
    targets, scores = make_scores(90, 3)
    targets[:, 0] = 0
    targets[:3, 0] = 1  # a class that some draws lack
    groups = np.random.default_rng(5).integers(0, 40, 90)
    repeats = np.stack([scores, make_scores(90, 3, seed=2)[1] + 0.2 * scores])
    generator, slow = np.random.default_rng(7), []
    for _ in range(70):  # more than one chunk
        drawn = resample(groups, generator)
        slow.append([macro_of(targets[drawn], model[drawn], measure) for model in repeats])
    low, high = np.quantile(np.mean(slow, axis=1), [0.025, 0.975])
    interval = bootstrap_interval(targets, repeats, groups, draws=70, seed=7, statistic=statistic)
    value = np.mean([macro_of(targets, model, measure) for model in repeats])
    assert interval == pytest.approx((value, low, high), abs=1e-12)
    difference = paired_difference(
        targets, repeats[0], repeats[1], groups, draws=70, seed=7, statistic=statistic
    )
    low, high = np.quantile(np.diff(slow, axis=1) * -1, [0.025, 0.975])
    assert difference[1:] == pytest.approx((low, high), abs=1e-12)


def test_all_areas_at_once_are_those_of_one_bootstrap_each():
    targets, scores = make_scores()
    targets[:, 2] = 0
    groups, names = np.repeat(np.arange(150), 2), list("ABCD")
    with pytest.warns(AbsentClassWarning, match="C") as told:
        found = draws.area_intervals(targets, scores, groups, names, draws=80)
    assert len(told) == 1 and list(found) == [
        "macro_auroc",
        "mean_average_precision",
        "auroc:A",
        "auroc:B",
        "auroc:D",
    ]
    with pytest.warns(AbsentClassWarning):
        for name, statistic in (
            ("macro_auroc", "auroc"),
            ("mean_average_precision", "average_precision"),
        ):
            assert found[name] == bootstrap_interval(
                targets, scores, groups, 80, statistic=statistic, classes=names
            )
    assert found["auroc:D"] == bootstrap_interval(targets[:, [3]], scores[:, [3]], groups, 80)


def test_draws_do_not_depend_on_the_chunks(monkeypatch):
    targets, scores = make_scores(120)
    first = bootstrap_interval(targets, scores, np.arange(120) // 2, draws=40)
    monkeypatch.setattr(draws, "DRAWS_TOGETHER", 7)
    assert bootstrap_interval(targets, scores, np.arange(120) // 2, draws=40) == first


def test_measures_are_taken_together_on_the_same_draws():
    targets, scores = make_scores(100)
    sampler, sides = draws.PatientDraws(np.arange(100) // 2, 40, seed=3), []
    for model in (scores, scores[:, ::-1]):
        sides.append(draws.auroc(targets, model))
    values, drawn = sampler.sample(draws.together(*sides))
    assert values.shape == (2,) and drawn.shape == (2, 40)
    assert sampler.interval(sides[1]) == draws.percentile_interval(values[1], drawn[1])
    assert sampler.difference(*sides) == draws.percentile_interval(
        values[0] - values[1], drawn[0] - drawn[1]
    )
    one, both = draws.f2(targets, scores > 0), draws.f2(targets, np.stack([scores > 0] * 2))
    assert sampler.interval(one) == pytest.approx(sampler.interval(both), abs=1e-12)


def test_a_class_of_one_patient_leaves_draws_but_not_the_interval():
    targets = np.zeros((12, 1), int)
    targets[0] = 1
    interval = bootstrap_interval(targets, np.arange(12.0)[::-1, None], np.arange(12), draws=50)
    assert interval == (1.0, 1.0, 1.0)


def test_a_model_does_not_differ_from_itself():
    targets, scores = make_scores()
    assert paired_difference(targets, scores, scores, np.arange(300), draws=20) == (0, 0, 0)


def test_the_interval_covers_the_truth_and_widens_with_the_level():
    """Two normal distributions one standard deviation apart: the true ROC area is 0.7602."""
    covered = 0
    for seed in range(120):
        generator = np.random.default_rng(seed)
        patient = np.repeat(np.arange(100), 2)
        targets = (patient % 2)[:, None]
        shared = generator.normal(size=100)[patient] * np.sqrt(
            0.5
        )  # two records of a patient resemble each other
        scores = (targets[:, 0] + shared + generator.normal(size=200) * np.sqrt(0.5))[:, None]
        interval = bootstrap_interval(targets, scores, patient, draws=200, seed=seed)
        assert interval.low <= interval.value <= interval.high
        covered += interval.low <= 0.7602 <= interval.high
    assert 0.88 <= covered / 120 <= 0.99
    narrow = bootstrap_interval(targets, scores, patient, draws=200, level=0.5)
    by_record = bootstrap_interval(targets, scores, np.arange(200), draws=200)
    assert narrow.high - narrow.low < by_record.high - by_record.low < interval.high - interval.low


def test_bad_input_is_one_sentence():
    targets, scores = make_scores(20)
    bad = scores.copy()
    bad[3, 2] = np.nan
    for call, message in [
        (lambda: macro_auroc(targets, scores[:, :2]), "equal in shape"),
        (lambda: macro_auroc(targets * 0.5, scores), "soft targets"),
        (lambda: macro_auroc(targets, bad), "record 3, class 2"),
        (lambda: macro_auroc(targets, scores, ["A"]), "class names"),
        (
            lambda: bootstrap_interval(targets, scores, np.arange(19)),
            "one patient for each of 20 records",
        ),
        (lambda: bootstrap_interval(targets, scores, [None] + ["P"] * 19), "19 were given"),
        (
            lambda: bootstrap_interval(targets, scores, np.arange(20), statistic="f1"),
            "choose one of auroc",
        ),
        (lambda: bootstrap_interval(targets, scores, np.arange(20), level=95), "0.95"),
        (lambda: bootstrap_interval(targets, scores, np.arange(20), draws=0), "1,000"),
        (
            lambda: metrics.ranking_report(targets[:, :1], scores[:, :1], [0.5]),
            "two classes or more",
        ),
        (
            lambda: draws.PatientDraws(np.arange(20)).interval(draws.mean(np.ones(3))),
            "one patient for each of 3 records, 20 were given",
        ),
        (lambda: metrics.expected_calibration_error(targets, scores * 9), "between 0 and 1"),
    ]:
        with pytest.raises(DataError, match=message):
            call()


def test_calibration_error_of_an_honest_and_of_a_boastful_model():
    generator = np.random.default_rng(0)
    probabilities = generator.random((20_000, 2))
    targets = generator.random((20_000, 2)) < probabilities
    assert metrics.expected_calibration_error(targets, probabilities) < 0.02
    assert metrics.expected_calibration_error(
        np.zeros((10, 1)), np.full((10, 1), 0.9)
    ) == pytest.approx(0.9)


def test_windows_cover_a_record_with_seven():
    assert window_starts(1000, 250, 125) == [0, 125, 250, 375, 500, 625, 750]
    assert window_starts(1010, 250, 125)[-2:] == [750, 760]
    assert window_starts(200, 250, 125) == [0] == window_starts(250, 250, 125)
    with pytest.raises(DataError, match="at least one sample"):
        window_starts(0, 250, 125)


def make_records(n: int = 9, time: int = 1000) -> Records:
    """Noise records with a few missing samples."""
    signals = np.random.default_rng(0).integers(-900, 900, (n, 12, time)).astype(np.int16)
    signals[0, 3, :40] = MISSING
    table = pd.DataFrame(
        {"record_id": [f"R{i}" for i in range(n)], "patient_id": "P", "fold": 1, "source": "made"}
    )
    return Records(signals, 0.002, 100.0, table, np.zeros((n, 2)), ("A", "B"))


def two_means(windows: torch.Tensor) -> torch.Tensor:
    """A model whose logits are the means of leads I and aVR."""
    return windows[:, [0, 3]].mean(dim=2) * 20


@pytest.mark.parametrize("time", [1000, 200])
def test_predictions_are_the_mean_of_the_windows(time, monkeypatch):
    monkeypatch.setattr(windows, "WINDOWS_TOGETHER", 16)  # two records
    records, chosen = make_records(time=time), np.array([4, 0, 7])
    found = windows.predict_windows(two_means, records, chosen)
    signals = np.nan_to_num(records.millivolts(chosen))
    starts = window_starts(time, 250, 125)
    logits = np.stack(
        [20 * signals[:, [0, 3], start : start + 250].mean(axis=2) for start in starts]
    )
    assert (
        found.dtype == np.float32
        and found.shape == (3, 2)
        and len(starts) == (7 if time == 1000 else 1)
    )
    assert np.allclose(found, (1 / (1 + np.exp(-logits))).mean(axis=0), atol=1e-5)


def test_a_network_on_frozen_encoders_answers_the_mean_features_of_each_ones_windows():
    class OnEncoders(torch.nn.Module):
        encoders, windows = [two_means, lambda x: 3 * two_means(x) ** 2], (2.5, 4.0)

        def answer(self, features: torch.Tensor) -> torch.Tensor:
            return features[:, :2] * features[:, 2:]

    records, chosen = make_records(), np.array([4, 0, 7])
    features = [
        windows.encode_windows(encoder, records, chosen, seconds)
        for encoder, seconds in zip(OnEncoders.encoders, OnEncoders.windows, strict=True)
    ]
    logits = features[0] * features[1]
    found = windows.predict_windows(OnEncoders(), records, chosen)
    assert np.allclose(found, 1 / (1 + np.exp(-logits)), atol=1e-6)


class Dropping(torch.nn.Module):
    """A model that answers differently in training."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(two_means(windows), training=self.training)


def test_prediction_is_made_in_evaluation_mode_and_the_mode_is_given_back():
    model = torch.nn.Sequential(Dropping(), torch.nn.Identity().eval())
    found = windows.predict_windows(model, make_records(), np.arange(9))
    assert model.training and model[0].training and not model[1].training
    assert np.array_equal(found, windows.predict_windows(two_means, make_records(), np.arange(9)))


def test_a_diverged_model_is_named_with_the_record():
    def diverged(windows: torch.Tensor) -> torch.Tensor:
        return two_means(windows) * float("nan")

    with pytest.raises(DataError, match="record R2"):
        windows.predict_windows(diverged, make_records(), np.array([2, 3]))
    with pytest.raises(DataError, match="no record to predict"):
        windows.predict_windows(two_means, make_records(), np.array([], int))
