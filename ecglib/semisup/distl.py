"""DISTL (Park et al. 2022): a network that keeps learning from recordings that nobody has labelled.

Three things train one transformer. It learns *from itself*: a slow copy, the teacher, looks at the
clean recording and says how likely each class is; the student must say the same of a noisy piece
(self-training with soft labels). It learns *by itself*: DINO's pretext on pieces of the recording.
And it is *corrected*: now and then it goes through the few labelled recordings. Then more
unlabelled recordings arrive, and the next stage goes on from there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import Transform
from ecglib.batches import Batch, CropBatches, need_disjoint, unlabelled_seed
from ecglib.ema import average_of, momentum_at, momentum_for_steps, update_average
from ecglib.errors import DataError
from ecglib.records import Records
from ecglib.selfsup.crops import MultiCrop, encode_views
from ecglib.selfsup.dino import DINOHead, dino_loss, next_center
from ecglib.supervised import Classifier


def ramp(progress: float) -> float:
    """Weight of the self-training loss by progress: 2 x (epoch + 1) / 5 in five epochs, which is
    0.4, 0.8, ... 2.0.
    """
    return 2.0 * min(math.floor(progress * 5) + 1, 5) / 5


def soft_label_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean over records and classes of BCE(sigmoid(logits), answers); no threshold, no sharpening.

    `answers` are the teacher's probabilities of the clean view; only `logits`, of the noised one,
    get a gradient.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), answers.detach().float())


@dataclass
class StageBatch(Batch):
    """A batch of which all records are `labelled` or none: then its targets are `(batch, 0)`.

    `indices` are positions in the records that the batches were made of.
    """

    labelled: bool


class StageBatches:
    """`batches(step)` gives a StageBatch: unlabelled ones, and a pass over the labelled records for
    every `correction_every` unlabelled records.

    The published correction comes every 500 steps of 8 images, which is one pass for 4,000 images;
    stated so, it does not change with the batch size. Without unlabelled records all batches are
    labelled, with `correction_every` of infinity none is. DataError where there is then nothing to
    learn from.
    """

    def __init__(
        self,
        records: Records,
        labelled: np.ndarray,
        unlabelled: np.ndarray,
        batch_size: int,
        crop_seconds: float,
        correction_every: float,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if not correction_every > 0:
            raise DataError(
                f"The labelled records cannot come after every {correction_every:g} unlabelled "
                "ones; choose a number above 0."
            )
        need_disjoint(records, labelled, unlabelled)
        self.record_ids = records.table["record_id"].to_numpy()
        crops = (batch_size, crop_seconds)
        self.labelled = CropBatches(records, labelled, *crops, seed, device)
        # Steps without and with labels in one round.
        self.without_labels = 0
        self.with_labels = math.ceil(len(labelled) / batch_size)
        if len(unlabelled):
            seed = unlabelled_seed(seed)
            self.unlabelled = CropBatches(records, unlabelled, *crops, seed, device)
            if math.isinf(correction_every):
                self.without_labels = 1
                self.with_labels = 0
            else:
                self.without_labels = max(1, round(correction_every / batch_size))

    def unlabelled_steps(self, steps: int) -> int:
        """How many of `steps` have an unlabelled batch."""
        rounds, rest = divmod(steps, self.without_labels + self.with_labels)
        return rounds * self.without_labels + min(rest, self.without_labels)

    def __call__(self, step: int) -> StageBatch:
        """The batch of one step, the same whenever it is asked for."""
        # Each pool counts its own steps.
        before = self.unlabelled_steps(step)
        labelled = self.unlabelled_steps(step + 1) == before
        pool = self.labelled if labelled else self.unlabelled
        batch = pool(step - before if labelled else before)
        if not labelled:
            batch.targets = batch.targets[:, :0]
        batch.indices = torch.from_numpy(pool.indices).to(batch.indices.device)[batch.indices]
        return StageBatch(**vars(batch), labelled=labelled)


class DISTL(nn.Module):
    """`.network` is the student, `.teacher` its moving average; both map signals to logits and both
    are scored.

    With lambda = `pretext`, alpha = `ramp`, DINO's loss D and self-training's loss S, an unlabelled
    batch gives

    lambda D + (1 - lambda) alpha S,   a labelled one   lambda D + (1 - lambda) BCE(student(noised
    piece), label).

    The teacher sees the clean crop and one noised piece of 0.8 of it, the student these and
    `local_views` short ones of 0.4. `noised=False` shows the student's classifier the clean crop
    instead. The teacher moves after unlabelled batches only, with a momentum fitted to the number
    of them, `unlabelled_steps` (`ema.momentum_for_steps`): the published 0.9995 over 6,750 steps
    would stand nearly still in 400.
    """

    def __init__(
        self,
        network: Classifier,
        transforms: Sequence[Transform] = (),
        *,
        unlabelled_steps: int,
        pretext: float = 0.5,
        noised: bool = True,
        turnover: float = 1.7,
        prototypes: int = 4096,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm: bool = False,
        local_views: int = 6,
    ) -> None:
        super().__init__()
        if not 0.0 <= pretext <= 1.0:
            raise DataError(
                f"The pretext cannot weigh {pretext}; choose from 0, self-training, to 1, DINO "
                "alone."
            )
        self.network = network
        self.teacher = average_of(network)
        size = network.encoder.feature_size
        self.network_head = DINOHead(size, hidden, bottleneck, prototypes, norm)
        self.teacher_head = average_of(self.network_head)
        self.pretext = pretext
        self.noised = noised
        shares = [0.8] + [0.4] * (local_views if pretext else 0)
        self.crops = MultiCrop(network.encoder, shares, transforms)
        self.momentum = momentum_for_steps(unlabelled_steps, turnover)
        self.labelled = False  # what the last batch was
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("progress", torch.tensor(0.0))

    def loss(self, batch: StageBatch) -> Tensor:
        """Scalar loss of one batch."""
        self.labelled = batch.labelled
        pieces = self.crops(batch.signals, batch.generator)
        views = [(batch.signals, torch.zeros_like(batch.indices)), *pieces]
        # Each network sees a view once, for both losses, and none that no loss needs.
        seen = views if self.pretext else [views[self.noised]]
        taught = views[: 2 if self.pretext else int(not batch.labelled)]
        student = encode_views(self.network.encoder, seen).chunk(len(seen))
        with torch.no_grad():
            teacher = [encode_views(self.teacher.encoder, [view]) for view in taught]
        loss = 0.0
        if self.pretext:
            loss = self.pretext * self._pretext(student, teacher)
        if self.pretext < 1:
            features = student[self.noised if self.pretext else 0]
            loss = loss + (1 - self.pretext) * self._classes(batch, features, teacher)
        return loss

    def _pretext(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """DINO's loss, with the clean crop and the noised piece as the teacher's views."""
        with torch.no_grad():
            aims = self.teacher_head(torch.cat(teacher)).chunk(2)
        answers = self.network_head(torch.cat(student)).chunk(len(student))
        loss = dino_loss(answers, aims, self.center)
        if self.training:
            self.center.copy_(next_center(self.center, aims))
        return loss

    def _classes(self, batch: StageBatch, features: Tensor, teacher: Sequence[Tensor]) -> Tensor:
        """Loss of the class head: against the labels, or against the teacher's answers to the clean
        crop.
        """
        logits = self.network.head(features)
        if batch.labelled:
            return F.binary_cross_entropy_with_logits(logits.float(), batch.targets)
        with torch.no_grad():
            likely = torch.sigmoid(self.teacher.head(teacher[0]).float())
        return ramp(float(self.progress)) * soft_label_loss(logits, likely)

    def after_step(self, progress: float) -> None:
        """The teacher moves towards the student, but not after a correction."""
        if not self.labelled:
            momentum = momentum_at(progress, self.momentum)
            update_average(self.teacher, self.network, momentum)
            update_average(self.teacher_head, self.network_head, momentum)
        self.progress.fill_(progress)
