"""The transformer block that the study's encoders share, and fixed positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DropPath(nn.Dropout):
    """Stochastic depth (Huang et al. 2016): drops a record's whole path with probability `p` while
    training.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        return x * F.dropout(x.new_ones(len(x), 1, 1), self.p)


class FusedLinear(nn.Linear):
    """Several linear layers of the same input as one matrix: `parts` blocks of rows, here queries,
    keys and values.
    """

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(width, parts * width)
        self.parts = parts


class TransformerBlock(nn.Module):
    """Pre-norm block: attention and a 4 x wider layer, each added to `(batch, tokens, width)`.

    With `causal`, a token takes only from itself and earlier ones.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        activation: type[nn.Module] = nn.GELU,
        epsilon: float = 1e-6,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width, epsilon)
        self.norm2 = nn.LayerNorm(width, epsilon)
        self.qkv = FusedLinear(width, 3)
        self.mix = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), activation(), nn.Linear(4 * width, width)
        )
        self.drop_path = DropPath(0.0)  # see `set_drop_path`

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each `(batch, heads, tokens, width / heads)`."""
        parts = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)), `(batch, heads, tokens, tokens)`."""
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        if self.causal:
            scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
        return scores.softmax(dim=3)

    def attention(self, x: Tensor) -> Tensor:
        """How much each token (row) takes from each other, `(batch, heads, tokens, tokens)`; rows
        sum to 1.
        """
        q, k, _ = self.queries_keys_values(x)
        return self._weights(q, k)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        # On a CPU the fused kernel's backward pass in bfloat16 takes five times as long as these
        # two products.
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            taken = self._weights(q, k) @ v
        else:
            taken = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.drop_path(self.mix(taken.transpose(1, 2).flatten(2)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def sinusoidal_positions(tokens: int, width: int) -> Tensor:
    """`(tokens, width)`: sin and cos of positions at wavelengths from 2 pi to 10,000 x 2 pi
    (Vaswani et al. 2017).
    """
    pairs = torch.arange(0, width, 2, dtype=torch.float64)
    angle = torch.arange(tokens)[:, None] * torch.exp(pairs * (-math.log(10_000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)  # float64


def set_drop_path(encoder: nn.Module, largest: float) -> None:
    """Give an encoder's blocks stochastic depth that rises linearly from 0 to `largest`, first
    block to last.

    An encoder without such blocks stays as it is.
    """
    paths = [module for module in encoder.modules() if isinstance(module, DropPath)]
    for place, path in enumerate(paths):
        path.p = largest * place / max(len(paths) - 1, 1)
