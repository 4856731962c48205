"""The small networks that stand on an encoder while it is pretrained, and are thrown away after."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.errors import DataError


def projection_head(
    inputs: int, hidden: int, outputs: int, norm: bool = False, bias: bool = True
) -> nn.Sequential:
    """Linear, ReLU, linear: `(batch, inputs)` -> `(batch, outputs)`; with `norm` a batch norm
    stands before the ReLU.

    A linear layer before a batch norm has no bias: the norm would take it away again. 512-512-16
    has 270,864 weights.
    """
    middle = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(
        nn.Linear(inputs, hidden, bias=bias and not norm),
        *middle,
        nn.ReLU(),
        nn.Linear(hidden, outputs, bias=bias),
    )


class Prototypes(nn.Module):
    """`count` learned directions: `(..., inputs)` -> cosines `(..., count)`, a weight-normed layer
    with its gain at 1.

    The cosines are float32 also under autocast: divided by a temperature of 0.04 the rounding of
    bfloat16 would show.
    """

    def __init__(self, inputs: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(count, inputs), dim=1))

    def forward(self, features: Tensor, trained: Tensor | None = None) -> Tensor:
        """Cosines; the gradient of the prototypes is multiplied by the scalar `trained`, 0 to
        freeze them.
        """
        # A gradient of zero rather than none, which data parallel training would take for a part
        # left out.
        weight = self.weight
        if trained is not None:
            weight = torch.lerp(weight.detach(), weight, trained)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(F.normalize(features.float(), dim=-1), F.normalize(weight, dim=1))

    @torch.no_grad()
    def normalise(self) -> None:
        """Bring every prototype back to length 1."""
        self.weight.copy_(F.normalize(self.weight, dim=1))


def cross_view_entropy(aims: Tensor, answers: Tensor) -> Tensor:
    """Mean over (view a with an aim, other view b) and the batch of -sum_k aims_ak answers_bk.

    `aims` are probabilities `(views with an aim, batch, k)`, `answers` log-probabilities `(views,
    batch, k)` whose first views are those of the aims; a view never answers its own aim.
    """
    # View b answers the sum of all aims but its own: one product per view, not one per pair.
    others = aims.sum(dim=0).repeat(len(answers), 1, 1)
    others[: len(aims)] -= aims
    return -(others * answers).sum() / (len(aims) * (len(answers) - 1) * answers.shape[1])


def need_two_records(signals: Tensor, method: str) -> None:
    """DataError where a batch is too small for a method that compares its records."""
    if len(signals) < 2:
        raise DataError(f"{method} needs at least two records in a batch; raise the batch size.")
