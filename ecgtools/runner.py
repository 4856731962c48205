"""Runs the study: the notebooks of one profile in order, skipping what is done and unchanged.

`python -m ecgtools.runner [smoke|laptop|reference|paper|test|pair]`; `run_all.sh` starts it with
the right interpreter.
"""

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path, PurePath

from joblib import cpu_count

from ecglib.errors import DataError, StorageError, explain_storage
from ecglib.files import atomic_file, short_hash, write_json
from ecgstudy.code import fingerprint, imported_modules
from ecgtools.environment import ROOT, read_command, say
from ecgtools.exercises import write_exercises
from ecgtools.notebooks import (
    Execution,
    NotebookFailure,
    code_cells,
    execute,
    executed_copy,
    minutes,
    notebook_sources,
    parameter_names,
    run_together,
    shown,
    write_pairs,
)
from ecgtools.report import read_if_there, write_report

NUMERICAL_PACKAGES = ("torch", "numpy", "pandas", "scipy", "scikit-learn")
STATE = "study.json"
LISTING = "files.txt"
LONG_FOLDER = 40  # files; a fuller folder is summed up on the screen and written out in files.txt


@dataclass(frozen=True)
class Step:
    """One notebook of a run: its source, the parameters it gets, and a key.

    The key changes with these, with the code that the notebook imports, with the versions of the
    numerical packages, and, where it has a parameter `data`, with the folder of ECGs.
    """

    source: Path
    parameters: dict
    key: str

    @property
    def name(self) -> str:
        """The notebook's name without its ending."""
        return self.source.stem


def run_study(
    profile: str,
    data: Path | None = None,
    fresh: bool = False,
    root: Path = ROOT,
    results: Path | None = None,
    last: str | None = None,
) -> Path:
    """Run the notebooks of `root` up to `last` (default: all) with `configs/<profile>.yaml`;
    returns the results.

    Results go to `root/results/<profile>` or to `results`. Raises DataError or StorageError before
    or between notebooks and NotebookFailure where one fails; what was finished before stays
    finished. After the last notebook of all comes the report; a run that ends before it writes
    none.
    """
    results = Path(results or root / "results" / profile)
    config = read_config(root / "configs" / f"{profile}.yaml")
    if profile == "paper" and data is None:
        raise DataError(
            "The profile paper needs --data FOLDER with PTB-XL; `python -m "
            "ecglib.sources.download ptb-xl "
            "FOLDER` fetches it."
        )
    steps = plan(root, config, data, results)
    names = [step.name for step in steps]
    if last is not None:
        steps = steps[: names.index(last) + 1]
    with hold(results):
        origin = f"ECGs of {data}" if data else "simulated ECGs (no --data folder was given)"
        say(
            f"Profile {profile}: {config['about']}. {len(steps)} notebooks, {origin}; results go "
            f"to {shown(results)}."
        )
        if fresh and results.exists():
            say(f"--fresh: deleting {shown(results)} first.")
            with explain_storage(results):
                shutil.rmtree(results)
        titles = {
            step.name: f"[{place}/{len(steps)}] {step.name}"
            for place, step in enumerate(steps, start=1)
        }
        for turn in in_turns(steps, config.get("side_by_side", [])):
            run_turn(turn, results, titles)
        report = (
            make_report(results, names, profile, config["about"], root)
            if len(steps) == len(names)
            else ""
        )
        list_files(results)
        if report:
            say(report)
    return results


def make_report(results: Path, names: list[str], profile: str, about: str, root: Path) -> str:
    """Write the report where something in it has changed; returns the line that tells the reader of
    it.
    """
    start = time.monotonic()
    written = write_report(results, names, profile, about, root)
    how = (
        f"written in {time.monotonic() - start:.0f} s"
        if written
        else "there already, nothing in it has changed"
    )
    return f"\nThe report, {how}; open it in a browser: {shown(results / 'report' / 'index.html')}"


def read_config(path: Path) -> dict:
    """A profile's mapping: `about` (a sentence), `common` and one mapping of parameters a notebook,
    and two more.

    `with_data` holds mappings of the same names, which take precedence where real ECGs are given.
    `side_by_side` lists groups of notebooks that need nothing of each other and may run at the same
    time.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{path}: the profile is missing; restore it from the repository."
        ) from None
    except yaml.YAMLError as error:
        raise DataError(
            f"{path}: not valid YAML ({' '.join(str(error).split())}); correct it."
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("about"), str):
        raise DataError(
            f"{path}: must be a mapping with a sentence `about`; see the other profiles."
        )
    for name, value in config.items():
        if name not in ("about", "side_by_side") and not isinstance(value, dict | None):
            raise DataError(
                f"{path}: `{name}` must be a mapping of parameters, not {value!r}; correct it."
            )
    return {name: value or {} for name, value in config.items()}


def plan(root: Path, config: dict, data: Path | None, results: Path) -> list[Step]:
    """The steps of a run with their parameters and keys; a key of the config that no notebook has
    is a DataError.
    """
    sources = notebook_sources(root / "notebooks")
    known = {source.stem: parameter_names(source) for source in sources}
    config = {name: part for name, part in config.items() if name != "about"}
    special, groups = config.pop("with_data", {}), config.pop("side_by_side", [])
    unknown = [name for group in groups for name in group if name not in known]
    if unknown:
        raise DataError(
            f"The config's `side_by_side` names a notebook `{unknown[0]}` that does not exist; "
            "correct it."
        )
    for part in (config, special):
        check_config(part, known)
    if data is not None:
        config = {name: config.get(name, {}) | special.get(name, {}) for name in config | special}
    given: dict = {} if data is None else {"data": str(data)}
    if given and not any("data" in names for names in known.values()):
        raise DataError(f"--data {data}: no notebook has a parameter `data`; leave it out.")
    versions = [metadata.version(name) for name in NUMERICAL_PACKAGES]
    ecgs = folder_fingerprint(data)
    steps = []
    for source in sources:
        # A path relative to the notebook's own folder, where it runs, keeps the machine out of the
        # executed copy.
        given["results"] = os.path.relpath(results, source.parent)
        offered = config.get("common", {}) | config.get(source.stem, {}) | given
        parameters = {name: value for name, value in offered.items() if name in known[source.stem]}
        key = [source.stem, source.read_text(encoding="utf-8"), parameters, versions]
        key += [fingerprint(code_imports(source)), ecgs if "data" in parameters else []]
        steps.append(Step(source, parameters, short_hash(key)))
    return steps


def code_imports(source: Path) -> set[str]:
    """Names of the study's modules that a notebook's code cells import; a cell with an error in its
    syntax imports nothing, and will say so itself.
    """
    names: set[str] = set()
    for cell in code_cells(source):
        lines = [line for line in cell.splitlines() if not line.lstrip().startswith(("%", "!"))]
        with suppress(SyntaxError):
            names.update(imported_modules("\n".join(lines)))
    return names


def check_config(config: dict, known: dict[str, tuple[str, ...]]) -> None:
    """Raise DataError for the first notebook or parameter of a config that does not exist."""
    everywhere = {name for names in known.values() for name in names}
    for notebook, parameters in config.items():
        if notebook != "common" and notebook not in known:
            raise DataError(
                f"The config names a notebook `{notebook}` that does not exist; correct the name."
            )
        names = everywhere if notebook == "common" else known[notebook]
        for name in parameters:
            if name not in names:
                where = "no notebook has" if notebook == "common" else f"{notebook} does not have"
                raise DataError(
                    f"The config sets `{name}`, a parameter that {where}; correct the name or "
                    "remove it."
                )


def folder_fingerprint(folder: Path | None) -> list:
    """Names of a folder's entries with size and time of its files: cheap, and a new index file
    changes it.
    """
    if folder is None:
        return []
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"--data {folder}: there is no such folder, or you may not read it ({error.strerror}); "
            "give the folder that holds the ECG files."
        ) from None
    return [[path.name, *(size_and_time(path) if path.is_file() else ())] for path in entries]


def size_and_time(path: Path) -> tuple[int, int]:
    """A file's size in bytes and the time of its last change in nanoseconds."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def in_turns(steps: Sequence[Step], groups: Sequence[Sequence[str]]) -> list[list[Step]]:
    """The steps in the order in which they run; those of a group together, in its order, once its
    first is reached.
    """
    by_name, turns = {step.name: step for step in steps}, []
    for step in steps:
        group = next((group for group in groups if step.name in group), [step.name])
        members = [by_name.pop(name) for name in group if name in by_name]
        turns += [members] if members else []
    return turns


def run_turn(turn: Sequence[Step], results: Path, titles: Mapping[str, str]) -> None:
    """Execute those of the steps that are not done, side by side where there are several, and note
    what succeeded.

    A failing notebook does not stop the others; at the end NotebookFailure names all that failed.
    """
    todo = [step for step in turn if not is_done(step, results, titles[step.name])]
    if not todo:
        return
    at_once = min(len(todo), cpu_count())
    threads = cpu_count() // at_once if len(todo) > 1 else None
    steps = {step.name: step for step in todo}
    failed: list[str] = []

    def finish(name: str, execution: Future) -> None:
        try:
            note_done(steps[name], results, execution.result())
        except NotebookFailure as failure:
            if len(todo) == 1:
                raise
            say(f"\n{failure}")
            failed.append(titles[name])

    jobs = {
        name: partial(
            execute, step.source, step.parameters, results, titles[name], threads, len(todo) == 1
        )
        for name, step in steps.items()
    }
    run_together(jobs, finish, at_once)
    if failed:
        raise NotebookFailure(f"These failed, as told above: {', '.join(sorted(failed))}")


def is_done(step: Step, results: Path, title: str) -> bool:
    """Whether a step is done and nothing that it depends on has changed, which is said; what is not
    done is forgotten.

    What it wrote must be there, and what it read from other steps must be as it was.
    """
    state = read_if_there(results / STATE)
    done = state.pop(step.name, None)
    if (
        done
        and done["key"] == step.key
        and executed_copy(results, step.name).exists()
        and all((results / name).exists() for name in done["files"])
        and all(content(results, name) == known for name, known in done["read"].items())
    ):
        say(f"{title}: done before and unchanged, skipped (it took {minutes(done['seconds'])})")
        return True
    if done:
        write_json(results / STATE, state)
    return False


def note_done(step: Step, results: Path, execution: Execution) -> None:
    """Note that a step succeeded, the files that it wrote, and what it read of others."""
    files = [
        name
        for name in written_files(results)
        if execution.wrote & {name, *map(str, PurePath(name).parents)}
    ]
    read = sorted(execution.read - {*files})
    entry = {
        "key": step.key,
        "seconds": execution.seconds,
        "files": files,
        "read": {name: content(results, name) for name in read},
    }
    write_json(results / STATE, read_if_there(results / STATE) | {step.name: entry})


def content(results: Path, name: str) -> str | None:
    """Hash of what a file below `results` holds, or, with a slash at the end of its name, of the
    names in a folder; None where it is not there.
    """
    path = results / name
    try:
        if name.endswith("/"):
            return short_hash(sorted(each for each in os.listdir(path) if each[0] != "."))
        return hash_of_file(path, *size_and_time(path))
    except OSError:
        return None


@cache
def hash_of_file(path: Path, size: int, time_ns: int) -> str:
    """Hash of a file's content, computed once for a size and time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def written_files(results: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every result by its name below `results`, but for hidden files and this
    module's own.
    """
    stamps = {}
    for folder, inner, files in os.walk(results):
        inner[:] = sorted(
            name for name in inner if not name.startswith(".")
        )  # what is half written lies in these
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(folder, name)
            if path.relative_to(results).as_posix() not in (STATE, LISTING) and path.exists():
                stamps[path.relative_to(results).as_posix()] = size_and_time(path)
    return dict(sorted(stamps.items()))


def list_files(results: Path) -> None:
    """Name every file of a run with its size, in `files.txt` and, save for very full folders, on
    the screen.
    """
    files = {name: size for name, (size, _) in written_files(results).items()}
    with atomic_file(results / LISTING) as temporary:
        temporary.write_text("".join(f"{size:>12} {name}\n" for name, size in files.items()))
    folders: dict[str, list[str]] = {}
    for name in files:
        folders.setdefault(name.rpartition("/")[0].split("/")[0], []).append(name)
    say(f"\nWritten in {shown(results)}, every file by name in its {LISTING}:")
    for folder, names in folders.items():
        if len(names) > LONG_FOLDER:
            size = sum(files[name] for name in names)
            say(f"  {size / 1e3:10,.1f} kB  {folder}/ ({len(names)} files)")
            continue
        for name in names:
            say(f"  {files[name] / 1e3:10,.1f} kB  {name}")


@contextmanager
def hold(results: Path) -> Iterator[None]:
    """Hold the results folder; a second run in it raises DataError. The system frees it even after
    SIGKILL.
    """
    with explain_storage(results):
        results.parent.mkdir(parents=True, exist_ok=True)
        file = open(results.with_name(f".{results.name}.lock"), "w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{shown(results)}: another run is writing there; wait until it has ended."
            ) from None
        with explain_storage(results):
            results.mkdir(exist_ok=True)
        yield


def run_tests(arguments: list[str]) -> int:
    """The tests, with pytest's own arguments; returns its exit code."""
    say(
        "Running the tests: about 8 minutes on 2 CPU cores, and 5 more for notebooks that "
        "`smoke` has not yet run."
    )
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT).returncode


def check_style() -> int:
    """Whether the code is formatted and clean; returns 1 where ruff says that it is not."""
    ruff = [sys.executable, "-m", "ruff"]
    commands = ([*ruff, "format", "--check"], [*ruff, "check"])
    return int(any([subprocess.run(command, cwd=ROOT).returncode for command in commands]))


def pair(check: bool) -> int:
    """Write the `.ipynb` pairs and the exercises anew, or check them; returns 1 where a checked one
    differs.
    """
    differing = write_pairs(ROOT / "notebooks", check) + write_exercises(ROOT / "notebooks", check)
    for path in differing:
        fault = "differs from its .py; run `./run_all.sh pair`"
        say(f"{shown(path)} {fault if check else 'written'}")
    return 1 if check and differing else 0


def main(arguments: list[str] | None = None) -> int:
    """Carry out the command line; returns 0, 1 for a failing notebook or test, 2 for a bad input,
    130 where stopped.
    """
    command = read_command(sys.argv[1:] if arguments is None else arguments)
    # So that a polite stop also ends the kernels.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if command.command == "test":
            return run_tests(command.pytest)
        if command.command == "style":
            return check_style()
        if command.command == "pair":
            return pair(command.check)
        run_study(command.command, command.data, command.fresh)
    except NotebookFailure as error:
        say(f"\n{error}\nStart again when it is put right; finished notebooks are skipped.")
        return 1
    except (DataError, StorageError) as error:
        say(f"run_all.sh: {error}")
        return 2
    except KeyboardInterrupt:
        say("\nStopped. Start again to go on where it stopped; finished notebooks are skipped.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
