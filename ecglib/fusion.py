"""DVME, fusion of frozen encoders: a token per encoder, self-attention over the tokens, one
classifier on them all.

DVME (Truong, Mohammadi & Lenga 2021, for images) has no published code. What is recoverable of it:
an own projection of each encoder's embedding, self-attention over these tokens, concatenation, a
linear layer, a classifier, all trained on the task. Here besides, as labels are few: a norm and a
learned name for each token, whole tokens dropped while training, and a direct path of votes, so
that training starts from the mean of the encoders' own linear probes.

All label subsets of a study are trained as one stack of models: every parameter has a leading
dimension `models`, every product is batched, and no gradient passes from one model to another.
"""

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ecglib.batches import Batch, step_generator
from ecglib.errors import DataError
from ecglib.train import fit

MIXINGS = ("attention", "uniform", "gate")


class StackedLinear(nn.Module):
    """A linear layer of each model: `(models, ..., inputs)` -> `(models, ..., outputs)`."""

    def __init__(self, models: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(models, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(models, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x.flatten(1, -2), self.weight).unflatten(1, x.shape[1:-1])


class StackedNorm(nn.Module):
    """A layer norm of each model over the last dimension of `(models, ..., width)`."""

    def __init__(self, models: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(models, 1, width))
        self.shift = nn.Parameter(torch.zeros(models, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        flat = F.layer_norm(x.flatten(1, -2), x.shape[-1:])
        return torch.addcmul(self.shift, flat, self.scale).unflatten(1, x.shape[1:-1])


class _Fused(nn.Module):
    """What every fusion shares: votes, the direct path from the features to the logits, and the
    drawing of weights.

    `sizes` are the numbers of features of the members. Without votes a fusion starts from random
    weights alone.
    """

    def __init__(
        self, models: int, sizes: Sequence[int], classes: int, votes: bool, dropout: float
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.dropout = dropout
        self.votes = StackedLinear(models, sum(sizes), classes) if votes else None

    def _draw(self, seeds: Sequence[int]) -> None:
        """Weights from each model's own seed, so that a model starts alike whichever others are in
        the stack.

        The last layer starts at 0 where there are votes: they alone decide at first.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                silent = self.votes is not None and name.startswith(("head", "votes"))
                if name.endswith(("weight", "names")) and not silent:
                    deviation = 0.02 if name == "names" else parameter.shape[1] ** -0.5
                    shape = parameter.shape[1:]
                    drawn = [torch.randn(shape, generator=generator) for generator in generators]
                    parameter.copy_(deviation * torch.stack(drawn))

    def start_from(self, weights: Tensor, bias: Tensor) -> None:
        """Let the members' probes vote: weights `(models, d, classes)` and bias `(models, members,
        classes)` of them.

        The votes are the mean of the probes' logits.
        """
        if self.votes is None:
            raise DataError(
                "This fusion has no votes to start from probes; make it with votes=True."
            )
        with torch.no_grad():
            self.votes.weight.copy_(weights / len(self.sizes))
            self.votes.bias.copy_(bias.mean(dim=1, keepdim=True))

    def _classified(
        self,
        inputs: Tensor,
        features: Tensor,
        present: Tensor | None,
        generator: Generator | None,
    ) -> Tensor:
        """Logits `(models, n, classes)` of `inputs`, with the votes, if there are any, of the
        members that are `present` `(n, members)`.
        """
        logits = self.head(self._drop(F.gelu(self.hidden(inputs)), generator))
        return logits if self.votes is None else logits + self.votes(self._only(features, present))

    def _only(self, features: Tensor, present: Tensor | None) -> Tensor:
        """Features `(n, d)` times the weight `present` `(n, members)` of their member."""
        if present is None:
            return features
        sizes = torch.tensor(self.sizes, device=present.device)
        return features * present.repeat_interleave(sizes, dim=1)

    def _drop(self, values: Tensor, generator: Generator | None) -> Tensor:
        """Dropout of `(models, ...)` that is the same for every model, so that none depends on how
        many there are.
        """
        if not self.training or self.dropout == 0.0:
            return values
        kept = torch.rand(values.shape[1:], generator=generator, device=values.device)
        return values * ((kept >= self.dropout) / (1 - self.dropout))


class FusionNetwork(_Fused):
    """Logits `(models, n, classes)` of the members' features side by side `(models, n, d)`.

    Member k's token is z_k = LN(W_k e_k + b_k) + name_k in `width` dimensions. `mixing` is how
    tokens learn of each other: "attention", A = softmax(Q K' / sqrt(d_h)) with `heads` heads,
    pre-norm, added to the token; "uniform", the same with A = 1/K; "gate", each token weighed by a
    softmax over the members of a linear score of it (Phan et al. 2022). The tokens are
    concatenated, then come a layer of `hidden` units and the classes.
    """

    def __init__(
        self,
        models: int,
        sizes: Sequence[int],
        classes: int,
        *,
        width: int = 64,
        heads: int = 4,
        hidden: int = 128,
        dropout: float = 0.1,
        mixing: str = "attention",
        votes: bool = True,
        seeds: Sequence[int] | None = None,
    ) -> None:
        super().__init__(models, sizes, classes, votes, dropout)
        if mixing not in MIXINGS or width % heads:
            raise ValueError(
                f"A fusion mixes by {', '.join(MIXINGS)}, not {mixing!r}, and its width ({width}) "
                f"is a multiple of its heads ({heads})."
            )
        self.heads, self.mixing = heads, mixing
        self.project = nn.ModuleList(StackedLinear(models, size, width) for size in sizes)
        self.norm = StackedNorm(models, width)
        self.names = nn.Parameter(torch.zeros(models, 1, len(sizes), width))
        if mixing == "gate":
            self.gate = StackedLinear(models, width, 1)
        else:
            self.inner_norm = StackedNorm(models, width)
            self.qkv = StackedLinear(models, width, 3 * width)
            self.mix = StackedLinear(models, width, width)
        self.hidden = StackedLinear(models, len(sizes) * width, hidden)
        self.head = StackedLinear(models, hidden, classes)
        self._draw(range(models) if seeds is None else seeds)

    def tokens(self, features: Tensor) -> Tensor:
        """`(models, n, members, width)`."""
        parts = zip(self.project, features.split(self.sizes, dim=2), strict=True)
        return self.norm(torch.stack([layer(part) for layer, part in parts], dim=2)) + self.names

    def mixing_weights(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """How much each token (row) takes from each other, `(models, n, heads, members, members)`;
        rows sum to 1.

        With a gate, the weight of each token `(models, n, members)`. Tokens out of `keep` `(n,
        members)` get none.
        """
        if self.mixing == "gate":
            scores = self.gate(tokens).squeeze(3)
            return _masked(scores, keep).softmax(dim=2)
        q, k, _ = self._split(tokens)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores = torch.zeros_like(scores) if self.mixing == "uniform" else scores
        return _masked(scores, None if keep is None else keep[:, None, None]).softmax(dim=4)

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each `(models, n, heads, members, width / heads)`."""
        both = self.qkv(self.inner_norm(tokens)).unflatten(3, (3, self.heads, -1))
        return both.permute(3, 0, 1, 4, 2, 5).unbind(0)

    def mixed(self, tokens: Tensor, keep: Tensor | None, generator: Generator | None) -> Tensor:
        """Tokens that know of each other, as they were in shape."""
        weights = self.mixing_weights(tokens, keep)
        if self.mixing == "gate":
            return tokens * weights[..., None] * len(self.sizes)
        taken = self._drop(weights, generator) @ self._split(tokens)[2]
        return tokens + self.mix(taken.transpose(2, 3).flatten(3))

    def forward(
        self, features: Tensor, keep: Tensor | None = None, generator: Generator | None = None
    ) -> Tensor:
        tokens = self.mixed(self.tokens(features), keep, generator)
        present = None if keep is None else _present(keep)
        # A gate's weights make up for dropped tokens already.
        if present is not None and self.mixing != "gate":
            tokens = tokens * present[:, :, None]
        return self._classified(tokens.flatten(2), features, present, generator)


class FusionPerceptron(_Fused):
    """The control without tokens: all features side by side, one hidden layer, classes, and the
    same votes.

    `hidden` of `matched_hidden` gives it the parameters of a FusionNetwork. Dropped members are
    zeros.
    """

    def __init__(
        self,
        models: int,
        sizes: Sequence[int],
        classes: int,
        *,
        hidden: int,
        dropout: float = 0.1,
        seeds: Sequence[int] | None = None,
    ) -> None:
        super().__init__(models, sizes, classes, True, dropout)
        self.hidden = StackedLinear(models, sum(sizes), hidden)
        self.head = StackedLinear(models, hidden, classes)
        self._draw(range(models) if seeds is None else seeds)

    def forward(
        self, features: Tensor, keep: Tensor | None = None, generator: Generator | None = None
    ) -> Tensor:
        features = self._only(features, None if keep is None else _present(keep))
        return self._classified(features, features, None, generator)


def matched_hidden(sizes: Sequence[int], classes: int, **network) -> int:
    """Hidden units with which a FusionPerceptron has as many parameters as a FusionNetwork of the
    options `network`.
    """
    wanted = count_parameters(FusionNetwork(1, sizes, classes, **network, votes=False))
    return max(1, round((wanted - classes) / (sum(sizes) + 1 + classes)))


def model_of(stack: nn.Module, place: int) -> nn.Module:
    """A stack of the one model at `place`."""
    model = copy.deepcopy(stack)
    for parameter in model.parameters():
        parameter.data = parameter.data[[place]].clone()
    return model


def count_parameters(network: nn.Module) -> int:
    """Trained numbers of a stack of one model."""
    return sum(parameter.numel() for parameter in network.parameters())


def _masked(scores: Tensor, keep: Tensor | None) -> Tensor:
    """Scores with minus infinity where a token is dropped."""
    return scores if keep is None else scores.masked_fill(~keep, -math.inf)


def _present(keep: Tensor) -> Tensor:
    """1 over the share of members kept, `(n, members)`, 0 for the dropped ones: sums keep their
    expected size.
    """
    return keep * (keep.shape[1] / keep.sum(dim=1, keepdim=True))


def draw_tokens(
    records: int,
    tokens: int,
    dropout: float,
    generator: Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which tokens of each record stay, `(records, tokens)`: each is dropped with probability
    `dropout`, never all.
    """
    keep = torch.rand(records, tokens, generator=generator, device=device) >= dropout
    last = torch.randint(tokens, (records, 1), generator=generator, device=device)
    rescued = torch.zeros_like(keep).scatter_(1, last, True)
    return keep | (rescued & ~keep.any(dim=1, keepdim=True))


class Fusion(nn.Module):
    """Sum over models of the binary cross-entropy, mean over classes and records, while whole
    tokens are dropped.
    """

    def __init__(
        self, network: FusionNetwork | FusionPerceptron, token_dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.network, self.token_dropout = network, token_dropout

    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss; signals are features `(models, n, d)`, targets `(models, n, classes)`."""
        records, tokens = batch.signals.shape[1], len(self.network.sizes)
        device = batch.signals.device
        keep = draw_tokens(records, tokens, self.token_dropout, batch.generator, device)
        logits = self.network(batch.signals, keep, batch.generator)
        each = F.binary_cross_entropy_with_logits(logits.float(), batch.targets, reduction="none")
        return each.mean(dim=(1, 2)).sum()


class FusionBatches:
    """`batches(step)` gives each model records of its own label subset, every one of them equally
    often.

    `features` holds a member's features as `(1, records, d)`, or `(models, records, d)` where they
    differ by model. A model's records depend on its seed and subset alone.
    """

    def __init__(
        self,
        features: Sequence[Tensor],
        targets: np.ndarray,
        subsets: Sequence[np.ndarray],
        seeds: Sequence[int],
        steps: int,
        batch_size: int,
    ) -> None:
        self.features, device = list(features), features[0].device
        self.targets = torch.from_numpy(targets.astype(np.float32)).to(device)
        pairs = zip(subsets, seeds, strict=True)
        orders = np.stack([_order(subset, seed, steps * batch_size) for subset, seed in pairs])
        self.order = torch.from_numpy(orders).unflatten(1, (steps, batch_size)).to(device)

    def __call__(self, step: int) -> Batch:
        """The batch of one step, the same whenever it is asked for."""
        picked = self.order[:, step]
        generator = step_generator(0, step, self.targets.device)
        return Batch(gather(self.features, picked), self.targets[picked], picked, generator)


def _order(subset: np.ndarray, seed: int, count: int) -> np.ndarray:
    """`count` positions: pass after pass through the subset, each in a new order."""
    generator = np.random.default_rng([seed, len(subset)])
    passes = [generator.permutation(subset) for _ in range(-(-count // len(subset)))]
    return np.concatenate(passes)[:count]


def gather(features: Sequence[Tensor], picked: Tensor) -> Tensor:
    """The members' features side by side, `(models, n, d)`, of the records at `picked` `(models,
    n)`.
    """
    models = torch.arange(len(picked), device=picked.device)[:, None]
    return torch.cat([each[models if len(each) > 1 else 0, picked] for each in features], dim=2)


def train_stack(
    network: FusionNetwork | FusionPerceptron,
    batches: FusionBatches,
    steps: int,
    learning_rate: float,
    token_dropout: float = 0.2,
) -> float:
    """Train every model of the stack in place and return the last mean loss of a model.

    No decay: the learning rate, with few steps, says how far a model may go from its start. AdamW
    acts on each number apart, so the models do not meet there either; clipping the gradient would
    couple them.
    """
    options = {"learning_rate": learning_rate, "clip": None, "dtype": "float32"}
    groups = [{"params": list(network.parameters()), "weight_decay": 0.0}]
    history = fit(Fusion(network, token_dropout), batches, steps, groups=groups, **options)
    return history["loss"].iloc[-1] / len(batches.order)


@torch.no_grad()
def stack_logits(
    network: nn.Module, features: Sequence[Tensor], positions: np.ndarray, models: int
) -> Tensor:
    """Logits `(models, n, classes)` of the records at `positions`, nothing dropped."""
    network.eval()
    parts = torch.from_numpy(positions).to(features[0].device).split(64)
    return torch.cat([network(gather(features, part.expand(models, -1))) for part in parts], dim=1)


def token_weights(network: FusionNetwork, features: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What each member counts for each class, two measures that need not agree, `(models, classes,
    members)` each.

    attention: the weight that all tokens together give to a member's, mean over the records
    `(models, n, d)` with the class; rows sum to 1. Large weights on small values say little, hence
    gradient_input: the share of a member in the sum over members of |sum of features x gradient of
    the class's logit|, mean over the same records.
    """
    network.eval()
    features = features.detach().requires_grad_()
    having = targets.float() / targets.sum(dim=1, keepdim=True).clamp_min(1)
    weights = network.mixing_weights(network.tokens(features))
    received = weights if network.mixing == "gate" else weights.mean(dim=(2, 3))
    logits, shares = network(features), []
    for column in range(targets.shape[2]):
        (slope,) = torch.autograd.grad(logits[..., column].sum(), features, retain_graph=True)
        parts = (slope * features).split(network.sizes, dim=2)
        each = torch.stack([part.sum(dim=2).abs() for part in parts], dim=2)
        shares.append((each / each.sum(dim=2, keepdim=True) * having[:, :, [column]]).sum(dim=1))
    return {
        "attention": (having.mT @ received).detach(),
        "gradient_input": torch.stack(shares, dim=1).detach(),
    }


def linear_cka(first: Tensor | np.ndarray, second: Tensor | np.ndarray) -> float:
    """Linear centred kernel alignment of two features of the same records, `(n, d)` and `(n, e)`
    (Kornblith 2019).

    |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms of centred columns: 1 where one is a turned and scaled
    copy of the other. DataError where the records differ in number or nothing varies.
    """
    x, y = (torch.as_tensor(values).detach().cpu().double() for values in (first, second))
    if len(x) != len(y):
        raise DataError(
            f"CKA compares features of the same records, not of {len(x)} and {len(y)}; encode both "
            "alike."
        )
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    size = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    if size == 0:
        raise DataError(
            "CKA needs features that vary; one of the two is the same for every record."
        )
    return float(torch.linalg.matrix_norm(y.T @ x) ** 2 / size)
