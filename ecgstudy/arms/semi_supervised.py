"""Semi-supervised methods as runs: the same backbone, start, records, batches and schedule."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ecglib.batches import CropBatches, SemiBatches
from ecglib.checkpoints import first_difference
from ecglib.encoders import ENCODERS, encoder_maker, make_encoder
from ecglib.errors import DataError
from ecglib.lora import (
    add_lora,
    last_linear,
    low_rank_layers,
    merge_lora,
    trainable_parameters,
)
from ecglib.ranks import allocate_ranks
from ecglib.records import Records
from ecglib.semisup import Adaptation, Task
from ecglib.train import fit, linear_schedule
from ecgstudy.arms.pretrain import start_weights
from ecgstudy.arms.supervised import Labelled, classifier_result
from ecgstudy.runs import Result, Run
from ecgstudy.study import Study


@dataclass(frozen=True)
class Start:
    """The weights from which every semi-supervised method begins: those of a run, random without.

    `name` is that of the column `start`.
    """

    name: str
    run: Run | None = None

    def settings(self) -> Mapping:
        """What tells the start in a job's settings."""
        return {"start": self.name, "start_key": self.run.spec.key if self.run else "none"}

    def weights(self) -> dict[str, Tensor] | None:
        """The encoder's weights, None where they are random."""
        return start_weights(self.run) if self.run else None


def make_network(
    backbone: str, classes: int, seed: int, start: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """An encoder made with classes, random weights drawn from the seed, and the weights of `start`
    but for the last layer.

    `start` may come from other classes, or from an encoder without a head, whose first layer then
    stays random. DataError where it lacks a weight of the backbone or has one of another shape,
    ValueError for a name that is no encoder made with classes.
    """
    if backbone not in ENCODERS or "classes" not in signature(encoder_maker(backbone)).parameters:
        raise ValueError(
            f"There is no backbone {backbone!r}; choose an encoder that is made with classes, such "
            "as conv_transformer_small."
        )
    torch.manual_seed(seed)
    network = make_encoder(backbone, classes=classes)
    if start is not None:
        last = f"{last_linear(network)}."
        own = {name: w for name, w in network.state_dict().items() if not name.startswith(last)}
        taken = {name: start[name] for name in own if name in start}
        needed = {name: own[name] for name in own if name in taken or not name.startswith("head.")}
        name = first_difference(needed, taken)
        if name:
            raise DataError(
                f"The start does not fit the backbone {backbone} (first difference at {name}); "
                "pretrain this backbone."
            )
        network.load_state_dict(taken, strict=False)
    return network


def every_weight(network: nn.Module, labelled: CropBatches, settings: Adaptation) -> dict:
    """Leave the network as it is, all of it trained."""
    return {}


def low_rank(
    network: nn.Module,
    labelled: CropBatches,
    settings: Adaptation,
    allocate: bool = False,
    deactivate: bool = False,
    start: float = 1.0,
    **kind: bool,
) -> dict:
    """Put low-rank pairs beside the layers; returns their ranks and the seconds to find them.

    All have `start` times the full rank, or with `allocate` what one pass over the labelled batches
    decides. With `deactivate` they are left out at random. `kind` goes to `LowRankLayer`.
    """
    started = time.perf_counter()
    ranks = round(start * settings.rank)
    seconds = 0.0
    if allocate:
        batches = map(labelled, range(max(len(labelled.indices) // labelled.batch_size, 1)))
        ranks = allocate_ranks(network, batches, settings.rank, settings.share, settings.score)
        seconds = time.perf_counter() - started
    add_lora(network, ranks, settings.deactivation if deactivate else 0.0, **kind)
    ranks = {name: layer.rank for name, layer in low_rank_layers(network).items()}
    return {"ranks": ranks, "rank_pass_seconds": seconds}


@dataclass(frozen=True)
class Recipe:
    """What makes a semi-supervised method: `adapt(network, labelled, settings, **options)` changes
    the network in place, as those above, and returns what it decided, `objective(network, task)`
    gives the loss around the adapted network, and `unlabelled` says whether it learns from
    unlabelled records.
    """

    objective: Callable[[nn.Module, Task], nn.Module]
    adapt: Callable[..., dict] = every_weight
    unlabelled: bool = True
    options: Mapping = field(default_factory=dict)

    def prepare(
        self,
        network: nn.Module,
        records: Records,
        pools: tuple[np.ndarray, np.ndarray],
        settings: Adaptation,
        seed: int = 0,
        device: str = "cpu",
    ) -> tuple[nn.Module, SemiBatches | CropBatches, dict]:
        """Adapt `network`; its objective, the batches to learn from, and what was decided.

        `pools` are the positions of the labelled and of the unlabelled records.
        """
        crops = (settings.batch_size, settings.ratio, settings.crop_seconds)
        batches = SemiBatches(records, *pools, *crops, seed, device)
        network.to(device)
        notes = self.adapt(network, batches.labelled, settings, **self.options)
        objective = self.objective(network, Task(len(records.classes), len(pools[1]), settings))
        notes["trained_parameters"] = sum(p.numel() for p in trainable_parameters(network))
        return objective.to(device), batches if self.unlabelled else batches.labelled, notes


@dataclass(frozen=True)
class Adapted(Labelled):
    """A backbone trained on a label subset with all other training records unlabelled.

    Scored is the teacher where the objective has one. Low-rank pairs are merged into the weights.
    """

    method: str
    start: Start
    adaptation: Adaptation
    recipe: Recipe
    rebuild = "ecgstudy.arms.semi_supervised:kept_network"

    def settings(self) -> Mapping:
        recipe = {"unlabelled": self.recipe.unlabelled, "adapt": dict(self.recipe.options)}
        own = super().settings() | self.start.settings()
        return asdict(self.adaptation) | own | recipe

    def compute(self, study: Study, workspace: Path) -> Result:
        settings = self.adaptation
        records = study.records
        labelled = self.subset.positions(records)
        pools = (labelled, np.setdiff1d(records.split["train"], labelled))
        start = self.start.weights()
        network = make_network(settings.backbone, len(records.classes), self.seed, start)
        objective, batches, notes = self.recipe.prepare(
            network, records, pools, settings, self.seed, study.device
        )
        pairs = low_rank_layers(network)
        report = getattr(objective, "report", dict)
        history = fit(
            objective,
            batches,
            settings.steps,
            learning_rate=settings.low_rank_learning_rate if pairs else settings.learning_rate,
            weight_decay=settings.weight_decay,
            schedule=linear_schedule,
            seed=self.seed,
            folder=workspace,
            watch=lambda _: report(),
        ).to_dict("records")
        final = merge_lora(getattr(objective, "teacher", network))
        result = classifier_result(study, final, labelled, settings.crop_seconds, history)
        result.notes |= notes
        return result


def kept_network(run: Run, records: Records, results: Path) -> nn.Module:
    """The network that an adapted run kept."""
    backbone = run.spec.settings["backbone"]
    return run.load(make_network(backbone, len(records.classes), run.spec.seed))
