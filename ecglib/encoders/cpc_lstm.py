"""The encoder of contrastive predictive coding in Mehari & Strodthoff 2022: fully connected layers,
then an LSTM.

A network that CPC can train has `latents(signals) -> (batch, time, latent_size)`, where each time
step sees its own samples alone, and `context(latents) -> (batch, time, context_size)`, where each
time step sees no later one.
"""

import torch
from torch import Tensor, nn

from ecglib.encoders.xresnet1d import Pointwise

# Standard deviation in mV of the leads I, II, III, aVR, aVL, aVF, V1-V6 of PTB-XL; the means, all
# below 0.003, count 0.
PTB_XL_DEVIATIONS = (
    0.164,
    0.165,
    0.171,
    0.140,
    0.146,
    0.147,
    0.234,
    0.338,
    0.334,
    0.306,
    0.273,
    0.276,
)


class Latents(nn.Module):
    """Fully connected layers on each time step: `(batch, leads, time)` mV -> `(batch, time /
    samples, width)`.

    Each layer is linear (no bias), batch norm, ReLU. A latent stands for `samples` successive
    samples, none of them shared with its neighbours, so that overlap does not help to predict the
    next one; samples that fill no latent are cut off. `standardised` divides each lead by its
    deviation over PTB-XL, `centred` subtracts each lead's mean over the crop, which is the one
    number per lead that a latent then knows of later samples. Raises ValueError where leads other
    than the 12 are to be standardised.
    """

    def __init__(
        self,
        leads: int,
        width: int,
        layers: int,
        samples: int = 1,
        standardised: bool = True,
        centred: bool = False,
    ) -> None:
        super().__init__()
        if standardised and leads != len(PTB_XL_DEVIATIONS):
            raise ValueError(
                f"PTB-XL's deviations are for 12 leads, not {leads}; give standardised=False."
            )
        self.samples = samples
        self.centred = centred
        scale = torch.tensor(PTB_XL_DEVIATIONS) if standardised else torch.ones(leads)
        self.register_buffer("scale", scale[:, None], persistent=False)
        each = [
            nn.Sequential(Pointwise(size, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for size in [leads * samples] + [width] * (layers - 1)
        ]
        self.layers = nn.Sequential(*each)
        self.to(memory_format=torch.channels_last)

    def forward(self, signals: Tensor) -> Tensor:
        if self.centred:
            signals = signals - signals.mean(dim=2, keepdim=True)
        steps = signals.shape[2] // self.samples
        signals = (signals / self.scale)[:, :, : steps * self.samples]
        patches = signals.unflatten(2, (steps, self.samples)).permute(0, 1, 3, 2).flatten(1, 2)
        # A 1 x time image in channels-last memory: there batch norm is fast, and the result is
        # (batch, time, width).
        return self.layers(patches.unsqueeze(2)).squeeze(2).transpose(1, 2)


def pool(context: Tensor) -> Tensor:
    """[mean, maximum, last] over time of `(batch, time, size)`, as the paper's heads take it:
    `(batch, 3 size)`.
    """
    return torch.cat([context.mean(dim=1), context.amax(dim=1), context[:, -1]], dim=1)


class CPCEncoder(nn.Module):
    """The paper's "4FC + 2LSTM": `(batch, leads, time)` mV -> `(batch, feature_size)`, [mean,
    maximum, last] pooled.

    796,672 parameters in the fully connected layers, 4,202,496 in the LSTM; 1,536 features; a
    latent for each sample. The `options` are those of `Latents`: `samples`, `standardised` (by
    default, as published) and `centred`.
    """

    def __init__(
        self,
        leads: int = 12,
        width: int = 512,
        layers: int = 4,
        hidden: int = 512,
        lstm_layers: int = 2,
        **options: int | bool,
    ) -> None:
        super().__init__()
        self.latent_size = width
        self.context_size = hidden
        self.feature_size = 3 * hidden
        self.latents = Latents(leads, width, layers, **options)
        self.lstm = nn.LSTM(width, hidden, lstm_layers, batch_first=True)

    def layers(self) -> list[nn.Module]:
        """Fully connected layers and LSTM, from input to output, each to get its own learning rate
        in fine-tuning.
        """
        return [self.latents, self.lstm]

    def context(self, latents: Tensor) -> Tensor:
        """What the LSTM knows at each time step, from the latents up to it: `(batch, time,
        hidden)`.
        """
        return self.lstm(latents)[0]

    def forward(self, signals: Tensor) -> Tensor:
        return pool(self.context(self.latents(signals)))


def cpc_lstm_small(leads: int = 12) -> CPCEncoder:
    """A laptop's encoder of the same form: half the layers, width 128, a latent for every two
    samples, 384 features.
    """
    return CPCEncoder(
        leads,
        width=128,
        layers=2,
        hidden=128,
        lstm_layers=1,
        samples=2,
        standardised=False,
        centred=True,
    )
