"""How good a classifier is and how sure that is: measures, thresholds, patient bootstrap, test-time windows.

Targets are 0/1 `(n, classes)` and scores are real numbers of the same shape, higher for more likely. A class can be
measured only where it has both a positive and a negative record; the others are called absent and always named.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import coverage_error, fbeta_score, hamming_loss, label_ranking_loss, precision_recall_curve

from ecglib.batches import to_millivolts
from ecglib.errors import DataError
from ecglib.records import Records

DRAWS_TOGETHER = 32  # bootstrap draws computed at once: few enough to stay in the processor's cache
CELLS_TOGETHER = 2**23  # and never more weights (records x draws) than this at once


class AbsentClassWarning(UserWarning):
    """A class has no positive or no negative record, so a mean over classes leaves it out."""


class Interval(NamedTuple):
    """A measured value with the lower and upper limit of its interval."""

    value: float
    low: float
    high: float


class Ranking(NamedTuple):
    """One class's scores, sorted once: everything that a weighted rank statistic needs.

    positives and negatives are record positions in ascending order of score; below and up_to count, for each positive,
    the negatives with a smaller score and with a score not larger; peers counts the positives with a smaller score.
    """

    positives: np.ndarray
    negatives: np.ndarray
    below: np.ndarray
    up_to: np.ndarray
    peers: np.ndarray


Statistic = Callable[[Ranking, np.ndarray], np.ndarray]  # one class and record weights (n, draws) -> (draws,)


def rank_class(positive: np.ndarray, scores: np.ndarray) -> Ranking:
    """Sort the scores `(n,)` of one class with its mask of positive records `(n,)`."""
    order = np.argsort(scores, kind="stable")
    positives, negatives = order[positive[order]], order[~positive[order]]
    high, low = scores[positives], scores[negatives]
    return Ranking(
        positives, negatives, np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right"),
        np.searchsorted(high, high, "left"),
    )  # fmt: skip


def rank_classes(targets: np.ndarray, scores: np.ndarray) -> list[Ranking]:
    """One `Ranking` a class of targets and scores `(n, classes)`; DataError where they do not fit."""
    targets, scores = _check(targets, scores)
    return [rank_class(targets[:, c], scores[:, c]) for c in range(targets.shape[1])]


def weighted_auroc(ranking: Ranking, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for record weights `(n, draws)`, `(draws,)`; a tie counts half; NaN where absent."""
    won = _running_sum(weights[ranking.negatives])
    positive = weights[ranking.positives]
    # Doubled wins stay whole numbers for whole weights, so that ties are counted without rounding.
    doubled = np.einsum("id,id->d", won[ranking.below] + won[ranking.up_to], positive)
    return _divide(doubled, 2 * positive.sum(axis=0) * won[-1])


def weighted_average_precision(ranking: Ranking, weights: np.ndarray) -> np.ndarray:
    """Mean precision at the positives for record weights `(n, draws)`, `(draws,)`; equal scores share one precision."""
    positive = weights[ranking.positives]
    above_negative, above_positive = _running_sum(weights[ranking.negatives]), _running_sum(positive)
    positives, negatives = above_positive[-1], above_negative[-1]
    hits = positives - above_positive[ranking.peers]
    precision = _divide(hits, hits + negatives - above_negative[ranking.below])
    total = np.einsum("id,id->d", np.nan_to_num(precision), positive)
    return np.where(negatives > 0, _divide(total, positives), np.nan)


STATISTICS: dict[str, Statistic] = {"auroc": weighted_auroc, "average_precision": weighted_average_precision}


def class_auroc(targets: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """ROC area of each class `(classes,)`, NaN where absent; weights `(n,)`, or `(draws, n)` for `(draws, classes)`."""
    return _class_statistic(weighted_auroc, targets, scores, weights)


def class_average_precision(targets: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Average precision of each class `(classes,)`, NaN where absent; weights as in `class_auroc`."""
    return _class_statistic(weighted_average_precision, targets, scores, weights)


def absent_classes(targets: np.ndarray, classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the classes of `(n, classes)` that have no positive or no negative record."""
    targets = np.asarray(targets).astype(bool)
    usable = targets.any(axis=0) & ~targets.all(axis=0)
    return tuple(name for name, present in zip(_names(classes, targets.shape[1]), usable, strict=True) if not present)


def macro_auroc(targets: np.ndarray, scores: np.ndarray, classes: Sequence[str] | None = None) -> float:
    """Mean ROC area over the classes present; an `AbsentClassWarning` names the others. DataError if none is."""
    return _mean_over_present(class_auroc(targets, scores), targets, classes)


def macro_auprc(targets: np.ndarray, scores: np.ndarray, classes: Sequence[str] | None = None) -> float:
    """Mean average precision over the classes present; absent ones are treated as in `macro_auroc`."""
    return _mean_over_present(class_average_precision(targets, scores), targets, classes)


def choose_thresholds(
    targets: np.ndarray, scores: np.ndarray, beta: float = 2, classes: Sequence[str] | None = None
) -> np.ndarray:
    """Threshold `(classes,)` that maximises F_beta of each class on validation data; NaN without a positive record.

    It lies halfway between the best score and the next lower one, so that `>` and `>=` give the same predictions.
    Of equal maxima the lowest is taken (most sensitive). Classes without a threshold are named in a warning.
    """
    targets, scores = _check(targets, scores)
    found = targets.any(axis=0)
    if not found.all():
        _warn_absent([_names(classes, len(found))[c] for c in np.flatnonzero(~found)], "gets no threshold")
    thresholds = [_best_threshold(targets[:, c], scores[:, c], beta) if found[c] else np.nan for c in range(len(found))]
    return np.array(thresholds)


def _best_threshold(positive: np.ndarray, scores: np.ndarray, beta: float) -> float:
    """Threshold of one class just below the score where F_beta is largest."""
    precision, recall, candidates = precision_recall_curve(positive, scores)
    precision, recall = precision[:-1], recall[:-1]  # the last point, recall 0, belongs to no score
    f_beta = _divide((1 + beta**2) * precision * recall, beta**2 * precision + recall)
    best = int(np.nanargmax(f_beta))
    if best == 0:
        return float(np.nextafter(candidates[0], -np.inf))
    return float(candidates[best - 1] + (candidates[best] - candidates[best - 1]) / 2)


def ranking_report(
    targets: np.ndarray, scores: np.ndarray, thresholds: np.ndarray, classes: Sequence[str] | None = None
) -> dict[str, float | tuple[str, ...]]:
    """The measures of the CE-SSL paper (supplement, section 1) and Hamming loss: seven numbers, two lists of names.

    `absent` names the classes without a positive or negative record: they count in ranking loss, coverage and Hamming
    loss only. `without_threshold` (NaN in thresholds `(classes,)`): they are also left out of Hamming loss, F2 and G2.
    A record without any label counts 0 in ranking loss and coverage, as in scikit-learn. DataError for one class only.
    """
    targets, scores = _check(targets, scores)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    names = _names(classes, targets.shape[1])
    if len(names) < 2 or thresholds.shape != (len(names),):
        raise DataError(
            f"The ranking measures need two classes or more and one threshold each, not {len(names)} classes with "
            f"thresholds {thresholds.shape}."
        )
    present, decided = targets.any(axis=0) & ~targets.all(axis=0), np.isfinite(thresholds)
    predicted, both = scores > thresholds, present & decided
    return {
        "ranking_loss": float(label_ranking_loss(targets, scores)),
        "coverage": float(coverage_error(targets, scores)),
        "macro_auroc": float(_mean_finite(class_auroc(targets, scores))),
        "mean_average_precision": float(_mean_finite(class_average_precision(targets, scores))),
        "macro_f2": _macro_f(targets[:, both], predicted[:, both], beta=2),
        "macro_g2": _macro_g(targets[:, both], predicted[:, both], beta=2),
        "hamming_loss": float(hamming_loss(targets[:, decided], predicted[:, decided])) if decided.any() else np.nan,
        "absent": tuple(np.array(names)[~present].tolist()),
        "without_threshold": tuple(np.array(names)[~decided].tolist()),
    }


def _macro_f(targets: np.ndarray, predicted: np.ndarray, beta: float) -> float:
    """Mean F_beta over the columns, NaN where there is none; one by one, for a single column is not multi-label."""
    if not targets.shape[1]:
        return np.nan
    return float(np.mean([fbeta_score(*pair, beta=beta, zero_division=0) for pair in zip(targets.T, predicted.T)]))


def _macro_g(targets: np.ndarray, predicted: np.ndarray, beta: float) -> float:
    """Mean G_beta = TP / (TP + FP + beta FN) over the columns, NaN where there is none."""
    hits, alarms, missed = ((a & b).sum(axis=0) for a, b in
                            ((targets, predicted), (~targets, predicted), (targets, ~predicted)))  # fmt: skip
    return float(_mean_finite(_divide(hits, hits + alarms + beta * missed)))


def expected_calibration_error(targets: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """Mean over classes of sum_b (n_b / n) |share of positives - mean probability| over equal bins b of [0, 1]."""
    targets, probabilities = _check(targets, probabilities)
    _require_probabilities(probabilities)
    return float(_weighted_calibration(targets, probabilities[None], np.ones((len(targets), 1)), bins)[0])


def _require_probabilities(values: np.ndarray) -> None:
    """DataError where values do not lie between 0 and 1."""
    if not (values.min() >= 0 and values.max() <= 1):  # refuses a NaN, too
        raise DataError("Calibration is measured on probabilities between 0 and 1; apply the sigmoid to logits first.")


def _weighted_calibration(targets: np.ndarray, models: np.ndarray, weights: np.ndarray, bins: int) -> np.ndarray:
    """Calibration error on each draw, mean over `models` `(repeats, n, classes)`; weights `(n, draws)`: `(draws,)`."""
    errors = []
    for probabilities in models:
        place = np.minimum((probabilities * bins).astype(int), bins - 1)
        for truth, told, bin_of in zip(targets.T, probabilities.T, place.T, strict=True):
            gap = np.zeros((bins, len(truth)))
            gap[bin_of, np.arange(len(truth))] = truth - told
            errors.append(np.abs(gap @ weights).sum(axis=0))
    return np.mean(errors, axis=0) / weights.sum(axis=0)


def bootstrap_interval(
    targets: np.ndarray, scores: np.ndarray, groups: Sequence, draws: int = 1000, seed: int = 0, level: float = 0.95,
    statistic: str = "auroc", classes: Sequence[str] | None = None,
) -> Interval:  # fmt: skip
    """Macro statistic with its patient-cluster percentile bootstrap interval (2.5 to 97.5 % by default).

    groups `(n,)` are patients, drawn with replacement, all records of one together. scores `(n, classes)`, or
    `(repeats, n, classes)` for models of several seeds: their mean is measured on the same draws. A class absent in a
    draw leaves that draw's mean; one absent in all records is named in a warning. statistic: auroc, average_precision.
    """
    value, drawn = _bootstrap(targets, [scores], groups, draws, seed, statistic, classes)
    return _percentiles(value[0], drawn[0], level)


def area_intervals(
    targets: np.ndarray, scores: np.ndarray, groups: Sequence, classes: Sequence[str], draws: int = 1000,
    seed: int = 0, level: float = 0.95,
) -> dict[str, Interval]:  # fmt: skip
    """macro_auroc, mean_average_precision and auroc:<class> of each class present, of one model `(n, classes)`.

    The intervals are those of `bootstrap_interval`, all from one pass over the draws.
    """
    rankings = rank_classes(targets, scores)
    _require_present(targets, classes)

    def areas(weights: np.ndarray) -> np.ndarray:
        return np.array([[statistic(ranking, weights) for ranking in rankings] for statistic in STATISTICS.values()])

    value = areas(np.ones((len(targets), 1)))[..., 0]
    drawn = np.concatenate([areas(weights) for weights in draw_weights(groups, len(targets), draws, seed)], axis=2)
    macro, macro_drawn = _mean_finite(value, axis=1), _mean_finite(drawn, axis=1)
    names = ("macro_auroc", "mean_average_precision")
    intervals = {name: _percentiles(macro[place], macro_drawn[place], level) for place, name in enumerate(names)}
    return intervals | {f"auroc:{label}": _percentiles(value[0, column], drawn[0, column], level)
                        for column, label in enumerate(classes) if not np.isnan(value[0, column])}  # fmt: skip


def paired_difference(
    targets: np.ndarray, scores_a: np.ndarray, scores_b: np.ndarray, groups: Sequence, draws: int = 1000,
    seed: int = 0, level: float = 0.95, statistic: str = "auroc", classes: Sequence[str] | None = None,
) -> Interval:  # fmt: skip
    """Macro statistic of a minus that of b, both on the same patient draws; the rest as in `bootstrap_interval`."""
    value, drawn = _bootstrap(targets, [scores_a, scores_b], groups, draws, seed, statistic, classes)
    return _percentiles(value[0] - value[1], drawn[0] - drawn[1], level)


def paired_f2(
    targets: np.ndarray, predicted_a: np.ndarray, predicted_b: np.ndarray, groups: Sequence, draws: int = 1000,
    seed: int = 0, level: float = 0.95,
) -> Interval:  # fmt: skip
    """Macro F2 of a minus that of b on the same patient draws, for decisions `(repeats, n, classes)`.

    Repeats are models of several seeds, whose F2 is averaged. A class without a positive record in a draw, or for which
    nothing was decided (NaN), leaves the mean of that draw or model.
    """
    models = [np.asarray(predicted_a, dtype=np.float64), np.asarray(predicted_b, dtype=np.float64)]
    targets = np.asarray(targets).astype(np.float64)

    def macro(weights: np.ndarray) -> list[np.ndarray]:
        return [_mean_finite(_weighted_f2(targets, model, weights), axis=2).mean(axis=0) for model in models]

    return _drawn_difference(macro, groups, len(targets), draws, seed, level)


def paired_calibration_error(
    targets: np.ndarray, probabilities_a: np.ndarray, probabilities_b: np.ndarray, groups: Sequence, draws: int = 1000,
    seed: int = 0, level: float = 0.95, bins: int = 15,
) -> Interval:  # fmt: skip
    """Expected calibration error of a minus that of b on the same patient draws, for `(repeats, n, classes)` each.

    Repeats are models of several seeds, whose errors are averaged. On a draw errors are larger than on the whole, for
    bins are noisier, and those of a well calibrated model more so. So this is the basic bootstrap, which takes that
    shift off: 2 x value - the percentiles.
    """
    models = [np.asarray(probabilities_a, dtype=np.float64), np.asarray(probabilities_b, dtype=np.float64)]
    targets = np.asarray(targets).astype(np.float64)
    for model in models:
        _require_probabilities(model)

    def error(weights: np.ndarray) -> list[np.ndarray]:
        return [_weighted_calibration(targets, model, weights, bins) for model in models]

    value, low, high = _drawn_difference(error, groups, len(targets), draws, seed, level)
    return Interval(value, 2 * value - high, 2 * value - low)


def _drawn_difference(measure: Callable[[np.ndarray], list[np.ndarray]], groups: Sequence, records: int, draws: int,
                      seed: int, level: float) -> Interval:  # fmt: skip
    """Difference of the two values that `measure(weights (n, draws))` gives, each `(draws,)`, with its interval."""
    first, second = measure(np.ones((records, 1)))
    drawn = np.concatenate([measure(weights) for weights in draw_weights(groups, records, draws, seed)], axis=1)
    return _percentiles(float(first[0] - second[0]), drawn[0] - drawn[1], level)


def _weighted_f2(targets: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F2 = 5 TP / (4 P + predicted) of each repeat, draw and class, `(repeats, draws, classes)`."""
    hits = np.einsum("rnc,nd->rdc", predicted * targets, weights)
    called = np.einsum("rnc,nd->rdc", predicted, weights)
    positives = weights.T @ targets
    return np.where(positives > 0, _divide(5 * hits, 4 * positives + called), np.nan)


def labels_needed(
    targets: np.ndarray, curve: Mapping[float, np.ndarray], goal: np.ndarray, groups: Sequence, draws: int = 1000,
    seed: int = 0, level: float = 0.95, classes: Sequence[str] | None = None,
) -> Interval:  # fmt: skip
    """Smallest share of the labels with which a method reaches the macro AUROC of `goal`, with its interval.

    curve maps each label fraction to the method's scores, goal are those of the model to be reached, both
    `(n, classes)` or `(repeats, n, classes)`. Between fractions the curve is a straight line over log(fraction); the
    question is asked anew on every patient draw. infinity: not reached with all labels (`high` is infinite where that
    happens in more draws than the interval leaves out); the smallest fraction means "this or fewer".
    """
    fractions = sorted(curve)
    models = [goal, *(curve[fraction] for fraction in fractions)]
    value, drawn = _bootstrap(targets, models, groups, draws, seed, "auroc", classes)
    every = np.concatenate([value[:, None], drawn], axis=1)
    needed = [first_reached(fractions, column[1:], column[0]) for column in every.T]
    low, high = np.quantile(needed[1:], [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return Interval(needed[0], float(low), float(high))


def first_reached(fractions: list[float], values: np.ndarray, goal: float) -> float:
    """Where the line through (log fraction, value) first reaches `goal`; infinity where it does not."""
    for place, value in enumerate(values):
        if value >= goal:
            if place == 0:
                return float(fractions[0])
            share = (goal - values[place - 1]) / (value - values[place - 1])
            below, above = np.log(fractions[place - 1]), np.log(fractions[place])
            return float(np.exp(below + share * (above - below)))
    return float(np.inf)


def _bootstrap(
    targets: np.ndarray, models: list[np.ndarray], groups: Sequence, draws: int, seed: int, statistic: str,
    classes: Sequence[str] | None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Macro statistic of each model `(models,)` and on each draw `(models, draws)`."""
    if statistic not in STATISTICS:
        raise DataError(f"The statistic {statistic!r} is unknown; choose one of {', '.join(STATISTICS)}.")
    if draws < 1:
        raise DataError(f"A bootstrap of {draws} draws gives no interval; ask for 1,000.")
    models = [scores if np.ndim(scores) == 3 else np.asarray(scores)[None] for scores in models]
    rankings = [[rank_classes(targets, scores) for scores in model] for model in models]
    _require_present(targets, classes)

    def macro(weights: np.ndarray) -> list[np.ndarray]:
        return [_macro_of_repeats(STATISTICS[statistic], model, weights) for model in rankings]

    whole = np.ones((len(targets), 1))
    drawn = [macro(weights) for weights in draw_weights(groups, len(targets), draws, seed)]
    return np.array(macro(whole))[:, 0], np.concatenate(drawn, axis=1)


def _macro_of_repeats(statistic: Statistic, repeats: list[list[Ranking]], weights: np.ndarray) -> np.ndarray:
    """Mean over repeats of the mean over the classes present, for record weights `(n, draws)`: `(draws,)`."""
    each = np.array([[statistic(ranking, weights) for ranking in classes] for classes in repeats])
    return _mean_finite(each, axis=1).mean(axis=0)


def draw_weights(groups: Sequence, records: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each record was drawn, in chunks `(n, some draws)`; the draws do not depend on the chunks."""
    codes, patients = pd.factorize(np.asarray(groups), sort=True)
    if codes.shape != (records,) or (codes < 0).any():
        raise DataError(
            f"The bootstrap needs one patient for each of {records} records, {(codes >= 0).sum()} were given; "
            "pass the table's patient_id."
        )
    generator, count = np.random.default_rng(seed), len(patients)
    together = max(1, min(DRAWS_TOGETHER, CELLS_TOGETHER // records))
    for start in range(0, draws, together):
        size = min(together, draws - start)
        chosen = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(chosen.ravel(), minlength=size * count).reshape(size, count)
        yield times.T[codes].astype(np.float64)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First samples of overlapping windows that cover `length` samples; the last one is moved back to end with them."""
    if min(length, window, stride) < 1:
        raise DataError(f"Length {length}, window {window} and stride {stride} must be at least one sample each.")
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def predict_windows(
    encode: Callable[[torch.Tensor], torch.Tensor], records: Records, indices: np.ndarray, window_seconds: float = 2.5,
    stride_seconds: float = 1.25, batch_size: int = 256, device: str | torch.device = "cpu",
) -> np.ndarray:  # fmt: skip
    """Mean of the sigmoid outputs over overlapping windows, float32 `(n, classes)`: 7 windows for a 10 s record.

    encode maps windows `(b, 12, time)` in mV to logits `(b, classes)`; a module is put in evaluation mode meanwhile.
    Missing samples become 0 mV; a record shorter than the window is used whole. batch_size counts windows.
    """
    return _mean_over_windows(
        encode, torch.sigmoid, records, indices, window_seconds, stride_seconds, batch_size, device
    )


def encode_windows(
    encode: Callable[[torch.Tensor], torch.Tensor], records: Records, indices: np.ndarray, window_seconds: float = 2.5,
    stride_seconds: float = 1.25, batch_size: int = 256, device: str | torch.device = "cpu",
) -> np.ndarray:  # fmt: skip
    """Features of each record, float32 `(n, features)`: their mean over the windows of `predict_windows`."""
    return _mean_over_windows(
        encode, lambda features: features, records, indices, window_seconds, stride_seconds, batch_size, device
    )


def _mean_over_windows(
    encode: Callable[[torch.Tensor], torch.Tensor], finish: Callable[[torch.Tensor], torch.Tensor], records: Records,
    indices: np.ndarray, window_seconds: float, stride_seconds: float, batch_size: int, device: str | torch.device,
) -> np.ndarray:  # fmt: skip
    """Mean of `finish(encode(window))` over each record's windows, a few records at a time."""
    window, stride = (max(1, round(seconds * records.sampling_rate)) for seconds in (window_seconds, stride_seconds))
    starts = window_starts(records.signals.shape[2], window, stride)
    indices, together = np.arange(len(records))[indices], max(1, batch_size // len(starts))  # a mask will do as well
    if not len(indices):
        raise DataError("There is no record to predict; check the split.")
    was_training = getattr(encode, "training", False)
    if was_training:
        encode.eval()
    parts = []
    try:
        with torch.inference_mode():
            for start in range(0, len(indices), together):
                # The int16 counts travel and are scaled on the device.
                counts = torch.from_numpy(np.ascontiguousarray(records.signals[indices[start : start + together]]))
                signals = to_millivolts(counts.to(device), records.scale)
                windows = torch.stack([signals[:, :, first : first + window] for first in starts], dim=1)
                outputs = finish(encode(windows.flatten(0, 1)).float())
                parts.append(outputs.unflatten(0, (len(counts), len(starts))).mean(dim=1).cpu().numpy())
    finally:
        if was_training:
            encode.train()
    return _require_finite(np.concatenate(parts), records.table["record_id"].iloc[indices])


def _require_finite(probabilities: np.ndarray, record_ids: pd.Series) -> np.ndarray:
    """The probabilities, or DataError naming the first record whose score is not a number."""
    wrong = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
    if len(wrong):
        raise DataError(
            f"The model gives no number for record {record_ids.iloc[wrong[0]]} ({len(wrong)} records in all); "
            "its training has diverged, train it again with a smaller learning rate."
        )
    return probabilities


def _class_statistic(
    statistic: Statistic, targets: np.ndarray, scores: np.ndarray, weights: np.ndarray | None
) -> np.ndarray:
    """The statistic of each class; the leading shape is that of the weights without their records."""
    rankings, count = rank_classes(targets, scores), len(targets)
    weights = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape[-1:] != (count,):
        raise DataError(f"Weights {weights.shape} do not fit {count} records; give one weight a record.")
    columns = np.ascontiguousarray(np.atleast_2d(weights).T)
    each = [statistic(ranking, columns) for ranking in rankings]
    return np.stack(each, axis=1).reshape(*weights.shape[:-1], len(rankings))


def _check(targets: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets as booleans and scores as floats, both `(n, classes)`, or DataError."""
    targets, scores = np.asarray(targets), np.asarray(scores)
    if targets.ndim != 2 or targets.shape != scores.shape or not targets.size:
        raise DataError(f"Targets {targets.shape} and scores {scores.shape} must be equal in shape (records, classes).")
    if not np.isin(targets, (0, 1)).all():
        raise DataError("The targets hold values other than 0 and 1; evaluate against labels, not soft targets.")
    wrong = np.argwhere(~np.isfinite(scores))
    if len(wrong):
        raise DataError(
            f"The score of record {wrong[0, 0]}, class {wrong[0, 1]} (counted from 0) is not a number; train the model "
            "again with a smaller learning rate, or fill the scores in."
        )
    return targets.astype(bool), scores.astype(np.float64)


def _names(classes: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """The class names, or numbers in their place."""
    names = tuple(classes) if classes is not None else tuple(f"class {number}" for number in range(count))
    if len(names) != count:
        raise DataError(f"{len(names)} class names were given for {count} classes; give one a class.")
    return names


def _warn_absent(names: Sequence[str], consequence: str) -> None:
    """Name the absent classes in one warning."""
    listed, plural = ", ".join(names), len(names) > 1
    message = f"{'Classes' if plural else 'Class'} without positive or negative records: {listed}; "
    warnings.warn(message + f"{'each' if plural else 'it'} {consequence}.", AbsentClassWarning, stacklevel=4)


def _require_present(targets: np.ndarray, classes: Sequence[str] | None) -> None:
    """Warn of absent classes; DataError where all are absent."""
    absent = absent_classes(targets, classes)
    if len(absent) == np.shape(targets)[1]:
        raise DataError("No class has both positive and negative records: nothing can be measured; use more records.")
    if absent:
        _warn_absent(absent, "is left out of the mean")


def _mean_over_present(values: np.ndarray, targets: np.ndarray, classes: Sequence[str] | None) -> float:
    """Mean of the class values over the classes that are present, the others named in a warning."""
    _require_present(targets, classes)
    return float(_mean_finite(values))


def _mean_finite(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean over the entries that are not NaN; NaN, without a warning, where there is none."""
    known = ~np.isnan(values)
    return _divide(np.where(known, values, 0).sum(axis=axis), known.sum(axis=axis))


def _percentiles(value: float, drawn: np.ndarray, level: float) -> Interval:
    """The percentile interval; a draw without any measurable class has no say."""
    if not 0 < level < 1:
        raise DataError(f"An interval of level {level} does not exist; give a share between 0 and 1, such as 0.95.")
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))


def _running_sum(weights: np.ndarray) -> np.ndarray:
    """Sums over the first 0, 1, ... n rows, `(n + 1, draws)`."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient as float, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def score_rows(records: Records, split: Mapping[str, np.ndarray], probabilities: Mapping[str, np.ndarray],
               labelled_records: int, labelled_patients: int) -> list[dict]:  # fmt: skip
    """The metrics of one model as rows of the study's tables, for validation (fold 9) and test (fold 10).

    probabilities holds `(n, classes)` for both splits. Thresholds come from validation. Areas carry patient-bootstrap
    intervals; the measures that need a threshold or a ranking are given without. n_records and n_patients count the
    *labelled training* data behind the model.
    """
    classes, rows = records.classes, []
    targets = {name: records.targets[split[name]] for name in probabilities}
    thresholds = choose_thresholds(targets["validation"], probabilities["validation"], classes=classes)
    for name, scores in probabilities.items():
        patients = records.table["patient_id"].to_numpy()[split[name]]
        intervals = area_intervals(targets[name], scores, patients, classes)
        report = ranking_report(targets[name], scores, thresholds, classes)
        intervals |= {measure: Interval(value, np.nan, np.nan) for measure, value in report.items()
                      if measure not in intervals and isinstance(value, float)}  # fmt: skip
        rows += [{"split": name, "metric": metric, **interval._asdict(), "n_records": labelled_records,
                  "n_patients": labelled_patients} for metric, interval in intervals.items()]  # fmt: skip
    return rows
