"""The base of the small frozen dataclasses that hold a method's settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Self


class Settings:
    """Base of a frozen dataclass whose fields are settings; `dataclasses.asdict` stores it."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of its fields in order."""
        return tuple(each.name for each in fields(cls))

    @classmethod
    def of(cls, values: Mapping) -> Self:
        """The settings that `values` holds beside others, such as those of a stored run."""
        return cls(**{name: values[name] for name in cls.names() if name in values})


@dataclass(frozen=True)
class EncoderTraining(Settings):
    """How an encoder is trained, with labels or without.

    `encoder` is a name of `encoders.ENCODERS`. Each of the `steps` of AdamW sees `batch_size` crops
    of `crop_seconds` seconds, changed by `transforms` (a name of `augment.named_transforms`: its
    options). `learning_rate` is the largest one of the schedule, `weight_decay` acts on matrices
    and kernels.
    """

    encoder: str
    steps: int
    batch_size: int
    crop_seconds: float
    learning_rate: float
    weight_decay: float
    transforms: Mapping[str, Mapping] = field(default_factory=dict)
