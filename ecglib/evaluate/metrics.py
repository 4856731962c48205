"""How good a classifier is: rank statistics, thresholds, calibration, the ranking report.

Targets are 0/1 `(n, classes)` and scores are real numbers of the same shape, higher for more
likely. A class can be measured only where it has both a positive and a negative record; the others
are called absent and always named.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import coverage_error, label_ranking_loss, precision_recall_curve

from ecglib.errors import DataError


class AbsentClassWarning(UserWarning):
    """A class has no positive or no negative record, so a mean over classes leaves it out."""


class Ranking(NamedTuple):
    """One class's scores, sorted once: everything that a weighted rank statistic needs.

    positives and negatives are record positions in ascending order of score; below and up_to count,
    for each positive, the negatives with a smaller score and with a score not larger; peers counts
    the positives with a smaller score.
    """

    positives: np.ndarray
    negatives: np.ndarray
    below: np.ndarray
    up_to: np.ndarray
    peers: np.ndarray


# Of one class and record weights (n, draws): (draws,)
Statistic = Callable[[Ranking, np.ndarray], np.ndarray]


def rank_classes(targets: np.ndarray, scores: np.ndarray) -> list[Ranking]:
    """One `Ranking` for each class of targets and scores `(n, classes)`; DataError where they do
    not fit.
    """
    targets, scores = _check(targets, scores)
    rankings = []
    for positive, column in zip(targets.T, scores.T, strict=True):
        order = np.argsort(column, kind="stable")
        positives, negatives = order[positive[order]], order[~positive[order]]
        high, low = column[positives], column[negatives]
        below, up_to = (np.searchsorted(low, high, side) for side in ("left", "right"))
        rankings.append(Ranking(positives, negatives, below, up_to, np.searchsorted(high, high)))
    return rankings


def weighted_auroc(ranking: Ranking, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for record weights `(n, draws)`, `(draws,)`; a tie counts half; NaN
    where absent.
    """
    won = _running_sum(weights[ranking.negatives])
    positive = weights[ranking.positives]
    # Doubled wins stay whole numbers for whole weights, so that ties are counted without rounding.
    doubled = np.einsum("id,id->d", won[ranking.below] + won[ranking.up_to], positive)
    return _divide(doubled, 2 * positive.sum(axis=0) * won[-1])


def weighted_average_precision(ranking: Ranking, weights: np.ndarray) -> np.ndarray:
    """Mean precision at the positives for record weights `(n, draws)`, `(draws,)`; equal scores
    share one precision.
    """
    positive = weights[ranking.positives]
    above_negative = _running_sum(weights[ranking.negatives])
    above_positive = _running_sum(positive)
    positives, negatives = above_positive[-1], above_negative[-1]
    hits = positives - above_positive[ranking.peers]
    precision = _divide(hits, hits + negatives - above_negative[ranking.below])
    total = np.einsum("id,id->d", np.nan_to_num(precision), positive)
    return np.where(negatives > 0, _divide(total, positives), np.nan)


def weighted_f2(targets: np.ndarray, models: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F2 = 5 TP / (4 P + predicted) of decisions `(models, n, classes)` for record weights `(n,
    draws)`, `(models, draws, classes)`; NaN without a positive record or a decision.
    """
    hits = np.einsum("rnc,nd->rdc", models * targets, weights)
    predicted = np.einsum("rnc,nd->rdc", models, weights)
    positives = weights.T @ targets
    return np.where(positives > 0, _divide(5 * hits, 4 * positives + predicted), np.nan)


def weighted_calibration_error(
    targets: np.ndarray, models: np.ndarray, weights: np.ndarray, bins: int
) -> np.ndarray:
    """Expected calibration error, mean over `models` `(models, n, classes)`, for record weights
    `(n, draws)`: `(draws,)`.
    """
    errors = []
    for probabilities in models:
        places = np.minimum((probabilities * bins).astype(int), bins - 1)
        for truth, stated, place in zip(targets.T, probabilities.T, places.T, strict=True):
            gap = np.zeros((bins, len(truth)))
            gap[place, np.arange(len(truth))] = truth - stated
            errors.append(np.abs(gap @ weights).sum(axis=0))
    return np.mean(errors, axis=0) / weights.sum(axis=0)


def class_auroc(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """ROC area of each class `(classes,)`, NaN where absent."""
    return _class_statistic(weighted_auroc, targets, scores)


def class_average_precision(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Average precision of each class `(classes,)`, NaN where absent."""
    return _class_statistic(weighted_average_precision, targets, scores)


def absent_classes(targets: np.ndarray, classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the classes of `(n, classes)` that have no positive or no negative record."""
    targets = np.asarray(targets).astype(bool)
    return _pick(classes, targets.any(axis=0) == targets.all(axis=0))


def macro_auroc(
    targets: np.ndarray, scores: np.ndarray, classes: Sequence[str] | None = None
) -> float:
    """Mean ROC area over the classes present; an `AbsentClassWarning` names the others. DataError
    if none is.
    """
    areas = class_auroc(targets, scores)
    warn_of_absent_classes(targets, classes)
    return float(mean_finite(areas))


def choose_thresholds(
    targets: np.ndarray, scores: np.ndarray, beta: float = 2, classes: Sequence[str] | None = None
) -> np.ndarray:
    """Threshold `(classes,)` that maximises F_beta of each class on validation data; NaN without a
    positive record.

    It lies halfway between the best score and the next lower one, so that `>` and `>=` give the
    same predictions. Of equal maxima the lowest is taken (most sensitive). Classes without a
    threshold are named in a warning.
    """
    targets, scores = _check(targets, scores)
    found = targets.any(axis=0)
    _warn("thresholds are chosen", _pick(classes, ~found))
    columns = zip(targets.T, scores.T, found, strict=True)
    return np.array([_best_threshold(*pair, beta) if known else np.nan for *pair, known in columns])


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
    targets: np.ndarray,
    scores: np.ndarray,
    thresholds: np.ndarray,
    classes: Sequence[str] | None = None,
) -> dict[str, float | tuple[str, ...]]:
    """The measures of the CE-SSL paper (supplement, section 1) and Hamming loss: seven numbers, two
    lists of names.

    `absent` names the classes without a positive or negative record: they count in ranking loss,
    coverage and Hamming loss only. `without_threshold` (NaN in thresholds `(classes,)`): they are
    also left out of Hamming loss, F2 and G2. A record without any label counts 0 in ranking loss
    and coverage, as in scikit-learn. DataError for one class only.
    """
    targets, scores = _check(targets, scores)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    count = targets.shape[1]
    if count < 2 or thresholds.shape != (count,):
        raise DataError(
            "The ranking measures need two classes or more and one threshold each, not "
            f"{count} classes with thresholds {thresholds.shape}."
        )
    present, decided = targets.any(axis=0) & ~targets.all(axis=0), np.isfinite(thresholds)
    predicted, both = scores > thresholds, present & decided
    hits, positives = (targets & predicted).sum(axis=0)[both], targets.sum(axis=0)[both]
    called = predicted.sum(axis=0)[both]
    wrong = (targets != predicted).mean(axis=0)
    return {
        "ranking_loss": float(label_ranking_loss(targets, scores)),
        "coverage": float(coverage_error(targets, scores)),
        "macro_auroc": float(mean_finite(class_auroc(targets, scores))),
        "mean_average_precision": float(mean_finite(class_average_precision(targets, scores))),
        # TP over TP + beta^2 FN + FP (F), over TP + beta FN + FP (G), with 5 = 1 + beta^2
        "macro_f2": float(mean_finite(5 * hits / (4 * positives + called))),
        "macro_g2": float(mean_finite(hits / (called + 2 * (positives - hits)))),
        "hamming_loss": float(mean_finite(wrong[decided])),
        "absent": _pick(classes, ~present),
        "without_threshold": _pick(classes, ~decided),
    }


def expected_calibration_error(
    targets: np.ndarray, probabilities: np.ndarray, bins: int = 15
) -> float:
    """Mean over classes of sum_b (n_b / n) |share of positives - mean probability| over equal bins
    b of [0, 1].
    """
    targets, probabilities = _check(targets, probabilities)
    need_probabilities(probabilities)
    whole = np.ones((len(targets), 1))
    return float(weighted_calibration_error(targets, probabilities[None], whole, bins)[0])


def need_probabilities(values: np.ndarray) -> None:
    """DataError where values do not lie between 0 and 1."""
    if not (values.min() >= 0 and values.max() <= 1):  # refuses a NaN, too
        raise DataError(
            "Calibration is measured on probabilities between 0 and 1; apply the sigmoid to logits "
            "first."
        )


def _class_statistic(statistic: Statistic, targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    rankings, whole = rank_classes(targets, scores), np.ones((len(targets), 1))
    return np.array([statistic(ranking, whole)[0] for ranking in rankings])


def _check(targets: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets as booleans and scores as floats, both `(n, classes)`, or DataError."""
    targets, scores = np.asarray(targets), np.asarray(scores)
    if targets.ndim != 2 or targets.shape != scores.shape or not targets.size:
        raise DataError(
            f"Targets {targets.shape} and scores {scores.shape} must be equal in shape (records, "
            "classes)."
        )
    if not np.isin(targets, (0, 1)).all():
        raise DataError(
            "The targets hold values other than 0 and 1; evaluate against labels, not soft targets."
        )
    wrong = np.argwhere(~np.isfinite(scores))
    if len(wrong):
        raise DataError(
            f"The score of record {wrong[0, 0]}, class {wrong[0, 1]} (counted from 0) is not a "
            "number; train the model again with a smaller learning rate, or fill the scores in."
        )
    return targets.astype(bool), scores.astype(np.float64)


def _pick(classes: Sequence[str] | None, chosen: np.ndarray) -> tuple[str, ...]:
    """The names of the chosen classes, or numbers in their place."""
    names = [f"class {place}" for place in range(len(chosen))] if classes is None else classes
    if len(names) != len(chosen):
        raise DataError(
            f"{len(names)} class names were given for {len(chosen)} classes; give one a class."
        )
    return tuple(name for name, wanted in zip(names, chosen, strict=True) if wanted)


def warn_of_absent_classes(
    targets: np.ndarray, classes: Sequence[str] | None, result: str = "mean", verb: str = "taken"
) -> None:
    """Warn that the `result` is taken, or what the `verb` says, without the absent classes;
    DataError where all are absent.
    """
    absent = absent_classes(targets, classes)
    if len(absent) == np.shape(targets)[1]:
        raise DataError(
            f"No class has both positive and negative records: no {result} can be {verb}; use more "
            "records."
        )
    _warn(f"{result} is {verb}", absent)


def _warn(what, absent):
    """Name the absent classes, if any, in one warning."""
    if absent:
        message = f"The {what} without {', '.join(absent)}: all or none of the records have the"
        warnings.warn(f"{message} class.", AbsentClassWarning, stacklevel=4)


def mean_finite(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean over the entries that are not NaN; NaN, without a warning, where there is none."""
    known = ~np.isnan(values)
    return _divide(np.where(known, values, 0).sum(axis=axis), known.sum(axis=axis))


def _running_sum(weights: np.ndarray) -> np.ndarray:
    """Sums over the first 0, 1, ... n rows, `(n + 1, draws)`."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient as float, NaN where the denominator is 0."""
    numerator = np.asarray(numerator, dtype=float)
    nothing = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=nothing, where=np.asarray(denominator) != 0)
