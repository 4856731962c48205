"""The one training loop of the study."""

import math
import os
import re
from collections.abc import Callable
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
BFLOAT16 = re.compile("avx512_bf16|amx_bf16| bf16")  # instructions of a processor


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what to change."""


def cosine_schedule(progress: float, warmup: float = 0.1) -> float:
    """Factor on the learning rate: linear from 0 over the share `warmup`, then half a cosine down
    to 0.
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (progress - warmup) / (1.0 - warmup)))


def linear_schedule(progress: float, warmup: float = 0.01) -> float:
    """Factor on the learning rate: linear from 0 over the share `warmup`, then linear down to 0."""
    return min(progress / warmup, (1.0 - progress) / (1.0 - warmup))


def default_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def precision(device: torch.device | str) -> str:
    """`bfloat16` where the device computes faster in it (GPU, or a CPU with AVX512-BF16 or AMX),
    else `float32`.
    """
    processor = Path("/proc/cpuinfo")
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:  # without such instructions torch would emulate them, slower than float32
        fast = processor.exists() and BFLOAT16.search(processor.read_text())
    return "bfloat16" if fast else "float32"


def autocast(device: torch.device | str, dtype: str) -> torch.autocast:
    """Autocast to bfloat16, or none for float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, dtype != "float32")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and kernels decay; biases and norms do not."""
    decaying = {"params": [], "weight_decay": weight_decay}
    others = {"params": [], "weight_decay": 0.0}
    for parameter in module.parameters():
        if parameter.requires_grad:
            group = decaying if parameter.ndim > 1 else others
            group["params"].append(parameter)
    return [decaying, others]


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

    A row stands for `log_every` steps, its loss for their mean; `watch(step)` adds columns.
    `batches(step)` gives a step's batch, `objective.loss(batch)` the scalar to minimise, and
    `objective.after_step(progress)`, where it exists, is called after it with progress in (0, 1].
    `groups` replaces the parameter groups; a group's `learning_rate_factor` scales its rate. With
    a `folder`, a checkpoint is kept there and a run that was stopped continues from it to the same
    weights. Started by torchrun, gradients are averaged over processes. Raises TrainingError where
    loss or gradient are not finite.
    """
    device = _join_process_group(objective)
    dtype = dtype or precision(device)
    groups = groups or parameter_groups(objective, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    module = _wrapped(objective, compiled)
    log = TrainingLog(folder, steps, seed)
    first = log.resume(objective, optimizer)
    hidden = not progress_bar or rank_and_world()[0] > 0
    bar = tqdm(range(first, steps), initial=first, total=steps, disable=hidden, unit="step")
    objective.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in bar:
            torch.manual_seed(step_generator(seed, step).initial_seed())  # as in a resumed run
            batch = batches(step)
            with autocast(device, dtype):
                loss = module(batch)
            at_fault = _descend(loss, optimizer, schedule((step + 0.5) / steps), clip)
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


def _descend(loss, optimizer, factor, clip):
    """One step of the optimizer at `factor` times its learning rate; where the loss or a gradient
    is not finite, its name instead.
    """
    largest = optimizer.defaults["lr"]
    for group in optimizer.param_groups:
        group["lr"] = largest * group.get("learning_rate_factor", 1.0) * factor
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    size = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    # A finite loss may still have gradients that are not: they must not reach the weights.
    if not torch.isfinite(loss + size):
        return "gradient" if loss.isfinite() else "loss"
    optimizer.step()
    return None


def _not_finite(at_fault, step, optimizer, batches, batch, log):
    """The sentence for a loss or gradient that is NaN or infinite: the records at fault, else those
    of the batch.
    """
    names = "unknown"
    if hasattr(batches, "record_ids"):
        broken = ~batch.signals.flatten(1).isfinite().all(dim=1)
        named = batch.indices[broken] if broken.any() else batch.indices
        ids = batches.record_ids[named.tolist()]
        names = ", ".join(map(str, ids[:NAMED]))
        names += f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    rate = max(group["lr"] for group in optimizer.param_groups)
    return (
        f"The {at_fault} is not finite at step {step} with learning rate {rate:.2e} on the records "
        f"{names}; lower the learning rate or check these records{log.kept}."
    )


def _join_process_group(objective):
    """Join the group that torchrun started, if it did; each process moves its objective to its own
    GPU and returns the device.
    """
    device = next(objective.parameters()).device
    gpu = device.type == "cuda"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed():
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
    if distributed() and gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    objective.to(device)
    return device


def _wrapped(objective, compiled):
    """The loss as a module, compiled and data parallel as asked."""
    module = _LossModule(objective)
    if distributed():
        module = DistributedDataParallel(module)
    return torch.compile(module) if compiled else module
