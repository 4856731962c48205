"""Cells of runs that differ in the seed alone: their scores, and one summary row per cell."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.evaluate.draws import PatientDraws, auroc
from ecglib.evaluate.metrics import macro_auroc, warn_of_absent_classes
from ecglib.records import Records
from ecgstudy.runs import Run

CELL = ("method", "data", "labels", "fraction")
STUDENT = "student"  # of the networks that a run kept, the one whose scores have no prefix
Members = list[tuple[Run, str]]  # the runs of a cell by seed, each with the network that is meant


def group_runs(runs: Iterable[Run], cell: Sequence[str] = CELL) -> dict[tuple, Members]:
    """The runs of each cell in the order of their seeds.

    `cell` names what tells cells apart, fields or settings of the specs; "network" among them are
    the networks that a run kept, student and teacher.
    """
    cells: dict[tuple, Members] = {}
    for run in sorted(runs, key=lambda run: run.spec.seed):
        kept = {row["network"] for row in run.about["metrics"]} if "network" in cell else [STUDENT]
        for network in sorted(kept):
            values = [network if name == "network" else run.spec.value(name) for name in cell]
            cells.setdefault(tuple(values), []).append((run, network))
    return cells


def stack_scores(members: Members, split: str = "test") -> np.ndarray:
    """Probabilities `(seeds, n, classes)` of the runs of a cell."""
    names = [
        f"{split}/probabilities" if network == STUDENT else f"{network}/{split}/probabilities"
        for _, network in members
    ]
    return np.stack([run.predictions()[name] for (run, _), name in zip(members, names)])


def seed_scores(
    runs: Iterable[Run], split: str = "test", cell: Sequence[str] = CELL
) -> dict[tuple, np.ndarray]:
    """Probabilities `(seeds, n, classes)` of each cell of runs, see `group_runs`."""
    cells = group_runs(runs, cell)
    return {values: stack_scores(members, split) for values, members in cells.items()}


def seed_summary(
    runs: Iterable[Run], records: Records, split: str = "test", cell: Sequence[str] = CELL
) -> pd.DataFrame:
    """One row per cell: macro AUROC as mean over seeds, and the interval of that mean.

    `cell` is that of `group_runs`. Patients are drawn once for all seeds of a cell, so the interval
    speaks of the test patients; `sd_seeds` tells how far the label subsets and starts differ.
    """
    targets, patients = records.split_truth(split)
    warn_of_absent_classes(targets, records.classes)
    draws = PatientDraws(patients)
    rows = []
    for values, scores in sorted(seed_scores(runs, split, cell).items()):
        each = [macro_auroc(targets, seed) for seed in scores]
        rows.append(
            {
                **dict(zip(cell, values, strict=True)),
                "split": split,
                "metric": "macro_auroc",
                **draws.interval(auroc(targets, scores))._asdict(),
                "seeds": len(scores),
                "sd_seeds": float(np.std(each, ddof=1)) if len(each) > 1 else np.nan,
            }
        )
    return pd.DataFrame(rows)


def need_same_seeds(cells: Mapping[tuple, Members], own: tuple, other: tuple) -> None:
    """DataError where the runs of two cells do not pair."""
    first, second = ([run.spec.seed for run, _ in cells.get(side, ())] for side in (own, other))
    if first != second:
        names = [" ".join(map(str, side)) for side in (own, other)]
        raise DataError(
            f"{names[0]} and {names[1]} were not run with the same seeds; run the missing ones."
        )
