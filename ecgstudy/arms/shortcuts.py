"""Whether the order of a recording's segments can be told without looking at the heart."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ecglib.encoders import encoder_maker
from ecglib.selfsup.order_shortcuts import shortcut_probes
from ecgstudy.runs import Result
from ecgstudy.study import Job, Study


@dataclass(frozen=True)
class OrderShortcuts(Job):
    """Networks that learn the order task of patient pairs from the whole view, the joins, or drift.

    Trained `steps` steps on folds 1-8 and asked on fold 9; see `shortcut_probes`. The notes keep
    its table as `probes`.
    """

    encoder: str
    steps: int
    crop_seconds: float
    segments: int
    seed: int = 0
    method: str = "order_shortcuts"

    def settings(self) -> Mapping:
        names = ("encoder", "steps", "crop_seconds", "segments")
        return {name: getattr(self, name) for name in names}

    def reaches(self) -> tuple[Callable, ...]:
        return (encoder_maker(self.encoder),)

    def compute(self, study: Study, workspace: Path) -> Result:
        started = time.perf_counter()
        pools = [study.records.split[name] for name in ("train", "validation")]
        options = {"seed": self.seed, "device": study.device, **self.settings()}
        table = shortcut_probes(study.records, *pools, **options)
        notes = {"probes": table.to_dict("records")}
        return Result([], notes=notes, seconds=time.perf_counter() - started)
