"""Exercises for a course, made from the lessons, so that the two cannot drift apart.

A lesson ends with the text of an exercise and three cells, tagged `given`, `solution` and `check`.
The given cell stands by itself: with the parameters it imports and loads all that the others need.
The exercise notebook has the text, the given cell, a stub in place of the solution, and the check.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from ecglib.errors import DataError
from ecgtools.notebooks import (
    assigned,
    notebook_sources,
    plain_notebook,
    read_notebook,
    tags,
    write_changed,
)

FOLDER = "exercises"
TODO = "your code here"
CHECKED = "The check says that the answer is right, or what is wrong with it."
CHECK = re.compile(r'^# %% .*"check"', re.MULTILINE)


@dataclass(frozen=True)
class Exercise:
    """The parts of one exercise, as sources of cells; `stub` stands where the lesson has the
    solution.
    """

    name: str
    title: str
    text: str
    parameters: str
    given: str
    stub: str
    solution: str
    check: str


def lessons_with_exercise(folder: str | Path) -> list[Path]:
    """The sources of a folder that have a cell tagged `check`."""
    sources = notebook_sources(folder)
    return [source for source in sources if CHECK.search(source.read_text(encoding="utf-8"))]


def read_exercise(source: Path) -> Exercise:
    """The exercise of a lesson; DataError where a part of it is missing or nothing is asked."""
    cells = read_notebook(source).cells
    parts: dict[str, str] = {}
    for part in ("## Exercise", "parameters", "given", "solution", "check"):
        found = [
            cell.source for cell in cells if part in tags(cell) or cell.source.startswith(part)
        ]
        if len(found) != 1:
            raise DataError(
                f"{source}: {len(found)} cells are `{part}`; a lesson with an exercise has exactly "
                "one."
            )
        parts[part] = found[0]
    given, solution, check = parts["given"], parts["solution"], parts["check"]
    asked = set(assigned(ast.parse(solution))) & used(check) - set(assigned(ast.parse(check)))
    if not asked:
        raise DataError(
            f"{source}: the check uses no name that the solution assigns; let it check an answer."
        )
    return Exercise(
        name=source.stem,
        title=cells[0].source.splitlines()[0].lstrip("# "),
        text=parts["## Exercise"],
        parameters=needed_parameters(parts["parameters"], used(f"{given}\n{solution}\n{check}")),
        given=given,
        stub=stub(solution, asked),
        solution=solution,
        check=check,
    )


def used(source: str) -> set[str]:
    """Names that code reads anywhere."""
    names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Load)}


def needed_parameters(cell: str, names: set[str]) -> str:
    """Those of the parameters that are needed, with the comments behind them and with paths as seen
    from the folder of the exercises.
    """
    lines, kept = cell.splitlines(), []
    for node in ast.parse(cell).body:
        if names & set(assigned(node)):
            kept += lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(kept).replace('"../', '"../../')


def stub(solution: str, asked: set[str]) -> str:
    """What the student fills in: `name = ...` for a value, the signature for a function or class;
    the order is kept.
    """
    blocks, values = [], []
    for node in ast.parse(solution).body:
        names = [name for name in assigned(node) if name in asked]
        if names and isinstance(node, ast.FunctionDef | ast.ClassDef):
            blocks.append(outline(solution, node))
        else:
            values += names
    if values:
        blocks.append("\n".join(f"{name} = ...  # {TODO}" for name in dict.fromkeys(values)))
    return "\n\n\n".join(blocks)


def outline(source: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """Signature and docstring of a function, or of a class and its methods."""
    lines, first = source.splitlines(), node.body[0]
    described = ast.get_docstring(node) is not None
    head = "\n".join(lines[node.lineno - 1 : first.end_lineno if described else first.lineno - 1])
    if isinstance(node, ast.FunctionDef):
        return f"{head}\n{' ' * first.col_offset}...  # {TODO}"
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    return "\n\n".join([head, *(outline(source, method) for method in methods)])


def exercise_notebook(exercise: Exercise) -> NotebookNode:
    """The notebook that a student gets: no solution, no outputs."""
    parameters = new_code_cell(exercise.parameters, metadata={"tags": ["parameters"]})
    cells = [
        new_markdown_cell(introduction(exercise)),
        *([parameters] if exercise.parameters else []),
        new_markdown_cell(exercise.text),
        new_code_cell(exercise.given),
        new_code_cell(exercise.stub, metadata={"tags": ["answer"]}),
        new_markdown_cell(CHECKED),
        new_code_cell(exercise.check, metadata={"tags": ["check"]}),
    ]
    return plain_notebook(cells)


def introduction(exercise: Exercise) -> str:
    """The first cell: the lesson, what must have been run, and how to work."""
    if '"tables"' in exercise.given + exercise.check:
        needs = (
            "the tables of the study up to this lesson: run `./run_all.sh` first, or at least up "
            f"to {exercise.name}."
        )
    elif "results" in exercise.parameters:
        needs = "the records of notebook 00: run `./run_all.sh` first, or at least notebook 00."
    else:
        needs = "nothing but the package."
    if "results" in exercise.parameters:
        needs += " For another profile than `laptop` change `results`."
    return (
        f"# Exercise {exercise.title}\n\nRead the lesson first: [{exercise.name}]"
        f"(../{exercise.name}.ipynb). This exercise needs {needs} The first cells prepare what the "
        f"answer is made from; run them, put your answer where it says `{TODO}`, and run the "
        "check. Nothing here writes into the results.\n\nThis notebook is made from the lesson by "
        "`./run_all.sh pair`, which overwrites it: work on a copy."
    )


def write_exercises(folder: str | Path, check: bool = False) -> list[Path]:
    """Write each exercise of the lessons of `folder` that differs, and return these; with `check`
    only return them.
    """
    exercises = [read_exercise(source) for source in lessons_with_exercise(folder)]
    written = {
        Path(folder, FOLDER, f"{exercise.name}.ipynb"): exercise_notebook(exercise)
        for exercise in exercises
    }
    return write_changed(written, check)
