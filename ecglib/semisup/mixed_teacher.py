"""MixedTeacher (Zhang et al. 2022): a slow copy of the network labels the unlabelled records, and
all are mixed.

Known of it: the paper ("Semi-supervised learning for automatic atrial fibrillation detection in
24-hour Holter monitoring", IEEE JBHI) trains on low-entropy labels that it makes for unlabelled
samples; in CE-SSL's tables, where it has this name, it takes 0.68 of FixMatch's memory and 0.79 of
its time, as two views with and one without a gradient would. The paper's formulae were not
available to us. Our reading, from name, abstract and cost: a mean teacher (Tarvainen & Valpola
2017) whose sharpened answers are mixed with the labels as in MixMatch (Berthelot et al. 2019).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import mixup, weak_view
from ecglib.batches import SemiBatch, need_unlabelled
from ecglib.ema import average_of, momentum_at, momentum_for_steps, update_average
from ecglib.semisup import Task
from ecglib.semisup.fixmatch import confidence
from ecglib.semisup.tally import Tally

WEIGHT = 1.0  # of 1 and 10 the better one on folds 8 and 9
RAMP = 0.25
TURNOVER = 10.0


def sharpen(logits: Tensor, temperature: float = 0.5) -> Tensor:
    """p^(1/T) / (p^(1/T) + (1 - p)^(1/T)) with p = sigmoid(logits): closer to 0 or 1 the lower the
    temperature T.

    Equation 7 of MixMatch for a two-way decision, which for a sigmoid is the same as dividing the
    logits by T.
    """
    return torch.sigmoid(logits.float() / temperature)


def mixed_loss(logits: Tensor, targets: Tensor, labelled: int, weight: Tensor | float) -> Tensor:
    """BCE of the first `labelled` rows plus `weight` times the squared error of probabilities of
    the other rows.

    `logits` and soft `targets` are `(n, classes)`; both parts are means. The squared error is
    bounded: a wrong answer of the teacher costs less than it would in a cross-entropy (MixMatch,
    section 3.4).
    """
    logits, targets = logits.float(), targets.detach()
    supervised = F.binary_cross_entropy_with_logits(logits[:labelled], targets[:labelled])
    return supervised + weight * F.mse_loss(torch.sigmoid(logits[labelled:]), targets[labelled:])


class MixedTeacher(nn.Module):
    """`.network`, the student, maps signals `(n, leads, time)` to logits `(n, classes)`; `.teacher`
    is its average.

    Score the teacher: it is the better of the two in the mean teacher's paper. It has no dropout
    and normalises by its batch while training; running statistics are the student's. Its momentum
    rises to 1 along a cosine and is fitted to the `steps` of the run (`ema.momentum_for_steps`): of
    the first weights exp(-`TURNOVER`) is left at the end. The unlabelled part grows linearly to
    `WEIGHT` over the first share `RAMP` of the run, while the teacher knows little.
    """

    def __init__(self, network: nn.Module, steps: int) -> None:
        super().__init__()
        self.network = network
        self.teacher = average_of(network)
        self.momentum = momentum_for_steps(steps, TURNOVER)
        self.register_buffer("progress", torch.tensor(0.0))
        self.tally = Tally("confidence", "positive")

    def loss(self, batch: SemiBatch) -> Tensor:
        """The student on labelled records and unlabelled weak views, mixed; DataError for a batch
        without the latter.

        Teacher and student see different views of the unlabelled crops.
        """
        need_unlabelled(batch, "MixedTeacher")
        views = [weak_view(batch.unlabelled, batch.generator) for _ in range(2)]
        with torch.no_grad():
            answers = self.teacher(views[0]).float()
            probabilities = torch.sigmoid(answers)
            everything = torch.ones_like(probabilities)
            self.tally.add(confidence(probabilities), everything, probabilities > 0.5, everything)
        targets = torch.cat([batch.targets, sharpen(answers)])
        signals = torch.cat([batch.signals, views[1]])
        signals, targets = mixup(signals, targets, batch.generator)
        weight = WEIGHT * (self.progress / RAMP).clamp_max(1.0)
        return mixed_loss(self.network(signals), targets, len(batch.signals), weight)

    def after_step(self, progress: float) -> None:
        """The teacher moves towards the student; the progress decides about the unlabelled part's
        weight.
        """
        update_average(self.teacher, self.network, momentum_at(progress, self.momentum))
        self.progress.fill_(progress)

    def report(self) -> dict[str, float]:
        """Of the teacher's answers since the last report: mean `confidence` before sharpening,
        share `positive`.

        NaN where there was none. There is no threshold that an answer could pass.
        """
        return self.tally.report()


def make_mixed_teacher(network: nn.Module, task: Task) -> MixedTeacher:
    """MixedTeacher around a network."""
    return MixedTeacher(network, task.settings.steps)
