"""Self-supervised objectives: one method, one file, each an `nn.Module` that `ecglib.train.fit`
trains.

Each takes an encoder, keeps the network to be probed afterwards as `.encoder`, and has
`.loss(batch)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ecglib.settings import EncoderTraining


@dataclass(frozen=True)
class Pretraining(EncoderTraining):
    """How an encoder is trained without labels.

    `options` are the method's own: `SimCLR(encoder, transforms, **options)`.
    """

    options: Mapping = field(default_factory=dict)
