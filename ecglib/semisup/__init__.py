"""Semi-supervised objectives: each trains a classifier on a few labelled and many unlabelled
records.

Each file has, beside its objective, functions `make(network, task)` that put the objective together
for a `Task`.
"""

from dataclasses import dataclass

from ecglib.settings import Settings


@dataclass(frozen=True)
class Adaptation(Settings):
    """How a pretrained network is adapted to few labels.

    `backbone` is a name of `encoders.ENCODERS` that is made with classes. Each of the `steps` of
    AdamW sees `batch_size` labelled crops of `crop_seconds` seconds and `ratio` unlabelled ones for
    each of them. `learning_rate` is the largest one where every weight is trained,
    `low_rank_learning_rate` where low-rank pairs are. The `share` of the layers with the largest
    importance, a `score` of `ranks.importance`, get the full `rank`, the others half of it;
    `deactivation` is the probability with which a layer's pair is left out. `threshold` is that of
    a pseudo-label's confidence.
    """

    backbone: str
    steps: int
    batch_size: int
    crop_seconds: float
    learning_rate: float
    low_rank_learning_rate: float
    weight_decay: float
    ratio: int = 1
    rank: int = 8
    share: float = 0.2
    score: str = "corrected"
    deactivation: float = 0.2
    threshold: float = 0.95


@dataclass(frozen=True)
class Task:
    """What an objective is made for: numbers of classes and unlabelled records, and settings."""

    classes: int
    unlabelled: int
    settings: Adaptation
