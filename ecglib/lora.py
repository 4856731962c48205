"""Low-rank adaptation (Hu et al. 2022) with random deactivation (CE-SSL, Zhou et al. 2024).

An adapted layer keeps its weight W0 and learns a difference of low rank, W = W0 + BA, from B = 0.
While training, each pair (A, B) is left out of a whole forward pass with probability p; when
testing, W = W0 + (1 - p) BA. Trained besides: every bias and the last linear layer. Frozen besides:
the gains of norms, and attention's output projection.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.checkpoints import first_difference, load_tensors, save_tensors
from ecglib.errors import DataError

START = 0.02  # standard deviation of A at its start
PROJECTION = "mix"  # attention's output projection: frozen and not adapted, as published
HEAD = "head."  # layers below this name are never deactivated
LOW_RANK_PARTS = ("A", "B", "values")  # what a low-rank layer learns


class _FrozenConvolution(torch.autograd.Function):
    """A convolution whose kernel is constant: unlike torch's own, it keeps no input for the
    backward pass.
    """

    @staticmethod
    def forward(context, x, weight, bias, *form):
        """`torch.conv1d`; `form` is stride, padding and dilation."""
        context.save_for_backward(weight)
        context.about = x.shape, *form
        return F.conv1d(x, weight, bias, *form)

    @staticmethod
    def backward(context, gradient):
        """Gradients of the input and the bias."""
        weight = context.saved_tensors[0].to(gradient.dtype)
        shape, stride, padding, dilation = context.about
        around = dilation[0] * (weight.shape[2] - 1) - padding[0]
        by_input = by_bias = None
        if context.needs_input_grad[0] and stride[0] == 1 and around >= 0:
            # Without a stride it is a convolution with the kernel turned round, on a CPU a third
            # faster.
            by_input = F.conv1d(gradient, weight.flip(2).transpose(0, 1), None, 1, around, dilation)
        elif context.needs_input_grad[0]:
            by_input = nn.grad.conv1d_input(shape, weight, gradient, stride, padding, dilation)
        if context.needs_input_grad[2]:
            by_bias = gradient.sum(dim=(0, 2))
        return by_input, None, by_bias, None, None, None


class LowRankLayer(nn.Module):
    """`base`, a Linear, FusedLinear or Conv1d, with a difference of `rank` that is learned.

    For a weight of `(out, in)` or `(out, in, kernel)`: A `(rank, in x kernel)`, B `(out, rank)`; a
    fused layer of `parts` has one pair per part, stacked: A `(parts x rank, in)`, B `(parts x out,
    rank)`. A and B are applied one after the other, without forming BA. `nested` draws the rank
    anew at each pass in training, as DyLoRA does. With `singular_values` the difference is B
    diag(values) A and starts at values = 0, as in AdaLoRA.

    `start_deviation` is the standard deviation of the entries of A at their start: 0.02, and
    1 / sqrt(3 in) in a fused layer.
    """

    def __init__(
        self,
        base: nn.Linear | nn.Conv1d,
        rank: int,
        *,
        nested: bool = False,
        singular_values: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.rank = rank
        self.nested = nested
        self.deactivation = 0.0
        self.parts = getattr(base, "parts", 1)
        weight = base.weight.flatten(1)
        rows = self.parts * rank
        self.A = nn.Parameter(weight.new_empty(rows, weight.shape[1]))
        self.B = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.values = nn.Parameter(weight.new_zeros(rows)) if singular_values else None
        self.start_deviation = START
        nn.init.normal_(self.A, std=START)
        # As published, a fused layer starts wider than the others; `ranks` takes that out of its
        # score again.
        if self.parts > 1:
            self.start_deviation = 1.0 / math.sqrt(3.0 * weight.shape[1])
            reach = math.sqrt(3.0) * self.start_deviation
            nn.init.uniform_(self.A, -reach, reach)
        if singular_values:
            nn.init.normal_(self.B, std=START)

    def pairs(self, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """A `(parts, rank, in x kernel)` and B `(parts, out, rank)`, cut to the first `rank` ranks;
        A holds the singular values.
        """
        a = self.A if self.values is None else self.values[:, None] * self.A
        a = a.unflatten(0, (self.parts, -1))
        return a[:, :rank], self.B.unflatten(0, (self.parts, -1))[..., :rank]

    def difference(self) -> Tensor:
        """BA in the shape of the weight."""
        a, b = self.pairs()
        return (b @ a).view_as(self.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base
        linear = isinstance(base, nn.Linear)
        form = () if linear else (base.stride, base.padding, base.dilation)
        y = base(x) if linear else _FrozenConvolution.apply(x, base.weight, base.bias, *form)
        rank = self.rank
        share = 1.0 - self.deactivation
        if self.training:
            # One coin per layer and pass, from torch's random numbers on the CPU: it costs a GPU no
            # waiting.
            if self.deactivation and float(torch.rand(())) < self.deactivation:
                return y
            rank = int(torch.randint(1, rank + 1, ())) if self.nested else rank
            # Alpha / rank with alpha = rank is 1, but for the ranks that DyLoRA cuts.
            share = self.rank / rank
        a, b = self.pairs(rank)
        b = b if share == 1.0 else share * b
        # Added in place by two small products, without forming BA.
        if not linear:
            inner = F.conv1d(x, a.view(rank, *base.weight.shape[1:]), None, *form)
            return y.baddbmm_(b.to(y.dtype).expand(len(y), -1, -1), inner)
        inner = F.linear(x, a.flatten(0, 1)).chunk(self.parts, dim=-1)
        outer = [F.linear(*each) for each in zip(inner, b)]
        return y.add_(torch.cat(outer, dim=-1) if self.parts > 1 else outer[0])


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that get a low-rank difference, by name in order: every Conv1d and Linear but the last
    Linear and `mix`.

    DataError for a grouped convolution, whose weight is not one matrix.
    """
    last = last_linear(model)
    layers = {}
    for name, layer in model.named_modules():
        spared = name == last or name.rpartition(".")[2] == PROJECTION
        if spared or not isinstance(layer, nn.Conv1d | nn.Linear):
            continue
        if getattr(layer, "groups", 1) > 1:
            raise DataError(
                f"The convolution {name} has {layer.groups} groups, and its weight is several "
                "matrices, so it cannot be adapted at low rank; use groups=1."
            )
        layers[name] = layer
    return layers


def last_linear(model: nn.Module) -> str:
    """Name of the model's last linear layer, the one whose rows are the classes; DataError where
    there is none.
    """
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not names:
        raise DataError(
            "The network has no linear layer that could be its last; give it a head with classes."
        )
    return names[-1]


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The adapted layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLayer)}


def add_lora(
    model: nn.Module, ranks: int | Mapping[str, int], deactivation: float = 0.0, **kind: bool
) -> nn.Module:
    """Adapt `model` in place: `ranks` is one rank for all layers or one for each of
    `adaptable_layers`.

    The model's answers stay the same (B = 0). `deactivation` is the p of random deactivation, which
    spares the head; `kind` goes to `LowRankLayer`. Only what `trainable_parameters` lists still
    needs gradients. Raises DataError for a rank larger than a layer's matrix, for names that are no
    adaptable layers, and for a p outside [0, 1).
    """
    if not 0.0 <= deactivation < 1.0:
        raise DataError(
            f"A probability of deactivation of {deactivation} is not in [0, 1); the paper's is 0.2."
        )
    layers = adaptable_layers(model)
    ranks = dict.fromkeys(layers, ranks) if isinstance(ranks, int) else ranks
    differing = ranks.keys() ^ layers.keys()
    if differing:
        raise DataError(
            f"The ranks do not fit the network (first difference at {min(differing)}); allocate "
            "them for this network."
        )
    for name, layer in layers.items():
        rows, columns = layer.weight.flatten(1).shape
        rows //= getattr(layer, "parts", 1)
        # The larger side counts: the paper gives rank 16 and 32 to the first shortcut as well,
        # which has 12 inputs.
        if not 1 <= ranks[name] <= max(rows, columns):
            raise DataError(
                f"A rank of {ranks[name]} does not fit the layer {name} with its matrix of {rows} "
                f"x {columns}; choose 1 to {max(rows, columns)}."
            )
    trained = ("bias", f"{last_linear(model)}.weight")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith(trained)
    for name, layer in layers.items():
        adapted = LowRankLayer(layer, ranks[name], **kind).train(layer.training)
        if not name.startswith(HEAD):
            adapted.deactivation = deactivation
        model.set_submodule(name, adapted)
    return model


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every adapted layer in place by an ordinary one with the weight W0 + (1 - p) BA;
    returns the model.
    """
    for name, layer in low_rank_layers(model).items():
        layer.base.weight += (1.0 - layer.deactivation) * layer.difference()
        model.set_submodule(name, layer.base)
    return model.requires_grad_(True)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained: the low-rank pairs, every bias, and the last linear layer's weight."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes: the trained parameters and the running statistics of batch
    norm.
    """
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    return {
        name: value
        for name, value in model.state_dict().items()
        if name not in frozen and not name.endswith("batches_tracked")
    }


def backbone_checksum(model: nn.Module) -> str:
    """SHA-256 over the weights that adaptation leaves as they are, whether the model is adapted
    already or not.

    The head's last layer is not among them, for it belongs to the task.
    """
    trained = {last_linear(model), *low_rank_layers(model)}
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if kind == "bias" or owner in trained:
            continue
        plain = name.replace(".base.", ".")
        digest.update(f"{plain} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_adapter(model: nn.Module, path: str | Path) -> Path:
    """Write what training changed, and nothing else, as safetensors, with ranks, p and the
    backbone's checksum.
    """
    layers = low_rank_layers(model)
    if not layers:
        raise DataError(
            "The network has no low-rank layers, so there is no adapter to save; call add_lora "
            "first."
        )
    about = {f"rank/{name}": str(layer.rank) for name, layer in layers.items()}
    about["deactivation"] = str(max(layer.deactivation for layer in layers.values()))
    about["backbone"] = backbone_checksum(model)
    save_tensors(path, adapter_state(model), about)
    return Path(path)


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Adapt the plain backbone `model` in place with a saved adapter; DataError where it is another
    backbone's.
    """
    tensors, about = load_tensors(path)
    if about.pop("backbone", None) != backbone_checksum(model):
        raise DataError(
            f"{path}: an adapter for another backbone (the checksums of the weights differ); load "
            "it onto the weights that it was trained on."
        )
    deactivation = float(about.pop("deactivation"))
    ranks = {name.removeprefix("rank/"): int(rank) for name, rank in about.items()}
    add_lora(model, ranks, deactivation)
    name = first_difference(adapter_state(model), tensors)
    if name is not None:
        raise DataError(
            f"{path}: the adapter does not fit this network (first difference at {name}); use the "
            "same encoder and the same classes."
        )
    model.load_state_dict(tensors, strict=False)
    return model
