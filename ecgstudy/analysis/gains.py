"""What one arm gains over another on the same labels, patients and seeds."""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ecglib.evaluate.draws import PatientDraws, calibration_error, f2, paired_difference
from ecglib.evaluate.metrics import AbsentClassWarning, choose_thresholds
from ecglib.records import Records
from ecgstudy.analysis.figures import arm_label, method_label, plot_intervals, require_columns
from ecgstudy.analysis.self_evolving import with_teacher
from ecgstudy.analysis.summary import need_same_seeds, seed_scores
from ecgstudy.runs import Run


def plot_gains(gains: pd.DataFrame, title: str | None = None) -> Figure:
    """Gain in macro AUROC with its paired interval, a panel a fraction, a row an arm; hollow where
    it spans zero.

    gains has method, encoder, protocol, fraction, gain, low, high (see `transfer.paired_gains`).
    """
    require_columns(
        gains,
        ("method", "encoder", "protocol", "fraction", "gain", "low", "high"),
        "table of gains",
    )
    arms = [arm_label(row.method, row.encoder) for row in gains.itertuples()]
    panels = [f"{100 * fraction:g} % of the labels" for fraction in gains["fraction"]]
    table = gains.assign(row=arms, panel=panels, colour=gains["protocol"]).sort_values(
        ["fraction", "row"]
    )
    return plot_intervals(table, ("frozen", "fine-tuned"), 1.75, title)


def plot_method_gains(gains: pd.DataFrame, title: str | None = None) -> Figure:
    """What one method gains over the others: a panel a measure, a row a comparator, a colour a
    label fraction.

    gains has against, fraction, metric, gain, low, high (see `semisup.compare.gains_over`); hollow
    where the interval spans zero.
    """
    require_columns(
        gains, ("against", "fraction", "metric", "gain", "low", "high"), "table of gains"
    )
    colours = {
        fraction: f"{100 * fraction:g} % of the labels"
        for fraction in sorted(gains["fraction"].unique())
    }
    table = gains.assign(
        row=gains["against"].map(method_label),
        panel=gains["metric"].str.replace("_", " "),
        colour=gains["fraction"].map(colours),
    )
    return plot_intervals(table, tuple(colours.values()), 3.2, title, one_scale=False)


FUSION_NAMES = {
    "dvme": "DVME",
    "dvme_random_start": "DVME from random weights",
    "best_single": "best single encoder",
    "concatenation": "concatenation + logistic",
    "perceptron": "matched perceptron",
}


def plot_fusion_gains(gains: pd.DataFrame, title: str | None = None) -> Figure:
    """What DVME gains over other fusions: a panel a fraction, a row a comparator; hollow where it
    spans zero.

    gains has over, fraction, gain, low, high (see `fusion_runs.fusion_gains`).
    """
    require_columns(gains, ("over", "fraction", "gain", "low", "high"), "table of fusion gains")
    rows = [FUSION_NAMES.get(name, name.replace("_", " ")) for name in gains["over"]]
    panels = [f"{100 * fraction:g} % of the labels" for fraction in gains["fraction"]]
    table = gains.assign(row=rows, panel=panels, colour="gain of DVME").sort_values(
        "fraction", kind="stable"
    )
    return plot_intervals(table, ("gain of DVME",), 1.75, title)


def paired_gains(runs: Sequence[Run], records: Records, split: str = "test") -> pd.DataFrame:
    """How much each arm gains in macro AUROC over its controls with the same encoder, labels and
    patients.

    A row an arm, fraction and control (`over`: supervised, or random for frozen arms): gain with
    its paired patient-bootstrap interval, both sides as means over seeds.
    """
    targets, patients = records.split_truth(split)
    cells, rows = seed_scores(runs, split, ("method", "encoder", "protocol", "fraction")), []
    for (method, encoder, protocol, fraction), scores in sorted(cells.items()):
        controls = {"supervised": ("supervised", encoder, "supervised", fraction)}
        if protocol == "frozen":
            controls["random"] = ("random", encoder, "frozen", fraction)
        for over, control in controls.items():
            if control in cells and method != over:
                gain = paired_difference(
                    targets, scores, cells[control], patients, classes=records.classes
                )
                rows.append(
                    {
                        "method": method,
                        "encoder": encoder,
                        "protocol": protocol,
                        "fraction": fraction,
                        "over": over,
                        "gain": gain.value,
                        "low": gain.low,
                        "high": gain.high,
                    }
                )
    return pd.DataFrame(rows)


MEASURES = {"macro_auroc": "auroc", "mean_average_precision": "average_precision"}
FUSION_CELL = ("method", "members", "protocol", "fraction")
CELL = ("start", "fraction", "method")
STAGE = ("stage", "method", "fraction")


def gains_over(
    runs: Sequence[Run], records: Records, method: str = "ce_ssl", split: str = "test"
) -> pd.DataFrame:
    """What `method` gains over every other method with the same start and fraction, in three
    measures.

    A row a start, comparator, fraction and measure (macro_auroc, mean_average_precision, macro_f2):
    gain, with its paired patient-bootstrap interval; both sides are means over the same seeds.
    Thresholds of F2 come from validation, one for each model and class; a class without a positive
    record there has none and is left out of F2. DataError where two methods do not have the same
    seeds.
    """
    targets, patients = records.split_truth(split)
    scores, known = seed_scores(runs, split, CELL), seed_scores(runs, "validation", CELL)
    decisions = {cell: _decisions(known[cell], scores[cell], records) for cell in scores}
    rows = []
    for cell in scores:
        own = (*cell[:2], method)
        if cell == own or own not in scores:
            continue
        need_same_seeds(runs, CELL, own, cell)
        gains = {
            measure: paired_difference(
                targets,
                scores[own],
                scores[cell],
                patients,
                statistic=statistic,
                classes=records.classes,
            )
            for measure, statistic in MEASURES.items()
        }
        gains["macro_f2"] = PatientDraws(patients).difference(
            f2(targets, decisions[own]), f2(targets, decisions[cell])
        )
        pair = {"method": method, "against": cell[2], "start": cell[0], "fraction": cell[1]}
        rows += [
            {**pair, "metric": measure, "gain": gain.value, "low": gain.low, "high": gain.high}
            for measure, gain in gains.items()
        ]
    # The order in which the runs came, within each start and fraction.
    return pd.DataFrame(rows).sort_values(["start", "fraction"], kind="stable", ignore_index=True)


def stage_gains(
    runs: Sequence[Run], records: Records, method: str = "distl", split: str = "test"
) -> pd.DataFrame:
    """What each method gained since T = 0, and what `method` gains over every other one at the same
    T.

    A row a pair and metric (macro_auroc, expected_calibration_error), with method, network (student
    or teacher), stage and fraction of the one side, `against`, `against_network` and
    `against_stage` of the other: gain with its paired patient-bootstrap interval, both sides as
    means over the same seeds. A calibration error that falls is a gain below zero. DataError where
    two sides do not have the same seeds.
    """
    taught = with_teacher(runs)
    sides = {("student", *cell): scores for cell, scores in seed_scores(runs, split, STAGE).items()}
    sides |= {
        ("teacher", *cell): scores
        for cell, scores in seed_scores(taught, split, STAGE, "teacher").items()
    }
    targets, patients = records.split_truth(split)
    rows = []
    for own, other in _stage_pairs(list(sides), method):
        need_same_seeds(runs, STAGE, own[1:], other[1:])
        names = {
            "method": own[2],
            "network": own[0],
            "stage": own[1],
            "fraction": own[3],
            "against": other[2],
            "against_network": other[0],
            "against_stage": other[1],
        }
        gains = {
            "macro_auroc": paired_difference(
                targets, sides[own], sides[other], patients, classes=records.classes
            ),
            "expected_calibration_error": PatientDraws(patients)
            .difference(
                calibration_error(targets, sides[own]), calibration_error(targets, sides[other])
            )
            .basic(),
        }
        rows += [
            {**names, "metric": metric, "gain": gain.value, "low": gain.low, "high": gain.high}
            for metric, gain in gains.items()
        ]
    return pd.DataFrame(rows)


def _stage_pairs(sides: Sequence[tuple], method: str) -> list[tuple[tuple, tuple]]:
    """Which (network, stage, method, fraction) are compared: all with their common start, `method`
    with the others.
    """
    pairs = [(side, ("student", 0, "supervised", side[3])) for side in sides if side[1] > 0]
    own = [side for side in sides if side[0] == "student" and side[2] == method]
    return pairs + [
        (one, other) for one in own for other in sides if other != one and other[1::2] == one[1::2]
    ]


def _decisions(known: np.ndarray, scores: np.ndarray, records: Records) -> np.ndarray:
    """1 where a model says yes, 0 where it says no, NaN where it has no threshold, `(seeds, n,
    classes)`.

    known are its probabilities for validation, from which its thresholds come, scores those that
    are decided.
    """
    truth, _ = records.split_truth("validation")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AbsentClassWarning)  # named once, when the run was scored
        thresholds = np.stack([choose_thresholds(truth, one) for one in known])[:, None]
    return np.where(np.isnan(thresholds), np.nan, scores > thresholds)


def fusion_gains(runs: Sequence[Run], records: Records, split: str = "test") -> pd.DataFrame:
    """Gain of DVME in macro AUROC over every other method, fraction by fraction, with its paired
    interval.

    `over` is the other one's method and `members` its members; DVME itself has the members of the
    first of its runs. Both sides are means over the same seeds; DVME without a member or with other
    members is a control like any other. DataError where the seeds differ.
    """
    targets, patients = records.split_truth(split)
    ours = next(run.spec.settings["members"] for run in runs if run.spec.method == "dvme")
    cells, rows = seed_scores(runs, split, FUSION_CELL), []
    for (method, members, protocol, fraction), scores in sorted(cells.items()):
        own = cells.get(("dvme", ours, "frozen", fraction))
        if own is not None and (method, members, protocol) != ("dvme", ours, "frozen"):
            need_same_seeds(
                runs,
                FUSION_CELL,
                ("dvme", ours, "frozen", fraction),
                (method, members, protocol, fraction),
            )
            gain = paired_difference(targets, own, scores, patients, classes=records.classes)
            rows.append(
                {
                    "over": method,
                    "members": members,
                    "protocol": protocol,
                    "fraction": fraction,
                    "gain": gain.value,
                    "low": gain.low,
                    "high": gain.high,
                }
            )
    return pd.DataFrame(rows)
