"""Intervals from draws of patients: one bootstrap behind every interval of a study.

`PatientDraws` draws patients with replacement, all records of a patient together. What is measured
on a draw is a `Measure`: `auroc`, `average_precision`, `f2`, `calibration_error` or `mean`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.evaluate.metrics import (
    Statistic,
    choose_thresholds,
    mean_finite,
    need_probabilities,
    rank_classes,
    ranking_report,
    warn_of_absent_classes,
    weighted_auroc,
    weighted_average_precision,
    weighted_calibration_error,
    weighted_f2,
)
from ecglib.records import Records

DRAWS_TOGETHER = 32  # bootstrap draws computed at once: few enough to stay in the processor's cache
CELLS_TOGETHER = 2**23  # and never more weights (records x draws) than this at once


class Interval(NamedTuple):
    """A measured value with the lower and upper limit of its interval."""

    value: float
    low: float
    high: float

    def basic(self) -> "Interval":
        """The basic bootstrap interval, 2 x value - the percentiles.

        It takes off the shift between draws and the whole, for measures that have one: calibration
        errors are larger on a draw, as its bins are noisier, most of all for a calibrated model.
        """
        return Interval(self.value, 2 * self.value - self.high, 2 * self.value - self.low)


def percentile_interval(
    value: float, drawn: np.ndarray, level: float = 0.95, method: str = "linear"
) -> Interval:
    """The middle `level` of the draws `(draws,)`; a draw without any measurable class has no say.

    `method` is that of `numpy.quantile`: "inverted_cdf" where a draw may be infinite.
    """
    drawn = np.asarray(drawn)
    known = drawn[~np.isnan(drawn)]
    limits = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(known, limits, method=method) if len(known) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))


class Measure(NamedTuple):
    """What is measured on draws of `records` records: `of(weights (n, draws))`, `(..., draws)`."""

    records: int
    of: Callable[[np.ndarray], np.ndarray]


def together(*measures: Measure) -> Measure:
    """Several measures of the same records as one, `(measures, ..., draws)`."""
    return Measure(
        measures[0].records,
        lambda weights: np.stack([measure.of(weights) for measure in measures]),
    )


class PatientDraws:
    """Draws of patients with replacement, the same ones for every measure.

    patients `(n,)` names each record's patient; `level` is the share of the draws inside an
    interval. DataError for no draws and for a level outside of 0 to 1.
    """

    def __init__(
        self, patients: Sequence, draws: int = 1000, seed: int = 0, level: float = 0.95
    ) -> None:
        if draws < 1:
            raise DataError(f"A bootstrap of {draws} draws gives no interval; ask for 1,000.")
        if not 0 < level < 1:
            raise DataError(
                f"An interval of level {level} does not exist; give a share between 0 and 1, such "
                "as 0.95."
            )
        codes, found = pd.factorize(np.asarray(patients), sort=True)
        self.codes, self.count = codes, len(found)
        self.draws, self.seed, self.level = draws, seed, level

    def weights(self) -> Iterator[np.ndarray]:
        """How often each record was drawn, in chunks `(n, some draws)`.

        The draws do not depend on the chunks.
        """
        generator = np.random.default_rng(self.seed)
        most = max(1, min(DRAWS_TOGETHER, CELLS_TOGETHER // len(self.codes)))
        for start in range(0, self.draws, most):
            size = min(most, self.draws - start)
            chosen = generator.integers(self.count, size=(size, self.count))
            chosen += self.count * np.arange(size)[:, None]
            times = np.bincount(chosen.ravel(), minlength=size * self.count)
            yield times.reshape(size, self.count).T[self.codes].astype(np.float64)

    def sample(self, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
        """The measure on all records `(...)` and on each draw `(..., draws)`.

        DataError where there is not one patient for each record.
        """
        known = int((self.codes >= 0).sum())
        if not known == len(self.codes) == measure.records:
            raise DataError(
                f"The bootstrap needs one patient for each of {measure.records} records, {known} "
                "were given; pass the table's patient_id."
            )
        drawn = [measure.of(weights) for weights in self.weights()]
        return measure.of(np.ones((known, 1)))[..., 0], np.concatenate(drawn, axis=-1)

    def interval(self, measure: Measure) -> Interval:
        """A single measure with its percentile interval."""
        return percentile_interval(*self.sample(measure), self.level)

    def difference(self, first: Measure, second: Measure) -> Interval:
        """The first measure minus the second, both on the same draws, with its interval."""
        value, drawn = self.sample(together(first, second))
        return percentile_interval(value[0] - value[1], drawn[0] - drawn[1], self.level)


def auroc(targets: np.ndarray, scores: np.ndarray) -> Measure:
    """Macro AUROC `(draws,)` of scores `(n, classes)`, or `(repeats, n, classes)` for models of
    several seeds, whose mean is measured. A class absent in a draw leaves that draw's mean.
    """
    return _macro_area(weighted_auroc, targets, scores)


def average_precision(targets: np.ndarray, scores: np.ndarray) -> Measure:
    """Mean average precision `(draws,)`; scores and absent classes as in `auroc`."""
    return _macro_area(weighted_average_precision, targets, scores)


def _macro_area(statistic: Statistic, targets: np.ndarray, scores: np.ndarray) -> Measure:
    each = together(*(class_areas(statistic, targets, model) for model in _repeats(scores)))
    return Measure(each.records, lambda weights: mean_finite(each.of(weights), axis=1).mean(axis=0))


def class_areas(statistic: Statistic, targets: np.ndarray, scores: np.ndarray) -> Measure:
    """`weighted_auroc` or `weighted_average_precision` of each class, `(classes, draws)`."""
    rankings = rank_classes(targets, scores)
    return Measure(
        len(targets),
        lambda weights: np.stack([statistic(ranking, weights) for ranking in rankings]),
    )


def f2(targets: np.ndarray, decisions: np.ndarray) -> Measure:
    """Macro F2 `(draws,)` of decisions `(n, classes)` or `(repeats, n, classes)`, 1 for yes.

    A class without a positive record in a draw, or for which nothing was decided (NaN), leaves the
    mean of that draw or model.
    """
    targets, models = np.asarray(targets, np.float64), _repeats(decisions)
    return Measure(
        len(targets),
        lambda weights: mean_finite(weighted_f2(targets, models, weights), axis=2).mean(axis=0),
    )


def calibration_error(targets: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> Measure:
    """Expected calibration error `(draws,)` of probabilities `(n, classes)` or `(repeats, n,
    classes)`. Intervals of it need `Interval.basic`.
    """
    targets, models = np.asarray(targets, np.float64), _repeats(probabilities)
    need_probabilities(models)
    return Measure(
        len(targets), lambda weights: weighted_calibration_error(targets, models, weights, bins)
    )


def mean(values: np.ndarray) -> Measure:
    """Mean `(draws,)` of one number a record, `(n,)`."""
    return Measure(len(values), lambda weights: values @ weights / weights.sum(axis=0))


def _repeats(scores: np.ndarray) -> np.ndarray:
    """Scores of one model as those of one repeat, `(repeats, n, classes)`."""
    scores = np.asarray(scores, np.float64)
    return scores if scores.ndim == 3 else scores[None]


STATISTICS: dict[str, Callable[[np.ndarray, np.ndarray], Measure]] = {
    "auroc": auroc,
    "average_precision": average_precision,
}


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
    """Macro statistic with its patient-bootstrap interval (2.5 to 97.5 % by default).

    groups `(n,)` are patients, scores `(n, classes)`, or `(repeats, n, classes)` for models of
    several seeds: their mean is measured on the same draws. A class absent in a draw leaves that
    draw's mean; one absent in all records is named in a warning. statistic: auroc,
    average_precision.
    """
    (measure,) = _measures(statistic, targets, [scores], classes)
    return PatientDraws(groups, draws, seed, level).interval(measure)


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
    """Macro statistic of a minus that of b, both on the same patient draws.

    The rest is as in `bootstrap_interval`.
    """
    sides = _measures(statistic, targets, [scores_a, scores_b], classes)
    return PatientDraws(groups, draws, seed, level).difference(*sides)


def _measures(
    statistic: str,
    targets: np.ndarray,
    models: Sequence[np.ndarray],
    classes: Sequence[str] | None,
) -> list[Measure]:
    """The statistic of each model; absent classes are named in a warning."""
    if statistic not in STATISTICS:
        raise DataError(
            f"The statistic {statistic!r} is unknown; choose one of {', '.join(STATISTICS)}."
        )
    measures = [STATISTICS[statistic](targets, scores) for scores in models]
    warn_of_absent_classes(targets, classes)
    return measures


def area_intervals(
    targets: np.ndarray,
    scores: np.ndarray,
    groups: Sequence,
    classes: Sequence[str],
    draws: int = 1000,
) -> dict[str, Interval]:
    """macro_auroc, mean_average_precision and auroc:<class> of each class present, of one model
    `(n, classes)`.

    The intervals are those of `bootstrap_interval`, all from one pass over the draws.
    """
    measure = together(
        class_areas(weighted_auroc, targets, scores),
        class_areas(weighted_average_precision, targets, scores),
    )
    warn_of_absent_classes(targets, classes)
    value, drawn = PatientDraws(groups, draws).sample(measure)
    macro, macro_drawn = mean_finite(value, axis=1), mean_finite(drawn, axis=1)
    intervals = {
        name: percentile_interval(macro[place], macro_drawn[place])
        for place, name in enumerate(("macro_auroc", "mean_average_precision"))
    }
    for label, area, area_drawn in zip(classes, value[0], drawn[0], strict=True):
        if not np.isnan(area):
            intervals[f"auroc:{label}"] = percentile_interval(area, area_drawn)
    return intervals


def labels_needed(
    targets: np.ndarray,
    curve: Mapping[float, np.ndarray],
    goal: np.ndarray,
    groups: Sequence,
    draws: int = 1000,
    classes: Sequence[str] | None = None,
) -> Interval:
    """Smallest share of the labels with which a method reaches the macro AUROC of `goal`, with its
    95 % interval.

    curve maps each label fraction to the method's scores, goal are those of the model to be
    reached, both `(n, classes)` or `(repeats, n, classes)`. Between fractions the curve is a
    straight line over log(fraction); the question is asked anew on every patient draw. infinity:
    not reached with all labels (`high` is infinite where that happens in more draws than the
    interval leaves out); the smallest fraction means "this or fewer".
    """
    fractions = sorted(curve)
    models = [goal, *(curve[fraction] for fraction in fractions)]
    measures = _measures("auroc", targets, models, classes)
    value, drawn = PatientDraws(groups, draws).sample(together(*measures))
    needed = [first_reached(fractions, column[1:], column[0]) for column in drawn.T]
    whole = first_reached(fractions, value[1:], value[0])
    return percentile_interval(whole, needed, method="inverted_cdf")


def first_reached(fractions: Sequence[float], values: np.ndarray, goal: float) -> float:
    """Where the line through (log fraction, value) first reaches `goal`; infinity where it does
    not.
    """
    place = first_crossing(values, goal)
    if place in (0, np.inf):
        return float(fractions[0]) if place == 0 else place
    return float(np.exp(np.interp(place, range(len(fractions)), np.log(fractions))))


def first_crossing(values: np.ndarray, goal: float) -> float:
    """The place, counted from 0, at which the straight lines through the values first reach `goal`;
    infinity where they do not.
    """
    for place, value in enumerate(values):
        if value >= goal:
            before = values[max(place - 1, 0)]
            return place - (value - goal) / (value - before) if place else 0.0
    return float(np.inf)


def score_rows(
    records: Records, probabilities: Mapping[str, np.ndarray], labelled: np.ndarray
) -> list[dict]:
    """The metrics of one model as rows of the study's tables, for validation (fold 9) and test
    (fold 10).

    probabilities holds `(n, classes)` for both splits. Thresholds come from validation. Areas carry
    patient-bootstrap intervals; the measures that need a threshold or a ranking are given without.
    n_records and n_patients count the *labelled training* data behind the model.
    """
    truth, _ = records.split_truth("validation")
    thresholds = choose_thresholds(truth, probabilities["validation"], classes=records.classes)
    patients = records.table["patient_id"].iloc[labelled].nunique()
    behind = {"n_records": len(labelled), "n_patients": patients}
    rows = []
    for split, scores in probabilities.items():
        targets, groups = records.split_truth(split)
        intervals = area_intervals(targets, scores, groups, records.classes)
        report = ranking_report(targets, scores, thresholds, records.classes)
        for metric, value in report.items():
            if metric not in intervals and isinstance(value, float):
                intervals[metric] = Interval(value, np.nan, np.nan)
        rows += [
            {"split": split, "metric": metric, **interval._asdict(), **behind}
            for metric, interval in intervals.items()
        ]
    return rows
