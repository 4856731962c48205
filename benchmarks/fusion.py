"""The whole fusion comparison from cached features: all comparators, 7 fractions x 5 seeds, 8
members.

    python benchmarks/fusion.py [--threads 2] [--patients 2000]

Members: features of a frozen random xresnet1d_narrow on the simulated cohort, turned at random,
bent and blurred with noise; seven that are alike for all label subsets (256 features, one of them
384) and one that differs by subset, as the supervised encoder does. Each method is fitted and its
35 runs are scored with their patient-bootstrap intervals and kept in a temporary run store, as in
notebook 10. The encoders alone are part of it; leaving members out is not.

Floor of one trained method (2,176 features, width 64, 8 tokens, hidden 128): a forward pass
multiplies 139,000 numbers a record for the tokens, 131,000 for attention, 66,000 for the hidden
layer and 11,000 for the votes, 0.35 million; forward and backward 2.1 MFLOP. 35 models x 32 records
x 100 steps x 3 learning rates: 0.7 TFLOP, at 70 GFLOP/s of one core in float32 10 s; of AdamW's
states, 0.35 million parameters x 35 x 28 bytes a step, 0.34 GB, at 10 GB/s 10 s more.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from ecglib.batches import to_millivolts
from ecglib.encoders import make_encoder
from ecglib.evaluate.metrics import AbsentClassWarning
from ecglib.records import Records
from ecglib.sources.simulate import simulate_records
from ecgstudy.arms.fusion import FusionData, FusionSettings
from ecgstudy.methods import TrainedFusion, fuse, names_of
from ecgstudy.runs import Result, Run, RunSpec, machine, run_or_load
from ecgstudy.study import Study, label_grid

SUBSETS = label_grid((0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0), 5, 5)
SETTINGS = FusionSettings(
    width=64,
    heads=4,
    hidden=128,
    dropout=0.1,
    token_dropout=0.2,
    steps=100,
    batch_size=32,
    learning_rates=[0.00003, 0.0001, 0.001],
)


def encode(records: Records) -> torch.Tensor:
    """Features `(n, 256)` of a frozen random encoder on whole records."""
    torch.manual_seed(0)
    encoder, parts = make_encoder("xresnet1d_narrow").eval(), []
    with torch.inference_mode():
        for start in range(0, len(records), 64):
            counts = torch.from_numpy(np.array(records.signals[start : start + 64]))
            parts.append(encoder(to_millivolts(counts, records.scale)))
    features = torch.cat(parts)
    return (features - features.mean(dim=0)) / features.std(dim=0).clamp_min(1e-6)


def make_member(
    records: Records, features: torch.Tensor, seed: int, folder: str, size: int = 256
) -> Run:
    """A kept run with features that differ by seed."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.tanh(features @ torch.randn(features.shape[1], size, generator=generator) / 16)
    turned = turned + 0.3 * torch.randn(turned.shape, generator=generator)
    identity = ("made", records.name, records.fingerprint, "unlabelled", 0.0, seed)
    spec = RunSpec(*identity, {"size": size})
    return run_or_load(spec, lambda *_: Result([], {"features": turned.numpy()}), folder)


def told(seconds: np.ndarray) -> str:
    """Wall and processor seconds; a busy machine stretches the first only."""
    return f"{seconds[0]:6.1f} s wall {seconds[1]:6.1f} s processor"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patients", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", AbsentClassWarning)
    records = simulate_records(options.patients, seed=0)
    records.about["task"] = "simulated"
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(options.threads):
        features = encode(records)
        members: dict = {
            f"m{seed}": make_member(records, features, seed, folder, 384 if seed == 1 else 256)
            for seed in range(7)
        }
        members["own"] = {
            subset: make_member(records, features, 100 + place, folder)
            for place, subset in enumerate(SUBSETS)
        }
        print(
            f"{machine()}, {options.threads} thread(s); {len(records):,} records, "
            f"{len(members)} members"
        )
        last = started = np.array([time.perf_counter(), time.process_time()])
        study = Study(records, Path(folder))
        data = FusionData(records, SUBSETS, members)
        asked = [
            (method, [])
            for method in (
                *("mean_of_logits", "best_single", "concatenation"),
                *names_of(TrainedFusion),
            )
        ]
        for method, names in asked + [("alone", [name]) for name in members]:
            runs = fuse(study, data, method, SETTINGS, names)
            now = np.array([time.perf_counter(), time.process_time()])
            fitting = sum(run.about["seconds"] for run in runs)
            print(
                f"{method:20s} {told(now - last)}, {fitting:6.1f} s wall of them fitting",
                flush=True,
            )
            last = now
        print(f"{'all':20s} {told(last - started)}")


if __name__ == "__main__":
    main()
