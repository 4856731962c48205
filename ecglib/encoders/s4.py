"""A state-space encoder, S4D (Gu, Gupta, Goel & Ré 2022): the recurrence that a long convolution
can compute.

Each channel has its own linear system with a diagonal complex state, x' = A x + u, y = 2 Re(C x) +
D u, sampled at its own time step. Its impulse response is a sum of decaying oscillations, here
applied to the whole crop by FFT.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.encoders.cpc_lstm import Latents, pool

# Time steps at the start, log-uniform: memories of about 10 to 1,000 latents.
SHORTEST, LONGEST = 0.001, 0.1


class StateSpace(nn.Module):
    """One linear filter for each channel, `(batch, time, width)` -> the same shape in float32.

    S4D-Lin: A_n = -1/2 + i pi n for the `state` conjugate pairs, B = 1, C standard normal,
    zero-order hold.
    """

    def __init__(self, width: int, state: int) -> None:
        super().__init__()
        self.state = state
        steps = torch.empty(width).uniform_(math.log(SHORTEST), math.log(LONGEST))
        self.log_step = nn.Parameter(steps)
        # Flat, because the training loop lets only matrices decay, and poles must not be pulled
        # towards zero.
        self.log_decay = nn.Parameter(torch.full((width * state,), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(state).float().repeat(width))
        # C, real and imaginary.
        self.readout = nn.Parameter(torch.randn(width, state, 2) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(width))  # D

    def discrete(self) -> tuple[Tensor, Tensor]:
        """log of the state's factor per step, A dt, and gain C (exp(A dt) - 1) / A, complex
        `(width, state)`.
        """
        pole = torch.complex(-self.log_decay.exp(), self.frequency).unflatten(0, (-1, self.state))
        exponent = pole * self.log_step.exp()[:, None]
        return exponent, torch.view_as_complex(self.readout) * torch.expm1(exponent) / pole

    def impulse_response(self, time: int) -> Tensor:
        """Response of each filter to one impulse, `(width, time)`: K_l = 2 Re sum_n gain_n exp(l
        A_n dt).
        """
        exponent, gain = self.discrete()
        # Powers l = block * i + j as products of two short tables: 2 sqrt(time) exponentials per
        # state instead of time.
        block = math.isqrt(time - 1) + 1
        short = torch.arange(block, device=exponent.device)
        coarse = gain[..., None] * torch.exp(exponent[..., None] * (block * short))
        fine = torch.exp(exponent[..., None] * short)
        return 2 * (coarse.transpose(1, 2) @ fine).real.flatten(1)[:, :time]

    def forward(self, inputs: Tensor) -> Tensor:
        time = inputs.shape[1]
        # FFTs have no kernels for low precision.
        with torch.autocast(inputs.device.type, enabled=False):
            inputs = inputs.float()
            # Twice the length, so that nothing of the end comes round to the beginning; time last,
            # twice as fast.
            spectrum = torch.fft.rfft(inputs.transpose(1, 2), 2 * time)
            spectrum = spectrum * torch.fft.rfft(self.impulse_response(time), 2 * time)
            filtered = torch.fft.irfft(spectrum, 2 * time)[..., :time]
            return filtered.transpose(1, 2) + self.skip * inputs

    def recurrent(self, inputs: Tensor) -> Tensor:
        """The same output, one time step after the other, as the filter would run on a monitor."""
        exponent, gain = self.discrete()
        state, outputs = 0.0, []
        for step in inputs.float().unbind(dim=1):
            state = exponent.exp() * state + step[..., None]
            outputs.append(2 * (gain * state).real.sum(dim=2) + self.skip * step)
        return torch.stack(outputs, dim=1)


class Block(nn.Module):
    """Pre-norm residual block: x + GLU(linear(GELU(state space(norm(x)))))."""

    def __init__(self, width: int, state: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.filter = StateSpace(width, state)
        self.mix = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.dropout(F.glu(self.mix(F.gelu(self.filter(self.norm(inputs))))))


class S4Encoder(nn.Module):
    """The LSTM of `CPCEncoder` replaced by state-space blocks: `(batch, leads, time)` mV ->
    `(batch, feature_size)`.

    Width 512, 8 states, 4 blocks and dropout 0.2 are usual for state-space models of ECGs. It is
    causal, as CPC needs it; its features are [mean, maximum, last] over time. `latent_layers` and
    the `options` `samples`, `standardised` and `centred` are those of `cpc_lstm.Latents`.
    """

    def __init__(
        self,
        leads: int = 12,
        width: int = 512,
        state: int = 8,
        layers: int = 4,
        dropout: float = 0.2,
        latent_layers: int = 4,
        **options: int | bool,
    ) -> None:
        super().__init__()
        self.latent_size = width
        self.context_size = width
        self.feature_size = 3 * width
        self.latents = Latents(leads, width, latent_layers, **options)
        blocks = [Block(width, state, dropout) for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(width))

    def layers(self) -> list[nn.Module]:
        """Fully connected layers and blocks, from input to output, each to get its own learning
        rate in fine-tuning.
        """
        return [self.latents, *self.blocks]

    def context(self, latents: Tensor) -> Tensor:
        """What each time step knows from the latents up to it: `(batch, time, width)`."""
        return self.blocks(latents)

    def forward(self, signals: Tensor) -> Tensor:
        return pool(self.context(self.latents(signals)))


def s4_small(leads: int = 12) -> S4Encoder:
    """A laptop's encoder of the same form: width 64, two blocks of 8 states, a latent for every two
    samples.
    """
    return S4Encoder(
        leads,
        width=64,
        layers=2,
        dropout=0.0,
        latent_layers=2,
        samples=2,
        standardised=False,
        centred=True,
    )
