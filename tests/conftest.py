"""What tests of runs share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ecglib.records import Records
from ecgstudy.arms.fusion import FusionData, FusionSettings
from ecgstudy.arms.pretrain import Encode
from ecgstudy.methods import fuse
from ecgstudy.runs import Run
from ecgstudy.study import Study, label_grid
from toolkit import labelled_records


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random weights."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def records() -> Records:
    """A data set for tiny studies, used where a test module has no records of its own."""
    return labelled_records()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder for the module."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def small_fusion(records: Records) -> Callable[..., tuple[Run, dict[str, Run]]]:
    """Makes, in a results folder, a DVME of two encoders that were never trained: its run, and
    those of its members.
    """

    def make(folder: Path, windows: tuple[float, float] = (1.0, 1.0)) -> tuple[Run, dict[str, Run]]:
        study = Study(records, folder)
        members = {
            f"random{seed}": study.run(Encode("random", "xresnet1d_narrow", seconds, seed))
            for seed, seconds in enumerate(windows)
        }
        settings = FusionSettings(
            width=8,
            heads=2,
            hidden=6,
            dropout=0.1,
            token_dropout=0.2,
            steps=3,
            batch_size=8,
            learning_rates=[0.001],
        )
        data = FusionData(records, label_grid([1.0], 1), members)
        (run,) = fuse(study, data, "dvme", settings)
        return run, members

    return make
