"""Where the study starts: read the command line, find or make a Python with the packages, go on in
it.

Runs under any Python 3.11 or newer with nothing installed, so it uses the standard library alone.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from ecglib.errors import DataError, StorageError, explain_storage

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements.lock"
READY = "study-ready"  # file in .venv, written last: what it was made from
UNFINISHED = "study-unfinished"  # file in .venv while packages are being installed
PIP = "pip==26.3"  # needs two thirds of the time of the one that comes with Python 3.11
DISK_NEEDED = 2e9  # bytes; the packages without a GPU take 1.6 GB

PROFILES = ("smoke", "laptop", "reference", "paper")
HELP = """commands:
  smoke               every notebook on a few hundred simulated records: does everything run?
  laptop              every notebook on about 3,000 simulated records: real trends without a
                      download (the default)
  reference           every arm and label fraction: the run behind the tables in reference/
  paper               the published data sets and settings; needs a GPU
  test [ARGUMENTS]    the tests; ARGUMENTS go to pytest, for instance: test -k records
  style               whether the code is formatted and clean, by ruff; changes nothing
  pair [--check]      write every notebook and exercise anew from its NN_name.py, or only check
                      that they agree

Results go to results/PROFILE: tables, figures, the executed copy of each notebook, and
report/index.html, which shows them all in a browser. A second start runs only the notebooks whose
code, imports, parameters or files have changed. Where this Python lacks the packages, .venv is made
from requirements.lock."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists what it takes.\n")


def existing_folder(text: str) -> Path:
    """The folder named on the command line as an absolute path."""
    path = Path(text).expanduser()
    if not path.is_dir():
        reason = "is not a folder" if path.exists() else "does not exist"
        raise argparse.ArgumentTypeError(
            f"{text} {reason}, give the folder that holds the ECG files"
        )
    return path.resolve()


def read_command(arguments: list[str]) -> argparse.Namespace:
    """The command line as `command`, `data`, `fresh`, `check` and `pytest`; leaves with status 2
    where it is wrong.
    """
    parser = _Parser(
        prog="run_all.sh",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run the whole study, or its tests.",
    )
    commands = (*PROFILES, "test", "style", "pair")
    parser.add_argument("command", nargs="?", default="laptop", choices=commands, metavar="COMMAND")
    folder_help = "use these ECGs, not simulated ones"
    parser.add_argument("--data", type=existing_folder, metavar="FOLDER", help=folder_help)
    fresh_help = "delete results/PROFILE first and start anew"
    parser.add_argument("--fresh", action="store_true", help=fresh_help)
    parser.add_argument("--check", action="store_true", help="with pair: change nothing")
    if arguments[:1] == ["test"]:
        return argparse.Namespace(command="test", pytest=arguments[1:])
    command = parser.parse_args(arguments)
    if command.check and command.command != "pair":
        parser.error("--check belongs to pair")
    if command.command not in PROFILES and (command.data or command.fresh):
        parser.error("--data and --fresh belong to the profiles")
    return command


def required_packages() -> list[str]:
    """The requirements of pyproject.toml, those of its optional parts included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + sum(project["optional-dependencies"].values(), [])


def missing_packages() -> list[str]:
    """Those requirements that the running interpreter does not meet."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return required_packages()

    def fits(requirement: Requirement) -> bool:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            return False
        return requirement.specifier.contains(version, prereleases=True)

    return [text for text in required_packages() if not fits(Requirement(text))]


def choose_python() -> str:
    """Path of an interpreter with the packages: this one, that of `.venv`, or that of a `.venv`
    made now.
    """
    unfinished = (VENV / UNFINISHED).exists()
    missing = missing_packages()
    if not missing and not (unfinished and Path(sys.prefix) == VENV):
        return sys.executable
    python = VENV / "bin" / "python"
    if not is_ready():
        say(
            f"This Python ({sys.version.split()[0]}) lacks {missing[0]}"
            + (f" and {len(missing) - 1} more packages of the study." if missing[1:] else ".")
        )
        with one_at_a_time():
            if not is_ready():  # another start may have made it while this one waited
                make_venv(python)
    return str(python)


def is_ready() -> bool:
    """Whether `.venv` is complete and made from the present lock in the present folder."""
    ready, python = VENV / READY, VENV / "bin" / "python"
    return os.access(python, os.X_OK) and ready.is_file() and ready.read_text() == stamp()


def stamp() -> str:
    """What `.venv` is made from: the lock, the package's description and the folder, which a copied
    `.venv` betrays.
    """
    parts = (LOCK.read_bytes(), (ROOT / "pyproject.toml").read_bytes(), str(ROOT).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest() + "\n"


def make_venv(python: Path) -> None:
    """Make `.venv` and install the lock and the package itself; killed half-way, the next start
    makes it anew.
    """
    check_tools()
    usable = not (VENV / UNFINISHED).exists() and works(python)
    if usable:
        say("Bringing .venv up to date from requirements.lock: a few minutes at most.")
    else:
        say(
            "Making .venv from requirements.lock: about 0.5 GB to download, up to 3 GB where pip "
            "brings NVIDIA's CUDA libraries; 2 to 10 minutes on a fast line. It is kept for later "
            "starts."
        )
        base = getattr(sys, "_base_executable", sys.executable)
        call([base, "-m", "venv", "--clear", str(VENV)], "making the folder .venv")
    with explain_storage(VENV):
        (VENV / READY).unlink(missing_ok=True)
        (VENV / UNFINISHED).touch()
    quiet = [] if sys.stderr.isatty() else ["-qq"]  # a log keeps errors only
    install = [str(python), "-m", "pip", "install"]
    own = ["-qq", "--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    call([*install, "-qq", PIP], "updating pip")
    call([*install, *quiet, "--no-compile", "-r", str(LOCK)], "installing requirements.lock")
    call([*install, *own], "installing ecglib")
    compile_packages(python)
    with explain_storage(VENV):
        (VENV / READY).write_text(stamp())
        (VENV / UNFINISHED).unlink()


def compile_packages(python: Path) -> None:
    """Byte code of the packages, without their tests, on all cores: pip would make all of it on
    one.

    What cannot be compiled is left as it is, as pip does; its import, should there ever be one,
    will tell.
    """
    left_out = "/tests?/|/testing/_internal/"
    command = [str(python), "-m", "compileall", "-qq", "-j", "0", "-x", left_out, "lib"]
    subprocess.run(command, cwd=VENV, stdout=subprocess.DEVNULL, check=False)


def check_tools() -> None:
    """One sentence with the remedy where this Python cannot make an environment or the disk has no
    room for one.
    """
    if not (has_module("venv") and has_module("ensurepip")):
        raise DataError(
            f"{sys.executable} cannot make a virtual environment; install that part of Python "
            "(Debian or Ubuntu: apt install python3-venv), or activate the conda environment of "
            "environment.yml, and start again."
        )
    free = shutil.disk_usage(ROOT).free
    if free < DISK_NEEDED:
        raise StorageError(
            f"{ROOT}: {free / 1e9:.1f} GB are free, the packages need {DISK_NEEDED / 1e9:.0f} GB "
            "or more; make room."
        )


def has_module(name: str) -> bool:
    """Whether this Python has a module; Debian's splits some of the standard library off."""
    return importlib.util.find_spec(name) is not None


def works(python: Path) -> bool:
    """Whether this interpreter starts, is recent enough and has pip."""
    code = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


def call(command: list[str], purpose: str) -> None:
    """Run one step of making `.venv`; raises StorageError with the remedy where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    if subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr).returncode:
        raise StorageError(
            f"{VENV}: {purpose} failed, the lines above say why; check network and free space, "
            "then start again."
        )


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait for another start that is making `.venv`."""
    with explain_storage(ROOT), open(ROOT / ".venv.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another start is making .venv; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """A line for the reader, at once."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> None:
    """Check the command line, see to the packages, and become `python -m ecgtools.runner`."""
    read_command(arguments)
    try:
        python = choose_python()
    except (DataError, StorageError) as error:
        say(f"run_all.sh: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        say("\nStopped; start again to go on.")
        sys.exit(130)
    os.execv(python, [python, "-P", "-m", "ecgtools.runner", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
