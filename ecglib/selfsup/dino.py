"""DINO (Caron et al. 2021) on time crops: a student sees short and long pieces and must say what
its slow copy says.

The teacher is kept from collapsing by centring (no prototype may win always) and sharpening (a low
temperature). Crops are contiguous and never stretched, and know where in the record they began.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ecglib.augment import Transform
from ecglib.batches import Batch
from ecglib.distributed import gathered
from ecglib.ema import average_of, momentum_at, update_average
from ecglib.errors import DataError
from ecglib.selfsup.crops import MultiCrop, encode_views
from ecglib.selfsup.heads import Prototypes, cross_view_entropy, need_two_records


def dino_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    center: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """Mean over (teacher view a, student view b != a) and the batch of -sum_k P_t(a)_k log
    P_s(b)_k, where

    P_t = softmax((teacher - center) / teacher_temperature),   P_s = softmax(student /
    student_temperature).

    `student` and `teacher` are outputs `(batch, prototypes)`, one per view, the teacher's views
    first among the student's; `center` is `(prototypes,)`. The teacher gets no gradient.
    """
    answers = torch.stack(list(student)).float() / student_temperature
    aims = (torch.stack(list(teacher)).detach().float() - center) / teacher_temperature
    return cross_view_entropy(torch.softmax(aims, dim=2), torch.log_softmax(answers, dim=2))


@torch.no_grad()
def next_center(center: Tensor, teacher: Sequence[Tensor], momentum: float = 0.9) -> Tensor:
    """momentum x center + (1 - momentum) x mean teacher output over views, batch and processes."""
    mean = torch.stack(list(teacher)).float().mean(dim=(0, 1))
    mean = torch.stack(gathered(mean)).mean(dim=0)
    return momentum * center + (1.0 - momentum) * mean


class DINOHead(nn.Module):
    """Three linear layers with GELU to a bottleneck, then cosines with prototypes: `(batch,
    features)` -> `(batch, K)`.

    The cosines are the published weight-normed last layer with its gain at 1. With `norm` a batch
    norm stands before each GELU.
    """

    def __init__(
        self, inputs: int, hidden: int, bottleneck: int, prototypes: int, norm: bool = False
    ) -> None:
        super().__init__()
        layers = []
        for size in (inputs, hidden):
            middle = [nn.BatchNorm1d(hidden)] if norm else []
            layers += [nn.Linear(size, hidden), *middle, nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.prototypes = Prototypes(bottleneck, prototypes)

    def forward(self, features: Tensor, trained: Tensor | None = None) -> Tensor:
        """Outputs; the prototypes' gradient is multiplied by `trained`."""
        return self.prototypes(self.layers(features), trained)


class DINO(nn.Module):
    """Student learns, teacher is its moving average; `.encoder`, to be probed afterwards, is the
    TEACHER's.

    The encoder given becomes the student's. The teacher is a copy without dropout and stochastic
    depth, and with the student's running statistics of batch norm. Its parameters do not require
    gradients: ask for them (`requires_grad_()`) before fine-tuning. Two crops are 0.8 of the
    signal, `local_views` ones 0.4, cut at whole patches where the encoder is a transformer.

    `momentum` starts at the published 0.996 and rises to 1 along a cosine; for other lengths take
    `ema.momentum_for_steps(steps)`. The teacher must stay slower than the centre (1 - momentum well
    below 1 - `center_momentum`), which otherwise lags behind it and stops balancing. The
    published 65,536 prototypes are more than the study has records; they stay as they are for the
    share `frozen` of the run (the first of 100 epochs). `norm` puts batch norm into the head:
    outputs then differ between records from the first step on, and the loss leaves log(prototypes)
    at once. A lower loss is not a better encoder: compare probes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        transforms: Sequence[Transform] = (),
        *,
        prototypes: int = 4096,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm: bool = False,
        local_views: int = 6,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        frozen: float = 0.01,
    ) -> None:
        super().__init__()
        if local_views < 0:
            raise DataError(f"DINO cannot have {local_views} local views; use 0 or more.")
        self.student = encoder
        self.student_head = DINOHead(encoder.feature_size, hidden, bottleneck, prototypes, norm)
        self.encoder = average_of(encoder)
        self.teacher_head = average_of(self.student_head)
        self.crops = MultiCrop(encoder, [0.8] * 2 + [0.4] * local_views, transforms)
        self.center_momentum = center_momentum
        self.momentum = momentum
        self.frozen = frozen
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("progress", torch.tensor(0.0))

    def loss(self, batch: Batch) -> Tensor:
        """The student's views against the teacher's two long ones; DataError for a batch of one."""
        need_two_records(batch.signals, "DINO")
        views = self.crops(batch.signals, batch.generator)
        trained = (self.progress >= self.frozen).float()
        with torch.no_grad():
            teacher = self.teacher_head(encode_views(self.encoder, views[:2])).chunk(2)
        student = self.student_head(encode_views(self.student, views), trained).chunk(len(views))
        loss = dino_loss(student, teacher, self.center)
        if self.training:
            self.center.copy_(next_center(self.center, teacher, self.center_momentum))
        return loss

    def after_step(self, progress: float) -> None:
        """The teacher moves towards the student; the progress decides about freezing."""
        momentum = momentum_at(progress, self.momentum)
        update_average(self.encoder, self.student, momentum)
        update_average(self.teacher_head, self.student_head, momentum)
        self.progress.fill_(progress)
