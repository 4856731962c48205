"""Which layers deserve a higher rank: CE-SSL's one-shot allocation, and AdaLoRA's, which goes on
while training.
"""

import copy
from collections.abc import Iterable, Mapping

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.batches import Batch
from ecglib.errors import DataError
from ecglib.lora import LOW_RANK_PARTS, add_lora, low_rank_layers

# AdaLoRA's penalty and smoothing, and the shares of the run between which the ranks shrink.
PENALTY, SMOOTHING = 0.1, 0.85
BEGIN, END = 0.1, 0.7


def importance(
    model: nn.Module, batches: Iterable[Batch], rank: int, seed: int = 0
) -> pd.DataFrame:
    """Importance of each adaptable layer of `model`, before anything is trained; the model stays as
    it is.

    With B = 0 the loss has a gradient in B alone, and G' = (dL/dB) A = G A'A stands for the
    gradient G of the weight. One row per layer, in order, with its mean over batches of the mean
    over entries of

    published    (W0 * G')^2 corrected    (W0 * G' / (rank sigma^2))^2    since A'A is rank sigma^2
    times the unit matrix on average.

    A fused layer starts A with a larger sigma than the others, so the published score favours it
    (10.5 times at a width of 256) for no reason that lies in the data; it takes the mean of its
    parts. DataError where there is no batch.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = add_lora(copy.deepcopy(model), rank).train()
    layers = low_rank_layers(probe)
    rows = []
    for batch in batches:
        probe.zero_grad()
        F.binary_cross_entropy_with_logits(probe(batch.signals).float(), batch.targets).backward()
        scores = {}
        for name, layer in layers.items():
            weight = layer.base.weight.double()
            proxy = layer.B.grad.unflatten(0, (layer.parts, -1)) @ layer.pairs()[0]
            scores[name] = (weight * proxy.view_as(weight)).square().mean().item()
        rows.append(scores)
    if not rows:
        raise DataError(
            "There is no labelled batch to measure the importance of layers on; label some records."
        )
    published = pd.DataFrame(rows).mean()
    scale = pd.Series({name: rank * layer.start_deviation**2 for name, layer in layers.items()})
    return pd.DataFrame({"published": published, "corrected": published / scale**2})


def ranks_by_importance(scores: Mapping[str, float], rank: int, share: float) -> dict[str, int]:
    """`rank` for the `share` of layers with the largest scores, half of it (an even number, as
    published) for the rest.

    DataError for a share outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise DataError(
            f"A share of important layers of {share} is not in [0, 1]; 0.5 gives half of them the "
            "full rank."
        )
    ordered = sorted(scores, key=scores.get, reverse=True)
    important = ordered[: round(share * len(ordered))]
    return {name: rank if name in important else max(rank // 4 * 2, 1) for name in scores}


def allocate_ranks(
    model: nn.Module, batches: Iterable[Batch], rank: int, share: float, score: str = "corrected"
) -> dict[str, int]:
    """Ranks for `lora.add_lora`: the full `rank` for the important `share` of the layers, half of
    it for the others.

    One pass over the labelled `batches` before any training; `score` is a column of `importance`.
    """
    scores = importance(model, batches, rank)[score]
    return ranks_by_importance(scores.to_dict(), rank, share)


class AdaptiveRanks(nn.Module):
    """AdaLoRA (Zhang et al. 2023) around an `objective`: the ranks of `network` shrink to a budget
    while it learns.

    Every difference is B diag(values) A with B'B and AA' kept near the unit matrix by a penalty. A
    triple is as important as its value's and its vectors' mean of |weight x gradient|, smoothed,
    times how much that varies. From 1.5 times the `rank` at the start, along a cubic, the least
    important values are set to 0 until `rank` per layer remain on average. `network` must have been
    adapted with `singular_values=True` and 1.5 times the `rank`.
    """

    def __init__(self, objective: nn.Module, network: nn.Module, rank: int) -> None:
        super().__init__()
        self.objective = objective
        self.layers = list(low_rank_layers(network).values())
        self.sizes = [len(layer.values) for layer in self.layers]
        self.goal = sum(rank * layer.parts for layer in self.layers)
        for index, layer in enumerate(self.layers):
            for part in LOW_RANK_PARTS:
                # The smoothed mean and the smoothed deviation of |weight x gradient|.
                shape = (2, *getattr(layer, part).shape)
                self.register_buffer(f"{part}_{index}", layer.A.new_zeros(shape))

    def loss(self, batch: Batch) -> Tensor:
        """The objective's loss and the penalty |AA' - 1|^2 + |B'B - 1|^2, summed over layers and
        their parts, on vectors that are not orthonormal.
        """
        penalty = 0.0
        for layer in self.layers:
            unit = torch.eye(layer.rank, device=layer.A.device)
            a, b = (values.unflatten(0, (layer.parts, -1)) for values in (layer.A, layer.B))
            penalty += (a @ a.mT - unit).square().sum() + (b.mT @ b - unit).square().sum()
        return self.objective.loss(batch) + PENALTY * penalty

    def budget(self, progress: float) -> int:
        """How many values may differ from 0."""
        left = 1.0 - min(max((progress - BEGIN) / (END - BEGIN), 0.0), 1.0)
        return self.goal + round((sum(self.sizes) - self.goal) * left**3)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Measure the importance of every triple and set the values of the least important ones to
        0.
        """
        if hasattr(self.objective, "after_step"):
            self.objective.after_step(progress)
        scores = torch.cat([self.triple_importance(index) for index in range(len(self.layers))])
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.topk(self.budget(progress)).indices] = True
        for layer, mask in zip(self.layers, kept.split(self.sizes)):
            layer.values.mul_(mask)

    @torch.no_grad()
    def triple_importance(self, index: int) -> Tensor:
        """Importance of each (value, row of A, column of B) of a layer, `(parts x rank,)`, after
        this step's gradient.
        """
        layer = self.layers[index]
        found = []
        for part in LOW_RANK_PARTS:
            weight = getattr(layer, part)
            mean, deviation = getattr(self, f"{part}_{index}")
            now = (weight * weight.grad).abs()
            mean.lerp_(now, 1.0 - SMOOTHING)
            deviation.lerp_((now - mean).abs(), 1.0 - SMOOTHING)
            found.append(mean * deviation)
        rows, columns, values = found
        columns = columns.unflatten(0, (layer.parts, -1)).mean(dim=1).flatten()
        return values + rows.mean(dim=1) + columns

    def report(self) -> dict:
        """What the objective tells, and the number of values in use."""
        in_use = int(sum(layer.values.count_nonzero() for layer in self.layers))
        return {**self.objective.report(), "ranks_in_use": in_use}
