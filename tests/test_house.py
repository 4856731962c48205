"""The plan of the house, read from the imports: three floors, nothing upwards, no cycle."""

import ast
from pathlib import Path

import pytest

from ecgstudy.code import imported_modules

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("ecglib", "ecgstudy", "ecgtools")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """The modules of any floor that a file imports, wherever in the file."""
    return set(imported_modules(path.read_text(encoding="utf-8"), FLOORS))


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    files = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
    return {module_name(path): imports_of(path) for path in files}


def floor(name: str) -> int:
    return FLOORS.index(name.partition(".")[0])


def test_each_floor_imports_only_from_itself_and_those_below(graph):
    upwards = {
        (name, imported)
        for name, modules in graph.items()
        for imported in modules
        if floor(imported) > floor(name)
    }
    assert not upwards


def test_no_module_imports_itself_by_way_of_others(graph):
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for imported in sorted(graph.get(name, ())):
                if imported != name:
                    visit(imported, (*way, name))
            done.add(name)

    for module in graph:
        visit(module, ())


def test_nobody_below_the_notebooks_knows_the_registry_of_methods(graph):
    """Runs reach the source of their own method alone: a new entry, label or colour of another
    leaves their keys as they are.
    """
    computing = [name for name in graph if name.startswith(("ecglib.", "ecgstudy.arms."))]
    assert computing
    assert not [name for name in computing if "ecgstudy.methods" in graph[name]]


def test_the_thin_package_names_a_reading_order():
    import ecglib

    modules = sorted(path.stem for path in (ROOT / "ecglib").glob("[a-z]*.py"))
    folders = sorted(path.parent.name for path in (ROOT / "ecglib").glob("*/__init__.py"))
    lacking = [name for name in modules + folders if f"`{name}`" not in ecglib.__doc__]
    assert not lacking, "the docstring of ecglib tells where these stand"


def test_no_function_is_longer_than_a_page():
    too_long = []
    for path in [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                too_long += [(path.name, node.name, lines)] if lines > 60 else []
    assert not too_long
