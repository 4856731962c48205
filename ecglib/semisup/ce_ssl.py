"""CE-SSL (Zhou et al. 2024): low-rank adaptation in which unlabelled records take part through
batch norm alone.

No pseudo-labels, no consistency loss, no teacher: one pass of both halves through the layers with
batch norm, of the labelled half through the rest. Random deactivation and the ranks belong to the
network (`lora`, `ranks`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.augment import cutmix, weak_view
from ecglib.batches import Batch, need_unlabelled
from ecglib.semisup import Task


class CESSL(nn.Module):
    """Cross-entropy of the labelled records, with batch norm's mean and variance over labelled and
    unlabelled ones:

    mean_c = mean over (labelled and unlabelled records, time) of x_c, and the variance alike;
    gradients flow through both. Labelled records are mixed by CutMix, unlabelled ones get one weak
    change a batch. `network` is a `ConvTransformer` with classes or a `Classifier`;
    `semi_supervised_norm=False` leaves the unlabelled records out.
    """

    def __init__(self, network: nn.Module, *, semi_supervised_norm: bool = True) -> None:
        super().__init__()
        self.network, self.semi_supervised_norm = network, semi_supervised_norm

    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss of one batch, which has unlabelled records where the norm wants them."""
        signals, targets = cutmix(batch.signals, batch.targets, batch.generator)
        if self.semi_supervised_norm:
            need_unlabelled(batch, "CE-SSL")
            signals = torch.cat([signals, weak_view(batch.unlabelled, batch.generator)])
        logits = self.network.head(first_features(self.network, signals, len(targets)))
        return F.binary_cross_entropy_with_logits(logits.float(), targets)


def first_features(network: nn.Module, signals: Tensor, count: int) -> Tensor:
    """Features of the first `count` signals, `(count, feature_size)`, where all of them set batch
    norm's statistics.

    Where the encoder tells its layers with batch norm (`local`) from those after it (`context`),
    the others stop there.
    """
    encoder = getattr(network, "encoder", network)
    if hasattr(encoder, "local"):
        return encoder.context(encoder.local(signals)[:count])
    return encoder(signals)[:count]


def make_ce_ssl(network: nn.Module, task: Task) -> CESSL:
    """CE-SSL around an adapted network."""
    return CESSL(network)


def make_supervised_cutmix(network: nn.Module, task: Task) -> CESSL:
    """The same loss of the labelled records alone, CutMix included."""
    return CESSL(network, semi_supervised_norm=False)
