"""The noise grid: 7 kinds x 6 ratios and clean, for every classifier of a study, from noise to
intervals.

python benchmarks/robustness.py [--results results/laptop] [--studies label_efficiency ...]
[--methods ...] [--workers 2]

Runs of the grid go to a temporary folder, those of the study are read. Floor: the bare networks on
windows that lie in memory, windows x time a window, as many at a time as in the grid, divided by
the workers. What the grid takes beyond the floor is noise, its file, loading, fitting the probes of
frozen runs again, and the bootstrap.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from ecglib.evaluate.windows import WINDOWS_TOGETHER, record_windows
from ecglib.records import Records
from ecgstudy.analysis.robustness import STUDIES, noise_arms
from ecgstudy.arms import noise
from ecgstudy.arms.trained import trained_classifier
from ecgstudy.runs import Run, machine
from ecgstudy.study import Study


def seconds_a_window(run: Run, records: Records, results: Path) -> tuple[float, int]:
    """Seconds of the bare network for one window, and the windows of a record."""
    network, seconds = trained_classifier(run, records, results)
    starts, window = record_windows(records.signals.shape[2], records.sampling_rate, seconds)
    signals = torch.randn(WINDOWS_TOGETHER // len(starts) * len(starts), 12, window)
    with torch.inference_mode():
        network(signals)
        started, times = time.process_time(), 0
        while time.process_time() - started < 0.5:
            network(signals)
            times += 1
    return (time.process_time() - started) / times / len(signals), len(starts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("results/laptop"))
    parser.add_argument("--studies", nargs="+", default=list(STUDIES))
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    everything = Records.load(options.results / "records")
    records = everything.labelled
    arms = noise_arms(options.results, records, 1.0, options.studies, options.methods)
    test = len(records.split["test"])
    conditions = len(noise.NoiseGrid().conditions)
    print(
        f"{machine()}, {options.workers} worker(s) of one thread; {len(arms)} classifiers, "
        f"{test} records"
    )
    floor = 0.0
    for run in arms:
        seconds, windows = seconds_a_window(run, records, options.results)
        floor += seconds * windows * test * conditions / options.workers
        print(
            f"{run.spec.name:60.60s} {1e3 * seconds:6.3f} ms a window, {windows} windows a record",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "runs").mkdir()
        for path in (options.results / "runs").iterdir():
            if "-noise-" not in path.name:
                os.symlink(path.resolve(), Path(folder) / "runs" / path.name)
        before, started = os.times(), time.perf_counter()
        study = Study(records, Path(folder), workers=options.workers)
        noise.score_under_noise(study, arms, noise.NoiseGrid())
        wall, after = time.perf_counter() - started, os.times()
    own = after.user + after.system - before.user - before.system
    print(
        f"grid {wall:.1f} s wall ({own:.1f} s processor in this process), floor {floor:.1f} s, "
        f"ratio {wall / floor:.2f}"
    )


if __name__ == "__main__":
    main()
