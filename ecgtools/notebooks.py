"""Notebooks as files: the `.py` percent script is the source, the `.ipynb` its pair without
outputs, and a run executes a notebook made from the source, so that the two cannot drift apart.
"""

import ast
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from ecglib.errors import DataError, explain_storage
from ecglib.files import atomic_file

PACKAGE_PARENT = Path(__file__).resolve().parents[1]
SEES_FILES = Path(__file__).resolve().parent / "kernel"
NAME = re.compile(r"\d\d_[a-z0-9_]+")
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
SOURCE_LINES_SHOWN = 5
OWN_SCOPE = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
ACTIONS = ("read", "wrote")  # as `kernel/sitecustomize.py` notes them


class NotebookFailure(Exception):
    """A cell raised an error, or its kernel died: the message gives the error, the cell and the
    executed copy.
    """


@dataclass(frozen=True)
class Execution:
    """What running a notebook took, and the names below the results folder of what it read and
    wrote; a folder that it listed is among what it read, with a slash at its end.
    """

    seconds: float
    read: set[str]
    wrote: set[str]


def notebook_sources(folder: str | Path) -> list[Path]:
    """The sources `NN_name.py` of a folder in the order of their numbers; raises DataError where
    two share a number.
    """
    sources = sorted(path for path in Path(folder).glob("*.py") if NAME.fullmatch(path.stem))
    for first, second in zip(sources, sources[1:], strict=False):
        if first.stem[:2] == second.stem[:2]:
            raise DataError(
                f"{second}: has the number of {first.name}; give each notebook its own."
            )
    if not sources:
        raise DataError(
            f"{folder}: holds no notebook NN_name.py; restore the folder from the repository."
        )
    return sources


def read_notebook(source: str | Path) -> NotebookNode:
    """The notebook of a percent script, without outputs."""
    import jupytext

    return plain_notebook(jupytext.read(source, fmt="py:percent").cells)


def plain_notebook(cells: list[NotebookNode]) -> NotebookNode:
    """A notebook of these cells: no outputs, cell ids by position (jupytext's own are random), no
    metadata that would change with jupytext's version.
    """
    for position, cell in enumerate(cells):
        cell["id"] = f"cell-{position:02d}"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return nbformat.from_dict(
        {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    )


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def code_cells(source: str | Path) -> list[str]:
    """The sources of a notebook's code cells."""
    return [cell.source for cell in read_notebook(source).cells if cell.cell_type == "code"]


def write_pairs(folder: str | Path, check: bool = False) -> list[Path]:
    """Write each `NN_name.ipynb` that differs from its source and return these; with `check` only
    return them.
    """
    sources = notebook_sources(folder)
    return write_changed(
        {source.with_suffix(".ipynb"): read_notebook(source) for source in sources}, check
    )


def write_changed(notebooks: Mapping[Path, NotebookNode], check: bool = False) -> list[Path]:
    """Write each notebook whose file differs from it and return these files; with `check` only
    return them.
    """
    differing = []
    for path, notebook in notebooks.items():
        text = nbformat.writes(notebook) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            differing.append(path)
            if not check:
                with atomic_file(path) as temporary:
                    temporary.write_text(text, encoding="utf-8")
    return differing


def parameter_names(source: str | Path) -> tuple[str, ...]:
    """Names assigned in the one cell tagged `parameters`; raises DataError where there is none, or
    several.
    """
    tagged = [cell for cell in read_notebook(source).cells if "parameters" in tags(cell)]
    if len(tagged) != 1:
        raise DataError(f"{source}: {len(tagged)} cells are tagged `parameters`; tag exactly one.")
    try:
        return tuple(assigned(ast.parse(tagged[0].source)))
    except SyntaxError as error:
        raise DataError(
            f"{source}: the parameters cell is not valid Python ({error.msg}); correct it."
        ) from None


def assigned(node: ast.AST) -> Iterator[str]:
    """Names that code binds, in order, save inside its functions, classes and comprehensions."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif not isinstance(node, OWN_SCOPE):
        for part in ast.iter_child_nodes(node):
            yield from assigned(part)


def execute(
    source: Path,
    parameters: dict,
    results: Path,
    title: str,
    threads: int | None = None,
    bar: bool = True,
) -> Execution:
    """Run a notebook in its own folder and keep the executed copy, also of a failing one.

    Its networks get that many `threads`, by default one for each core. Shows `title`, the cells
    done and the time; without a `bar` also on a terminal as two lines. Raises NotebookFailure, or
    StorageError where the copy cannot be written.
    """
    import papermill

    start, notebook = time.monotonic(), read_notebook(source)
    cells = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)
    executed = executed_copy(results, source.stem)
    failure = f"{source.stem} failed: {{}}\nExecuted copy: {shown(executed)}"
    with explain_storage(executed), tempfile.TemporaryDirectory(prefix="ecg-study-") as folder:
        executed.parent.mkdir(parents=True, exist_ok=True)
        log = Path(folder, "files.txt")
        with progress(title, cells + bool(parameters), bar) as cell_done:  # papermill adds a cell
            try:
                papermill.execute_notebook(
                    _with_papermill_metadata(notebook),
                    re.sub(r"([{}])", r"\1\1", str(executed)),
                    parameters,
                    kernel_name=KERNEL["name"],
                    kernel_manager_class=kernel_manager(source.parent, log, results, threads),
                    progress_bar=False,
                    on_cell_complete=cell_done,
                )
            except papermill.PapermillExecutionError as error:
                raise NotebookFailure(failure.format(_describe(error))) from None
            except RuntimeError as error:  # nbclient's DeadKernelError is one
                reason = f"its Python stopped ({error}), most often because the memory ran out"
                raise NotebookFailure(failure.format(reason)) from None
        lines = [line.partition(" ") for line in log.read_text(encoding="utf-8").splitlines()]
    read, wrote = ({name for action, _, name in lines if action == each} for each in ACTIONS)
    return Execution(time.monotonic() - start, read, wrote)


def executed_copy(results: Path, name: str) -> Path:
    """Where the executed copy of a notebook lies."""
    return results / "executed" / f"{name}.ipynb"


def _with_papermill_metadata(notebook: NotebookNode) -> NotebookNode:
    """What papermill adds when it loads a notebook from a file, and expects in a NotebookNode."""
    notebook.metadata["papermill"] = {
        "default_parameters": {},
        "parameters": {},
        "environment_variables": {},
    }
    for cell in notebook.cells:
        cell.metadata.setdefault("tags", [])
        cell.metadata["papermill"] = {}
    return notebook


def _describe(error: Exception) -> str:
    """`ValueError: message`, then the first lines of the cell that raised it."""
    lines = error.source.strip().splitlines()
    more = ["..."] if len(lines) > SOURCE_LINES_SHOWN else []
    source = "\n".join("    " + line for line in [*lines[:SOURCE_LINES_SHOWN], *more])
    return f"{error.ename}: {error.evalue}\nin the cell In [{error.exec_count}]:\n{source}"


def kernel_manager(place: Path, log: Path, results: Path, threads: int | None) -> type:
    """The class whose kernels run this interpreter with this package, whatever kernels the user has
    registered, in the folder `place`, and note in the file `log` what they read and write below
    `results`.

    Nothing is registered: the kernel's own files lie beside `log`.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from traitlets import Unicode

    given = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    folder = str(log.parent)
    environment = {
        "IPYTHONDIR": folder,
        "JUPYTER_RUNTIME_DIR": folder,
        "PYTHONPATH": os.pathsep.join([str(SEES_FILES), str(PACKAGE_PARENT), *given]),
        "STUDY_LOG": str(log),
        "STUDY_RESULTS": os.path.realpath(results),
    }
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    module = ["-m", "ipykernel_launcher"]
    command = [sys.executable, *module, "-f", "{connection_file}", "--log-level=CRITICAL"]

    class StudyKernel(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=command, env=environment, **KERNEL)
        connection_file = Unicode(os.path.join(folder, "kernel.json"))

        async def start_kernel(self, **options: object) -> None:
            """Start in its own folder; papermill would move this whole process, others' too."""
            await super().start_kernel(**options | {"cwd": str(place)})

    return StudyKernel


def run_together(
    jobs: Mapping[str, Callable], finish: Callable[[str, Future], None], at_once: int
) -> None:
    """Call the jobs, `at_once` side by side, each in a thread that waits for its kernel, and
    `finish(title, future)` as soon as one has ended.

    After a KeyboardInterrupt no job is begun any more, and all processes below this one are ended.
    """
    import psutil

    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(job): title for title, job in jobs.items()}
        try:
            for future in as_completed(futures):
                finish(futures[future], future)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):
                for process in psutil.Process().children(recursive=True):
                    with suppress(psutil.Error):
                        process.kill()
                time.sleep(0.1)
            raise


@contextmanager
def progress(title: str, cells: int, bar: bool = True) -> Iterator:
    """Show a notebook's progress: a bar that ticks each second on a terminal, else a line at the
    start and the end.

    Yields the function to call after each cell.
    """
    from tqdm import tqdm

    start, finished = time.monotonic(), threading.Event()
    terminal = bar and sys.stderr.isatty()
    if not terminal:
        print(f"{title} ({cells} cells) ...", file=sys.stderr, flush=True)
    form = "{desc}: cell {n_fmt}/{total_fmt} |{bar:20}| {elapsed}"
    # 80 x 24 where a terminal does not say its size; tqdm would then draw nothing.
    columns, lines = shutil.get_terminal_size()
    with tqdm(
        total=cells, desc=title, disable=not terminal, bar_format=form, ncols=columns, nrows=lines
    ) as shown_bar:

        def tick() -> None:
            while not finished.wait(1.0):
                shown_bar.refresh()

        threading.Thread(target=tick, daemon=True).start()
        try:
            yield lambda **_: shown_bar.update()
        finally:
            finished.set()
    if not terminal:
        print(f"{title} done in {minutes(time.monotonic() - start)}", file=sys.stderr, flush=True)


def minutes(seconds: float) -> str:
    """Seconds as `m:ss`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def shown(path: Path) -> str:
    """A path as the reader would type it: relative where it lies below the present folder."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
