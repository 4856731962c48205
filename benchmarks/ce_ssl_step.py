"""An iteration of CE-SSL beside FixMatch and others, base backbone, 12 x 6144 samples, 64 + 64
records; and its layers.

python benchmarks/ce_ssl_step.py [--batch 64] [--iterations 3] [--dtype bfloat16] [--methods ce_ssl
...] [--table FILE.csv]

Every method runs in a process of its own, in float32 unless asked otherwise. An iteration is batch,
augmentation, forward, backward and the optimizer's step. Floor of a record: 1.5 billion
multiplications in the convolutions and 0.6 in the transformer, twice that backward where every
weight is trained, once where the weights are frozen. CE-SSL sends 128 records through the
convolutions and 64 through the transformer, FixMatch 192 through both.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from ecglib.lora import LowRankLayer
from ecglib.semisup import Adaptation
from ecgstudy.analysis.cost import measure_apart
from ecgstudy.methods import METHODS

ASKED = (
    "ce_ssl",
    "ce_ssl_without_deactivation",
    "ce_ssl_without_norm",
    "fixmatch",
    "fixmatch_lora",
    "supervised_cutmix",
)
ADAPTATION = Adaptation(
    backbone="conv_transformer",
    steps=1,
    batch_size=64,
    crop_seconds=61.44,
    learning_rate=1e-3,
    low_rank_learning_rate=1e-3,
    weight_decay=0.01,
    rank=16,
)
LAYERS = (
    (12, 256, 6144, 9, 4, 4),
    (256, 256, 1536, 9, 1, 4),
    (256, 256, 1536, 9, 4, 4),
    (256, 256, 384, 9, 1, 4),
)


def seconds_of_layer(layer: nn.Module, x: torch.Tensor) -> float:
    """Forward and backward pass of one layer; best of three."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        y = layer(x)
        y.backward(torch.ones_like(y))
        seconds.append(time.perf_counter() - started)
    return min(seconds)


class FormedFirst(LowRankLayer):
    """A low-rank convolution that adds BA to the weight and is then applied once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, form = self.base.weight + self.difference(), (self.base.stride, self.base.padding)
        return nn.functional.conv1d(x, weight, self.base.bias, *form)


def compare_forms(batch: int) -> pd.DataFrame:
    """Seconds of the convolutions: all weights trained, W0 + BA formed first, and A and B one after
    the other.
    """
    rows = []
    for inputs, outputs, samples, kernel, stride, padding in LAYERS:
        x = torch.randn(batch, inputs, samples, requires_grad=True)
        convolution = nn.Conv1d(inputs, outputs, kernel, stride, padding)
        whole = seconds_of_layer(convolution, x)
        convolution.weight.requires_grad = False
        forms = {
            name: seconds_of_layer(form(convolution, 16).train(), x)
            for name, form in (("W0 + BA", FormedFirst), ("two products", LowRankLayer))
        }
        rows.append(
            {
                "layer": f"{inputs} to {outputs}, stride {stride}, {samples} samples",
                "trained whole": whole,
                **forms,
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Print the layers, the table of costs, and CE-SSL's share of FixMatch's cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--methods", nargs="+", default=ASKED)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    print(compare_forms(16).round(3).to_string(index=False), flush=True)
    adaptation = replace(ADAPTATION, batch_size=options.batch)
    rows = []
    for method in options.methods:
        rows.append(
            measure_apart(
                method,
                METHODS[method].recipe,
                adaptation,
                18,
                6144,
                options.iterations,
                dtype=options.dtype,
            )
        )
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    print(table.drop(columns="machine").to_string(index=False))
    costs = table.set_index("method")[["seconds_per_iteration", "saved_activation_bytes"]]
    if {"ce_ssl", "fixmatch"} <= set(costs.index):
        print(
            "CE-SSL / FixMatch:", (costs.loc["ce_ssl"] / costs.loc["fixmatch"]).round(3).to_dict()
        )
    if options.table:
        table.to_csv(options.table, index=False)


if __name__ == "__main__":
    main()
