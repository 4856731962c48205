"""A tiny study of every method, for tests that run all of them."""

from dataclasses import replace
from pathlib import Path

from ecglib.selfsup import Pretraining
from ecglib.semisup import Adaptation
from ecglib.supervised import Training
from ecgstudy.arms.self_evolving import Evolution, evolve
from ecgstudy.arms.semi_supervised import Start
from ecgstudy.arms.supervised import FromScratch
from ecgstudy.methods import (
    SelfEvolving,
    SelfSupervised,
    SemiSupervised,
    adapted,
    evolving,
    names_of,
    pretraining,
)
from ecgstudy.runs import Run
from ecgstudy.study import LabelSubset, Study
from toolkit import labelled_records

ENCODER = "xresnet1d_narrow"
BACKBONE = "conv_transformer_small"
SUBSET = LabelSubset(0.5, 0, (0.5, 1.0))
OPTIONS = {
    "simclr": {"hidden": 16, "outputs": 8},
    "byol": {"hidden": 16, "outputs": 8},
    "swav": {"prototypes": 6, "hidden": 16, "outputs": 8, "batch_size": 8, "queue": 1},
    "cpc": {"steps": 2, "negatives": 4},
    "dino": {"prototypes": 8, "hidden": 16, "bottleneck": 8, "local_views": 1},
}
TRAINING = Training(
    ENCODER, steps=3, batch_size=8, crop_seconds=1.0, learning_rate=0.003, weight_decay=0.0
)
PRETRAINING = Pretraining(
    ENCODER, steps=3, batch_size=8, crop_seconds=1.0, learning_rate=0.003, weight_decay=0.0
)
ADAPTATION = Adaptation(
    BACKBONE,
    steps=2,
    batch_size=4,
    crop_seconds=1.0,
    learning_rate=0.003,
    low_rank_learning_rate=0.003,
    weight_decay=0.0,
    rank=2,
)
EVOLUTION = Evolution(
    "vit1d_small",
    stages=1,
    first_steps=2,
    first_learning_rate=0.001,
    steps=2,
    learning_rate=0.001,
    batch_size=8,
    crop_seconds=1.0,
    weight_decay=0.0,
    dropout=0.0,
    drop_path=0.0,
    correction_every=8,
    threshold=0.9,
    transforms={"gaussian_noise": {}},
    options={"prototypes": 8, "hidden": 8, "bottleneck": 4, "norm": True, "local_views": 1},
)


def tiny_runs(study: Study) -> list[Run]:
    """One run of each method."""
    jobs = [FromScratch(SUBSET, TRAINING)]
    for name in names_of(SelfSupervised):
        encoder = "cpc_lstm_small" if name == "cpc" else ENCODER
        settings = replace(PRETRAINING, encoder=encoder, options=OPTIONS.get(name, {}))
        jobs.append(pretraining(name, settings))
    jobs += adapted(names_of(SemiSupervised), Start("random"), [SUBSET], ADAPTATION)
    runs = study.grid(jobs, progress_bar=False)
    arms = evolving(names_of(SelfEvolving))
    return runs + evolve(study, arms, [SUBSET], EVOLUTION)


def last_losses(results: Path) -> dict[str, float]:
    """The loss with which a run of each method ended, by the name of the method."""
    runs = tiny_runs(Study(labelled_records(), results))
    return {run.spec.method: run.about["notes"]["history"][-1]["loss"] for run in runs}
