"""Every semi-supervised method as a run: the same backbone, start, records, batches and schedule."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ecglib.batches import CropBatches, SemiBatches
from ecglib.checkpoints import first_difference, load_state
from ecglib.encoders import ENCODERS, encoder_maker, make_encoder
from ecglib.errors import DataError
from ecglib.lora import (
    add_lora,
    last_linear,
    low_rank_layers,
    merge_lora,
    set_deactivation,
    trainable_parameters,
)
from ecglib.ranks import allocate_ranks
from ecglib.records import Records
from ecglib.semisup import Adaptation, Task
from ecglib.train import fit, linear_schedule
from ecgstudy.arms.pretrain import start_weights
from ecgstudy.arms.supervised import Labelled, classifier_result
from ecgstudy.runs import MODEL, Result, Run
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
        own = network.state_dict()
        last = f"{last_linear(network)}."
        taken = {name: start[name] for name in own if name in start and not name.startswith(last)}
        needed = {name: own[name] for name in own if name in taken or not name.startswith("head.")}
        name = first_difference(needed, taken)
        if name is not None:
            raise DataError(
                f"The start does not fit the backbone {backbone} (first difference at {name}); "
                "pretrain this backbone."
            )
        network.load_state_dict(taken, strict=False)
    return network


# Ways to adapt a network in place before training. Each returns what it decided, for `run.json`.


def every_weight(network: nn.Module, labelled: CropBatches, settings: Adaptation) -> dict:
    """Leave the network as it is, all of it trained."""
    return {}


def low_rank(network: nn.Module, labelled: CropBatches, settings: Adaptation) -> dict:
    """A low-rank pair of the full rank beside every layer."""
    add_lora(network, settings.rank)
    return {}


def nested(network: nn.Module, labelled: CropBatches, settings: Adaptation) -> dict:
    """Pairs whose rank is drawn anew at each pass, as in DyLoRA."""
    add_lora(network, settings.rank, nested=True)
    return {}


def singular(network: nn.Module, labelled: CropBatches, settings: Adaptation) -> dict:
    """Pairs with singular values and 1.5 times the rank, as AdaLoRA begins."""
    add_lora(network, round(1.5 * settings.rank), singular_values=True)
    return {}


def deactivated(network: nn.Module, labelled: CropBatches, settings: Adaptation) -> dict:
    """Pairs of the full rank that are left out at random."""
    add_lora(network, settings.rank, settings.deactivation)
    return {"ranks": {name: layer.rank for name, layer in low_rank_layers(network).items()}}


def allocated(network: nn.Module, labelled: CropBatches, settings: Adaptation) -> dict:
    """Pairs whose rank one pass over the labelled batches decides."""
    started = time.perf_counter()
    steps = max(len(labelled.indices) // labelled.batch_size, 1)
    batches = (labelled(step) for step in range(steps))
    ranks = allocate_ranks(network, batches, settings.rank, settings.share, settings.score)
    seconds = time.perf_counter() - started
    add_lora(network, ranks)
    return {"ranks": ranks, "rank_pass_seconds": seconds}


def allocated_and_deactivated(
    network: nn.Module, labelled: CropBatches, settings: Adaptation
) -> dict:
    """Both, as in CE-SSL."""
    notes = allocated(network, labelled, settings)
    set_deactivation(network, settings.deactivation)
    return notes


@dataclass(frozen=True)
class Recipe:
    """What makes a semi-supervised method: `adapt(network, labelled, settings)` is one of the ways
    above, `objective(network, task)` gives the loss around the adapted network, and `unlabelled`
    says whether it learns from unlabelled records at all.
    """

    objective: Callable[[nn.Module, Task], nn.Module]
    adapt: Callable[[nn.Module, CropBatches, Adaptation], dict] = every_weight
    unlabelled: bool = True

    def prepare(
        self, network: nn.Module, batches: SemiBatches, task: Task
    ) -> tuple[nn.Module, SemiBatches | CropBatches, dict]:
        """Adapt `network`; its objective, the batches to learn from, and what was decided."""
        notes = self.adapt(network, batches.labelled, task.settings)
        objective = self.objective(network, task)
        notes["trained_parameters"] = sum(p.numel() for p in trainable_parameters(network))
        return objective, batches if self.unlabelled else batches.labelled, notes


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
        own = {"unlabelled": self.recipe.unlabelled, "fractions": list(self.subset.fractions)}
        return {**asdict(self.adaptation), **self.start.settings(), **own}

    def reaches(self) -> tuple[Callable, ...]:
        return (encoder_maker(self.adaptation.backbone),)

    def compute(self, study: Study, workspace: Path) -> Result:
        settings = self.adaptation
        records = study.records
        classes = len(records.classes)
        labelled = self.subset.positions(records)
        unlabelled = np.setdiff1d(records.split["train"], labelled)
        batches = SemiBatches(
            records,
            labelled,
            unlabelled,
            settings.batch_size,
            settings.ratio,
            settings.crop_seconds,
            self.seed,
            study.device,
        )
        network = make_network(settings.backbone, classes, self.seed, self.start.weights())
        network = network.to(study.device)
        task = Task(classes, len(unlabelled), settings.steps, settings)
        objective, source, notes = self.recipe.prepare(network, batches, task)
        pairs = low_rank_layers(network)
        report = getattr(objective, "report", dict)
        history = fit(
            objective.to(study.device),
            source,
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


def kept_network(run: Run, records: Records, results: Path) -> tuple[nn.Module, float]:
    """The network that an adapted run kept, and the seconds of its windows."""
    settings = run.spec.settings
    network = make_network(settings["backbone"], len(records.classes), run.spec.seed)
    load_state(network, run.weights(), run.folder / MODEL)
    return network, settings["crop_seconds"]
