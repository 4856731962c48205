"""SwAV (Caron et al. 2020), as in Mehari & Strodthoff 2022: one view's place among prototypes is
told from another's.

The places are balanced over the batch (Sinkhorn), so that not all records can settle at one
prototype.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import Transform
from ecglib.batches import Batch
from ecglib.distributed import gathered, rank_and_world
from ecglib.errors import DataError
from ecglib.selfsup.crops import MultiCrop, encode_views
from ecglib.selfsup.heads import Prototypes, cross_view_entropy, need_two_records, projection_head

CODE_VIEWS = 2  # codes are made from the first two views only


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Balanced codes `(batch, prototypes)` of cosines of that shape: Q = diag(u) exp(scores /
    epsilon) diag(v); several views `(views, batch, prototypes)` each by itself.

    Every iteration scales the columns to batch / prototypes and then the rows to 1, so rows sum to
    1 exactly, columns to their share the better, the more iterations. Computed with logarithms,
    which neither overflow nor divide by 0.
    """
    codes = scores.float() / epsilon
    for _ in range(iterations):
        codes = codes.log_softmax(dim=-2).log_softmax(dim=-1)
    return codes.exp()


def swav_loss(scores: Tensor, codes: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean over (code view c, other view v) and the batch of -sum_k code_ck log softmax(score_v /
    temperature)_k.

    `scores` are cosines `(views, batch, prototypes)`, `codes` those of the first views, `(code
    views, batch, prototypes)`; a view never predicts its own code.
    """
    return cross_view_entropy(codes, torch.log_softmax(scores.float() / temperature, dim=2))


class SwAV(nn.Module):
    """Encoder, projector (hidden, batch norm, ReLU, outputs) and prototypes; `.encoder` is kept.

    The published runs use 6 full-length views. With `local_views` the last ones of the `views` are
    windows of half the crop, the multi-crop of the original paper. The queue
    holds the embeddings of the last `queue` batches of `batch_size` records (all processes
    together) and joins the balancing from the share `queue_from` of the run on; prototypes stay as
    they are for the share `frozen` (the first of 100 epochs).
    """

    def __init__(
        self,
        encoder: nn.Module,
        transforms: Sequence[Transform] = (),
        *,
        prototypes: int = 3000,
        hidden: int = 2048,
        outputs: int = 128,
        batch_size: int = 4096,
        queue: int = 8,
        queue_from: float = 0.15,
        frozen: float = 0.01,
        views: int = 6,
        local_views: int = 0,
    ) -> None:
        super().__init__()
        whole = views - local_views
        if whole < CODE_VIEWS:
            raise DataError(
                f"SwAV needs two full-length views, not {whole}; use fewer local views."
            )
        self.encoder = encoder
        self.projector = projection_head(encoder.feature_size, hidden, outputs, norm=True)
        self.prototypes = Prototypes(outputs, prototypes)
        self.crops = MultiCrop(encoder, [1.0] * whole + [0.5] * local_views, transforms)
        self.batch_size = batch_size
        self.batches_queued = queue
        self.queue_from = queue_from
        self.frozen = frozen
        self.register_buffer("queue", torch.zeros(CODE_VIEWS, queue * batch_size, outputs))
        self.register_buffer("queued", torch.tensor(0))
        self.register_buffer("progress", torch.tensor(0.0))

    def loss(self, batch: Batch) -> Tensor:
        """Swapped prediction of the codes; DataError for a batch of one or of another size than
        `batch_size`.
        """
        need_two_records(batch.signals, "SwAV")
        views = self.crops(batch.signals, batch.generator)
        embeddings = self.projector(encode_views(self.encoder, views)).float()
        # Unit vectors `(views, batch, outputs)`, the full-length views first.
        embeddings = F.normalize(embeddings, dim=1).unflatten(0, (len(views), -1))
        trained = (self.progress >= self.frozen).float()
        scores = self.prototypes(embeddings, trained)
        return swav_loss(scores, self.codes(embeddings[:CODE_VIEWS].detach()))

    @torch.no_grad()
    def codes(self, embeddings: Tensor) -> Tensor:
        """Codes `(code views, batch, prototypes)`, balanced over all processes and, when it is
        full, the queue.
        """
        joint = torch.cat(gathered(embeddings), dim=1)
        if self.batches_queued and joint.shape[1] != self.batch_size:
            raise DataError(
                f"SwAV's queue was made for batches of {self.batch_size} records, this one has "
                f"{joint.shape[1]}; give SwAV the batch size that is used."
            )
        ready = (self.queued >= self.batches_queued) & (self.progress >= self.queue_from)
        # Until then the batch stands in for the queue: balancing copies of a batch gives the codes
        # of the batch.
        stored = torch.where(ready, self.queue, joint.repeat(1, self.batches_queued, 1))
        scores = self.prototypes(torch.cat([joint, stored], dim=1))
        if self.training:
            self.queue.copy_(torch.cat([joint, self.queue], dim=1)[:, : self.queue.shape[1]])
            self.queued += 1
        codes = sinkhorn(scores)
        return codes.split(embeddings.shape[1], dim=1)[rank_and_world()[0]]

    def after_step(self, progress: float) -> None:
        """Prototypes back to length 1; the progress decides about queue and freezing."""
        self.prototypes.normalise()
        self.progress.fill_(progress)
