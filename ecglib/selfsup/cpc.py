"""CPC: contrastive predictive coding, after van den Oord et al. 2018, as Mehari & Strodthoff 2022
do it on ECGs.

From what came so far, the network picks the latent that comes `steps` later out of others of the
same record.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from ecglib.augment import Transform, apply
from ecglib.batches import Batch
from ecglib.errors import DataError


def draw_negatives(
    batch: int, time: int, steps: int, negatives: int, generator: Generator
) -> Tensor:
    """Times `(batch, time - steps, negatives)` uniform with replacement over all but the positive,
    position+steps.
    """
    device = generator.device
    shape = (batch, time - steps, negatives)
    drawn = torch.randint(time - 1, shape, generator=generator, device=device)
    positive = torch.arange(steps, time, device=device)[:, None]
    return drawn + (drawn >= positive)


def info_nce(
    context: Tensor,
    latents: Tensor,
    steps: int,
    negatives: int,
    generator: Generator,
    reduction: str = "sum",
) -> Tensor:
    """InfoNCE of the predictions `context` (W c in the paper) of `latents`, both `(batch, time,
    width)`: a scalar.

    L = sum_i 1/B sum_b -log( exp(<Wc_bi, z_b,i+steps>) / sum_{j in candidates} exp(<Wc_bi, z_bj>) )

    The candidates of position i are the positive and `negatives` draws from the other times of the
    same record. As published, the mean over records is summed over the time - steps positions;
    `reduction="mean"` takes their mean instead, so that learning rate and gradient clipping do not
    depend on the crop's length. Scores are dot products, neither scaled nor normalised. Under
    autocast their product is taken in low precision, everything after in float32. Raises DataError
    where time is below steps + 2.
    """
    batch, time, _ = latents.shape
    if time < steps + 2:
        raise DataError(
            f"A crop of {time} latents is too short to predict {steps} ahead; "
            f"take at least {steps + 2} latents, or fewer steps."
        )
    chosen = draw_negatives(batch, time, steps, negatives, generator)
    # All scores of a record in one product, (batch, time - steps, time): gathering latents instead
    # of scores would need (batch, positions, candidates, width), 8 GB in the published setting.
    scores = context[:, : time - steps] @ latents.transpose(1, 2)
    positive = scores.diagonal(steps, dim1=1, dim2=2).float()
    others = scores.gather(2, chosen).float()
    losses = torch.cat([positive[..., None], others], dim=2).logsumexp(dim=2) - positive
    return losses.mean(dim=0).sum() if reduction == "sum" else losses.mean()


class CPC(nn.Module):
    """Contrastive predictive coding; `encoder` (trained itself, no average) is kept for probing.

    The encoder has `latents`, `context`, `latent_size` and `context_size` (see
    `ecglib.encoders.cpc_lstm`). `steps` counts latents, 120 ms in the paper. With `all_horizons`
    each of 1 to `steps` has its own linear predictor and the loss is the mean over them; the paper
    predicts `steps` ahead alone. The paper uses no transforms.
    """

    def __init__(
        self,
        encoder: nn.Module,
        transforms: Sequence[Transform] = (),
        *,
        steps: int = 12,
        negatives: int = 128,
        all_horizons: bool = False,
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"The reduction over positions is 'sum' or 'mean', not {reduction!r}.")
        self.encoder = encoder
        self.transforms = transforms
        self.negatives = negatives
        self.reduction = reduction
        self.horizons = range(1, steps + 1) if all_horizons else [steps]
        self.predictors = nn.ModuleList(
            nn.Linear(encoder.context_size, encoder.latent_size, bias=False) for _ in self.horizons
        )

    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss of one batch; a batch of one record will do, because negatives come from the
        same record.
        """
        latents = self.encoder.latents(apply(self.transforms, batch.signals, batch.generator))
        context = self.encoder.context(latents)
        options = self.negatives, batch.generator, self.reduction
        losses = [
            info_nce(predict(context), latents, horizon, *options)
            for horizon, predict in zip(self.horizons, self.predictors, strict=True)
        ]
        return torch.stack(losses).mean()
