"""xresnet1d (the "bag of tricks" of He et al. 2019 in one dimension), as in Mehari & Strodthoff
2022.

The convolutions are 1 x k two-dimensional ones in channels-last memory: the same numbers as
`Conv1d`, but the form for which processors with bfloat16 units have fast kernels (see
`ecglib.train.precision` and `benchmarks/training_step.py`).
"""

from collections.abc import Sequence
from itertools import islice, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

EXPANSION = 4  # output channels of a bottleneck over its inner width


class Pointwise(nn.Conv2d):
    """A 1 x 1 convolution done as a matrix product, which is what it is in channels-last memory,
    and faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return y.permute(0, 3, 1, 2)


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = False, gain: float = 1.0
) -> nn.Sequential:
    """A 1 x `kernel` convolution that keeps the length at stride 1, and its batch norm, which
    starts as in the paper with the gain `gain` and the bias 0.001.
    """
    kind = Pointwise if kernel == 1 else nn.Conv2d
    layer = kind(inputs, outputs, (1, kernel), (1, stride), (0, kernel // 2), bias=bias)
    norm = nn.BatchNorm2d(outputs)
    nn.init.constant_(norm.weight, gain)
    nn.init.constant_(norm.bias, 1e-3)
    return nn.Sequential(layer, norm)


class Bottleneck(nn.Module):
    """1x1, 1xk, 1x1 convolutions with a shortcut; the last batch norm starts at zero, so the block
    at the identity.
    """

    def __init__(self, inputs: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        outputs = width * EXPANSION
        self.path = nn.Sequential(
            convolution(inputs, width, 1),
            nn.ReLU(),
            convolution(width, width, kernel, stride),
            nn.ReLU(),
            convolution(width, outputs, 1, gain=0.0),
        )
        pool = nn.AvgPool2d((1, 2), ceil_mode=True) if stride == 2 else nn.Identity()
        match = nn.Identity() if inputs == outputs else convolution(inputs, outputs, 1)
        self.shortcut = nn.Sequential(pool, match)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.shortcut(x))


class XResNet1d(nn.Module):
    """Encoder `(batch, leads, time)` in mV -> `(batch, feature_size)`: [maximum, mean] over time of
    the last stage.

    With `centred` each lead's mean over the crop is taken away first: where a recorder's baseline
    stands says nothing about a heart, and with a few dozen labels a network cannot learn that by
    itself.
    """

    def __init__(
        self,
        leads: int = 12,
        stem: Sequence[int] = (32, 32, 64),
        width: int = 64,
        blocks: Sequence[int] = (3, 4, 6, 3),
        kernel: int = 5,
        centred: bool = False,
    ) -> None:
        super().__init__()
        self.centred, self.blocks = centred, tuple(blocks)
        # The first convolution has a bias and PyTorch's default start, as in the published model.
        layers = [convolution(leads, stem[0], kernel, 2, bias=True), nn.ReLU()]
        for inputs, outputs in pairwise(stem):
            layers += [convolution(inputs, outputs, kernel), nn.ReLU()]
        self.stem = nn.Sequential(*layers, nn.MaxPool2d((1, 3), (1, 2), (0, 1)))
        inputs, stages = stem[-1], []
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 1 + (stage > 0 and block == 0)
                stages.append(Bottleneck(inputs, width, kernel, stride))
                inputs = width * EXPANSION
        self.stages = nn.Sequential(*stages)
        self.feature_size = 2 * inputs
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and layer.bias is None:
                nn.init.kaiming_normal_(layer.weight)
        self.to(memory_format=torch.channels_last)

    def layers(self) -> list[nn.Module]:
        """Stem and stages from input to output, each with its own learning rate in fine-tuning."""
        stages = iter(self.stages)
        return [self.stem, *(nn.Sequential(*islice(stages, count)) for count in self.blocks)]

    def forward(self, signals: Tensor) -> Tensor:
        if self.centred:
            signals = signals - signals.mean(dim=2, keepdim=True)
        # The last stage before pooling, `(batch, channels, time / 32)`.
        features = self.stages(self.stem(signals.unsqueeze(2))).squeeze(2)
        return torch.cat([features.amax(dim=2), features.mean(dim=2)], dim=1)


def xresnet1d50(leads: int = 12) -> XResNet1d:
    """The paper's encoder: 886,432 parameters at 12 leads, 512 features; every stage has inner
    width 64.
    """
    return XResNet1d(leads)


def xresnet1d_narrow(leads: int = 12) -> XResNet1d:
    """A laptop's encoder of the same form: inner width 32, one block per stage, longer filters, 256
    features.
    """
    return XResNet1d(
        leads, stem=(32, 32, 32), width=32, blocks=(1, 1, 1, 1), kernel=9, centred=True
    )
