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
from ecglib.selfsup.heads import need_two_records, projection_head


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5, same: Tensor | None = None) -> Tensor:
    """Normalised-temperature cross-entropy of two views `(batch, d)`: the scalar

    L = -1/2N sum_i log( exp(s_ij / T) / sum_{k != i} exp(s_ik / T) ),   s = cosine similarity, j
    the other view.

    With N views that are all alike it is log(2N - 1). In a process group the negatives come from
    every process; the mean over processes is then the loss of the joint batch. `same` `(2 joint, 2
    joint)` marks pairs that are no negatives either, for example other records of one patient.
    DataError for a batch of one.
    """
    own = F.normalize(torch.stack([z1, z2]).float(), dim=2)
    everyone = torch.cat(gathered(own), dim=1)
    need_two_records(everyone[0], "A contrastive loss")
    everyone = everyone.flatten(0, 1)
    # Where this process's views stand among all first and all second views.
    rank, world = rank_and_world()
    places = torch.arange(len(everyone), device=own.device)
    rows = places.view(2, world, len(z1))[:, rank].flatten()
    positive = rows.roll(len(z1))
    # In float32: cosines of bfloat16 differ in the third digit.
    with torch.autocast(own.device.type, enabled=False):
        similarity = own.flatten(0, 1) @ everyone.T / temperature
    excluded = rows[:, None] == places
    if same is not None:
        excluded |= same[rows] & (positive[:, None] != places)
    return F.cross_entropy(similarity.masked_fill(excluded, -torch.inf), positive)


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
        self.encoder = encoder
        self.transforms = transforms
        self.temperature = temperature
        self.projector = projection_head(encoder.feature_size, hidden, outputs)

    def loss(self, batch: Batch) -> Tensor:
        """NT-Xent of two independently augmented views of each crop."""
        views = [apply(self.transforms, batch.signals, batch.generator) for _ in range(2)]
        # Both views in one pass: batch norm then sees them alike, and one large product is faster
        # than two.
        z1, z2 = self.projector(self.encoder(torch.cat(views))).chunk(2)
        return nt_xent(z1, z2, self.temperature)
