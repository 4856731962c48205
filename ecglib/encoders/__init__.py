"""Encoders: each maps `(batch, leads, time)` mV to `(batch, feature_size)`."""

from functools import partial

from torch import nn

from ecglib.encoders.conv_transformer import ConvTransformer, conv_transformer_small
from ecglib.encoders.cpc_lstm import CPCEncoder, cpc_lstm_small
from ecglib.encoders.s4 import S4Encoder, s4_small
from ecglib.encoders.vit1d import ViT1d, vit1d_small
from ecglib.encoders.xresnet1d import xresnet1d50, xresnet1d_narrow


def make_encoder(name: str, leads: int = 12) -> nn.Module:
    """The encoder of that name, as configs spell it, with random weights; ValueError for an unknown
    name.

    Besides `feature_size` each has `layers()`, its parts from input to output, for layer-wise
    learning rates.
    """
    encoders = {
        "xresnet1d50": xresnet1d50,
        "cpc_lstm": CPCEncoder,
        "s4": S4Encoder,
        "vit1d": ViT1d,
        "xresnet1d_narrow": xresnet1d_narrow,
        "cpc_lstm_small": cpc_lstm_small,
        "s4_small": s4_small,
        "vit1d_small": vit1d_small,
        "conv_transformer": partial(ConvTransformer, "base", None),
        "conv_transformer_small": conv_transformer_small,
    }
    if name not in encoders:
        raise ValueError(f"There is no encoder {name!r}; choose from {', '.join(encoders)}.")
    return encoders[name](leads)
