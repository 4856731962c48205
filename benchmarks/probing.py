"""Linear probes of 7 fractions x 5 seeds x 6 encoders x 5 classes x 5 penalties: one batched fit
beside scikit-learn.

    python benchmarks/probing.py [--threads 1] [--share 0.05] [--patients 2000]

Encoders: a frozen random xresnet1d_narrow on the simulated cohort, for two seeds, each as it is and
twice mixed by a random projection and blurred with noise, so that the spectra run from steep to
flat. scikit-learn fits its default solver (lbfgs), and its newton-cholesky besides, on a random
share drawn within each fraction and penalty, between our encoders in the same run, so that a busy
machine slows all alike; the seconds of each stratum are scaled up. Its tolerance, 2e-8 x penalty,
is about the loosest with which it agrees to 1e-4. lbfgs cannot do better than 2e-4 at the weakest
penalty with any tolerance, as its second rule (a change of the objective below 64 roundings) ends
it earlier; there newton-cholesky tells who is right.

Floor for one encoder (d = 256, the 31 different subsets hold 11,300 rows): the rows are 23 MB in
float64 and stay in the cache. Gram matrices and their eigenvectors cost 2 n d^2 + 9 d^3, 3 to 4
GFLOP in all; about 12 gradients and line searches of 25 problems, 8 n d k each, 5 GFLOP in float64;
the conjugate gradients, 4 n d k for each of some 400 steps with the number k of running problems
falling from 25 to a few, 22 to 32 GFLOP in float32. At 30 and 70 GFLOP/s of one core that is 0.7 s,
most of it the weakest penalty's.
"""

import argparse
import sys
import time
import warnings
from collections import defaultdict

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from ecglib.encoders import make_encoder
from ecglib.evaluate.metrics import AbsentClassWarning
from ecglib.evaluate.windows import encode_windows
from ecglib.labels import label_subsets
from ecglib.probe import PENALTIES, Probes, choose_penalty, fit_probes, standardise
from ecglib.records import Records
from ecglib.sources.simulate import simulate_records
from ecgstudy.runs import machine

FRACTIONS, SEEDS, ENCODERS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0), range(5), 2
BLURS = (0.0, 0.3, 1.0)  # noise added to the mixed features, in their standard deviations
SOLVERS = ("lbfgs", "newton-cholesky")


def encode(records: Records, seed: int) -> torch.Tensor:
    """Features `(n, 256)` of a frozen random encoder on whole records."""
    torch.manual_seed(seed)
    seconds = records.signals.shape[2] / records.sampling_rate
    every = np.arange(len(records))
    features = encode_windows(make_encoder("xresnet1d_narrow"), records, every, seconds)
    return torch.from_numpy(features).double()


def make_features(records: Records, train: np.ndarray) -> list[torch.Tensor]:
    """Standardised features of six encoders, each `(n, 256)`."""
    made, generator = [], torch.Generator().manual_seed(0)
    for seed in range(ENCODERS):
        plain = encode(records, seed)
        plain = standardise(plain, plain[train])
        mixing = (
            torch.randn(plain.shape[1], plain.shape[1], generator=generator).double()
            / plain.shape[1] ** 0.5
        )
        for blur in BLURS:
            mixed = plain @ mixing if blur else plain
            mixed = mixed + blur * torch.randn(mixed.shape, generator=generator)
            made.append(standardise(mixed, mixed[train]))
    return made


class Clock:
    """Wall and processor seconds of named work, summed; a busy machine stretches the first only."""

    def __init__(self) -> None:
        self.spent: dict[object, np.ndarray] = defaultdict(lambda: np.zeros(2))

    def measure(self, name: object, work, *inputs):
        """The result of `work(*inputs)`, its time added to `name`."""
        start = np.array([time.perf_counter(), time.process_time()])
        result = work(*inputs)
        self.spent[name] += np.array([time.perf_counter(), time.process_time()]) - start
        return result


def draw_share(
    share: float, classes: int, generator: np.random.Generator
) -> list[tuple[int, int, int, int]]:
    """(fraction, penalty, seed, class) of the fits that scikit-learn repeats: as many in each
    fraction and penalty.
    """
    cells = len(SEEDS) * classes
    count = max(1, round(share * cells))
    return [
        (f, p, *divmod(int(cell), classes))
        for f in range(len(FRACTIONS))
        for p in range(len(PENALTIES))
        for cell in generator.choice(cells, count, replace=False)
    ]


def scikit_learn(
    features: np.ndarray, target: np.ndarray, penalty: float, solver: str
) -> np.ndarray:
    """Weights and bias `(d + 1,)` of one fit of the loop."""
    model = LogisticRegression(C=1 / penalty, solver=solver, tol=2e-8 * penalty, max_iter=100_000)
    model.fit(features, target)
    return np.append(model.coef_[0], model.intercept_)


def compare(
    features: torch.Tensor,
    targets: np.ndarray,
    subsets: dict,
    share: list,
    fitted: Probes,
    clock: Clock,
    differences: dict[str, np.ndarray],
) -> None:
    """Repeat the share of one encoder's fits with scikit-learn; largest differences of weights and
    of the bias.
    """
    array = features.numpy()
    for f, p, seed, c in share:
        subset = subsets[f, seed]
        rows, target = array[subset], targets[subset, c]
        if 0 < target.sum() < len(target):
            place = f * len(SEEDS) + seed
            ours = np.append(fitted.weights[place, p, c].numpy(), float(fitted.bias[place, p, c]))
            for solver in SOLVERS:
                theirs = clock.measure(
                    (solver, f, p), scikit_learn, rows, target, PENALTIES[p], solver
                )
                gap = np.abs(theirs - ours)
                differences[solver] = np.maximum(differences[solver], [gap[:-1].max(), gap[-1]])
            clock.spent["fits", f, p] += 1


def report(clock: Clock, differences: dict[str, np.ndarray], classes: int) -> None:
    """Print the seconds, the ratios and the largest differences."""
    cells = len(SEEDS) * classes * ENCODERS * len(BLURS)
    keys = [(f, p) for f in range(len(FRACTIONS)) for p in range(len(PENALTIES))]
    each = {
        solver: {
            key: clock.spent[solver, *key] / np.maximum(clock.spent["fits", *key], 1)
            for key in keys
        }
        for solver in SOLVERS
    }
    loops = {f"scikit-learn, {solver}": [each[solver][key] for key in keys] for solver in SOLVERS}
    loops["scikit-learn, the faster for each size and penalty"] = [
        np.minimum(*(each[s][key] for s in SOLVERS)) for key in keys
    ]
    ours = clock.spent["ours"]
    fits = sum(clock.spent["fits", *key][0] for key in keys)
    print(f"{'ecglib, all fits':55s} {ours[0]:8.1f} s wall {ours[1]:8.1f} s processor")
    print(
        f"{'ecglib, choosing the penalties':55s} {clock.spent['choice'][0]:8.1f} s wall "
        f"{clock.spent['choice'][1]:8.1f} s processor"
    )
    for name, seconds in loops.items():
        whole = cells * np.sum(seconds, axis=0)
        once = whole - cells * (1 - 1 / len(SEEDS)) * np.sum(seconds[-len(PENALTIES) :], axis=0)
        print(
            f"{name:55s} {whole[0]:8.1f} s wall {whole[1]:8.1f} s processor, from {fits:.0f} of "
            f"{len(keys) * cells:,} fits: {whole[0] / ours[0]:.0f} times as long (processor "
            f"{whole[1] / ours[1]:.0f}; {once[0] / ours[0]:.0f} if it too fitted equal "
            f"subsets once)"
        )
    for solver, (weights, bias) in differences.items():
        print(f"largest difference from {solver}: weights {weights:.1e}, bias {bias:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--patients", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", AbsentClassWarning)
    generator, clock = np.random.default_rng(0), Clock()
    differences = {solver: np.zeros(2) for solver in SOLVERS}
    records = simulate_records(options.patients, seed=0)
    split, targets, classes = records.split, records.targets, len(records.classes)
    drawn = [label_subsets(records, FRACTIONS, seed) for seed in SEEDS]
    subsets = {
        (f, seed): drawn[seed][FRACTIONS[f]] for f in range(len(FRACTIONS)) for seed in SEEDS
    }
    validation = split["validation"]
    print(
        f"{machine()}, {options.threads} thread(s); {len(split['train']):,} training "
        f"records, 256 features"
    )
    with threadpool_limits(options.threads):
        for features in make_features(records, split["train"]):
            fitted = clock.measure("ours", fit_probes, features, targets, list(subsets.values()))
            clock.measure(
                "choice", choose_penalty, fitted, features[validation], targets[validation]
            )
            share = draw_share(options.share, classes, generator)
            compare(features, targets, subsets, share, fitted, clock, differences)
            print(f"encoder done, ecglib {clock.spent['ours'][0]:.1f} s so far", file=sys.stderr)
    report(clock, differences, classes)


if __name__ == "__main__":
    main()
