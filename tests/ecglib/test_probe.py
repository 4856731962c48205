"""The batched probes against scikit-learn, the choice of the penalty, and what bad input says."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from ecglib import probe
from ecglib.errors import DataError
from ecglib.evaluate.metrics import AbsentClassWarning, macro_auroc
from ecglib.probe import (
    Probes,
    choose_penalty,
    fit_probes,
    groups_of_like_size,
    probe_layer,
    probe_subsets,
    standardise,
)
from ecglib.train import TrainingError


def make_case(records: int = 400, width: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features with offsets, and targets of three classes with 50, 20 and 7 % positive
    records.
    """
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(records, width)) @ generator.normal(size=(width, width)) + 3
    noisy = features @ generator.normal(size=(width, 3)) / width + generator.normal(
        size=(records, 3)
    )
    return features, (noisy > np.quantile(noisy, [0.5, 0.8, 0.93], axis=0).diagonal()).astype(
        np.uint8
    )


def scikit_learn(
    features: np.ndarray, target: np.ndarray, penalty: float
) -> tuple[np.ndarray, float]:
    """Weights and bias of one probe by Newton's method, far below the comparison's tolerance."""
    model = LogisticRegression(C=1 / penalty, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    model.fit(features, target)
    return model.coef_[0], model.intercept_[0]


@pytest.mark.parametrize("records, width", [(400, 24), (400, 1), (60, 90), (26, 25), (25, 26)])
def test_probes_equal_scikit_learn(records, width):
    features, targets = make_case(records, width)
    subsets = [
        np.arange(records),
        np.arange(0, records, 2),
        np.r_[0:records:2, 1 : records // 3 : 2],
    ]
    penalties = (0.03, 1.0, 300.0)
    targets[:2] = [[0, 0, 0], [1, 1, 1]]  # in all three subsets but the last
    targets[2:4] = [[1, 1, 1], [0, 0, 0]]
    targets[4:6] = 1 - targets[:2]
    fitted = fit_probes(features, targets, subsets, penalties)
    assert fitted.weights.shape == (3, 3, 3, width) and fitted.bias.shape == (3, 3, 3)
    for s, subset in enumerate(subsets):
        for p, penalty in enumerate(penalties):
            for c in range(3):
                weights, bias = scikit_learn(features[subset], targets[subset, c], penalty)
                np.testing.assert_allclose(fitted.weights[s, p, c].numpy(), weights, atol=2e-5)
                assert float(fitted.bias[s, p, c]) == pytest.approx(bias, abs=1e-4)


def test_separable_subsets_with_a_weak_penalty_equal_scikit_learn():
    features, targets = make_case(80, 200)
    fitted = fit_probes(features, targets[:, :1], [np.arange(80)], [1e-4])
    weights, bias = scikit_learn(features, targets[:, 0], 1e-4)
    np.testing.assert_allclose(fitted.weights[0, 0, 0].numpy(), weights, atol=1e-5)
    assert float(fitted.bias[0, 0, 0]) == pytest.approx(bias, abs=1e-4)


def test_the_gradient_is_zero_and_the_bound_holds(monkeypatch):
    features, targets = make_case(300, 40, seed=3)
    monkeypatch.setattr(probe, "TOLERANCE", 1e-2)
    loose = fit_probes(features, targets, [np.arange(300)], [0.1, 10])
    monkeypatch.setattr(probe, "TOLERANCE", 1e-9)
    exact = fit_probes(features, targets, [np.arange(300)], [0.1, 10])
    distance = (loose.weights - exact.weights).norm(dim=-1)
    assert 1e-12 < distance.max() <= 1e-2
    residual = (
        1 / (1 + np.exp(-features @ exact.weights[0, 0].numpy().T - exact.bias[0, 0].numpy()))
        - targets
    )
    np.testing.assert_allclose(residual.sum(axis=0), 0, atol=1e-8)
    np.testing.assert_allclose(
        residual.T @ features + 0.1 * exact.weights[0, 0].numpy(), 0, atol=1e-7
    )


def test_a_hard_start_needs_the_line_search():
    """A record far out makes the full Newton step rise; the solution is scikit-learn's all the
    same.
    """
    features, targets = make_case(200, 5, seed=1)
    features[0] *= 300
    targets[0, 0] = 1 - targets[0, 0]
    fitted = fit_probes(features, targets[:, :1], [np.arange(200)], [1e-3])
    weights, _ = scikit_learn(features, targets[:, 0], 1e-3)
    np.testing.assert_allclose(fitted.weights[0, 0, 0].numpy(), weights, atol=1e-5)


def test_grouping_orders_and_equal_subsets_do_not_change_the_probes():
    features, targets = make_case()
    generator = np.random.default_rng(0)
    subsets = [generator.permutation(400)[:size] for size in (100, 90, 300, 120, 100)] + [
        np.arange(400)
    ] * 2
    # 400 and 300, 120 to 90; the equal ones once
    assert [len(group) for group in groups_of_like_size(subsets, 10_000)] == [2, 4]
    together = fit_probes(features, targets, subsets, [1, 100])
    assert torch.equal(together.weights[5], together.weights[6])
    again = fit_probes(features, targets, subsets, [1, 100])
    assert torch.equal(together.weights, again.weights) and torch.equal(together.bias, again.bias)
    for place, subset in enumerate(subsets):
        alone = fit_probes(features, targets, [subset[::-1]], [100, 1])
        torch.testing.assert_close(
            alone.weights[0].flip(0), together.weights[place], atol=2e-5, rtol=0
        )


def test_memory_bounds_the_groups():
    subsets = [np.arange(start, start + 50) for start in range(5)]
    assert [len(group) for group in groups_of_like_size(subsets, 100)] == [2, 2, 1]
    assert [len(group) for group in groups_of_like_size(subsets, 10)] == [1] * 5


def test_a_mask_is_a_subset_and_tensors_are_taken():
    features, targets = make_case()
    mask = np.arange(400) % 3 == 0
    from_mask = fit_probes(
        torch.from_numpy(features).float(), torch.from_numpy(targets), [mask], [1]
    )
    from_places = fit_probes(features.astype(np.float32), targets, [np.flatnonzero(mask)], [1])
    assert torch.equal(from_mask.weights, from_places.weights)


def test_absent_classes_get_a_constant_score_and_one_warning():
    features, targets = make_case()
    targets[:40, 1], targets[:20, 2] = 0, 1
    with pytest.warns(AbsentClassWarning) as caught:
        fitted = fit_probes(
            features,
            targets,
            {"1 %": np.arange(40), "tiny": np.arange(20), "all": np.arange(400)},
            [1, 10],
            ["NORM", "MI", "HYP"],
        )
    assert len(caught) == 1
    assert str(caught[0].message).endswith("MI in subset 1 %, tiny; HYP in subset tiny.")
    assert not fitted.weights[:2, :, 1].any() and not fitted.weights[1, :, 2].any()
    assert fitted.bias[0, :, 1].tolist() == pytest.approx([np.log(0.5 / 40.5)] * 2)
    assert fitted.bias[1, :, 2].tolist() == pytest.approx([np.log(20.5 / 0.5)] * 2)
    assert fitted.weights.isfinite().all() and fitted.bias.isfinite().all()
    weights, _ = scikit_learn(
        features[:20], targets[:20, 0], 10
    )  # the neighbours in the batch are not disturbed
    np.testing.assert_allclose(fitted.weights[1, 1, 0].numpy(), weights, atol=2e-5)


def test_one_record_is_enough_for_constant_scores():
    features, targets = make_case()
    with pytest.warns(AbsentClassWarning):
        fitted = fit_probes(features, targets, [[7]], [1])
    assert not fitted.weights.any() and fitted.bias.isfinite().all()


def test_standardise_uses_the_reference_and_keeps_constant_columns_finite():
    features, _ = make_case()
    features[:, 3] = np.float32(1e4 / 3)
    reference = features[:100]
    scaled = standardise(features, reference).numpy()
    np.testing.assert_allclose(scaled[:100].mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(np.delete(scaled[:100].std(axis=0), 3), 1)
    np.testing.assert_allclose(scaled[:, 3], 0, atol=1e-9)
    np.testing.assert_allclose(
        scaled[200, 5], (features[200, 5] - reference[:, 5].mean()) / reference[:, 5].std()
    )


def logits_of(columns: np.ndarray) -> Probes:
    """Probes of one subset whose logits of class c with penalty p are feature `columns[p][c]` of
    three.
    """
    weights = torch.eye(3, dtype=torch.float64)[torch.from_numpy(columns)]
    return Probes(
        weights[None],
        torch.zeros(1, *columns.shape, dtype=torch.float64),
        tuple(10.0 ** np.arange(3)),
    )


def test_choose_penalty_maximises_the_mean_over_classes_and_takes_the_stronger_of_equals():
    generator = np.random.default_rng(0)
    targets = np.stack([np.arange(40) % 2, np.arange(40) % 4 == 0], axis=1).astype(int)
    perfect, noise = targets.astype(float), generator.normal(size=(40, 1))
    features = np.concatenate([perfect, noise], axis=1)
    assert choose_penalty(
        logits_of(np.array([[0, 2], [0, 1], [2, 1]])), features, targets
    ).tolist() == [1]
    assert choose_penalty(
        logits_of(np.array([[0, 1], [0, 1], [2, 1]])), features, targets
    ).tolist() == [1]
    assert choose_penalty(
        logits_of(np.array([[2, 2], [2, 2], [2, 2]])), features, targets
    ).tolist() == [2]
    unsorted = logits_of(np.array([[0, 1], [0, 1], [0, 1]]))._replace(penalties=(1.0, 50.0, 3.0))
    assert choose_penalty(unsorted, features, targets).tolist() == [1]
    with pytest.warns(AbsentClassWarning, match="without MI"):
        only = np.stack([targets[:, 0], np.zeros(40, int)], axis=1)
        assert (
            choose_penalty(
                logits_of(np.array([[0, 1], [2, 1], [2, 1]])), features, only, ["A", "MI"]
            )[0]
            == 0
        )
    with pytest.raises(DataError, match="no penalty can be chosen"):
        choose_penalty(logits_of(np.array([[0, 1], [2, 1], [2, 1]])), features, np.zeros((40, 2)))


def test_saturated_probabilities_do_not_blur_the_choice():
    features = np.arange(40.0)[:, None] + 50
    targets = (np.arange(40) >= 20).astype(int)[:, None]
    fitted = Probes(
        torch.tensor([[[[1.0]], [[-1.0]]]]).double(), torch.zeros(1, 2, 1).double(), (1.0, 10.0)
    )
    assert choose_penalty(fitted, features, targets).tolist() == [0]


def best_of_scikit_learn(features, targets, subset, validation) -> tuple[float, np.ndarray]:
    """The penalty with the largest macro AUROC on validation, and its logits of all records."""
    logits = {}
    for penalty in probe.PENALTIES:
        pairs = [scikit_learn(features[subset], column[subset], penalty) for column in targets.T]
        weights, bias = zip(*pairs, strict=True)
        logits[penalty] = features @ np.stack(weights, axis=1) + bias
    best = max(
        logits, key=lambda penalty: macro_auroc(targets[validation], logits[penalty][validation])
    )
    return best, logits[best]


def test_probe_subsets_agrees_with_a_loop_of_scikit_learn():
    features, targets = make_case(600, 30, seed=5)
    split = {
        "train": np.arange(400),
        "validation": np.arange(400, 500),
        "test": np.arange(500, 600),
    }
    generator = np.random.default_rng(0)
    subsets = {
        (fraction, seed): generator.permutation(400)[: int(400 * fraction)]
        for fraction in (0.2, 1.0)
        for seed in (0, 1)
    }
    found = probe_subsets(features, targets, subsets, split)
    assert list(found) == list(subsets)
    scaled = (features - features[:400].mean(axis=0)) / features[:400].std(axis=0)
    scaled *= 30**0.5 / np.linalg.norm(scaled, axis=1, keepdims=True)
    for key, subset in subsets.items():
        penalty, logits = best_of_scikit_learn(scaled, targets, subset, split["validation"])
        assert found[key]["penalty"] == penalty
        for name in ("validation", "test"):
            expected = 1 / (1 + np.exp(-logits[split[name]]))
            np.testing.assert_allclose(found[key][f"{name}/probabilities"], expected, atol=1e-5)


def test_a_probe_layer_reads_features_as_they_are():
    features, targets = make_case(600, 30, seed=6)
    features = 5 + 3 * features
    split = {
        "train": np.arange(400),
        "validation": np.arange(400, 500),
        "test": np.arange(500, 600),
    }
    weights, bias = probe_layer(features, targets, np.arange(80), split)
    scaled = (features - features[:400].mean(axis=0)) / features[:400].std(axis=0)
    _, by_hand = best_of_scikit_learn(scaled, targets, np.arange(80), split["validation"])
    np.testing.assert_allclose(features @ weights.numpy().T + bias.numpy(), by_hand, atol=1e-4)


def test_labels_outside_the_training_folds_are_refused():
    features, targets = make_case()
    split = {
        "train": np.arange(300),
        "validation": np.arange(300, 350),
        "test": np.arange(350, 400),
    }
    with pytest.raises(
        DataError, match=r"subset \(0.1, 3\) holds records outside the training folds"
    ):
        probe_subsets(features, targets, {(0.1, 3): np.arange(280, 320)}, split)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"subsets": [np.arange(5), np.empty(0, int)]}, "subset 1 holds no record"),
        ({"subsets": [[]]}, "holds no record"),
        ({"subsets": [np.zeros(400, bool)]}, "holds no record"),
        ({"subsets": [np.arange(401)]}, "does not fit 400 records"),
        ({"subsets": []}, "not 0 subsets"),
        ({"penalties": [1, 0]}, "penalties above 0"),
        ({"penalties": [np.nan]}, "penalties above 0"),
        ({"penalties": []}, "penalties above 0"),
        ({"targets": np.full((400, 3), 0.5)}, "must hold 0 or 1"),
        ({"targets": np.zeros((300, 3))}, "must hold 0 or 1 for each of 400 records"),
        ({"targets": np.zeros(400)}, "must hold 0 or 1"),
        ({"features": np.zeros(400)}, "must be a matrix"),
        ({"classes": ["A"]}, "1 class names were given for 3 classes"),
    ],
)
def test_bad_input_is_said_in_one_sentence(change, message):
    features, targets = make_case()
    given = {
        "features": features,
        "targets": targets,
        "subsets": [np.arange(100)],
        "penalties": [1.0],
    } | change
    with pytest.raises(DataError, match=message):
        fit_probes(**given)


def test_features_that_are_not_numbers_are_named():
    features, targets = make_case()
    features[[17, 90], 2] = np.nan, np.inf
    with pytest.raises(DataError, match=r"position 17 are not all numbers \(2 such records"):
        fit_probes(features, targets, [np.arange(10)], [1])
    with pytest.raises(DataError, match="position 17"):
        standardise(features, features)


def test_probes_of_another_encoder_are_refused():
    features, targets = make_case()
    fitted = fit_probes(features, targets, [np.arange(100)], [1])
    with pytest.raises(DataError, match="fitted on 24 features and cannot score records with 7"):
        fitted.logits(features[:, :7])


def test_a_probe_that_does_not_converge_is_an_error(monkeypatch):
    features, targets = make_case()
    monkeypatch.setattr(probe, "NEWTON_STEPS", 2)
    with pytest.raises(
        TrainingError, match="penalties from 0.01 have not converged in 2 Newton steps"
    ):
        fit_probes(features, targets, [np.arange(400)], [1e5, 0.01])


def test_read_only_arrays_pass_without_a_warning():
    features, targets = make_case()
    features.flags.writeable = targets.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_probes(features, targets, [np.arange(100)], [1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same_probes():
    features, targets = make_case()
    subsets = [np.arange(100), np.arange(20, 110), np.arange(400)]
    here = fit_probes(features, targets, subsets)
    there = fit_probes(torch.from_numpy(features).cuda(), targets, subsets)
    assert there.weights.is_cuda
    torch.testing.assert_close(there.weights.cpu(), here.weights, atol=2e-5, rtol=0)
    chosen = choose_penalty(there, torch.from_numpy(features).cuda(), targets)
    logits = there.at(chosen).logits(torch.from_numpy(features).cuda()).cpu()
    torch.testing.assert_close(logits, here.at(chosen).logits(features), atol=1e-3, rtol=0)
