"""Scores of runs that differ in the seed alone, summed up."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from ecglib.errors import DataError
from ecglib.evaluate.draws import bootstrap_interval
from ecglib.evaluate.metrics import macro_auroc
from ecglib.records import Records
from ecgstudy.runs import Run

CELL = ("method", "data", "labels", "fraction")


def seed_summary(
    runs: Iterable[Run],
    records: Records,
    split: str = "test",
    cell: Sequence[str] = CELL,
    network: str = "",
) -> pd.DataFrame:
    """One row a cell of runs that differ in the seed alone: macro AUROC as mean over seeds, and
    that mean's interval.

    `cell` names what tells cells apart, fields or settings of the specs; `network` a second network
    that the runs kept, such as "teacher". Patients are drawn once for all seeds of a cell, so the
    interval speaks of the test patients; `sd_seeds` tells how far the label subsets and starts
    differ.
    """
    targets, patients = records.split_truth(split)
    rows = []
    for values, scores in sorted(seed_scores(runs, split, cell, network).items()):
        interval = bootstrap_interval(targets, scores, patients, classes=records.classes)
        each = [macro_auroc(targets, one, records.classes) for one in scores]
        rows.append(
            {
                **dict(zip(cell, values, strict=True)),
                "split": split,
                "metric": "macro_auroc",
                **interval._asdict(),
                "seeds": len(scores),
                "sd_seeds": float(np.std(each, ddof=1)) if len(each) > 1 else np.nan,
            }
        )
    return pd.DataFrame(rows)


def seed_scores(
    runs: Iterable[Run], split: str = "test", cell: Sequence[str] = CELL, network: str = ""
) -> dict[tuple, np.ndarray]:
    """Probabilities `(seeds, n, classes)` of each cell of runs, in the order of their seeds."""
    name = f"{network}/{split}/probabilities" if network else f"{split}/probabilities"
    cells: dict[tuple, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.spec.seed):
        cells.setdefault(tuple(map(run.spec.value, cell)), []).append(run)
    return {
        values: np.stack([run.predictions()[name] for run in members])
        for values, members in cells.items()
    }


def need_same_seeds(runs: Sequence[Run], cell: Sequence[str], own: tuple, other: tuple) -> None:
    """DataError where the runs of two cells do not pair."""
    seeds = [
        sorted(run.spec.seed for run in runs if tuple(map(run.spec.value, cell)) == side)
        for side in (own, other)
    ]
    if seeds[0] != seeds[1]:
        names = [" ".join(map(str, side)) for side in (own, other)]
        raise DataError(
            f"{names[0]} and {names[1]} were not run with the same seeds; run the missing ones."
        )
