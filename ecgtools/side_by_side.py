"""Notebooks that need nothing of each other, executed at the same time: each in a process with its
share of the cores.

Small networks gain little from a second thread, so two notebooks on two cores take hardly longer
than one.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ecglib.errors import StorageError
from ecgtools.environment import say
from ecgtools.notebooks import PACKAGE_PARENT, NotebookFailure, execute

AT_ONCE = 2
LOOK_AGAIN = 0.1  # seconds


@dataclass(frozen=True)
class Job:
    """One execution, see `notebooks.execute`."""

    source: str
    parameters: dict
    executed: str
    title: str


def execute_together(jobs: Sequence[Job], lock: int | None = None) -> Iterator[tuple[Job, float]]:
    """Execute all jobs, `AT_ONCE` at a time, and yield each with its seconds as soon as it has
    succeeded.

    A failing notebook does not stop the others; at the end NotebookFailure names all that failed.
    `lock` is an open file that the processes hold too, so that nobody else takes their folder
    should this one be killed.
    """
    waiting, failed = list(jobs), []
    with processes() as running:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                job = waiting.pop(0)
                running[_start(job, lock)] = (job, time.monotonic())
            time.sleep(LOOK_AGAIN)
            for process in [process for process in running if process.poll() is not None]:
                job, started = running.pop(process)
                if process.returncode == 0:
                    yield job, time.monotonic() - started
                else:
                    failed.append(job.title)
    if failed:
        raise NotebookFailure(f"These failed, as told above: {', '.join(failed)}")


def _start(job: Job, lock: int | None) -> subprocess.Popen:
    """A process of its own session, so that a Ctrl-C on the terminal reaches it through this one
    alone.
    """
    threads = str(max(1, (os.cpu_count() or 1) // AT_ONCE))
    python_path = os.pathsep.join(
        filter(None, [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")])
    )
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": python_path}
    command = [
        sys.executable,
        "-P",
        "-m",
        "ecgtools.side_by_side",
        json.dumps(vars(job)),
        str(os.getpid()),
    ]
    return subprocess.Popen(
        command, env=environment, start_new_session=True, pass_fds=() if lock is None else (lock,)
    )


@contextmanager
def processes() -> Iterator[dict]:
    """The running processes; those that are left at the end, after an error or a stop, are ended
    politely.
    """
    running: dict[subprocess.Popen, tuple] = {}
    try:
        yield running
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def main(arguments: Sequence[str]) -> int:
    """Carry out one job, given as JSON: 0 where it succeeded, 1 where the notebook failed, 2 on a
    full disk.
    """
    job, parent = Job(**json.loads(arguments[0])), int(arguments[1])
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # so that a polite stop also ends the kernel
    _stop_with(parent)
    try:
        execute(Path(job.source), job.parameters, Path(job.executed), job.title, bar=False)
    except NotebookFailure as error:
        say(f"\n{error}")
        return 1
    except StorageError as error:
        say(f"run_all.sh: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _stop_with(parent: int) -> None:
    """End this process politely once its parent is gone, even where that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
