"""A training step of xresnet1d50 (batch 128, 12 x 250): plain fp32 Conv1d beside the form that the study trains in.

    python benchmarks/training_step.py [--threads 2] [--rounds 15]

The forms take turns within one run, so that a busy machine slows them alike. Floor: 886 k parameters and 128 x 250
samples cost about 17 GFLOP forward and backward.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]

import torch  # noqa: E402
from plain_conv1d import plain_conv1d  # noqa: E402

from ecglib.encoders.xresnet1d import xresnet1d50  # noqa: E402
from ecglib.runs import machine  # noqa: E402
from ecglib.train import autocast, precision  # noqa: E402


def gradients(network: torch.nn.Module, signals: torch.Tensor, weights: torch.Tensor, dtype: str) -> torch.Tensor:
    """All gradients of one step in one vector; the loss weighs the features at random so that none cancels."""
    network.zero_grad(set_to_none=True)
    with autocast("cpu", dtype):
        loss = (network(signals).float() * weights).mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    encoder = xresnet1d50()
    for module in encoder.modules():  # as after some training: the last norm of a block no longer at zero
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
    twin, dtype = plain_conv1d(encoder), precision("cpu")
    signals, weights = torch.randn(128, 12, 250), torch.randn(128, 512)
    forms = {"plain Conv1d, float32": (twin, "float32"), "1 x k channels-last, float32": (encoder, "float32"),
             f"1 x k channels-last, {dtype} (used)": (encoder, dtype)}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(options.rounds + 2):
        for name, (network, kind) in forms.items():
            started = time.perf_counter()
            gradients(network, signals, weights, kind)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    plain, *_, used = (statistics.median(values) for values in seconds.values())
    print(machine())
    for name, values in seconds.items():
        print(f"{name:42s} median {1000 * statistics.median(values):7.1f} ms   min {1000 * min(values):7.1f} ms")
    best = min(seconds["plain Conv1d, float32"]) / min(list(seconds.values())[-1])
    print(f"the study's form is {plain / used:.2f} times as fast (medians), {best:.2f} (minima)")
    exact = gradients(twin, signals, weights, "float32")
    for name, (network, kind) in list(forms.items())[1:]:
        error = gradients(network, signals, weights, kind)
        print(f"{name:42s} gradient differs by {float((error - exact).norm() / exact.norm()):.1e} of its norm")


if __name__ == "__main__":
    main()
