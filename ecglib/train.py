"""The one training loop of the study."""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ecglib.batches import Batch, step_generator
from ecglib.checkpoints import load_state, load_tensors, save_tensors
from ecglib.distributed import distributed, rank_and_world
from ecglib.errors import DataError
from ecglib.files import atomic_file

CHECKPOINT, LOG = "checkpoint.safetensors", "training.jsonl"
NAMED = 128  # records that one sentence may name


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what to change."""


def cosine_schedule(progress: float, warmup: float = 0.1) -> float:
    """Factor on the learning rate: linear from 0 over the share `warmup`, then half a cosine down
    to 0.
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / max(1.0 - warmup, 1e-9)))


def linear_schedule(progress: float, warmup: float = 0.01) -> float:
    """Factor on the learning rate: linear from 0 over the share `warmup`, then linear down to 0."""
    return min(progress / warmup, (1.0 - progress) / (1.0 - warmup))


def constant_schedule(progress: float) -> float:
    """Factor 1 throughout."""
    return 1.0


def default_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision(device: torch.device | str) -> str:
    """`bfloat16` where the device computes faster in it (GPU, or a CPU with AVX512-BF16 or AMX),
    else `float32`.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if _cpu_has_bfloat16() else "float32"


def _cpu_has_bfloat16() -> bool:
    """Whether the processor lists bfloat16 instructions; elsewhere torch would emulate them, slower
    than float32.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags


def autocast(device: torch.device | str, dtype: str) -> AbstractContextManager:
    """Autocast to bfloat16, or nothing for float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and kernels decay; biases and norms do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


class _LossModule(nn.Module):
    """Gives `objective.loss` the name `forward`, which compilation and data parallelism hook into."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective.loss(batch)


def fit(
    objective: nn.Module,
    batches: Callable[[int], Batch],
    steps: int,
    *,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    schedule: Callable[[float], float] = cosine_schedule,
    groups: list[dict] | None = None,
    clip: float | None = 1.0,
    seed: int = 0,
    folder: str | Path | None = None,
    checkpoint_every: int = 200,
    log_every: int = 20,
    dtype: str | None = None,
    compiled: bool = False,
    watch: Callable[[int], dict] | None = None,
    progress_bar: bool = False,
) -> pd.DataFrame:
    """Train `objective` in place for `steps` AdamW steps and return its history.

    A row of the history stands for `log_every` steps, its loss for their mean.

    `objective.loss(batch)` gives the scalar to minimise; `objective.after_step(progress)`, where it
    exists, is called after each step with progress in (0, 1]. `batches(step)` gives the batch of a
    step. `groups` replaces the parameter groups; a group's `learning_rate_factor` scales its rate.
    With a `folder`, a checkpoint is kept there and a run that was stopped continues from it to the
    same weights. `watch(step)` adds columns to the history. Started by torchrun, gradients are
    averaged over processes. Raises TrainingError where loss or gradient are not finite.
    """
    device = _join_process_group(next(objective.parameters()).device)
    objective.to(device)
    dtype = dtype or precision(device)
    groups = groups or parameter_groups(objective, weight_decay)
    factors = [group.pop("learning_rate_factor", 1.0) for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    module = _wrapped(objective, compiled)
    leader = rank_and_world()[0] == 0
    store = _Store(Path(folder) if folder else None, steps, seed, leader)
    first, history, recent = store.resume(objective, optimizer)
    started = time.perf_counter() - (history[-1]["seconds"] if history else 0.0)
    objective.train()
    bar = tqdm(
        range(first, steps),
        initial=first,
        total=steps,
        disable=not (progress_bar and leader),
        unit="step",
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in bar:
            torch.manual_seed(
                step_generator(seed, step).initial_seed()
            )  # dropout, if any, resumes alike
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = learning_rate * factor * schedule((step + 0.5) / steps)
            batch = batches(step)
            with autocast(device, dtype):
                loss = module(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            size = nn.utils.clip_grad_norm_(
                [p for group in groups for p in group["params"]], clip or math.inf
            )
            # A finite loss may still have gradients that are not: looked at before they reach
            # weights and checkpoint.
            if not torch.isfinite(loss + size):
                rate = learning_rate * schedule((step + 0.5) / steps)
                raise TrainingError(
                    _not_finite(
                        "gradient" if loss.isfinite() else "loss",
                        step,
                        rate,
                        batches,
                        batch,
                        store.checkpoint,
                    )
                )
            optimizer.step()
            if hasattr(objective, "after_step"):
                objective.after_step((step + 1) / steps)
            done = step + 1
            recent.append(loss.detach().float().cpu())
            if done % log_every == 0 or done == steps:
                history.append(
                    {
                        "step": done,
                        "loss": float(torch.stack(recent).mean()),
                        "learning_rate": optimizer.param_groups[0]["lr"],
                        "seconds": time.perf_counter() - started,
                        "precision": dtype,
                        **(watch(done) if watch else {}),
                    }
                )
                recent.clear()
                objective.train()
                bar.set_postfix(loss=f"{history[-1]['loss']:.4f}")
            if done % checkpoint_every == 0 or done == steps:
                store.save(objective, optimizer, done, history, recent)
    return pd.DataFrame(history)


def _not_finite(
    what: str, step: int, rate: float, batches: Callable, batch: Batch, checkpoint: Path | None
) -> str:
    """The sentence for a loss or gradient that is NaN or infinite: the records at fault, else those
    of the batch.
    """
    ids, signals = getattr(batches, "record_ids", None), batch.signals.flatten(1)
    at_fault = (
        batch.indices[~signals.isfinite().all(dim=1)]
        if len(signals) == len(batch.indices)
        else batch.indices[:0]
    )
    named = at_fault if len(at_fault) else batch.indices
    names = "unknown" if ids is None else ", ".join(str(ids[i]) for i in named[:NAMED].tolist())
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    kept = f"; the last good checkpoint is {checkpoint}" if checkpoint else ""
    return (
        f"The {what} is not finite at step {step} with learning rate {rate:.2e} on the records {names}{more}; "
        f"lower the learning rate or check these records{kept}."
    )


def _join_process_group(device: torch.device) -> torch.device:
    """Join the group that torchrun started, if it did; each process takes its own GPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if distributed() and device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def _wrapped(objective: nn.Module, compiled: bool) -> nn.Module:
    """The loss as a module, compiled and data parallel as asked."""
    module: nn.Module = _LossModule(objective)
    if distributed():
        module = DistributedDataParallel(module)
    return torch.compile(module) if compiled else module


class _Store:
    """Checkpoint and log of one training in one folder; without a folder it does nothing."""

    def __init__(self, folder: Path | None, steps: int, seed: int, leader: bool) -> None:
        self.folder, self.leader = folder, leader
        self.identity = {"steps": str(steps), "seed": str(seed)}

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint, if one was written."""
        path = self.folder / CHECKPOINT if self.folder else None
        return path if path and path.exists() else None

    def save(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        history: list[dict],
        recent: list[Tensor],
    ) -> None:
        """Write weights, buffers, optimizer state, history and the losses since its last row, the
        log first.
        """
        if self.folder is None or not self.leader:
            return
        with atomic_file(self.folder / LOG) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in history))
        tensors = {f"model/{name}": value for name, value in objective.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors.update(
                {
                    f"optimizer/{index}/{name}": torch.as_tensor(value)
                    for name, value in state.items()
                }
            )
        if recent:
            tensors["recent_losses"] = torch.stack(recent)
        save_tensors(self.folder / CHECKPOINT, tensors, {"step": str(step), **self.identity})

    def resume(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[int, list[dict], list[Tensor]]:
        """Load the checkpoint, if there is one: the next step, the history, and the losses since
        its last row.
        """
        if self.folder is None or not (self.folder / CHECKPOINT).exists():
            return 0, [], []
        tensors, about = load_tensors(self.folder / CHECKPOINT)
        if {key: about.get(key) for key in self.identity} != self.identity:
            raise DataError(
                f"{self.folder / CHECKPOINT}: a checkpoint of another run ({about}); use another folder."
            )
        load_state(
            objective,
            {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")},
            self.folder / CHECKPOINT,
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        step = int(about["step"])
        lines = (self.folder / LOG).read_text().splitlines()
        recent = list(tensors.get("recent_losses", torch.empty(0)))
        return step, [row for row in map(json.loads, lines) if row["step"] <= step], recent
