"""The one training loop of the study."""

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ecglib.batches import Batch, step_generator
from ecglib.checkpoints import TrainingLog
from ecglib.distributed import distributed, rank_and_world

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
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


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
    """Gives `objective.loss` the name `forward`, which compilation and data parallelism need."""

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

    A row of the history stands for `log_every` steps, its loss for their mean. `batches(step)`
    gives a step's batch, `objective.loss(batch)` the scalar to minimise, and
    `objective.after_step(progress)`, where it exists, is called after it with progress in (0, 1].
    `groups` replaces the parameter groups; a group's `learning_rate_factor` scales its rate. With
    a `folder`, a checkpoint is kept there and a run that was stopped continues from it to the same
    weights. `watch(step)` adds columns to the history. Started by torchrun, gradients are averaged
    over processes. Raises TrainingError where loss or gradient are not finite.
    """
    device = _join_process_group(objective)
    dtype = dtype or precision(device)
    groups = groups or parameter_groups(objective, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    module = _wrapped(objective, compiled)
    log = TrainingLog(folder, steps, seed)
    bar = _progress_bar(log.resume(objective, optimizer), steps, progress_bar)
    objective.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in bar:
            # Dropout, if any, draws the same in a resumed run.
            torch.manual_seed(step_generator(seed, step).initial_seed())
            _set_rates(optimizer, learning_rate, schedule((step + 0.5) / steps))
            batch = batches(step)
            with autocast(device, dtype):
                loss = module(batch)
            at_fault = _descend(loss, optimizer, clip)
            if at_fault:
                raise TrainingError(_not_finite(at_fault, step, optimizer, batches, batch, log))
            done = step + 1
            if hasattr(objective, "after_step"):
                objective.after_step(done / steps)
            log.recent.append(loss.detach().float().cpu())
            if done % log_every == 0 or done == steps:
                row = log.add_row(done, optimizer.param_groups[0]["lr"], dtype)
                row |= watch(done) if watch else {}
                objective.train()
                bar.set_postfix(loss=f"{row['loss']:.4f}")
            if done % checkpoint_every == 0 or done == steps:
                log.save(objective, optimizer, done)
    return pd.DataFrame(log.rows)


def _progress_bar(first: int, steps: int, shown: bool) -> tqdm:
    """The numbers of the steps from `first` on, shown by one process only."""
    hidden = not shown or rank_and_world()[0] > 0
    return tqdm(range(first, steps), initial=first, total=steps, disable=hidden, unit="step")


def _set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, factor: float) -> None:
    """The learning rate of one step for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("learning_rate_factor", 1.0) * factor


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float | None) -> str | None:
    """One step of the optimizer; where the loss or a gradient is not finite, its name instead."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    size = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    # A finite loss may still have gradients that are not: they must not reach the weights.
    if not torch.isfinite(loss + size):
        return "gradient" if loss.isfinite() else "loss"
    optimizer.step()
    return None


def _not_finite(
    what: str,
    step: int,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Batch],
    batch: Batch,
    log: TrainingLog,
) -> str:
    """The sentence for a loss or gradient that is NaN or infinite: the records at fault, else those
    of the batch.
    """
    ids, signals, named = getattr(batches, "record_ids", None), batch.signals, batch.indices
    if len(signals) == len(named) and not signals.isfinite().all():
        named = named[~signals.flatten(1).isfinite().all(dim=1)]
    names = "unknown" if ids is None else ", ".join(str(ids[i]) for i in named[:NAMED].tolist())
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    rate = max(group["lr"] for group in optimizer.param_groups)
    kept = f"; the last good checkpoint is {log.checkpoint}" if log.checkpoint else ""
    return (
        f"The {what} is not finite at step {step} with learning rate {rate:.2e} on the records "
        f"{names}{more}; lower the learning rate or check these records{kept}."
    )


def _join_process_group(objective: nn.Module) -> torch.device:
    """Join the group that torchrun started, if it did; each process moves its objective to its own
    GPU and returns the device.
    """
    device = next(objective.parameters()).device
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if distributed() and device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    objective.to(device)
    return device


def _wrapped(objective: nn.Module, compiled: bool) -> nn.Module:
    """The loss as a module, compiled and data parallel as asked."""
    module: nn.Module = _LossModule(objective)
    if distributed():
        module = DistributedDataParallel(module)
    return torch.compile(module) if compiled else module
