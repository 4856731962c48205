"""A vision transformer in one dimension: a token is a short piece of all leads together
(Dosovitskiy et al. 2021).

The size follows DISTL's and DINO's small transformers; a patch of 20 samples at 100 Hz keeps one
QRS within two tokens.
"""

import torch
from torch import Tensor, nn

from ecglib.encoders.transformer import TransformerBlock
from ecglib.errors import DataError


class ViT1d(nn.Module):
    """Encoder `(batch, leads, time)` mV -> `(batch, feature_size)`: [CLS] of the last block and
    the mean of its patch tokens.

    `length` is the longest signal in samples and, like every signal's, a multiple of `patch`.
    Positions are learned for it; a shorter crop takes those from its first sample on, so they are
    never stretched. `centred` takes each lead's mean over the crop away first. The default has 5.4
    million parameters. For stochastic depth see `transformer.set_drop_path`.
    """

    def __init__(
        self,
        leads: int = 12,
        patch: int = 20,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        length: int = 1000,
        centred: bool = False,
    ) -> None:
        super().__init__()
        if length % patch or width % heads:
            raise ValueError(
                f"A ViT1d needs a length ({length}) that is a multiple of the patch ({patch}) and "
                f"a width ({width}) that is a multiple of the heads ({heads})."
            )
        self.leads = leads
        self.patch = patch
        self.length = length
        self.centred = centred
        self.embed = nn.Linear(leads * patch, width)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(length // patch, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.feature_size = 2 * width
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        # Signals are a few tenths of a millivolt: the tokens of a beat must stand out from their
        # positions.
        nn.init.normal_(self.embed.weight, std=(leads * patch) ** -0.5)
        for parameter in (self.class_token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def layers(self) -> list[nn.Module]:
        """Patch layer, blocks and last norm, from input to output, each to get its own learning
        rate in fine-tuning.

        The [CLS] token and the positions belong to none of them.
        """
        return [self.embed, *self.blocks, self.norm]

    def tokens(self, signals: Tensor, start: Tensor | None = None) -> Tensor:
        """[CLS] and patch tokens before the first block, `(batch, 1 + time / patch, width)`.

        `start` `(batch,)` is where each crop begins in its record, in samples, a multiple of
        `patch`; without it, at 0.
        """
        batch, leads, time = signals.shape
        if leads != self.leads or time % self.patch or not self.patch <= time <= self.length:
            raise DataError(
                f"This ViT1d takes {self.leads} leads and up to {self.length} samples, a multiple "
                f"of its patch of {self.patch}; the signals have {leads} leads and {time} samples."
            )
        if self.centred:
            signals = signals - signals.mean(dim=2, keepdim=True)
        # A convolution whose stride is its kernel, done as the matrix product that it is.
        patches = self.embed(signals.unflatten(2, (-1, self.patch)).transpose(1, 2).flatten(2))
        count = patches.shape[1]
        if start is None:
            patches = patches + self.positions[:count]
        else:
            self._check_starts(start, time)
            places = torch.arange(count, device=start.device) + start[:, None] // self.patch
            patches = patches + self.positions[places]
        return torch.cat([self.class_token.expand(batch, 1, -1).to(patches), patches], dim=1)

    def _check_starts(self, start: Tensor, time: int) -> None:
        # Looked at on the CPU only: on a GPU it would make every step wait.
        if start.device.type == "cpu" and not torch.compiler.is_compiling():
            if ((start % self.patch != 0) | (start < 0) | (start + time > self.length)).any():
                raise DataError(
                    f"Crops of {time} samples must start at a multiple of the patch ({self.patch}) "
                    f"and end within {self.length} samples, not start at {start.tolist()}."
                )

    def class_tokens(self, signals: Tensor, blocks: int = 4) -> Tensor:
        """[CLS] of the last `blocks` blocks, first to last, `(batch, blocks x width)`: DINO's
        features for probing.
        """
        x = self.tokens(signals)
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(self.norm(x)[:, 0])
        return torch.cat(states[-blocks:], dim=1)

    def forward(self, signals: Tensor, start: Tensor | None = None) -> Tensor:
        x = self.tokens(signals, start)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1)


def vit1d_small(leads: int = 12) -> ViT1d:
    """A laptop's transformer: patches of 0.25 s, width 96, 4 blocks, centred, 192 features."""
    return ViT1d(leads, patch=25, width=96, depth=4, heads=3, centred=True)
