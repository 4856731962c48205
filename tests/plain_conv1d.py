"""xresnet1d with one-dimensional layers: the plain form that the encoder is tested and timed against."""

import copy

import torch
from torch import nn

from ecglib.encoders.xresnet1d import XResNet1d


def plain_conv1d(encoder: XResNet1d) -> nn.Module:
    """The same network, `(batch, leads, time)` -> features, with one-dimensional layers and the same weights."""
    twin = copy.deepcopy(encoder)
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                layer = nn.Conv1d(child.in_channels, child.out_channels, child.kernel_size[1], child.stride[1],
                                  child.padding[1], bias=child.bias is not None)  # fmt: skip
                layer.weight.data = child.weight.data.squeeze(2).clone(memory_format=torch.contiguous_format)
                if child.bias is not None:
                    layer.bias.data = child.bias.data.clone()
            elif isinstance(child, nn.BatchNorm2d):
                layer = nn.BatchNorm1d(child.num_features)
                layer.load_state_dict(child.state_dict())
            elif isinstance(child, nn.MaxPool2d):
                layer = nn.MaxPool1d(3, 2, 1)
            elif isinstance(child, nn.AvgPool2d):
                layer = nn.AvgPool1d(2, 2, ceil_mode=True)
            else:
                continue
            setattr(module, name, layer)
    return _Pooled(twin)


class _Pooled(nn.Module):
    """Stem, stages and pooling on (batch, channels, time)."""

    def __init__(self, twin: nn.Module) -> None:
        super().__init__()
        self.stem, self.stages = twin.stem, twin.stages

    def forward(self, signals: torch.Tensor) -> torch.Tensor:
        features = self.stages(self.stem(signals))
        return torch.cat([features.amax(dim=2), features.mean(dim=2)], dim=1)
