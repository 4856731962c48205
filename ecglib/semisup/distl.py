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
from ecglib.selfsup.crops import encode_views, random_views
from ecglib.selfsup.dino import DINOHead, dino_loss, next_center
from ecglib.supervised import Classifier


def ramp(progress: float, most: float = 2.0, epochs: int = 5) -> float:
    """Weight of the self-training loss: `most` x (epoch + 1) / `epochs`, which is 0.4, 0.8, ...
    2.0, by progress.
    """
    return most * min(math.floor(progress * epochs) + 1, epochs) / epochs


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
        options = {"batch_size": batch_size, "crop_seconds": crop_seconds, "device": device}
        self.pools = {"labelled": CropBatches(records, labelled, seed=seed, **options)}
        # Steps without and with labels in one round; a pool's own steps are counted on through the
        # rounds.
        self.without_labels, self.with_labels = 0, math.ceil(len(labelled) / batch_size)
        if len(unlabelled):
            own = unlabelled_seed(seed)
            self.pools["unlabelled"] = CropBatches(records, unlabelled, seed=own, **options)
            if math.isinf(correction_every):
                self.without_labels, self.with_labels = 1, 0
            else:
                self.without_labels = max(1, round(correction_every / batch_size))

    def unlabelled_steps(self, steps: int) -> int:
        """How many of `steps` have an unlabelled batch."""
        rounds, rest = divmod(steps, self.without_labels + self.with_labels)
        return rounds * self.without_labels + min(rest, self.without_labels)

    def __call__(self, step: int) -> StageBatch:
        """The batch of one step, the same whenever it is asked for."""
        rounds, place = divmod(step, self.without_labels + self.with_labels)
        labelled = place >= self.without_labels
        if labelled:
            pool = self.pools["labelled"]
            batch = pool(rounds * self.with_labels + place - self.without_labels)
        else:
            pool = self.pools["unlabelled"]
            batch = pool(rounds * self.without_labels + place)
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

    The teacher sees the clean crop and one noised piece of `piece_share`, the student these and
    `local_views` short ones. `noised=False` shows the student's classifier the clean crop instead.
    The teacher moves after unlabelled batches only, with a momentum fitted to the number of them,
    `unlabelled_steps` (`ema.momentum_for_steps`): the published 0.9995 over 6,750 steps would stand
    nearly still in 400.
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
        most: float = 2.0,
        prototypes: int = 4096,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm: bool = False,
        piece_share: float = 0.8,
        local_views: int = 6,
        local_share: float = 0.4,
    ) -> None:
        super().__init__()
        if not 0.0 <= pretext <= 1.0:
            raise DataError(
                f"The pretext cannot weigh {pretext}; choose from 0, self-training, to 1, DINO "
                "alone."
            )
        self.network, self.teacher = network, average_of(network)
        size = network.encoder.feature_size
        self.network_head = DINOHead(size, hidden, bottleneck, prototypes, norm)
        self.teacher_head = average_of(self.network_head)
        self.transforms, self.patch = list(transforms), getattr(network.encoder, "patch", 1)
        self.pretext, self.noised, self.most = pretext, noised, most
        self.shares = [piece_share] + [local_share] * local_views
        self.momentum = momentum_for_steps(unlabelled_steps, turnover)
        self.labelled = False  # what the last batch was
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("progress", torch.tensor(0.0))

    def loss(self, batch: StageBatch) -> Tensor:
        """Scalar loss of one batch."""
        self.labelled = batch.labelled
        generator, shares = batch.generator, self.shares if self.pretext else self.shares[:1]
        pieces = random_views(batch.signals, shares, generator, self.transforms, self.patch)
        views = [(batch.signals, torch.zeros_like(batch.indices)), *pieces]
        # Views of one length go through together, and each network sees a view once, for both
        # losses.
        groups, classified = [views[:1], views[1:2], views[2:]], int(self.noised)
        features = {
            place: encode_views(self.network.encoder, group)
            for place, group in enumerate(groups)
            if group and (self.pretext or place == classified)
        }
        # The teacher sees the first views only.
        count = 2 if self.pretext else int(not batch.labelled)
        with torch.no_grad():
            answers = [encode_views(self.teacher.encoder, [view]) for view in views[:count]]
        loss = batch.signals.new_zeros(())
        if self.pretext:
            student = torch.cat(list(features.values()))
            loss = loss + self.pretext * self._pretext(student, answers, len(views))
        if self.pretext < 1:
            logits = self.network.head(features[classified])
            loss = loss + (1 - self.pretext) * self._classes(batch, logits, answers)
        return loss

    def _pretext(self, features: Tensor, answers: list[Tensor], views: int) -> Tensor:
        """DINO's loss, with the clean crop and the noised piece as the teacher's views."""
        with torch.no_grad():
            teacher = self.teacher_head(torch.cat(answers)).chunk(2)
        student = self.network_head(features).chunk(views)
        loss = dino_loss(student, teacher, self.center)
        if self.training:
            self.center.copy_(next_center(self.center, teacher))
        return loss

    def _classes(self, batch: StageBatch, logits: Tensor, answers: list[Tensor]) -> Tensor:
        """Loss of the class head: against the labels, or against the teacher's answers to the clean
        crop.
        """
        if batch.labelled:
            return F.binary_cross_entropy_with_logits(logits.float(), batch.targets)
        with torch.no_grad():
            likely = torch.sigmoid(self.teacher.head(answers[0]).float())
        return ramp(float(self.progress), self.most) * soft_label_loss(logits, likely)

    def after_step(self, progress: float) -> None:
        """The teacher moves towards the student, but not after a correction."""
        if not self.labelled:
            momentum = momentum_at(progress, self.momentum)
            update_average(self.teacher, self.network, momentum)
            update_average(self.teacher_head, self.network_head, momentum)
        self.progress.fill_(progress)
