"""Weights as safetensors files, written atomically and checked when they are opened."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ecglib.errors import DataError
from ecglib.files import atomic_file


def save_tensors(
    path: str | Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None
) -> None:
    """Tensors as one safetensors file, written atomically; `about` becomes its metadata."""
    with atomic_file(path) as temporary:
        # Clones, because safetensors refuses tensors that share memory.
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
            temporary,
            about,
        )


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; a damaged one is a DataError."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: not a readable checkpoint ({error}); delete it and train again."
        ) from None


def first_difference(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """The first name, in alphabetical order, that only one of two sets of tensors has or whose
    shapes differ.
    """
    for name in sorted(set(expected) | set(tensors)):
        if (
            name not in tensors
            or name not in expected
            or tensors[name].shape != expected[name].shape
        ):
            return name
    return None


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Load weights into `module`; weights of another network are a DataError naming the first
    difference.
    """
    name = first_difference(module.state_dict(), tensors)
    if name is not None:
        raise DataError(
            f"{path}: a checkpoint of another network (first difference at {name}); use the right one."
        )
    module.load_state_dict(tensors)
