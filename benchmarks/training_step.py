"""A training step of xresnet1d50 (batch 128, 12 x 250): plain fp32 Conv1d beside the form that the
study trains in.

    python benchmarks/training_step.py [--threads 2] [--rounds 15]

The forms take turns within one run, so that a busy machine slows them alike. Floor: 886 k
parameters and 128 x 250 samples cost about 20 GFLOP forward and backward. The gradients of bfloat16
differ from those of float32 by rounding; the plain form in bfloat16 shows how much of the
difference is due to that alone.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.append(
    str(Path(__file__).resolve().parents[1] / "tests")
)  # the plain twin is the tests' reference

import numpy as np  # noqa: E402
import torch  # noqa: E402

from ecglib.batches import Batch, CropBatches
from ecglib.encoders.xresnet1d import xresnet1d50  # noqa: E402
from ecglib.sources.simulate import simulate_records
from ecglib.train import autocast, precision
from ecgstudy.runs import machine
from toolkit import plain_conv1d  # noqa: E402


def gradients(
    network: torch.nn.Module, head: torch.nn.Linear, batch: Batch, dtype: str
) -> torch.Tensor:
    """All gradients of one supervised step in one vector."""
    network.zero_grad(set_to_none=True)
    with autocast("cpu", dtype):
        logits = head(network(batch.signals))
    torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), batch.targets).backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    records = simulate_records(300, seed=0)
    batch = CropBatches(records, np.arange(len(records)), 128, 2.5, seed=0)(0)
    encoder, head = xresnet1d50(), torch.nn.Linear(512, len(records.classes))
    twin, dtype = plain_conv1d(encoder), precision("cpu")
    forms = {
        "plain Conv1d, float32": (twin, "float32"),
        f"plain Conv1d, {dtype}": (twin, dtype),
        "1 x k channels-last, float32": (encoder, "float32"),
        f"1 x k channels-last, {dtype} (used)": (encoder, dtype),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(options.rounds + 2):
        for name, (network, kind) in forms.items():
            started = time.perf_counter()
            gradients(network, head, batch, kind)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    plain, *_, used = (statistics.median(values) for values in seconds.values())
    print(machine())
    for name, values in seconds.items():
        print(
            f"{name:42s} median {1000 * statistics.median(values):7.1f} ms   min "
            f"{1000 * min(values):7.1f} ms"
        )
    best = min(seconds["plain Conv1d, float32"]) / min(list(seconds.values())[-1])
    print(f"the study's form is {plain / used:.2f} times as fast (medians), {best:.2f} (minima)")
    exact = gradients(twin, head, batch, "float32")
    for name, (network, kind) in list(forms.items())[1:]:
        error = gradients(network, head, batch, kind)
        print(
            f"{name:42s} gradient differs by "
            f"{float((error - exact).norm() / exact.norm()):.1e} of its norm"
        )


if __name__ == "__main__":
    main()
