"""FixMatch (Sohn et al. 2020) for several labels per record, with the thresholds of FlexMatch and
SoftMatch.

What the network says of a weak view, where it is sure enough, is the label of a strong view of the
same crop. The papers choose one of K classes. Here every class is a two-way decision of its own:
the probability p is a sigmoid, the pseudo-label is 1[p > 1/2], its confidence q = max(p, 1 - p),
and each (record, class) passes or not by itself. A threshold is a module that maps probabilities
`(n, classes)` and the records' positions in the unlabelled pool `(n,)` to weights `(n, classes)`
between 0 and 1, and learns from them while it is in training mode.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import Transform, apply, cutmix, strong_view, weak_view
from ecglib.batches import SemiBatch, need_unlabelled
from ecglib.distributed import gathered
from ecglib.errors import DataError
from ecglib.ranks import AdaptiveRanks
from ecglib.semisup import Task
from ecglib.semisup.tally import Tally


def pseudo_label_loss(logits: Tensor, probabilities: Tensor, weights: Tensor) -> Tensor:
    """Mean over all (record, class), passed or not, of weight x BCE(logits, 1[p > 1/2]), for three
    `(n, classes)`.

    Equation 4 of FixMatch with a two-way cross-entropy. Only `logits`, of the strong view, get a
    gradient.
    """
    labels = (probabilities.detach() > 0.5).float()
    return F.binary_cross_entropy_with_logits(logits.float(), labels, weight=weights.detach())


def confidence(probabilities: Tensor) -> Tensor:
    """q = max(p, 1 - p), from 1/2 to 1, of the same shape."""
    return torch.maximum(probabilities, 1.0 - probabilities)


class FixedThreshold(nn.Module):
    """FixMatch: a decision weighs 1 from the confidence `threshold` on, else 0, for every class
    alike.
    """

    def __init__(self, threshold: float = 0.95) -> None:
        super().__init__()
        if not 0.5 <= threshold <= 1.0:
            raise DataError(
                f"No two-way decision has a confidence threshold of {threshold}; choose one from "
                "0.5, with which all pass, to 1."
            )
        self.threshold = threshold

    def forward(self, probabilities: Tensor, indices: Tensor) -> Tensor:
        """Weights `(n, classes)`, 1 or 0."""
        return (confidence(probabilities) >= self.threshold).float()


class FlexThreshold(FixedThreshold):
    """FlexMatch (Zhang et al. 2021): a lower threshold where fewer decisions were confident so far.

    For each of the `records` of the unlabelled pool and each class the latest decision that reached
    `threshold` is kept. With sigma(c, s) the number of records decided as s (negative, positive)
    for class c, and u(c) of those never decided, status and level to be reached are

        beta(c, s) = sigma(c, s) / max(max_k sigma(k, s), u(c))
        level(c, s) = 1/2 + (threshold - 1/2) beta(c, s) / (2 - beta(c, s)).

    u(c) is the paper's warm-up. Two things are our reading for several labels. Positive and
    negative decisions are counted apart, and a class is compared with the other classes on the same
    side: within one class the positive ones are few because the finding is rare, not because it is
    learnt badly. (Between classes, too, a rare one gets a lower level for being rare; the paper
    assumes balanced classes.) And the mapped status scales what lies above 1/2, below which no
    confidence can be; the paper scales from 0.
    """

    def __init__(self, classes: int, records: int, threshold: float = 0.95) -> None:
        super().__init__(threshold)
        self.register_buffer("decisions", torch.full((records, classes), -1, dtype=torch.int8))

    def levels(self) -> Tensor:
        """Confidence to be reached `(2, classes)`, for negative and for positive decisions."""
        decided = torch.stack([(self.decisions == side).sum(dim=0) for side in (0, 1)])
        never = len(self.decisions) - decided.sum(dim=0)
        status = decided / torch.maximum(decided.amax(dim=1, keepdim=True), never).clamp_min(1)
        return 0.5 + (self.threshold - 0.5) * status / (2.0 - status)

    def forward(self, probabilities: Tensor, indices: Tensor) -> Tensor:
        """Weights `(n, classes)`, 1 or 0, by the levels before this batch."""
        negative, positive = self.levels()
        level = torch.where(probabilities > 0.5, positive, negative)
        if self.training:
            self._remember(torch.cat(gathered(probabilities)), torch.cat(gathered(indices)))
        return (confidence(probabilities) >= level).float()

    def _remember(self, probabilities: Tensor, indices: Tensor) -> None:
        """Keep the confident decisions of a batch."""
        confident = confidence(probabilities) >= self.threshold
        decided = (probabilities > 0.5).to(torch.int8)
        latest = torch.where(confident, decided, self.decisions[indices])
        # Where a batch holds a record twice, all its rows write what the last one says: the order
        # cannot matter.
        rows = torch.arange(len(indices), device=indices.device)
        last = (rows * (indices[:, None] == indices)).amax(dim=1)
        self.decisions[indices] = latest[last]


class SoftThreshold(nn.Module):
    """SoftMatch (Chen et al. 2023): all decisions count, those below the class's mean confidence
    less and less:

        weight = exp(-(2 min(q - mean, 0))^2 / (2 variance)).

    Mean and variance of q are running ones, of each class by itself, from 1/2 and 1 on. The factor
    2 is that of the released code, it is 1 in the paper's formula. The published `momentum` of
    0.999 is meant for a million steps: over 1,000 steps a third of the first variance, with which
    nearly all weigh 1, remains; take 0.99 or less there.

    Probabilities are aligned, uniformly for a two-way decision: p / (running mean of p) against (1
    - p) / (1 - that mean), brought to sum to 1. Without it the rare positive decisions, seldom as
    sure as the many negative ones, would always lie below the mean. As published it moves the
    weights and not the pseudo-labels. q is the aligned probability of the pseudo-label, small where
    alignment would decide the other way; the released code takes the larger of the two.
    """

    def __init__(self, classes: int, momentum: float = 0.999) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("positive", torch.full((classes,), 0.5))
        self.register_buffer("mean", torch.full((classes,), 0.5))
        self.register_buffer("variance", torch.ones(classes))

    def forward(self, probabilities: Tensor, indices: Tensor) -> Tensor:
        """Weights `(n, classes)` in (0, 1], by averages that this batch is already part of."""
        if self.training:
            share = 1.0 - self.momentum
            everyone = torch.cat(gathered(probabilities))
            self.positive.lerp_(everyone.mean(dim=0), share)
            sure = self._confidence(everyone)
            self.mean.lerp_(sure.mean(dim=0), share)
            # The unbiased variance, which of a single record does not exist.
            self.variance.lerp_(sure.var(dim=0, correction=min(len(sure) - 1, 1)), share)
        below = (self._confidence(probabilities) - self.mean).clamp_max(0.0)
        distance = (2.0 * below).square()
        return torch.exp(-distance / (2.0 * self.variance.clamp_min(1e-12)))

    def _confidence(self, probabilities: Tensor) -> Tensor:
        """The aligned probability of each pseudo-label."""
        share = self.positive.clamp(1e-6, 1.0 - 1e-6)
        yes = probabilities / share
        no = (1.0 - probabilities) / (1.0 - share)
        aligned = yes / (yes + no)
        return torch.where(probabilities > 0.5, aligned, 1.0 - aligned)


class FixMatch(nn.Module):
    """`network` maps signals `(n, leads, time)` to logits `(n, classes)`; `thresholds` is one of
    the three above.

    One forward pass sees labelled, weak and strong views together, so that batch norm knows one
    distribution. With `transforms` labelled and strong views are made by these and the weak view is
    the clean crop, for comparisons with methods that have the same noise.
    """

    def __init__(
        self,
        network: nn.Module,
        thresholds: nn.Module,
        transforms: Sequence[Transform] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.thresholds = thresholds
        self.transforms = transforms
        self.tally = Tally("passed", "passed_positive")

    def loss(self, batch: SemiBatch) -> Tensor:
        """BCE of labelled records plus that of the strong view against its pseudo-labels.

        Labelled records are mixed by CutMix, as in every other method of the study: reversal and
        shuffled leads, which the weak view may hold, do not leave an ECG's label as it was (0.01 of
        macro AUROC on fold 9). DataError for a batch without unlabelled records.
        """
        need_unlabelled(batch, "FixMatch")
        views, targets = self._views(batch)
        # float32 from here on: around a threshold of 0.95 bfloat16 knows probabilities only in
        # steps of 0.004.
        logits = self.network(torch.cat(views)).float()
        labelled, weak, strong = logits.split([len(view) for view in views])
        with torch.no_grad():
            probabilities = torch.sigmoid(weak)
            weights = self.thresholds(probabilities, batch.unlabelled_indices)
            positive = probabilities > 0.5
            everything = torch.ones_like(weights)
            self.tally.add(weights, everything, weights * positive, positive)
        supervised = F.binary_cross_entropy_with_logits(labelled, targets)
        return supervised + pseudo_label_loss(strong, probabilities, weights)

    def _views(self, batch: SemiBatch) -> tuple[list[Tensor], Tensor]:
        """Labelled, weak and strong views, and the labelled ones' targets."""
        generator = batch.generator
        if self.transforms is None:
            labelled, targets = cutmix(batch.signals, batch.targets, generator)
            weak = weak_view(batch.unlabelled, generator)
            strong = strong_view(batch.unlabelled, generator)
        else:
            labelled = apply(self.transforms, batch.signals, generator)
            targets = batch.targets
            weak = batch.unlabelled
            strong = apply(self.transforms, weak, generator)
        return [labelled, weak, strong], targets

    def report(self) -> dict[str, float]:
        """Since the last report, `passed`: mean weight of all decisions; `passed_positive`: of the
        positive ones.

        With weights of 0 and 1 these are the shares that pass; NaN where there was no such
        decision.
        """
        return self.tally.report()


def make_fixmatch(network: nn.Module, task: Task) -> FixMatch:
    """FixMatch around a network."""
    return FixMatch(network, FixedThreshold(task.settings.threshold))


def make_flexmatch(network: nn.Module, task: Task) -> FixMatch:
    """FlexMatch around a network."""
    thresholds = FlexThreshold(task.classes, task.unlabelled, task.settings.threshold)
    return FixMatch(network, thresholds)


def make_softmatch(network: nn.Module, task: Task) -> FixMatch:
    """SoftMatch around a network.

    Its averages settle within a few hundred steps; the published 0.999 is meant for 2^20.
    """
    return FixMatch(network, SoftThreshold(task.classes, momentum=0.99))


def make_adalora(network: nn.Module, task: Task) -> AdaptiveRanks:
    """FixMatch around a network with singular values, whose ranks shrink while it learns."""
    return AdaptiveRanks(make_fixmatch(network, task), network, task.settings.rank)
