"""Pretraining throughput: records a second of each objective in the study's loop, and what the
augmentation costs.

python benchmarks/pretraining.py                          # SimCLR on the CPU: xresnet1d50, batch
64, 12 x 250 python benchmarks/pretraining.py --objectives SimCLR BYOL SwAV CPC DINO PatientPairs
--batch 4096   # on a GPU

A step is everything that `train.fit` does: crop, two views, forward, loss, backward, AdamW. Floor
of SimCLR's step: xresnet1d50 costs about 0.16 GFLOP a crop of 250 samples forward and backward,
twice for two views, so batch 64 is 20 GFLOP. The augmentation is timed alone, on the same batches;
its bytes, 64 x 12 x 250 x 4 = 0.8 MB a view, fit in a cache. Compiled and eager take turns where
`--compiled` is given.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from ecglib.augment import apply, named_transforms
from ecglib.batches import CropBatches, PatientBatches
from ecglib.encoders import make_encoder
from ecglib.selfsup.byol import BYOL
from ecglib.selfsup.cpc import CPC
from ecglib.selfsup.dino import DINO
from ecglib.selfsup.patient_pairs import PatientPairs
from ecglib.selfsup.simclr import SimCLR
from ecglib.selfsup.swav import SwAV
from ecglib.sources.simulate import simulate_records
from ecglib.train import default_device, fit, precision
from ecgstudy.runs import machine

VIEWS = {"random_resized_crop": {}, "time_out": {}}
# Objective, encoder, seconds of a crop, views, and options as published.
FORMS = {
    "SimCLR": (SimCLR, "xresnet1d50", 2.5, VIEWS, {}),
    "BYOL": (BYOL, "xresnet1d50", 2.5, VIEWS, {}),
    "SwAV": (SwAV, "xresnet1d50", 2.5, VIEWS, {}),
    "CPC": (CPC, "cpc_lstm", 10.0, {}, {}),
    "DINO": (DINO, "vit1d", 10.0, {"time_out": {}}, {}),
    "PatientPairs": (PatientPairs, "xresnet1d50", 2.5, VIEWS, {}),
}


def measure(name: str, options: argparse.Namespace, compiled: bool) -> None:
    """Train one objective for some steps and print the median and the best step."""
    objective, encoder, seconds, views, settings = FORMS[name]
    if name == "SwAV":
        settings = {**settings, "batch_size": options.batch}
    torch.manual_seed(0)
    records = simulate_records(options.patients, seed=0)
    model = objective(make_encoder(encoder), named_transforms(views), **settings).to(options.device)
    source = PatientBatches if objective is PatientPairs else CropBatches
    batches = source(records, np.arange(len(records)), options.batch, seconds, 0, options.device)
    stamps = []

    def stamp(_: int) -> dict:
        if options.device == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        return {}

    fit(model, batches, options.steps + 3, log_every=1, watch=stamp, compiled=compiled)
    each = np.diff(stamps)[2:]  # the first steps allocate and compile
    print(
        f"{name:13s} {encoder:12s} batch {options.batch} "
        f"{precision(options.device)}{' compiled' if compiled else ''}: "
        f"median {options.batch / statistics.median(each):8.0f} records/s, best "
        f"{options.batch / min(each):8.0f}"
    )
    if options.device == "cuda":
        print(
            f"{'':13s} peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, "
            f"utilisation {torch.cuda.utilization()} %"
        )
        torch.cuda.reset_peak_memory_stats()
    if views and objective is not PatientPairs:
        share_of_augmentation(batches, views, options, statistics.median(each))


def share_of_augmentation(
    batches: CropBatches, views: dict, options: argparse.Namespace, step: float
) -> None:
    """Print what cutting and two views cost of a step."""
    transforms, spent = named_transforms(views), []
    for number in range(options.steps):
        started = time.perf_counter()
        batch = batches(number)
        for _ in range(2):
            apply(transforms, batch.signals, batch.generator)
        if options.device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    print(
        f"{'':13s} crops and two views: {1000 * statistics.median(spent):.1f} ms, "
        f"{100 * statistics.median(spent) / step:.1f} % of the median step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objectives", nargs="+", default=["SimCLR"], choices=list(FORMS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patients", type=int, default=300)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    for name in options.objectives:
        for compiled in (False, True) if options.compiled else (False,):
            measure(name, options, compiled)


if __name__ == "__main__":
    main()
