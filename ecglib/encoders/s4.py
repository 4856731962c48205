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
    zero-order hold. Without `causal` a second filter of the same form runs backwards in time and
    both are added.
    """

    def __init__(self, width: int, state: int, causal: bool = True) -> None:
        super().__init__()
        self.causal, self.state = causal, state
        filters = width if causal else 2 * width
        steps = torch.empty(filters).uniform_(math.log(SHORTEST), math.log(LONGEST))
        self.log_step = nn.Parameter(steps)
        # Flat, because the training loop lets only matrices decay, and poles must not be pulled
        # towards zero.
        self.log_decay = nn.Parameter(torch.full((filters * state,), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(state).float().repeat(filters))
        # C, real and imaginary.
        self.readout = nn.Parameter(torch.randn(filters, state, 2) * math.sqrt(0.5))
        self.skip = nn.Parameter(torch.randn(width))  # D

    def discrete(self) -> tuple[Tensor, Tensor]:
        """log of the state's factor per step, A dt, and gain C (exp(A dt) - 1) / A, complex
        `(filters, state)`.
        """
        pole = torch.complex(-self.log_decay.exp(), self.frequency).unflatten(0, (-1, self.state))
        exponent = pole * self.log_step.exp()[:, None]
        return exponent, torch.view_as_complex(self.readout) * torch.expm1(exponent) / pole

    def impulse_response(self, time: int) -> Tensor:
        """Response of each filter to one impulse, `(filters, time)`: K_l = 2 Re sum_n gain_n exp(l
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
            response = self.impulse_response(time)
            if not self.causal:
                # The second half acts on later samples: lag -1 stands last, and wraps around.
                forwards, backwards = response.chunk(2)
                response = F.pad(forwards, (0, time)) + F.pad(backwards.flip(1), (time, 0))
            # Twice the length, so that nothing of the end comes round to the beginning; time last,
            # twice as fast.
            spectrum = torch.fft.rfft(inputs.transpose(1, 2), 2 * time)
            spectrum = spectrum * torch.fft.rfft(response, 2 * time)
            filtered = torch.fft.irfft(spectrum, 2 * time)[..., :time]
            return filtered.transpose(1, 2) + self.skip * inputs

    def recurrent(self, inputs: Tensor) -> Tensor:
        """The same output, one time step after the other: what a causal filter does on a monitor.
        ValueError else.
        """
        if not self.causal:
            raise ValueError("Only a causal filter can be run one step after the other.")
        exponent, gain = self.discrete()
        state, outputs = 0.0, []
        for step in inputs.float().unbind(dim=1):
            state = exponent.exp() * state + step[..., None]
            outputs.append(2 * (gain * state).real.sum(dim=2) + self.skip * step)
        return torch.stack(outputs, dim=1)


class Block(nn.Module):
    """Pre-norm residual block: x + GLU(linear(GELU(state space(norm(x)))))."""

    def __init__(self, width: int, state: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.norm, self.filter = nn.LayerNorm(width), StateSpace(width, state, causal)
        self.mix, self.dropout = nn.Linear(width, 2 * width), nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.dropout(F.glu(self.mix(F.gelu(self.filter(self.norm(inputs))))))


class S4Encoder(nn.Module):
    """The LSTM of `CPCEncoder` replaced by state-space blocks: `(batch, leads, time)` mV ->
    `(batch, feature_size)`.

    Width 512, 8 states, 4 blocks and dropout 0.2 are usual for state-space models of ECGs. A causal
    encoder is what CPC trains; its features are [mean, maximum, last] over time. With
    `causal=False` every time step sees the whole crop, and features are [mean, maximum], because
    the last step is then no summary. `latent_layers`, `samples`, `standardised` and `centred` are
    those of `cpc_lstm.Latents`.
    """

    def __init__(
        self,
        leads: int = 12,
        width: int = 512,
        state: int = 8,
        layers: int = 4,
        dropout: float = 0.2,
        causal: bool = True,
        latent_layers: int = 4,
        samples: int = 1,
        standardised: bool = True,
        centred: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.latent_size, self.context_size = width, width
        self.feature_size = (3 if causal else 2) * width
        self.latents = Latents(leads, width, latent_layers, samples, standardised, centred)
        blocks = [Block(width, state, dropout, causal) for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(width))

    def layers(self) -> list[nn.Module]:
        """Fully connected layers and blocks, from input to output, each to get its own learning
        rate in fine-tuning.
        """
        return [self.latents, *self.blocks]

    def context(self, latents: Tensor) -> Tensor:
        """Output of the blocks, `(batch, time, width)`; if causal, what each time knows from the
        latents so far.
        """
        return self.blocks(latents)

    def forward(self, signals: Tensor) -> Tensor:
        features = pool(self.context(self.latents(signals)))
        return features[:, : self.feature_size]


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
