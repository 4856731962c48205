"""Notes which results a notebook reads and writes, one path a line.

Python imports a module of this name when it starts. This folder is on the path of a run's kernels,
so the kernel and every process that it starts are seen; elsewhere the module does nothing.
"""

import os
import sys


def note_files(results: str, log: str) -> None:
    """From now on append to the file `log` what is done to files below the folder `results`:
    `read NAME`, `wrote NAME`, and `read NAME/` for a folder that was listed.
    """
    file = open(log, "a", buffering=1)  # one write a line, so that processes can share the file
    noted = set()

    def note(event: str, arguments: tuple) -> None:
        path, action, ending = None, "read", ""
        if event == "open":
            path, _, flags = arguments
            action = "wrote" if flags & (os.O_WRONLY | os.O_RDWR) else "read"
        elif event in ("os.scandir", "os.listdir"):
            path, ending = arguments[0], "/"
        elif event == "os.rename":
            path, action = arguments[1], "wrote"
        if isinstance(path, int | None):
            return
        name = os.path.relpath(os.path.realpath(os.fsdecode(path)), results)
        line = f"{action} {name}{ending}\n"
        hidden = any(part.startswith(".") for part in name.split(os.sep))  # or outside: ".."
        if not hidden and line not in noted:
            noted.add(line)
            file.write(line)

    sys.addaudithook(note)


if "STUDY_LOG" in os.environ:
    note_files(os.environ["STUDY_RESULTS"], os.environ["STUDY_LOG"])
