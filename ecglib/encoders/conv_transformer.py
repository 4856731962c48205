"""The backbone of CE-SSL (Zhou et al. 2024): three convolutional blocks, a small transformer, a
maximum over time.

Batch norm stands in the convolutional blocks alone, which is what CE-SSL's semi-supervised batch
norm builds on: `local` is everything with batch norm, `context` everything without.
"""

import torch
from torch import Tensor, nn

from ecglib.encoders.in_place_norm import norm_leaky
from ecglib.encoders.transformer import TransformerBlock, sinusoidal_positions
from ecglib.errors import DataError

HEADS = 16  # of every size
SIZES = {
    "tinylight": (64, 1),
    "tiny": (128, 4),
    "base": (256, 8),
    "medium": (512, 12),
    "large": (768, 12),
}


class ConvBlock(nn.Module):
    """`(batch, inputs, time)` -> `(batch, outputs, time / 4, rounded up)`: two kernels of 9 samples
    and a shortcut.

    Nothing follows the sum of the two ways.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(inputs, outputs, 9, stride=4, padding=4)
        self.norm1 = nn.BatchNorm1d(outputs)
        self.second = nn.Conv1d(outputs, outputs, 9, padding=4)
        self.norm2 = nn.BatchNorm1d(outputs)
        self.shortcut = nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = norm_leaky(self.norm1, self.first(x))
        return norm_leaky(self.norm2, self.second(inner)) + self.shortcut(mean_of_fours(x))


def mean_of_fours(x: Tensor) -> Tensor:
    """Mean of each four samples, `(batch, channels, time)` -> `(batch, channels, time / 4, rounded
    up)`.

    A last, incomplete four is the mean of what is there, so that any length works. Unlike torch's
    average pooling it keeps no input for its backward pass.
    """
    count = x.shape[2] // 4
    means = x[:, :, : 4 * count].unflatten(2, (count, 4)).mean(dim=3)
    rest = x[:, :, 4 * count :]
    return torch.cat([means, rest.mean(2, keepdim=True)], dim=2) if rest.shape[2] else means


class ConvTransformer(nn.Module):
    """`(batch, leads, time)` -> logits `(batch, classes)`, or without `classes` features `(batch,
    feature_size)`.

    `size` is one of `SIZES` (width, transformer layers); with 18 classes base, medium and large
    have 9.505, 50.493 and 113.489 million parameters. Any number of samples will do; the published
    one is 6144 at 500 Hz, in standard deviations of each lead. A token looks at earlier ones only,
    as published; `causal=False` lets it look both ways. `centred` takes each lead's mean over the
    input away first, for signals in mV. ValueError for an unknown size.
    """

    def __init__(
        self,
        size: str = "base",
        classes: int | None = None,
        leads: int = 12,
        *,
        causal: bool = True,
        centred: bool = False,
    ) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(
                f"There is no ConvTransformer of the size {size!r}; choose from {', '.join(SIZES)}."
            )
        width, depth = SIZES[size]
        self.leads = leads
        self.centred = centred
        self.feature_size = width
        self.blocks = nn.ModuleList(ConvBlock(leads if i == 0 else width, width) for i in range(3))
        self.transformer = nn.ModuleList(
            TransformerBlock(width, HEADS, nn.LeakyReLU, epsilon=1e-5, causal=causal)
            for _ in range(depth)
        )
        # Two layers with nothing in between, as published: the first is adapted at low rank, the
        # second trained whole.
        self.head = nn.Identity()
        if classes is not None:
            self.head = nn.Sequential(nn.Linear(width, width), nn.Linear(width, classes))

    def layers(self) -> list[nn.Module]:
        """The blocks from input to output, each to get its own learning rate in fine-tuning."""
        return [*self.blocks, *self.transformer]

    def local(self, signals: Tensor) -> Tensor:
        """The convolutional blocks, `(batch, leads, time)` -> `(batch, width, time / 64, rounded
        up)`.
        """
        if signals.ndim != 3 or signals.shape[1] != self.leads:
            raise DataError(
                f"This ConvTransformer takes signals (batch, {self.leads}, time), not "
                f"{tuple(signals.shape)}."
            )
        if self.centred:
            signals = signals - signals.mean(dim=2, keepdim=True)
        for block in self.blocks:
            signals = block(signals)
        return signals

    def context(self, x: Tensor) -> Tensor:
        """The transformer and the maximum over its tokens, `(batch, width, tokens)` -> `(batch,
        width)`.
        """
        x = x.transpose(1, 2)
        x = x + sinusoidal_positions(x.shape[1], x.shape[2]).to(x)
        for layer in self.transformer:
            x = layer(x)
        return x.amax(dim=1)

    def forward(self, signals: Tensor) -> Tensor:
        return self.head(self.context(self.local(signals)))


def conv_transformer_small(leads: int = 12, classes: int | None = None) -> ConvTransformer:
    """A laptop's backbone for signals in mV: one transformer layer of width 64, 64 features."""
    return ConvTransformer("tinylight", classes, leads, centred=True)
