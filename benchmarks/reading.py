"""How fast and in how much memory a PTB-XL folder is read, opened again, and read by wfdb alone.

    python benchmarks/reading.py ../shared/data/ptb-xl-subset

Each step runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BY_WFDB = 200  # records that wfdb reads side by side with this package


def step(name: str, folder: Path, saved: Path) -> str:
    """Run one step and describe it: seconds without imports, peak memory of the process."""
    import wfdb

    from ecglib.records import Records
    from ecglib.sources.ptbxl import read_ptbxl
    from ecglib.sources.wfdb_files import read_header, read_millivolts

    headers = sorted((folder / "records100").rglob("*.hea"))[:BY_WFDB]
    steps = {
        "read": lambda: read_ptbxl(folder),
        "read, unverified": lambda: read_ptbxl(folder, verify=False),
        "read and save": lambda: Records.load(read_ptbxl(folder).save(saved)),
        "open again": lambda: Records.load(saved),
        f"wfdb, {len(headers)} files": lambda: [
            wfdb.rdrecord(str(path.with_suffix(""))).p_signal for path in headers
        ],
        f"ecglib, {len(headers)} files": lambda: [
            read_millivolts(read_header(path)) for path in headers
        ],
    }
    if name == "names":
        return "\n".join(steps)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begun = time.perf_counter()
    result = steps[name]()
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    memory = f"peak {peak:6.0f} MB ({before:.0f} MB after the imports)"
    return f"{name:<20} {len(result):>7,} records {seconds:8.3f} s   {memory}"


def main() -> None:
    """Print one line a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--saved", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(step(given.step, given.folder, given.saved))
        return
    with tempfile.TemporaryDirectory() as saved:
        for name in step("names", given.folder, Path(saved)).splitlines():
            command = [
                sys.executable,
                __file__,
                str(given.folder),
                "--step",
                name,
                "--saved",
                f"{saved}/records",
            ]
            ran = subprocess.run(command, check=True, capture_output=True, text=True)
            print(ran.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
