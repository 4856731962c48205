"""Intervals from draws of patients, all statistics on the same draws."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.evaluate.metrics import (
    STATISTICS,
    Ranking,
    Statistic,
    _divide,
    _mean_finite,
    _require_present,
    _require_probabilities,
    _weighted_calibration,
    choose_thresholds,
    rank_classes,
    ranking_report,
)
from ecglib.records import Records

DRAWS_TOGETHER = 32  # bootstrap draws computed at once: few enough to stay in the processor's cache
CELLS_TOGETHER = 2**23  # and never more weights (records x draws) than this at once


class Interval(NamedTuple):
    """A measured value with the lower and upper limit of its interval."""

    value: float
    low: float
    high: float


def bootstrap_interval(
    targets: np.ndarray,
    scores: np.ndarray,
    groups: Sequence,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    statistic: str = "auroc",
    classes: Sequence[str] | None = None,
) -> Interval:
    """Macro statistic with its patient-cluster percentile bootstrap interval (2.5 to 97.5 % by
    default).

    groups `(n,)` are patients, drawn with replacement, all records of one together. scores `(n,
    classes)`, or `(repeats, n, classes)` for models of several seeds: their mean is measured on the
    same draws. A class absent in a draw leaves that draw's mean; one absent in all records is named
    in a warning. statistic: auroc, average_precision.
    """
    value, drawn = _bootstrap(targets, [scores], groups, draws, seed, statistic, classes)
    return _percentiles(value[0], drawn[0], level)


def area_intervals(
    targets: np.ndarray,
    scores: np.ndarray,
    groups: Sequence,
    classes: Sequence[str],
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """macro_auroc, mean_average_precision and auroc:<class> of each class present, of one model
    `(n, classes)`.

    The intervals are those of `bootstrap_interval`, all from one pass over the draws.
    """
    rankings = rank_classes(targets, scores)
    _require_present(targets, classes)

    def areas(weights: np.ndarray) -> np.ndarray:
        return np.array(
            [
                [statistic(ranking, weights) for ranking in rankings]
                for statistic in STATISTICS.values()
            ]
        )

    value = areas(np.ones((len(targets), 1)))[..., 0]
    drawn = np.concatenate(
        [areas(weights) for weights in draw_weights(groups, len(targets), draws, seed)], axis=2
    )
    macro, macro_drawn = _mean_finite(value, axis=1), _mean_finite(drawn, axis=1)
    names = ("macro_auroc", "mean_average_precision")
    intervals = {
        name: _percentiles(macro[place], macro_drawn[place], level)
        for place, name in enumerate(names)
    }
    return intervals | {
        f"auroc:{label}": _percentiles(value[0, column], drawn[0, column], level)
        for column, label in enumerate(classes)
        if not np.isnan(value[0, column])
    }


def paired_difference(
    targets: np.ndarray,
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    groups: Sequence,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    statistic: str = "auroc",
    classes: Sequence[str] | None = None,
) -> Interval:
    """Macro statistic of a minus that of b, both on the same patient draws; the rest as in
    `bootstrap_interval`.
    """
    value, drawn = _bootstrap(
        targets, [scores_a, scores_b], groups, draws, seed, statistic, classes
    )
    return _percentiles(value[0] - value[1], drawn[0] - drawn[1], level)


def paired_f2(
    targets: np.ndarray,
    predicted_a: np.ndarray,
    predicted_b: np.ndarray,
    groups: Sequence,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Macro F2 of a minus that of b on the same patient draws, for decisions `(repeats, n,
    classes)`.

    Repeats are models of several seeds, whose F2 is averaged. A class without a positive record in
    a draw, or for which nothing was decided (NaN), leaves the mean of that draw or model.
    """
    models = [np.asarray(predicted_a, dtype=np.float64), np.asarray(predicted_b, dtype=np.float64)]
    targets = np.asarray(targets).astype(np.float64)

    def macro(weights: np.ndarray) -> list[np.ndarray]:
        return [
            _mean_finite(_weighted_f2(targets, model, weights), axis=2).mean(axis=0)
            for model in models
        ]

    return _drawn_difference(macro, groups, len(targets), draws, seed, level)


def paired_calibration_error(
    targets: np.ndarray,
    probabilities_a: np.ndarray,
    probabilities_b: np.ndarray,
    groups: Sequence,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    bins: int = 15,
) -> Interval:
    """Expected calibration error of a minus that of b on the same patient draws, for `(repeats, n,
    classes)` each.

    Repeats are models of several seeds, whose errors are averaged. On a draw errors are larger than
    on the whole, for bins are noisier, and those of a well calibrated model more so. So this is the
    basic bootstrap, which takes that shift off: 2 x value - the percentiles.
    """
    models = [
        np.asarray(probabilities_a, dtype=np.float64),
        np.asarray(probabilities_b, dtype=np.float64),
    ]
    targets = np.asarray(targets).astype(np.float64)
    for model in models:
        _require_probabilities(model)

    def error(weights: np.ndarray) -> list[np.ndarray]:
        return [_weighted_calibration(targets, model, weights, bins) for model in models]

    value, low, high = _drawn_difference(error, groups, len(targets), draws, seed, level)
    return Interval(value, 2 * value - high, 2 * value - low)


def _drawn_difference(
    measure: Callable[[np.ndarray], list[np.ndarray]],
    groups: Sequence,
    records: int,
    draws: int,
    seed: int,
    level: float,
) -> Interval:
    """Difference of the two values that `measure(weights (n, draws))` gives, each `(draws,)`, with
    its interval.
    """
    first, second = measure(np.ones((records, 1)))
    drawn = np.concatenate(
        [measure(weights) for weights in draw_weights(groups, records, draws, seed)], axis=1
    )
    return _percentiles(float(first[0] - second[0]), drawn[0] - drawn[1], level)


def _weighted_f2(targets: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F2 = 5 TP / (4 P + predicted) of each repeat, draw and class, `(repeats, draws, classes)`."""
    hits = np.einsum("rnc,nd->rdc", predicted * targets, weights)
    called = np.einsum("rnc,nd->rdc", predicted, weights)
    positives = weights.T @ targets
    return np.where(positives > 0, _divide(5 * hits, 4 * positives + called), np.nan)


def labels_needed(
    targets: np.ndarray,
    curve: Mapping[float, np.ndarray],
    goal: np.ndarray,
    groups: Sequence,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    classes: Sequence[str] | None = None,
) -> Interval:
    """Smallest share of the labels with which a method reaches the macro AUROC of `goal`, with its
    interval.

    curve maps each label fraction to the method's scores, goal are those of the model to be
    reached, both `(n, classes)` or `(repeats, n, classes)`. Between fractions the curve is a
    straight line over log(fraction); the question is asked anew on every patient draw. infinity:
    not reached with all labels (`high` is infinite where that happens in more draws than the
    interval leaves out); the smallest fraction means "this or fewer".
    """
    fractions = sorted(curve)
    models = [goal, *(curve[fraction] for fraction in fractions)]
    value, drawn = _bootstrap(targets, models, groups, draws, seed, "auroc", classes)
    every = np.concatenate([value[:, None], drawn], axis=1)
    needed = [first_reached(fractions, column[1:], column[0]) for column in every.T]
    low, high = np.quantile(needed[1:], [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return Interval(needed[0], float(low), float(high))


def first_reached(fractions: list[float], values: np.ndarray, goal: float) -> float:
    """Where the line through (log fraction, value) first reaches `goal`; infinity where it does
    not.
    """
    for place, value in enumerate(values):
        if value >= goal:
            if place == 0:
                return float(fractions[0])
            share = (goal - values[place - 1]) / (value - values[place - 1])
            below, above = np.log(fractions[place - 1]), np.log(fractions[place])
            return float(np.exp(below + share * (above - below)))
    return float(np.inf)


def _bootstrap(
    targets: np.ndarray,
    models: list[np.ndarray],
    groups: Sequence,
    draws: int,
    seed: int,
    statistic: str,
    classes: Sequence[str] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Macro statistic of each model `(models,)` and on each draw `(models, draws)`."""
    if statistic not in STATISTICS:
        raise DataError(
            f"The statistic {statistic!r} is unknown; choose one of {', '.join(STATISTICS)}."
        )
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


def _macro_of_repeats(
    statistic: Statistic, repeats: list[list[Ranking]], weights: np.ndarray
) -> np.ndarray:
    """Mean over repeats of the mean over the classes present, for record weights `(n, draws)`:
    `(draws,)`.
    """
    each = np.array([[statistic(ranking, weights) for ranking in classes] for classes in repeats])
    return _mean_finite(each, axis=1).mean(axis=0)


def draw_weights(groups: Sequence, records: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each record was drawn, in chunks `(n, some draws)`; the draws do not depend on the
    chunks.
    """
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


def _percentiles(value: float, drawn: np.ndarray, level: float) -> Interval:
    """The percentile interval; a draw without any measurable class has no say."""
    if not 0 < level < 1:
        raise DataError(
            f"An interval of level {level} does not exist; give a share between 0 and 1, such as 0.95."
        )
    known = drawn[~np.isnan(drawn)]
    low, high = (
        np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else (np.nan, np.nan)
    )
    return Interval(float(value), float(low), float(high))


def score_rows(
    records: Records,
    split: Mapping[str, np.ndarray],
    probabilities: Mapping[str, np.ndarray],
    labelled_records: int,
    labelled_patients: int,
) -> list[dict]:
    """The metrics of one model as rows of the study's tables, for validation (fold 9) and test
    (fold 10).

    probabilities holds `(n, classes)` for both splits. Thresholds come from validation. Areas carry
    patient-bootstrap intervals; the measures that need a threshold or a ranking are given without.
    n_records and n_patients count the *labelled training* data behind the model.
    """
    classes, rows = records.classes, []
    targets = {name: records.targets[split[name]] for name in probabilities}
    thresholds = choose_thresholds(
        targets["validation"], probabilities["validation"], classes=classes
    )
    for name, scores in probabilities.items():
        patients = records.table["patient_id"].to_numpy()[split[name]]
        intervals = area_intervals(targets[name], scores, patients, classes)
        report = ranking_report(targets[name], scores, thresholds, classes)
        intervals |= {
            measure: Interval(value, np.nan, np.nan)
            for measure, value in report.items()
            if measure not in intervals and isinstance(value, float)
        }
        rows += [
            {
                "split": name,
                "metric": metric,
                **interval._asdict(),
                "n_records": labelled_records,
                "n_patients": labelled_patients,
            }
            for metric, interval in intervals.items()
        ]
    return rows
