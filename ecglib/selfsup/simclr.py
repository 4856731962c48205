"""SimCLR (Chen et al. 2020), as in Mehari & Strodthoff 2022: two views of a crop agree, other crops
are pushed away.

The published code subtracts e instead of e^(1/T) for a view's similarity to itself, which is right
only at T = 1; here the self pair is removed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import Transform, apply
from ecglib.batches import Batch
from ecglib.distributed import gathered, rank_and_world
from ecglib.errors import DataError
from ecglib.selfsup.heads import projection_head


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5, same: Tensor | None = None) -> Tensor:
    """Normalised-temperature cross-entropy of two views `(batch, d)`: the scalar

    L = -1/2N sum_i log( exp(s_ij / T) / sum_{k != i} exp(s_ik / T) ),   s = cosine similarity, j
    the other view.

    With N views that are all alike it is log(2N - 1). In a process group the negatives come from
    every process; the mean over processes is then the loss of the joint batch. `same` `(2 joint, 2
    joint)` marks pairs that are no negatives either, for example other records of one patient.
    DataError for a batch of one.
    """
    own = F.normalize(torch.cat([z1, z2]).float(), dim=1)
    everyone, rank = _gather_views(own)
    batch, joint = len(z1), len(everyone) // 2
    if joint < 2:
        raise DataError(
            "A contrastive loss needs at least two records in a batch; raise the batch size."
        )
    rows = torch.arange(batch, device=own.device) + rank * batch
    rows = torch.cat([rows, rows + joint])
    # In float32: cosines of bfloat16 differ in the third digit.
    with torch.autocast(own.device.type, enabled=False):
        similarity = own @ everyone.T / temperature
    excluded = F.one_hot(rows, 2 * joint).bool()
    positive = (rows + joint) % (2 * joint)
    if same is not None:
        excluded |= same[rows] & ~F.one_hot(positive, 2 * joint).bool()
    return F.cross_entropy(similarity.masked_fill(excluded, -torch.inf), positive)


def _gather_views(own: Tensor) -> tuple[Tensor, int]:
    """Views of all processes, all first views before all second ones, and this process's rank;
    gradients flow back.
    """
    firsts, seconds = zip(*(part.chunk(2) for part in gathered(own)), strict=True)
    return torch.cat([*firsts, *seconds]), rank_and_world()[0]


class SimCLR(nn.Module):
    """Encoder, projector `features -> hidden -> outputs`, NT-Xent; `.encoder` is kept, the
    projector thrown away.
    """

    def __init__(
        self,
        encoder: nn.Module,
        transforms: Sequence[Transform] = (),
        *,
        temperature: float = 0.5,
        hidden: int = 512,
        outputs: int = 16,
    ) -> None:
        super().__init__()
        self.encoder, self.transforms, self.temperature = encoder, list(transforms), temperature
        self.projector = projection_head(encoder.feature_size, hidden, outputs)

    def loss(self, batch: Batch) -> Tensor:
        """NT-Xent of two independently augmented views of each crop."""
        views = [apply(self.transforms, batch.signals, batch.generator) for _ in range(2)]
        # Both views in one pass: batch norm then sees them alike, and one large product is faster
        # than two.
        z1, z2 = self.projector(self.encoder(torch.cat(views))).chunk(2)
        return nt_xent(z1, z2, self.temperature)
