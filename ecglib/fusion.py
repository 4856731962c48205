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


def _drawn(generators, deviation, *shape):
    """Weights of each model from its own generator, so that a model starts alike whichever others
    are in the stack.
    """
    drawn = [torch.randn(shape, generator=generator) for generator in generators]
    return nn.Parameter(deviation * torch.stack(drawn))


class StackedLinear(nn.Module):
    """A linear layer of each model: `(models, ..., inputs)` -> `(models, ..., outputs)`."""

    def __init__(self, generators: Sequence[Generator], inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = _drawn(generators, inputs**-0.5, inputs, outputs)
        self.bias = nn.Parameter(torch.zeros(len(generators), 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x.flatten(1, -2), self.weight).unflatten(1, x.shape[1:-1])


class StackedNorm(nn.Module):
    """A layer norm of each model over the last dimension of `(models, n, members, width)`."""

    def __init__(self, models: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(models, 1, 1, width))
        self.shift = nn.Parameter(torch.zeros(models, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, F.layer_norm(x, x.shape[-1:]), self.scale)


class FusionPerceptron(nn.Module):
    """Logits `(models, n, classes)` of the members' features side by side `(models, n, d)`, by one
    layer of `hidden` units: the control without tokens.

    `sizes` are the numbers of features of the members. With `votes` the logits of a linear layer on
    the features are added; without them it starts from random weights alone. While training,
    whole members are dropped with probability `token_dropout`, never all, and count as zeros.
    `hidden` of `matched_hidden` gives it the parameters of a FusionNetwork.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        sizes: Sequence[int],
        classes: int,
        *,
        hidden: int = 128,
        dropout: float = 0.1,
        token_dropout: float = 0.2,
        votes: bool = True,
        **tokens,
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.dropout = dropout
        self.token_dropout = token_dropout
        generators = [Generator().manual_seed(seed) for seed in seeds]
        self.hidden = StackedLinear(generators, self._add_tokens(generators, **tokens), hidden)
        self.head = StackedLinear(generators, hidden, classes)
        self.votes = StackedLinear(generators, sum(sizes), classes) if votes else None
        if votes:  # at first they alone decide
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.votes.weight)

    def _add_tokens(self, generators):
        """Make what comes before the hidden layer; returns how many inputs that layer has."""
        return sum(self.sizes)

    @torch.no_grad()
    def start_from(self, weights: Tensor, bias: Tensor) -> None:
        """Let the members' probes vote: weights `(models, d, classes)` and bias `(models, members,
        classes)` of them.

        The votes are the mean of the probes' logits. DataError where there are no votes.
        """
        if self.votes is None:
            raise DataError(
                "This fusion has no votes to start from probes; make it with votes=True."
            )
        self.votes.weight.copy_(weights / len(self.sizes))
        self.votes.bias.copy_(bias.mean(dim=1, keepdim=True))

    def forward(self, features: Tensor, generator: Generator | None = None) -> Tensor:
        keep = features.new_ones(features.shape[1], len(self.sizes), dtype=torch.bool)
        if self.training:
            random = {"generator": generator, "device": keep.device}
            keep = draw_tokens(*keep.shape, self.token_dropout, **random)
        # 1 over the share of members kept, 0 for the dropped ones: sums keep their expected size.
        present = keep * (keep.shape[1] / keep.sum(dim=1, keepdim=True))
        sizes = torch.tensor(self.sizes, device=keep.device)
        voices = features * present.repeat_interleave(sizes, dim=1)
        inputs = self._inputs(features, voices, present, generator)
        logits = self.head(self._drop(F.gelu(self.hidden(inputs)), generator))
        return logits + self.votes(voices) if self.votes else logits

    def loss(self, batch: Batch) -> Tensor:
        """Sum over models of the binary cross-entropy, mean over classes and records.

        Signals are features `(models, n, d)`, targets `(models, n, classes)`.
        """
        logits = self(batch.signals, batch.generator)
        each = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none")
        return each.mean(dim=(1, 2)).sum()

    def _inputs(self, features, voices, present, generator):
        """What the hidden layer gets `(models, n, inputs)`, here the features of those present."""
        return voices

    def _drop(self, values, generator):
        """Dropout of `(models, ...)` that is the same for every model, so that none depends on how
        many there are.
        """
        if not self.training or self.dropout == 0.0:
            return values
        kept = torch.rand(values.shape[1:], generator=generator, device=values.device)
        return values * ((kept >= self.dropout) / (1 - self.dropout))


class FusionNetwork(FusionPerceptron):
    """The same with a token for each member before the hidden layer.

    Member k's token is z_k = LN(W_k e_k + b_k) + name_k in `width` (64) dimensions. `mixing` is how
    tokens learn of each other: "attention", A = softmax(Q K' / sqrt(d_h)) with `heads` (4) heads,
    pre-norm, added to the token; "uniform", the same with A = 1/K; "gate", each token weighed by a
    softmax over the members of a linear score of it (Phan et al. 2022). The tokens are
    concatenated, then come a layer of `hidden` units and the classes.
    """

    def _add_tokens(self, generators, width=64, heads=4, mixing="attention"):
        if mixing not in MIXINGS or width % heads:
            raise ValueError(
                f"A fusion mixes by {', '.join(MIXINGS)}, not {mixing!r}, and its width ({width}) "
                f"is a multiple of its heads ({heads})."
            )
        self.heads = heads
        self.mixing = mixing
        models = len(generators)
        self.names = _drawn(generators, 0.02, 1, len(self.sizes), width)
        self.project = nn.ModuleList(StackedLinear(generators, size, width) for size in self.sizes)
        self.norm = StackedNorm(models, width)
        if mixing == "gate":
            self.gate = StackedLinear(generators, width, 1)
        else:
            self.inner_norm = StackedNorm(models, width)
            self.qkv = StackedLinear(generators, width, 3 * width)
            self.mix = StackedLinear(generators, width, width)
        return len(self.sizes) * width

    def tokens(self, features: Tensor) -> Tensor:
        """`(models, n, members, width)`."""
        parts = zip(self.project, features.split(self.sizes, dim=2))
        return self.norm(torch.stack([layer(part) for layer, part in parts], dim=2)) + self.names

    def mixing_weights(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """How much each token (row) takes from each other, `(models, n, heads, members, members)`;
        rows sum to 1.

        With a gate, the weight of each token `(models, n, 1, 1, members)`. Tokens out of `keep`
        `(n, members)` get none.
        """
        if self.mixing == "gate":
            scores = self.gate(tokens).mT[:, :, None]
        else:
            q, k, _ = self._split(tokens)
            scores = q @ k.mT / q.shape[-1] ** 0.5
        if self.mixing == "uniform":
            scores = torch.zeros_like(scores)
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None], -math.inf)
        return scores.softmax(dim=-1)

    def _split(self, tokens):
        """Queries, keys and values, each `(models, n, heads, members, width / heads)`."""
        joint = self.qkv(self.inner_norm(tokens)).unflatten(3, (3, self.heads, -1))
        return joint.permute(3, 0, 1, 4, 2, 5).unbind(0)

    def mixed(self, tokens: Tensor, keep: Tensor | None, generator: Generator | None) -> Tensor:
        """Tokens that know of each other, as they were in shape."""
        weights = self.mixing_weights(tokens, keep)
        if self.mixing == "gate":
            return tokens * weights.flatten(2)[..., None] * len(self.sizes)
        taken = self._drop(weights, generator) @ self._split(tokens)[2]
        return tokens + self.mix(taken.transpose(2, 3).flatten(3))

    def _inputs(self, features, voices, present, generator):
        """The mixed tokens side by side."""
        tokens = self.mixed(self.tokens(features), present > 0, generator)
        # A gate's weights make up for dropped tokens already.
        return (tokens if self.mixing == "gate" else tokens * present[:, :, None]).flatten(2)


def matched_hidden(sizes: Sequence[int], classes: int, **network) -> int:
    """Hidden units with which a FusionPerceptron has as many parameters as a FusionNetwork of the
    options `network`.
    """
    wanted = count_parameters(FusionNetwork([0], sizes, classes, **network, votes=False))
    return max(1, round((wanted - classes) / (sum(sizes) + 1 + classes)))


def model_of(stack: nn.Module, place: int) -> nn.Module:
    """A stack of the one model at `place`."""
    model = copy.deepcopy(stack)
    for parameter in model.parameters():
        parameter.data = parameter.data[[place]]
    return model


def count_parameters(network: nn.Module) -> int:
    """Trained numbers of a stack of one model."""
    return sum(parameter.numel() for parameter in network.parameters())


def draw_tokens(records: int, tokens: int, dropout: float, **random) -> Tensor:
    """Which tokens of each record stay, `(records, tokens)`: each is dropped with probability
    `dropout`, never all.

    `random` are the generator and the device of the draws.
    """
    keep = torch.rand(records, tokens, **random) >= dropout
    last = torch.randint(tokens, (records, 1), **random)
    rescued = torch.arange(tokens, device=keep.device) == last
    return torch.where(keep.any(dim=1, keepdim=True), keep, rescued)


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
        self.features = features
        self.targets = torch.as_tensor(targets, dtype=torch.float32, device=features[0].device)
        count = steps * batch_size
        orders = []
        for subset, seed in zip(subsets, seeds):
            generator = np.random.default_rng([seed, len(subset)])
            passes = range(math.ceil(count / len(subset)))  # each in a new order
            orders.append(np.concatenate([generator.permutation(subset) for _ in passes])[:count])
        order = torch.as_tensor(np.stack(orders), device=self.targets.device)
        self.order = order.unflatten(1, (steps, batch_size))

    def __call__(self, step: int) -> Batch:
        """The batch of one step, the same whenever it is asked for."""
        picked = self.order[:, step]
        generator = step_generator(0, step, picked.device)
        return Batch(gather(self.features, picked), self.targets[picked], picked, generator)


def gather(features: Sequence[Tensor], picked: Tensor) -> Tensor:
    """The members' features side by side, `(models, n, d)`, of the records at `picked` `(models,
    n)`.
    """
    models = torch.arange(len(picked), device=picked.device)[:, None]
    return torch.cat([each[models if len(each) > 1 else 0, picked] for each in features], dim=2)


def train_stack(network: FusionPerceptron, batches: FusionBatches, learning_rate: float) -> None:
    """Train every model of the stack in place, for as many steps as there are batches.

    No decay: the learning rate, with few steps, says how far a model may go from its start. AdamW
    acts on each number apart, so the models do not meet there either; clipping the gradient would
    couple them.
    """
    steps = batches.order.shape[1]
    options = {"weight_decay": 0.0, "clip": None, "dtype": "float32"}
    fit(network, batches, steps, learning_rate=learning_rate, **options)


@torch.no_grad()
def stack_logits(
    network: FusionPerceptron, features: Sequence[Tensor], positions: np.ndarray
) -> Tensor:
    """Logits `(models, n, classes)` of the records at `positions`, nothing dropped."""
    network.eval()
    models = len(network.head.weight)
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
    received = network.mixing_weights(network.tokens(features)).mean(dim=(2, 3))
    shares = []
    for logits, share in zip(network(features).unbind(2), having.split(1, dim=2)):
        (slope,) = torch.autograd.grad(logits.sum(), features, retain_graph=True)
        parts = (slope * features).split(network.sizes, dim=2)
        each = torch.stack([part.sum(dim=2) for part in parts], dim=2)
        shares.append((F.normalize(each.abs(), p=1, dim=2) * share).sum(dim=1))
    found = {"attention": having.mT @ received, "gradient_input": torch.stack(shares, dim=1)}
    return {name: values.detach() for name, values in found.items()}


def linear_cka(first: Tensor | np.ndarray, second: Tensor | np.ndarray) -> float:
    """Linear centred kernel alignment of two features of the same records, `(n, d)` and `(n, e)`
    (Kornblith 2019).

    |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms of centred columns: 1 where one is a turned and scaled
    copy of the other. DataError where the records differ in number or nothing varies.
    """
    if len(first) != len(second):
        raise DataError(
            f"CKA compares features of the same records, not of {len(first)} and {len(second)}; "
            "encode both alike."
        )
    x, y = (torch.as_tensor(values, dtype=torch.float64) for values in (first, second))
    x = x - x.mean(dim=0)
    y = y - y.mean(dim=0)
    size = torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)
    if size == 0:
        raise DataError(
            "CKA needs features that vary; one of the two is the same for every record."
        )
    return float(torch.linalg.norm(y.T @ x) ** 2 / size)
