"""Low-rank adaptation (Hu et al. 2022) with random deactivation (CE-SSL, Zhou et al. 2024).

An adapted layer keeps its weight W0 and learns a difference of low rank, W = W0 + BA, from B = 0.
While training, each pair (A, B) is left out of a whole forward pass with probability p; when
testing, W = W0 + (1 - p) BA. Trained besides: every bias and the last linear layer. Frozen besides:
the gains of norms, and attention's output projection.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecglib.checkpoints import first_difference, load_tensors, save_tensors
from ecglib.errors import DataError

START = 0.02  # standard deviation of A at its start
PROJECTION = "mix"  # attention's output projection: frozen and not adapted, as published
HEAD = "head"  # layers below this name are never deactivated
LOW_RANK_PARTS = ("A", "B", "values")  # what a low-rank layer learns


class _FrozenConvolution(torch.autograd.Function):
    """A convolution whose kernel is constant: unlike torch's own, it keeps no input for the
    backward pass.
    """

    @staticmethod
    def forward(context, x, weight, bias, stride, padding, dilation):  # noqa: ANN001, ANN205
        """`torch.conv1d`."""
        context.save_for_backward(weight)
        context.about = x.shape, x.dtype, stride, padding, dilation
        return F.conv1d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(context, gradient):  # noqa: ANN001, ANN205
        """Gradients of the input and the bias."""
        (weight,) = context.saved_tensors
        shape, dtype, stride, padding, dilation = context.about
        to_input, _, to_bias = context.needs_input_grad[:3]
        by_input = None
        if to_input and set(stride) == {1} and padding[0] <= dilation[0] * (weight.shape[2] - 1):
            # Without a stride it is a convolution with the kernel turned round, on a CPU a third
            # faster.
            around = dilation[0] * (weight.shape[2] - 1) - padding[0]
            by_input = F.conv1d(gradient, weight.flip(2).transpose(0, 1), None, 1, around, dilation)
        elif to_input:
            # Only the shape of the input matters here: one number stands for all of it.
            place = torch.empty(1, dtype=dtype, device=gradient.device).expand(shape)
            form = (None, stride, padding, dilation, False, [0], 1, [True, False, False])
            by_input = torch.ops.aten.convolution_backward(gradient, place, weight, *form)[0]
        # Not left to the line above, which on a CPU would compute the kernel's gradient along with
        # the bias's.
        by_bias = gradient.sum(dim=(0, 2)) if to_bias else None
        return by_input, None, by_bias, None, None, None


class LowRankLayer(nn.Module):
    """`base`, a Linear, FusedLinear or Conv1d, with a difference of `rank` that is learned.

    For a weight of `(out, in)` or `(out, in, kernel)`: A `(rank, in x kernel)`, B `(out, rank)`; a
    fused layer of `parts` has one pair per part, stacked: A `(parts x rank, in)`, B `(parts x out,
    rank)`. A and B are applied one after the other, without forming BA. `nested` draws the rank
    anew at each pass in training, as DyLoRA does. With `singular_values` the difference is B
    diag(values) A and starts at values = 0, as in AdaLoRA.
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
        self.base, self.rank, self.nested = base, rank, nested
        self.deactivation = 0.0
        self.parts = getattr(base, "parts", 1)
        weight = base.weight
        self.A = nn.Parameter(weight.new_empty(self.parts * rank, weight[0].numel()))
        self.B = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.values = nn.Parameter(weight.new_zeros(self.parts * rank)) if singular_values else None
        # As published, a fused layer starts wider than the others; `ranks` takes that out of its
        # score again.
        nn.init.normal_(self.A, std=self.start_deviation)
        if self.parts > 1:
            reach = math.sqrt(3.0) * self.start_deviation
            nn.init.uniform_(self.A, -reach, reach)
        if singular_values:
            nn.init.normal_(self.B, std=START)

    @property
    def start_deviation(self) -> float:
        """Standard deviation of the entries of A at their start: 0.02, and 1 / sqrt(3 in) in a
        fused layer.
        """
        return START if self.parts == 1 else 1.0 / math.sqrt(3.0 * self.base.weight[0].numel())

    def pairs(self, rank: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The (A, B) of each part, cut to the first `rank` ranks; A holds the singular values."""
        rank = rank or self.rank
        scaled = self.A if self.values is None else self.values[:, None] * self.A
        for a, b in zip(scaled.chunk(self.parts), self.B.chunk(self.parts), strict=True):
            # The scale is alpha / rank with alpha = rank, 1, but for the ranks that DyLoRA cuts.
            b = b[:, :rank]
            yield a[:rank], b * (self.rank / rank) if rank < self.rank else b

    def difference(self) -> Tensor:
        """BA in the shape of the weight."""
        return torch.cat([b @ a for a, b in self.pairs()]).view_as(self.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        share, rank = 1.0 - self.deactivation, None
        if self.training:
            share = 1.0
            # One coin per layer and pass, from torch's random numbers on the CPU: it costs a GPU no
            # waiting.
            if self.deactivation and float(torch.rand(())) < self.deactivation:
                return self._frozen(x)
            rank = int(torch.randint(1, self.rank + 1, ())) if self.nested else None
        return self._with_difference(self._frozen(x), x, share, rank)

    def _frozen(self, x: Tensor) -> Tensor:
        """The layer without its difference."""
        weight, bias = self.base.weight, self.base.bias
        if isinstance(self.base, nn.Linear):
            return F.linear(x, weight, bias)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if bias is None else bias.to(dtype)
        return _FrozenConvolution.apply(x.to(dtype), weight.to(dtype), bias, *self._form())

    def _form(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding and dilation of a convolution."""
        return list(self.base.stride), list(self.base.padding), list(self.base.dilation)

    def _with_difference(self, y: Tensor, x: Tensor, share: float, rank: int | None) -> Tensor:
        """y + `share` x BA x, written into y, by two small products and without forming BA."""
        pairs = list(self.pairs(rank))
        if share != 1.0:
            pairs = [(a, share * b) for a, b in pairs]
        if isinstance(self.base, nn.Conv1d):
            ((a, b),) = pairs
            kernel = a.view(len(a), *self.base.weight.shape[1:])
            inner = F.conv1d(x, kernel, None, *self._form())
            return y.baddbmm_(b.to(y.dtype).expand(len(y), -1, -1), inner)
        inner = F.linear(x, torch.cat([a for a, _ in pairs])).chunk(len(pairs), dim=-1)
        outer = [F.linear(part, b) for part, (_, b) in zip(inner, pairs, strict=True)]
        return y.add_(outer[0] if len(outer) == 1 else torch.cat(outer, dim=-1))


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that get a low-rank difference, by name in order: every Conv1d and Linear but the last
    Linear and `mix`.

    DataError for a grouped convolution, whose weight is not one matrix.
    """
    last = last_linear(model)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv1d | nn.Linear)
        and name != last
        and name.rpartition(".")[2] != PROJECTION
    }
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv1d) and layer.groups > 1:
            raise DataError(
                f"The convolution {name} has {layer.groups} groups, and its weight is several "
                "matrices, so it cannot be adapted at low rank; use groups=1."
            )
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
    layers = adaptable_layers(model)
    ranks = dict.fromkeys(layers, ranks) if isinstance(ranks, int) else dict(ranks)
    differing = sorted(set(ranks) ^ set(layers))
    if differing:
        raise DataError(
            f"The ranks do not fit the network (first difference at {differing[0]}); allocate them "
            "for this network."
        )
    for name, layer in layers.items():
        _check_rank(name, layer, ranks[name])
    last = model.get_submodule(last_linear(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.rpartition(".")[2] == "bias"
    last.weight.requires_grad = True
    for name, layer in layers.items():
        model.set_submodule(name, LowRankLayer(layer, ranks[name], **kind).train(layer.training))
    set_deactivation(model, deactivation)
    return model


def _check_rank(name: str, layer: nn.Module, rank: int) -> None:
    """DataError for a rank larger than the matrix of `layer`.

    The larger side counts: the paper gives rank 16 and 32 to the first shortcut as well, which has
    12 inputs.
    """
    rows, columns = len(layer.weight) // getattr(layer, "parts", 1), layer.weight[0].numel()
    if not 1 <= rank <= max(rows, columns):
        raise DataError(
            f"A rank of {rank} does not fit the layer {name} with its matrix of {rows} x "
            f"{columns}; choose 1 to {max(rows, columns)}."
        )


def set_deactivation(model: nn.Module, deactivation: float) -> None:
    """Give every adapted layer but those of the head this probability p of random deactivation."""
    if not 0.0 <= deactivation < 1.0:
        raise DataError(
            f"A probability of deactivation of {deactivation} is not in [0, 1); the paper's is 0.2."
        )
    for name, layer in low_rank_layers(model).items():
        layer.deactivation = 0.0 if name.split(".")[0] == HEAD else deactivation


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
    parameters, buffers = model.named_parameters(), model.named_buffers()
    trained = {name: value.detach() for name, value in parameters if value.requires_grad}
    statistics = {name: value for name, value in buffers if not name.endswith("batches_tracked")}
    return trained | statistics


def backbone_checksum(model: nn.Module) -> str:
    """SHA-256 over the weights that adaptation leaves as they are, whether the model is adapted
    already or not.

    The head's last layer is not among them, for it belongs to the task.
    """
    adapted, last, digest = low_rank_layers(model), last_linear(model), hashlib.sha256()
    for name, value in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if kind == "bias" or owner == last or (owner in adapted and kind in LOW_RANK_PARTS):
            continue
        plain = ".".join(part for part in name.split(".") if part != "base")
        digest.update(f"{plain} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
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
    if about.get("backbone") != backbone_checksum(model):
        raise DataError(
            f"{path}: an adapter for another backbone (the checksums of the weights differ); load "
            "it onto the weights that it was trained on."
        )
    ranks = {name: rank for name, rank in about.items() if name.startswith("rank/")}
    ranks = {name.removeprefix("rank/"): int(rank) for name, rank in ranks.items()}
    add_lora(model, ranks, float(about["deactivation"]))
    name = first_difference(adapter_state(model), tensors)
    if name is not None:
        raise DataError(
            f"{path}: the adapter does not fit this network (first difference at {name}); use the "
            "same encoder and the same classes."
        )
    model.load_state_dict(tensors, strict=False)
    return model
