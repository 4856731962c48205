"""Notes which results a notebook reads, files and listings of folders, one path a line.

Python imports a module of this name when it starts. This folder is on the path of a run's kernels,
so the kernel and every process that it starts are seen; elsewhere the module does nothing.
"""

import os
import sys


def note_reads(results: str, log: str) -> None:
    """From now on append to the file `log` what is read below the folder `results`."""
    file = open(log, "a", buffering=1)  # one write a line, so that processes can share the file
    noted = set()

    def note(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            ending = ""
        elif event in ("os.scandir", "os.listdir"):
            path, flags, ending = arguments[0], os.O_RDONLY, "/"
        else:
            return
        if isinstance(path, int | None) or flags & (os.O_WRONLY | os.O_RDWR):
            return
        name = os.path.relpath(os.path.realpath(os.fsdecode(path)), results)
        hidden = any(part.startswith(".") for part in name.split(os.sep))  # or outside: ".."
        if not hidden and name + ending not in noted:
            noted.add(name + ending)
            file.write(f"{name}{ending}\n")

    sys.addaudithook(note)


if "STUDY_READS" in os.environ:
    note_reads(os.environ["STUDY_RESULTS"], os.environ["STUDY_READS"])
