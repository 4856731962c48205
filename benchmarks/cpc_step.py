"""A pretraining step of CPC (12 x 1000, batch 32) in the training loop, beside the published loop
over positions.

    python benchmarks/cpc_step.py [--threads 1] [--steps 6]

Each form runs in a process of its own, so that its peak memory is its own. Speed is given by the
clock and, for a busy machine, by the processor time that the step itself took. The loop over
positions keeps 129 candidates of 512 numbers for each position and record, 8 GB at batch 32, and so
runs at batch 4. Floor: 5.3 M weights times 32,000 latents cost about 1 TFLOP forward and backward.
"""

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ecglib.batches import Batch, step_generator
from ecglib.encoders.cpc_lstm import CPCEncoder
from ecglib.selfsup.cpc import CPC, draw_negatives, info_nce
from ecglib.train import autocast, fit, precision
from ecgstudy.runs import machine

FORMS = {
    "loop over positions": (4, "float32"),
    "one product": (4, "float32"),
    "one product, all": (32, "float32"),
    "as the study trains": (32, precision("cpu")),
}


class LoopOverPositions(CPC):
    """The same loss in the published form: candidates gathered position after position."""

    def loss(self, batch: Batch) -> Tensor:
        latents = self.encoder.latents(batch.signals)
        predictions = self.predictors[0](self.encoder.context(latents))
        steps, records = self.horizons[0], torch.arange(len(latents))[:, None]
        chosen = draw_negatives(
            len(latents), latents.shape[1], steps, self.negatives, batch.generator
        )
        target, total = torch.zeros(len(latents), dtype=torch.long), torch.zeros(())
        for position in range(latents.shape[1] - steps):
            candidates = latents[
                records, F.pad(chosen[:, position], (1, 0), value=position + steps)
            ]
            scores = (predictions[:, position, None] * candidates).sum(dim=2)
            total = total + F.cross_entropy(scores, target)
        return total


def seconds_of_loss(objective: CPC, signals: Tensor, dtype: str) -> float:
    """Processor seconds of the loss alone, forward and backward, on the batch's own latents; best
    of three.
    """
    with torch.no_grad(), autocast("cpu", dtype):
        latents = objective.encoder.latents(signals)
        predictions = objective.predictors[0](objective.encoder.context(latents))
    seconds = []
    for turn in range(3):
        leaves = [tensor.detach().requires_grad_() for tensor in (predictions, latents)]
        started = time.process_time()
        with autocast("cpu", dtype):
            loss = info_nce(*leaves, 12, 128, step_generator(0, turn))
        loss.backward()
        seconds.append(time.process_time() - started)
    return min(seconds)


def measure(name: str, threads: int, steps: int) -> str:
    """Train one form for `steps` steps after a warm-up step and describe it in one line."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batch, dtype = FORMS[name]
    objective = (LoopOverPositions if name.startswith("loop") else CPC)(CPCEncoder())
    signals = 0.2 * torch.randn(batch, 12, 1000)
    starts: list[tuple[float, float]] = []

    def batches(step: int) -> Batch:
        starts.append((time.perf_counter(), time.process_time()))
        return Batch(signals, torch.zeros(batch, 1), torch.arange(batch), step_generator(0, step))

    fit(
        objective,
        batches,
        steps + 2,
        learning_rate=1e-4,
        weight_decay=1e-3,
        schedule=lambda progress: 1.0,
        dtype=dtype,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    wall, processor = np.diff(starts[1:], axis=0).T  # the first step warms up
    share = seconds_of_loss(objective, signals, dtype) / min(processor)
    loss = "" if name.startswith("loop") else f"loss {share:3.0%}, "
    return (
        f"{name:<20} batch {batch:2d} {dtype:<9} records/s median {batch / np.median(wall):5.2f} "
        f"best {batch / min(wall):5.2f}, of processor time median "
        f"{batch / np.median(processor):5.2f} "
        f"best {batch / min(processor):5.2f}; {loss}peak {peak:5.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.form:
        print(measure(given.form, given.threads, given.steps))
        return
    print(f"{machine()}, {given.threads} thread(s)", flush=True)
    for name in FORMS:
        command = [
            sys.executable,
            __file__,
            "--threads",
            str(given.threads),
            "--steps",
            str(given.steps),
        ]
        ran = subprocess.run([*command, "--form", name], check=True, capture_output=True, text=True)
        print(ran.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
