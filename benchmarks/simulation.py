"""Time and memory of simulating the laptop profile's cohort.

    python benchmarks/simulation.py [--patients 2420]

Floor: 3,000 records of 12 leads and 1,000 samples are 36 million values, a few seconds of Gaussian
waves and noise.
"""

import argparse
import resource
import time

from ecglib.sources.simulate import simulate_cohort


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patients", type=int, default=2420)
    patients = parser.parse_args().patients
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    simulation = simulate_cohort(patients, seed=0)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{len(simulation.records):,} records of {patients:,} patients in {seconds:.1f} s; "
        f"peak memory {peak / 1e6:.2f} GB, {before / 1e6:.2f} GB of it before"
    )


if __name__ == "__main__":
    main()
