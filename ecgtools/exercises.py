"""Exercises for a course, made from the lessons, so that the two cannot drift apart.

A lesson ends with the text of an exercise and cells tagged `given` (optional), `solution` and
`check`. Its exercise notebook has the text, what the lesson prepared for it, a stub in place of the
solution, and the check.
"""

import ast
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecglib.errors import DataError

FOLDER = "exercises"
TODO = "your code here"
CHECK = re.compile(r'^# %% .*"check"', re.MULTILINE)
SHOWING = {"print", "display"}  # calls that change nothing


def number(value: object) -> float:
    """An answer as a float; NaN for what is no single number, so that a comparison with it fails by
    itself.
    """
    found = numbers(value, ())
    return float(found) if not isinstance(value, bool | np.bool_) else float("nan")


def numbers(value: object, shape: tuple[int, ...]) -> np.ndarray:
    """An answer (array, tensor, series, list) as floats of `shape`; all NaN where it is something
    else.
    """
    wrong = np.full(shape, np.nan)
    if isinstance(value, str | bytes | set | dict):
        return wrong
    try:
        value = value.detach().cpu().numpy() if hasattr(value, "detach") else value
        found = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return wrong
    return found if found.shape == shape else wrong


class Code(ast.NodeVisitor):
    """Names of a piece of code, in the order in which it runs.

    `read`: taken from outside; `bound`: assigned on any path; `sure`: assigned on every path;
    `changed`: perhaps changed in place, by an assignment to an attribute or item, or by a call
    whose value is thrown away, of the object or with it. Changes by way of another name of the same
    object are not seen.
    """

    def __init__(self, statements: Sequence[ast.AST] = (), bound: Iterable[str] = ()) -> None:
        self.read: set[str] = set()
        self.bound: set[str] = set(bound)
        self.sure: set[str] = set()
        self.changed: set[str] = set()
        for statement in statements:
            self.visit(statement)
            if isinstance(statement, ast.Assign | ast.AnnAssign | ast.FunctionDef | ast.ClassDef):
                self.sure |= Code().after(statement).bound
            elif isinstance(statement, ast.With):
                self.sure |= Code(statement.body).sure

    @classmethod
    def of(cls, source: str) -> "Code":
        """The names of a cell."""
        return cls(ast.parse(source).body)

    def after(self, *nodes: ast.AST | None) -> "Code":
        """Visit nodes one after the other."""
        for node in filter(None, nodes):
            self.visit(node)
        return self

    def inside(self, *nodes: ast.AST | None, bound: Iterable[str] = ()) -> None:
        """Visit nodes of a scope of its own, which sees the names outside; read here, to be on the
        safe side.
        """
        scope = Code(bound=bound).after(*nodes)
        self.read |= scope.read - self.bound
        self.changed |= scope.changed - scope.bound

    def visit_Name(self, node: ast.Name) -> None:
        """A name read, or bound."""
        if not isinstance(node.ctx, ast.Load):
            self.bound.add(node.id)
        elif node.id not in self.bound:
            self.read.add(node.id)

    def visit_Assign(self, node: ast.Assign) -> None:
        """The value is read before its names are bound."""
        self.after(node.value, *node.targets)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """`x += 1` reads x first, and may change it in place."""
        name = owner(node.target)
        self.read |= {name} - self.bound
        self.changed.add(name)
        self.after(node.value, node.target)

    def visit_Attribute(self, node: ast.Attribute | ast.Subscript) -> None:
        """An attribute or item that is assigned changes its owner."""
        if not isinstance(node.ctx, ast.Load):
            self.changed.add(owner(node))
        self.generic_visit(node)

    visit_Subscript = visit_Attribute

    def visit_Expr(self, node: ast.Expr) -> None:
        """A call for its effect may change what it belongs to and what it is given."""
        self.visit(node.value)
        call = node.value
        if isinstance(call, ast.Call) and owner(call.func) not in SHOWING:
            parts = [*call.args, *([call.func] if isinstance(call.func, ast.Attribute) else [])]
            self.changed |= {owner(part) for part in parts}

    def visit_For(self, node: ast.For) -> None:
        """The range is read before its names are bound."""
        self.after(node.iter, node.target, *node.body, *node.orelse)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Defaults and annotations are read outside; the name is bound before the body, which may
        call it.
        """
        everyone = parameters_of(node.args)
        self.after(*node.decorator_list, *node.args.defaults, *node.args.kw_defaults, node.returns)
        self.after(*[each.annotation for each in everyone])
        self.bound.add(node.name)
        self.inside(*node.body, bound=[each.arg for each in everyone])

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """As a function."""
        self.inside(node.body, bound=[each.arg for each in parameters_of(node.args)])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Bases are read outside."""
        self.after(*node.bases, *node.decorator_list)
        self.bound.add(node.name)
        self.inside(*node.body)

    def visit_ListComp(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp
    ) -> None:
        """The ranges come first, and their names end with the comprehension."""
        ranges = [part for each in node.generators for part in (each.iter, each.target, *each.ifs)]
        made = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self.inside(*ranges, *made)

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        """An import binds its names."""
        self.bound |= {local_name(alias) for alias in node.names}

    visit_ImportFrom = visit_Import


def parameters_of(arguments: ast.arguments) -> list[ast.arg]:
    """All parameters of a function."""
    special = filter(None, [arguments.vararg, arguments.kwarg])
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *special]


def local_name(alias: ast.alias) -> str:
    """The name under which something imported is known."""
    return alias.asname or alias.name.partition(".")[0]


def owner(node: ast.AST) -> str:
    """The name at the root of `name.attribute[item]`; empty where there is none."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def source_of(source: str, node: ast.stmt) -> str:
    """A statement as it is written, with the comment behind it."""
    return "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])


def slice_cells(
    cells: Sequence[str], names: set[str], literals: set[str]
) -> tuple[list[str], set[str]]:
    """Those of the cells that `names` depend on, by assignment or change, and the names that none
    of them binds.

    `literals`, the parameters, are not changed by a function that is given them.
    """
    kept = []
    for cell in reversed(cells):
        code = Code.of(cell)
        if (code.bound | code.changed - literals) & names:
            kept.append(cell)
            names = (names - code.sure) | code.read
    return kept[::-1], names


def without_imports(cell: str) -> str:
    """A cell without its imports, which are collected in one cell."""
    lines = cell.splitlines()
    for node in ast.parse(cell).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines).strip("\n")


def imports_of(cells: Iterable[str]) -> dict[str, tuple[str | None, str]]:
    """What the cells import: by its name there, the module and the name in it; no module for
    `import name`.
    """
    nodes = [
        node
        for cell in cells
        for node in ast.parse(cell).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    return {
        local_name(alias): (getattr(node, "module", None), ast.unparse(alias))
        for node in nodes
        for alias in node.names
    }


def import_cell(imported: dict[str, tuple[str | None, str]], names: set[str]) -> str:
    """The imports of some names, one line a module, in the usual order and groups."""
    plain, members = set(), {}
    for module, alias in (imported[name] for name in names & set(imported)):
        if module is None:
            plain.add(f"import {alias}")
        else:
            members.setdefault(module, set()).add(alias)
    lines = sorted(plain) + [
        f"from {module} import {', '.join(sorted(members[module]))}" for module in sorted(members)
    ]
    groups: tuple[list[str], ...] = ([], [], [])  # the standard library, others, the package
    for line in lines:
        package = line.split()[1].partition(".")[0]
        groups[
            2
            if package in ("ecglib", "ecgstudy", "ecgtools")
            else 0
            if package in sys.stdlib_module_names
            else 1
        ].append(line)
    return "\n\n".join("\n".join(group) for group in groups if group)


@dataclass(frozen=True)
class Exercise:
    """The parts of one exercise, as sources of cells; `stub` stands where the lesson has the
    solution.
    """

    name: str
    title: str
    text: str
    parameters: str
    prepared: list[str]  # what the lesson did that the exercise needs, imports first
    given: list[str]
    stub: str
    solution: str
    check: str


def lessons_with_exercise(folder: str | Path) -> list[Path]:
    """The sources of a folder that have a cell tagged `check`."""
    from ecgtools.notebooks import notebook_sources

    return [
        source
        for source in notebook_sources(folder)
        if CHECK.search(source.read_text(encoding="utf-8"))
    ]


def tagged(cells: list, tag: str) -> list[int]:
    """Positions of the cells with a tag."""
    return [position for position, cell in enumerate(cells) if tag in cell.metadata.get("tags", [])]


def read_exercise(source: Path) -> Exercise:
    """The exercise of a lesson; raises DataError where a part of it is missing or nothing is asked."""
    from ecgtools.notebooks import read_notebook

    cells = read_notebook(source).cells
    text = one(
        source,
        [n for n, cell in enumerate(cells) if cell.source.startswith("## Exercise")],
        "## Exercise",
    )
    solution, check, first = (
        one(source, tagged(cells, tag), tag) for tag in ("solution", "check", "parameters")
    )
    code = [cell.source for cell in cells[:text] if cell.cell_type == "code"]
    given = [
        cells[position].source for position in tagged(cells, "given") if text < position < solution
    ]
    asked = Code.of(cells[solution].source).bound & Code.of(cells[check].source).read
    if not asked:
        raise DataError(
            f"{source}: the check uses no name that the solution assigns; let it check an answer."
        )
    parts = Code.of("\n".join([*given, cells[solution].source, cells[check].source]))
    imported, literals = imports_of(code), Code.of(cells[first].source).bound
    lesson = [without_imports(cell) for cell in code if cell != cells[first].source]
    kept, outside = slice_cells(lesson, parts.read - set(imported), literals)
    # A student may need what the solution reads, so its imports are there too.
    needed = outside.union(parts.read, *(Code.of(cell).read for cell in kept))
    return Exercise(
        name=source.stem,
        title=cells[0].source.splitlines()[0].lstrip("# "),
        text=cells[text].source,
        parameters=needed_parameters(cells[first].source, needed),
        prepared=[cell for cell in [import_cell(imported, needed), *kept] if cell],
        given=given,
        stub=stub(cells[solution].source, asked),
        solution=cells[solution].source,
        check=cells[check].source,
    )


def one(source: Path, positions: Sequence[int], what: str) -> int:
    """The only position; DataError where there is none, or several."""
    if len(positions) != 1:
        raise DataError(
            f"{source}: {len(positions)} cells are `{what}`; a lesson with an exercise has exactly one."
        )
    return positions[0]


def needed_parameters(cell: str, names: set[str]) -> str:
    """Those of the parameters that are needed, with paths as seen from the folder of the exercises."""
    kept = [source_of(cell, node) for node in ast.parse(cell).body if Code([node]).bound & names]
    return "\n".join(kept).replace('"../', '"../../')


def stub(solution: str, asked: set[str]) -> str:
    """What the student fills in: `name = ...` for a value, the signature for a function or class;
    the order is kept.
    """
    blocks, values = [], []
    for node in ast.parse(solution).body:
        found = Code([node]).bound & asked
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and found:
            blocks.append(outline(solution, node))
        else:
            names = [
                name.id
                for name in ast.walk(node)
                if isinstance(name, ast.Name) and name.id in found
            ]
            values += [name for name in dict.fromkeys(names) if name not in values]
    if values:
        blocks.append("\n".join(f"{name} = ...  # {TODO}" for name in values))
    return "\n\n\n".join(blocks)


def outline(source: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """Signature and docstring of a function, or of a class and its methods."""
    lines, first = source.splitlines(), node.body[0]
    described = ast.get_docstring(node) is not None
    head = "\n".join(lines[node.lineno - 1 : first.end_lineno if described else first.lineno - 1])
    if isinstance(node, ast.FunctionDef):
        return f"{head}\n{' ' * first.col_offset}...  # {TODO}"
    return "\n\n".join(
        [head, *(outline(source, part) for part in node.body if isinstance(part, ast.FunctionDef))]
    )


def exercise_notebook(exercise: Exercise):
    """The notebook that a student gets: no solution, no outputs."""
    import nbformat

    from ecgtools.notebooks import KERNEL

    code, markdown = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    cells = [markdown(introduction(exercise))]
    if exercise.parameters:
        cells.append(code(exercise.parameters, metadata={"tags": ["parameters"]}))
    cells += [code(source) for source in exercise.prepared]
    cells += [markdown(exercise.text), *(code(source) for source in exercise.given)]
    cells.append(code(exercise.stub, metadata={"tags": ["answer"]}))
    cells += [markdown(CHECKED), code(exercise.check, metadata={"tags": ["check"]})]
    for position, cell in enumerate(cells):
        cell["id"] = f"cell-{position:02d}"
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return nbformat.from_dict(
        {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    )


CHECKED = "The check says that the answer is right, or what is wrong with it."


def introduction(exercise: Exercise) -> str:
    """The first cell: the lesson, what must have been run, and how to work."""
    if '"tables"' in "\n".join([*exercise.prepared, *exercise.given, exercise.check]):
        needs = f"the tables of the study up to this lesson: run `./run_all.sh` first, or at least up to {exercise.name}."
    elif exercise.parameters.startswith("results") or "\nresults" in exercise.parameters:
        needs = "the records of notebook 00: run `./run_all.sh` first, or at least notebook 00."
    else:
        needs = "nothing but the package."
    profile = (
        " For another profile than `laptop` change `results`."
        if "results" in exercise.parameters
        else ""
    )
    return (
        f"# Exercise {exercise.title}\n\nRead the lesson first: [{exercise.name}](../{exercise.name}.ipynb). This "
        f"exercise needs {needs}{profile} The first cells prepare what the lesson had at its end; run them, put your "
        f"answer where it says `{TODO}`, and run the check. Nothing here writes into the results.\n\nThis notebook is "
        "made from the lesson by `./run_all.sh pair`, which overwrites it: work on a copy."
    )


def write_exercises(folder: str | Path, check: bool = False) -> list[Path]:
    """Write each exercise of the lessons of `folder` that differs, and return these; with `check`
    only return them.
    """
    from ecgtools.notebooks import write_changed

    return write_changed(
        {
            Path(folder, FOLDER, f"{source.stem}.ipynb"): exercise_notebook(read_exercise(source))
            for source in lessons_with_exercise(folder)
        },
        check,
    )
