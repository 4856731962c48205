"""Self-supervised objectives: one method, one file, each an `nn.Module` that `ecglib.train.fit`
trains.

Each takes an encoder, keeps the network to be probed afterwards as `.encoder`, and has
`.loss(batch)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ecglib.settings import Settings


@dataclass(frozen=True)
class Pretraining(Settings):
    """How an encoder is trained without labels.

    `encoder` is a name of `encoders.ENCODERS`. Each of the `steps` of AdamW sees `batch_size` crops
    of `crop_seconds` seconds, changed by `transforms` (a name of `augment.named_transforms`: its
    options). `learning_rate` is the largest one of the schedule, `weight_decay` acts on matrices
    and kernels. `options` are the method's own: `SimCLR(encoder, transforms, **options)`.
    """

    encoder: str
    steps: int
    batch_size: int
    crop_seconds: float
    learning_rate: float
    weight_decay: float
    transforms: Mapping[str, Mapping] = field(default_factory=dict)
    options: Mapping = field(default_factory=dict)
