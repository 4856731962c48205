"""BYOL (Grill et al. 2020), as in Mehari & Strodthoff 2022: one view predicts what a slow copy
makes of the other.

The published code moves only the copy's weights and leaves its biases at their start; here every
parameter follows.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import Transform, apply
from ecglib.batches import Batch
from ecglib.ema import average_of, momentum_at, update_average
from ecglib.selfsup.heads import need_two_records, projection_head


def byol_loss(p: Tensor, z: Tensor) -> Tensor:
    """Mean over the batch of |p / |p| - z / |z||^2 = 2 - 2 cos(p, z), for `(batch, d)`: 0 at best,
    4 at worst.

    `p` is the online prediction of one view, `z` the target's projection of the other, which gets
    no gradient. The published code minimises -2 cos: the same gradients, a value lower by 2.
    """
    return 2.0 - 2.0 * F.cosine_similarity(p.float(), z.detach().float(), dim=1).mean()


class BYOL(nn.Module):
    """Online encoder, projector and predictor learn; the target, an average of encoder and
    projector, only follows.

    `.encoder` is the online one. `momentum` starts at the published 0.996, which is meant for some
    20,000 steps, and rises to 1 along a cosine; for other lengths take
    `ema.momentum_for_steps(steps)`. Running statistics of batch norm are copied to the target,
    which itself normalises by its batch.
    """

    def __init__(
        self,
        encoder: nn.Module,
        transforms: Sequence[Transform] = (),
        *,
        hidden: int = 512,
        outputs: int = 16,
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.transforms = transforms
        self.momentum = momentum
        self.projector = projection_head(encoder.feature_size, hidden, outputs, norm=True)
        self.predictor = projection_head(outputs, hidden, outputs, norm=True)
        self.target_encoder = average_of(encoder)
        self.target_projector = average_of(self.projector)

    def loss(self, batch: Batch) -> Tensor:
        """The sum over both directions, view 1 predicting view 2 and the reverse; DataError for a
        batch of one.
        """
        need_two_records(batch.signals, "BYOL")
        views = [apply(self.transforms, batch.signals, batch.generator) for _ in range(2)]
        views = torch.cat(views)
        p1, p2 = self.predictor(self.projector(self.encoder(views))).chunk(2)
        with torch.no_grad():
            z1, z2 = self.target_projector(self.target_encoder(views)).chunk(2)
        return byol_loss(p1, z2) + byol_loss(p2, z1)

    def after_step(self, progress: float) -> None:
        """The target moves towards the online network."""
        momentum = momentum_at(progress, self.momentum)
        update_average(self.target_encoder, self.encoder, momentum)
        update_average(self.target_projector, self.projector, momentum)
