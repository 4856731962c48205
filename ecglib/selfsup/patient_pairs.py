"""Patient pairs: the ECG counterpart of EchoCLR (Holste et al. 2022, arXiv 2207.11581).

Two different records of one patient agree, other patients are pushed away, and the order of a
view's four segments is predicted (see `segment_order`).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import Transform, apply
from ecglib.batches import PairBatch
from ecglib.distributed import gathered
from ecglib.errors import DataError
from ecglib.selfsup.heads import projection_head
from ecglib.selfsup.segment_order import OrderHead
from ecglib.selfsup.simclr import nt_xent


def patient_nt_xent(z1: Tensor, z2: Tensor, patients: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent of pairs `(batch, d)` in which no other pair of the same patient counts as a
    negative: the scalar

    L = -1/2N sum_i log( exp(s_ij / T) / (exp(s_ij / T) + sum_{k: p_k != p_i} exp(s_ik / T)) ),   j
    the pair of i.

    `patients` `(batch,)` holds the numbers p. EchoCLR leaves such false negatives in; with all
    patients different it is `nt_xent`. DataError for a batch of one.
    """
    everyone = torch.cat(gathered(patients)).repeat(2)
    return nt_xent(z1, z2, temperature, same=everyone[:, None] == everyone)


class PatientPairs(nn.Module):
    """L = NT-Xent over pairs of one patient + `order_weight` x cross-entropy of the segment order,
    on PatientBatches.

    `.encoder` is kept, projector (features -> 256 -> 128, no bias) and order head are thrown away.
    The contrastive branch sees augmented views with their time in order, the order branch the views
    as they were cut. EchoCLR sends one shuffled view through both, which breaks the rhythm; its
    weight is 1, its temperature 0.05. With `order_weight=0` only the pairs are left; `SegmentOrder`
    is the order alone.
    """

    def __init__(
        self,
        encoder: nn.Module,
        transforms: Sequence[Transform] = (),
        *,
        temperature: float = 0.1,
        order_weight: float = 1.0,
        segments: int = 4,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.transforms = transforms
        self.temperature = temperature
        self.order_weight = order_weight
        self.projector = projection_head(encoder.feature_size, 256, 128, bias=False)
        # No head where it would not learn: data parallelism refuses parameters without gradients.
        if order_weight:
            self.order_head = OrderHead(encoder.feature_size, segments)

    def loss(self, batch: PairBatch) -> Tensor:
        """Scalar loss of one batch of pairs; DataError for a batch without pairs, and for a single
        pair.
        """
        if not isinstance(batch, PairBatch):
            raise DataError("Patient pairs need batches of pairs; make them with PatientBatches.")
        views = apply(self.transforms, batch.signals, batch.generator)
        z1, z2 = self.projector(self.encoder(views)).chunk(2)
        loss = patient_nt_xent(z1, z2, batch.patients, self.temperature)
        if self.order_weight:
            order = F.cross_entropy(*self.order_head(self.encoder, batch))
            loss = loss + self.order_weight * order
        return loss
