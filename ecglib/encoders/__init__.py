"""The registry of encoders: each maps `(batch, leads, time)` mV to `(batch, feature_size)`.

A new encoder is a file and an entry here, or from elsewhere `ENCODERS["mine"] = "my_module:make"`.
"""

from collections.abc import Callable
from pkgutil import resolve_name

from torch import nn

# Name in the configs: where its maker is. Only the file of the encoder asked for is imported, so
# that an edit of one encoder leaves the runs of all others as they are.
ENCODERS = {
    "xresnet1d50": "ecglib.encoders.xresnet1d:xresnet1d50",
    "xresnet1d_narrow": "ecglib.encoders.xresnet1d:xresnet1d_narrow",
    "cpc_lstm": "ecglib.encoders.cpc_lstm:CPCEncoder",
    "cpc_lstm_small": "ecglib.encoders.cpc_lstm:cpc_lstm_small",
    "s4": "ecglib.encoders.s4:S4Encoder",
    "s4_small": "ecglib.encoders.s4:s4_small",
    "vit1d": "ecglib.encoders.vit1d:ViT1d",
    "vit1d_small": "ecglib.encoders.vit1d:vit1d_small",
    "conv_transformer": "ecglib.encoders.conv_transformer:ConvTransformer",
    "conv_transformer_small": "ecglib.encoders.conv_transformer:conv_transformer_small",
}


def encoder_maker(name: str) -> Callable[..., nn.Module]:
    """The function or class behind a name of `ENCODERS`; ValueError for an unknown name."""
    if name not in ENCODERS:
        raise ValueError(f"There is no encoder {name!r}; choose from {', '.join(ENCODERS)}.")
    return resolve_name(ENCODERS[name])


def make_encoder(name: str, leads: int = 12, **options) -> nn.Module:
    """The encoder of that name with random weights; ValueError for an unknown name.

    Besides `feature_size` it has `layers()`, its parts from input to output, for layer-wise
    learning rates. Further options go to its maker, such as `classes` of a ConvTransformer, which
    then returns logits.
    """
    return encoder_maker(name)(leads=leads, **options)
