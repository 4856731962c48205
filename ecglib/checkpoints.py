"""Weights as safetensors files, written atomically and checked when they are opened."""

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ecglib.distributed import rank_and_world
from ecglib.errors import DataError
from ecglib.files import atomic_file

CHECKPOINT, LOG = "checkpoint.safetensors", "training.jsonl"


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
    shapes = ({(name, value.shape) for name, value in each.items()} for each in (expected, tensors))
    return min((name for name, _ in set.symmetric_difference(*shapes)), default=None)


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Load weights into `module`; weights of another network are a DataError naming the first
    difference.
    """
    name = first_difference(module.state_dict(), tensors)
    if name is not None:
        raise DataError(
            f"{path}: a checkpoint of another network (first difference at {name}); use the right "
            "one."
        )
    module.load_state_dict(tensors)


class TrainingLog:
    """The history of one training, kept with its checkpoint in a folder; without one, in memory.

    `rows` is the history, `recent` holds the losses since its last row.
    """

    def __init__(self, folder: str | Path | None, steps: int, seed: int) -> None:
        self.path = Path(folder) / CHECKPOINT if folder else None
        self.identity = {"steps": str(steps), "seed": str(seed)}
        self.rows = []
        self.recent = []
        self.started = time.perf_counter()

    @property
    def kept(self) -> str:
        """The end of an error sentence that names the last checkpoint, if one was written."""
        written = self.path and self.path.exists()
        return f"; the last good checkpoint is {self.path}" if written else ""

    def add_row(self, step: int, learning_rate: float, precision: str) -> dict:
        """The new row for the steps since the last one, with the mean of their losses."""
        row = {
            "step": step,
            "loss": float(torch.stack(self.recent).mean()),
            "learning_rate": learning_rate,
            "seconds": time.perf_counter() - self.started,
            "precision": precision,
        }
        self.rows.append(row)
        self.recent.clear()
        return row

    def save(self, objective: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write the rows, then weights, buffers, optimizer state and recent losses.

        Only the first of several processes writes.
        """
        if self.path is None or rank_and_world()[0]:
            return
        with atomic_file(self.path.with_name(LOG)) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        tensors = {f"model/{name}": value for name, value in objective.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
        if self.recent:
            tensors["recent_losses"] = torch.stack(self.recent)
        save_tensors(self.path, tensors, {"step": str(step), **self.identity})

    def resume(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the checkpoint, if there is one, and return the next step.

        DataError for the checkpoint of another run or of another network.
        """
        if not self.kept:
            return 0
        tensors, about = load_tensors(self.path)
        if not self.identity.items() <= about.items():
            raise DataError(
                f"{self.path}: a checkpoint of another run ({about}); use another folder."
            )
        self.recent = list(tensors.pop("recent_losses", []))
        parts = defaultdict(dict)
        for name, value in tensors.items():
            part, _, key = name.rpartition("/")
            parts[part.removeprefix("optimizer/")][key] = value
        load_state(objective, parts.pop("model"), self.path)
        state = {int(index): values for index, values in parts.items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        step = int(about["step"])
        for row in map(json.loads, self.path.with_name(LOG).read_text().splitlines()):
            if row["step"] <= step:
                self.rows.append(row)
        if self.rows:
            self.started -= self.rows[-1]["seconds"]
        return step
