"""What one arm gains over another on the same labels, patients and seeds.

All comparisons of the study make one kind of table. A comparison is a list of pairs of cells, the
own one and the one that it is compared with; a cell is the runs that differ in the seed alone.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ecglib.evaluate.draws import (
    Interval,
    PatientDraws,
    auroc,
    average_precision,
    calibration_error,
    f2,
    percentile_interval,
)
from ecglib.evaluate.metrics import (
    AbsentClassWarning,
    choose_thresholds,
    warn_of_absent_classes,
)
from ecglib.records import Records
from ecgstudy.analysis.figures import (
    PALETTE,
    arm_label,
    draw_dot,
    finish,
    legend_line,
    looks,
    method_label,
    panels,
    percent_label,
    require_columns,
)
from ecgstudy.analysis.summary import STUDENT, Members, group_runs, need_same_seeds, stack_scores
from ecgstudy.runs import Run

Pairs = Iterable[tuple[tuple, tuple]]
METRICS = {
    "macro_auroc": auroc,
    "mean_average_precision": average_precision,
    "macro_f2": f2,
    "expected_calibration_error": calibration_error,
}


NAMES = {  # how the values of a column are written in a figure
    "over": method_label,
    "fraction": percent_label,
    "metric": lambda name: name.replace("_", " "),
}


def plot_gains(
    gains: pd.DataFrame,
    row: str = "over",
    panel: str = "fraction",
    colour: str | None = None,
    title: str | None = None,
) -> Figure:
    """Gains with their paired intervals, hollow where the interval holds zero.

    `row`, `panel` and `colour` name the columns of a gain table that rows, panels and colours tell
    apart; the row "arm" is method and encoder. Panels of several metrics have a scale each.
    """
    if row == "arm":
        require_columns(gains, ("method", "encoder"), "table of gains")
        gains = gains.assign(arm=[*map(arm_label, gains["method"], gains["encoder"])])
    require_columns(gains, (row, panel, colour or row, "gain", "low", "high"), "table of gains")
    rows = list(dict.fromkeys(gains[row]))[::-1]
    columns = (
        sorted(set(gains[panel])) if panel == "fraction" else list(dict.fromkeys(gains[panel]))
    )
    groups = sorted(set(gains[colour])) if colour else [None]
    palette = looks(groups, PALETTE)
    width = 1.75 if panel == "fraction" else 3.2
    size = 2.6 + width * len(columns), 1.2 + 0.42 * len(rows)
    figure, grid = panels(len(columns), size, grid="x", sharex=panel != "metric", sharey=True)
    for axes, name in zip(grid[0], columns):
        axes.axvline(0, color="0.5", linewidth=1)
        for cell in gains[gains[panel] == name].to_dict("records"):
            place = groups.index(cell[colour]) if colour else 0
            height = rows.index(cell[row]) + 0.6 * (0.5 - (place + 0.5) / len(groups))
            sure = cell["low"] > 0 or cell["high"] < 0
            draw_dot(axes, height, {**cell, "value": cell["gain"]}, palette[groups[place]], sure)
        axes.set(title=NAMES.get(panel, str)(name), xlabel="Gain")
        axes.locator_params(axis="x", nbins=3 if width < 2 else 5)
    grid[0, 0].set_yticks(range(len(rows)), [NAMES.get(row, str)(name) for name in rows])
    write = NAMES.get(colour, str)
    legend = [legend_line(write(name), palette[name], marker="o") for name in groups if colour]
    return finish(figure, title, legend)


def gain_row(own: Mapping, other: Mapping, metric: str, gain: Interval) -> dict:
    """One row of a gain table: the arm's own names, those of the other side as `over` (its method)
    and `over_NAME`, metric, gain, low and high.
    """
    over = {"over" if name == "method" else f"over_{name}": value for name, value in other.items()}
    limits = {"gain": gain.value, "low": gain.low, "high": gain.high}
    return {**own, **over, "metric": metric, **limits}


def gain_table(
    runs: Sequence[Run],
    records: Records,
    cell: Sequence[str],
    pairs: Callable[[list[tuple]], Pairs],
    beside: Sequence[str] = ("method",),
    metrics: Sequence[str] = ("macro_auroc",),
) -> pd.DataFrame:
    """One row per pair of cells and metric: gain with its paired interval, see `gain_row`.

    `pairs` chooses from the cells, in the order of their runs, those that are compared; `beside`
    are the parts of `cell` in which the two sides of a pair may differ. Both sides are means over
    the same seeds, on the same patient draws. DataError where two sides have other seeds.
    """
    cells = group_runs(runs, cell)
    targets, patients = records.split_truth("test")
    warn_of_absent_classes(targets, records.classes)
    draws = PatientDraws(patients)

    @cache
    def sample(metric: str, values: tuple) -> tuple[np.ndarray, np.ndarray]:
        members = cells[values]
        decided = metric == "macro_f2"
        answers = decide(members, records) if decided else stack_scores(members)
        return draws.sample(METRICS[metric](targets, answers))

    rows = []
    for own, other in pairs(list(cells)):
        need_same_seeds(cells, own, other)
        names = dict(zip(cell, own, strict=True))
        over = {name: value for name, value in zip(cell, other) if name in beside}
        for metric in metrics:
            value, drawn = sample(metric, own)
            other_value, other_drawn = sample(metric, other)
            gain = percentile_interval(value - other_value, drawn - other_drawn)
            if metric == "expected_calibration_error":
                gain = gain.basic()
            rows.append(gain_row(names, over, metric, gain))
    return pd.DataFrame(rows)


def decide(members: Members, records: Records) -> np.ndarray:
    """1 where a model says yes, 0 where it says no, `(seeds, n, classes)`.

    Thresholds come from validation, one for each model and class; a class without a positive record
    there has none and its decisions are NaN.
    """
    truth, _ = records.split_truth("validation")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AbsentClassWarning)  # named once, when the run was scored
        known = stack_scores(members, "validation")
        thresholds = np.stack([choose_thresholds(truth, seed) for seed in known])[:, None]
    return np.where(np.isnan(thresholds), np.nan, stack_scores(members) > thresholds)


def transfer_gains(runs: Sequence[Run], records: Records) -> pd.DataFrame:
    """What each arm gains over the same encoder trained from scratch, and a frozen one also over
    the same encoder never trained, with the same labels.
    """

    def pairs(cells: list[tuple]) -> Pairs:
        for cell in sorted(cells):
            method, encoder, protocol, fraction = cell
            controls = [("supervised", encoder, "supervised", fraction)]
            if protocol == "frozen":
                controls.append(("random", encoder, "frozen", fraction))
            for control in controls:
                if control in cells and control[0] != method:
                    yield cell, control

    return gain_table(runs, records, ("method", "encoder", "protocol", "fraction"), pairs)


def semi_supervised_gains(
    runs: Sequence[Run], records: Records, method: str = "ce_ssl"
) -> pd.DataFrame:
    """What `method` gains over every other method with the same start and fraction, in macro AUROC,
    mean average precision and macro F2.
    """

    def pairs(cells: list[tuple]) -> Pairs:
        for cell in sorted(cells, key=lambda cell: cell[1:]):
            own = (method, *cell[1:])
            if own in cells and cell != own:
                yield own, cell

    metrics = ("macro_auroc", "mean_average_precision", "macro_f2")
    return gain_table(runs, records, ("method", "start", "fraction"), pairs, metrics=metrics)


def self_evolving_gains(
    runs: Sequence[Run], records: Records, method: str = "distl"
) -> pd.DataFrame:
    """What each method gained since T = 0, and what `method` gains over every other one at the same
    T, in macro AUROC and calibration error, where a fall is a gain below zero.

    The other side has a method, a network (student or teacher) and a stage of its own.
    """

    def pairs(cells: list[tuple]) -> Pairs:
        cells = sorted(cells, key=lambda cell: cell[1])  # students first
        for cell in cells:
            if cell[2] > 0:
                yield cell, ("supervised_noised", STUDENT, 0, cell[3])
        for own in [cell for cell in cells if cell[:2] == (method, STUDENT)]:
            yield from ((own, cell) for cell in cells if cell != own and cell[2:] == own[2:])

    return gain_table(
        runs,
        records,
        ("method", "network", "stage", "fraction"),
        pairs,
        beside=("method", "network", "stage"),
        metrics=("macro_auroc", "expected_calibration_error"),
    )


def fusion_gains(runs: Sequence[Run], records: Records) -> pd.DataFrame:
    """What DVME gains in macro AUROC over every other method, fraction by fraction.

    DVME has the members of the first of its runs; without one of them, or with others, it is a
    control like any other.
    """
    members = next(run.spec.settings["members"] for run in runs if run.spec.method == "dvme")

    def pairs(cells: list[tuple]) -> Pairs:
        for cell in sorted(cells):
            own = ("dvme", members, "frozen", cell[3])
            if own in cells and cell != own:
                yield own, cell

    cell = ("method", "members", "protocol", "fraction")
    return gain_table(runs, records, cell, pairs, beside=cell[:3])
