"""A study: records, where results about them lie, and the device that computes.

What is computed is a job. The study derives both the key of its run and the inputs of its
computation from that one object, so that they cannot disagree.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ecglib.encoders import ENCODERS, encoder_maker
from ecglib.labels import label_subsets
from ecglib.records import Records
from ecglib.train import default_device
from ecgstudy.code import code_of
from ecgstudy.runs import Result, Run, RunSpec, run_all, run_or_load

FEW = 0.1  # share of the labels up to which luck matters, so that several subsets are drawn


@dataclass(frozen=True)
class LabelSubset:
    """Which training records are labelled: about the share `fraction` of them, whole patients.

    The subset is nested in those of the other `fractions` with the same `seed`.
    """

    fraction: float
    seed: int
    fractions: tuple[float, ...]

    def positions(self, records: Records) -> np.ndarray:
        """Sorted positions of the labelled records; DataError where the share is too small."""
        return label_subsets(records, self.fractions, self.seed)[self.fraction]


def label_grid(
    fractions: Sequence[float], few: int, many: int = 1, at: Iterable[float] | None = None
) -> list[LabelSubset]:
    """Label subsets of the fractions (or of those in `at`), nested over all fractions.

    There are `few` of each at 10 % of the labels and below, and `many` above.
    """
    chosen = fractions if at is None else [value for value in fractions if value in set(at)]
    counts = {value: few if value <= FEW else many for value in chosen}
    return [
        LabelSubset(value, seed, tuple(fractions))
        for value, count in counts.items()
        for seed in range(count)
    ]


class Job:
    """One computation of a study. Jobs are frozen dataclasses that derive from this class.

    `method` names the arm in tables, `seed` draws weights, batches and noise, `fraction` is the
    share of labelled training records, 0 where no label is used. `rebuild` is the "module:name" of
    `rebuild(run, records, results)`, which gives the trained network of a finished run, empty where
    a run keeps none.
    """

    method: str
    seed: int = 0
    fraction: float = 0.0
    rebuild = ""

    def settings(self) -> Mapping:
        """Every other value that the result depends on, JSON-like, for the key and `run.json`."""
        raise NotImplementedError

    def reaches(self) -> tuple:
        """Functions and classes that the job finds by name, whose source its key takes in.

        These are the makers of its encoders.
        """
        settings = self.settings()
        names = {settings.get("encoder"), settings.get("backbone")}
        return tuple(encoder_maker(name) for name in names if name in ENCODERS)

    def compute(self, study: "Study", workspace: Path) -> Result:
        """The result; `workspace` is a folder that survives a kill."""
        raise NotImplementedError


@dataclass(frozen=True)
class Study:
    """Records with the folder of the results about them, and what computes.

    Trainings of a grid run `workers` at a time, each in a process of one thread.
    """

    records: Records
    results: Path
    device: str = "cpu"
    workers: int = 1

    @classmethod
    def open(cls, results: str | Path, workers: int = 1) -> "Study":
        """The study of the labelled records below `results`, on a GPU where there is one."""
        records = Records.load(Path(results) / "records").labelled
        return cls(records, Path(results), default_device(), workers)

    @property
    def name(self) -> str:
        """The data set's name, which says so where it is simulated."""
        return f"{self.records.name}{self.records.caveat}"

    def spec(self, job: Job) -> RunSpec:
        """What identifies the run of a job."""
        labels = self.records.about["task"] if job.fraction else "unlabelled"
        identity = (job.method, self.records.name, self.records.fingerprint, labels)
        return RunSpec(*identity, job.fraction, job.seed, dict(job.settings()), code_of(job))

    def run(self, job: Job) -> Run:
        """The run of a job: opened where it is finished, else computed and kept."""
        return run_or_load(self.spec(job), partial(_compute, self, job), self.results)

    def grid(
        self, jobs: Iterable[Job], workers: int | None = None, progress_bar: bool = True
    ) -> list[Run]:
        """The runs of some jobs, computing what is missing, see `runs.run_all`."""
        pairs = [(self.spec(job), partial(_compute, self, job)) for job in jobs]
        return run_all(pairs, self.results, progress_bar, workers or self.workers)


def _compute(study: Study, job: Job, spec: RunSpec, workspace: Path) -> Result:
    """The result of a job, in the form that the run store calls."""
    result = job.compute(study, workspace)
    result.notes["rebuild"] = job.rebuild
    return result
