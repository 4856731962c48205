"""Encoders: each maps `(batch, leads, time)` mV to `(batch, feature_size)`."""

from torch import nn

from ecglib.encoders.xresnet1d import xresnet1d50, xresnet1d_narrow


def make_encoder(name: str, leads: int = 12) -> nn.Module:
    """The encoder of that name, as configs spell it; ValueError for an unknown name."""
    encoders = {"xresnet1d50": xresnet1d50, "xresnet1d_narrow": xresnet1d_narrow}
    if name not in encoders:
        raise ValueError(f"There is no encoder {name!r}; choose from {', '.join(encoders)}.")
    return encoders[name](leads)
