"""Every semi-supervised method of the study as a run: the same backbone, start, records, batches
and schedule.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ecglib.batches import CropBatches, SemiBatches
from ecglib.checkpoints import first_difference
from ecglib.encoders import ENCODERS, encoder_maker, make_encoder
from ecglib.errors import DataError
from ecglib.labels import label_subsets
from ecglib.lora import add_lora, last_linear, low_rank_layers, merge_lora, trainable_parameters
from ecglib.ranks import AdaptiveRanks, allocate_ranks
from ecglib.records import Records
from ecglib.semisup.ce_ssl import CESSL
from ecglib.semisup.fixmatch import FixedThreshold, FixMatch, FlexThreshold, SoftThreshold
from ecglib.semisup.mixed_teacher import MixedTeacher
from ecglib.train import fit, linear_schedule
from ecgstudy.arms.supervised import classifier_result
from ecgstudy.runs import Result, RunSpec

CE_SSL = (
    "ce_ssl",
    "ce_ssl_without_deactivation",
    "ce_ssl_without_allocation",
    "ce_ssl_without_norm",
)
FULL = (
    "supervised",
    "fixmatch",
    "flexmatch",
    "softmatch",
    "mixed_teacher",
)  # every weight is trained
LOW_RANK = ("fixmatch_lora", "fixmatch_adalora", "fixmatch_dylora")
METHODS = (*CE_SSL, *FULL, *LOW_RANK)
LABELLED_ONLY = ("supervised", "ce_ssl_without_norm")  # have no use for unlabelled records


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
            f"There is no backbone {backbone!r}; choose an encoder that is made with classes, such as "
            "conv_transformer_small."
        )
    torch.manual_seed(seed)
    network = make_encoder(backbone, classes=classes)
    if start is not None:
        last, own = last_linear(network), network.state_dict()
        taken = {
            name: start[name] for name in own if name in start and not name.startswith(f"{last}.")
        }
        needed = {name: own[name] for name in own if name in taken or not name.startswith("head.")}
        name = first_difference(needed, taken)
        if name is not None:
            raise DataError(
                f"The start does not fit the backbone {backbone} (first difference at {name}); pretrain "
                "this backbone."
            )
        network.load_state_dict(taken, strict=False)
    return network


def adapt(method: str, network: nn.Module, labelled: CropBatches, settings: Mapping) -> dict:
    """Make `network` ready for `method`: low-rank layers where it has them. Returns what was
    decided, for the notes.
    """
    rank = settings["rank"]
    if method in CE_SSL:
        ranks: int | dict[str, int] = rank
        started = time.perf_counter()
        if method != "ce_ssl_without_allocation":
            steps = max(len(labelled.indices) // labelled.batch_size, 1)
            ranks = allocate_ranks(
                network,
                (labelled(step) for step in range(steps)),
                rank,
                settings["share"],
                settings["score"],
            )
        seconds = time.perf_counter() - started
        add_lora(
            network,
            ranks,
            0.0 if method == "ce_ssl_without_deactivation" else settings["deactivation"],
        )
        return {
            "ranks": {name: layer.rank for name, layer in low_rank_layers(network).items()},
            "rank_pass_seconds": seconds,
        }
    if method == "fixmatch_adalora":
        add_lora(network, round(1.5 * rank), singular_values=True)
    elif method in LOW_RANK:
        add_lora(network, rank, nested=method == "fixmatch_dylora")
    elif method not in FULL:
        raise ValueError(f"There is no method {method!r}; choose from {', '.join(METHODS)}.")
    return {}


def make_objective(
    method: str, network: nn.Module, classes: int, unlabelled: int, steps: int, settings: Mapping
) -> nn.Module:
    """The loss of `method` around an adapted `network`; `unlabelled` is the number of unlabelled
    records.
    """
    if method in CE_SSL or method == "supervised":
        return CESSL(network, semi_supervised_norm=method not in LABELLED_ONLY)
    if method == "mixed_teacher":
        return MixedTeacher(
            network, steps, weight=1.0
        )  # of 1 and 10, the better one on folds 8 and 9
    # SoftMatch's averages must settle within a few hundred steps; the published 0.999 is meant for
    # 2^20.
    thresholds = {
        "flexmatch": lambda: FlexThreshold(classes, unlabelled, settings["threshold"]),
        "softmatch": lambda: SoftThreshold(classes, momentum=0.99),
    }
    objective = FixMatch(
        network, thresholds.get(method, lambda: FixedThreshold(classes, settings["threshold"]))()
    )
    return (
        AdaptiveRanks(objective, network, settings["rank"])
        if method == "fixmatch_adalora"
        else objective
    )


def batches_for(method: str, batches: SemiBatches) -> SemiBatches | CropBatches:
    """The batches that `method` learns from: the labelled ones are the same with and without
    unlabelled ones.
    """
    return batches.labelled if method in LABELLED_ONLY else batches


def semi_supervised_run(
    records: Records,
    fractions: Sequence[float],
    start: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
) -> Callable[[RunSpec, Path], Result]:
    """The function for `runs.run_or_load`: train `spec.method` on a label subset and all other
    training records.

    `start` are the backbone's pretrained weights, None a random start; spec.settings tells which.
    The unlabelled records are those of folds 1-8 outside the subset; folds 9 and 10 are only
    scored.
    """

    def run(spec: RunSpec, workspace: Path) -> Result:
        settings = spec.settings
        labelled = label_subsets(records, fractions, spec.seed)[spec.fraction]
        unlabelled = np.setdiff1d(records.split["train"], labelled)
        batches = SemiBatches(
            records,
            labelled,
            unlabelled,
            settings["batch_size"],
            settings["ratio"],
            settings["crop_seconds"],
            spec.seed,
            device,
        )
        network = make_network(settings["backbone"], len(records.classes), spec.seed, start).to(
            device
        )
        notes = adapt(spec.method, network, batches.labelled, settings)
        objective = make_objective(
            spec.method, network, len(records.classes), len(unlabelled), settings["steps"], settings
        ).to(device)
        notes["trained_parameters"] = sum(
            parameter.numel() for parameter in trainable_parameters(network)
        )
        rate = settings["learning_rate" if spec.method in FULL else "low_rank_learning_rate"]
        report = getattr(objective, "report", dict)
        history = fit(
            objective,
            batches_for(spec.method, batches),
            settings["steps"],
            learning_rate=rate,
            weight_decay=settings["weight_decay"],
            schedule=linear_schedule,
            seed=spec.seed,
            folder=workspace,
            watch=lambda _: report(),
        )
        final = merge_lora(getattr(objective, "teacher", network))
        result = classifier_result(
            final, records, labelled, settings, history.to_dict("records"), device
        )
        result.notes |= notes
        return result

    return run
