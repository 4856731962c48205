"""Which source a computation reaches, as one hash.

A run's key holds it, so that an edited method gets a new run and never shows the number of the old
one. Comments and docstrings do not count.
"""

import ast
import inspect
import re
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType

from ecglib.errors import DataError
from ecglib.files import short_hash

PACKAGES = ("ecglib", "ecgstudy")
ROOT = Path(__file__).resolve().parents[1]
STARTED = time.time()
ENTRY = re.compile(r"[\w.]+:\w+")


def fingerprint(modules: Iterable[str]) -> str:
    """Hash of the modules of these names and of all that they import from the study's packages.

    The packages around a module count as imported, too. Modules outside the study are hashed
    without their imports; those that have no source file are left out.
    """
    reached: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        path = _source_file(name)
        reached[name], imported = _read(path) if path else ("", ())
        waiting += imported if _is_own(name) else ()
        waiting += [name.rpartition(".")[0]] if _is_own(name) and "." in name else []
    return short_hash(sorted(reached.items()))


def code_of(*objects: object) -> str:
    """Hash of the source that functions, classes, jobs and modules reach, see `fingerprint`.

    A partial stands for its function and arguments, a closure for what it encloses, a method for
    its object, and a dataclass for its fields and for what its method `reaches()` returns. What
    was defined in a notebook counts with its own text and the names that it uses there.
    """
    modules: set[str] = set()
    definitions: set[str] = set()
    waiting = list(objects)
    seen: dict[int, object] = {}
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        waiting += _parts(value)
        if isinstance(value, ModuleType):
            modules.add(value.__name__)
        elif is_dataclass(value) and not isinstance(value, type):
            waiting.append(type(value))
        elif isinstance(value, FunctionType | type):
            name = value.__module__
            if name == "__main__":
                definitions.add(_text(value))
                waiting += _notebook_names(value)
            elif _is_own(name) or _is_users(name):
                modules.add(name)
                definitions.add(f"{name}:{value.__qualname__}")
    return short_hash([fingerprint(modules), sorted(definitions)])


def imported_modules(source: str, packages: Sequence[str] = PACKAGES) -> tuple[str, ...]:
    """Names of the modules of some packages that a Python source imports anywhere, in order."""
    found: dict[str, None] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [node.module, *(name for name in inner if _own_file(name))]
        else:
            continue
        found |= {name: None for name in names if name.partition(".")[0] in packages}
    return tuple(found)


def without_comments(source: str) -> str:
    """What a Python source does, in one form: no comments, docstrings, blank lines or registries.

    A registry is a dict whose values are all of the form "module:name": what an entry names counts
    where it is used, so that a new entry leaves the others' runs as they are.
    """
    tree = ast.parse(source)
    owners = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    for node in ast.walk(tree):
        if isinstance(node, owners) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    tree.body = [node for node in tree.body if not _is_registry(node)]
    return ast.unparse(tree)


def _is_registry(node: ast.stmt) -> bool:
    """Whether a statement assigns a dict of "module:name"."""
    table = getattr(node, "value", None)
    if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(table, ast.Dict):
        return False
    entries = [getattr(entry, "value", None) for entry in table.values]
    return bool(entries) and all(isinstance(e, str) and ENTRY.fullmatch(e) for e in entries)


def _is_own(name: str) -> bool:
    """Whether a module belongs to the study."""
    return name.partition(".")[0] in PACKAGES


@cache
def _own_file(name: str) -> Path | None:
    """The source file of a module of this repository, None where it has none."""
    path = ROOT.joinpath(*name.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


def _source_file(name: str) -> Path | None:
    """The source file of any module, None where it has none."""
    if _is_own(name):
        return _own_file(name)
    origin = getattr(sys.modules.get(name), "__file__", None)
    return Path(origin) if origin and origin.endswith(".py") else None


@cache
def _read(path: Path) -> tuple[str, tuple[str, ...]]:
    """Hash of a source file with the tables beside it that it names, and the modules it imports.

    DataError where the file changed after this process had loaded it: what would run is not what
    is written.
    """
    loaded = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    if path.stat().st_mtime > STARTED and str(path) in loaded:
        raise DataError(
            f"{path}: was edited after Python had loaded it; restart the kernel or the command, "
            "so that what runs is what is written."
        )
    source = path.read_text(encoding="utf-8")
    beside = sorted(path.parent.glob("*.csv")) + sorted(path.parent.glob("*.json"))
    tables = [table for table in beside if table.name in source]
    texts = [without_comments(source), *(table.read_text(encoding="utf-8") for table in tables)]
    return short_hash(texts), imported_modules(source)


def _parts(value: object) -> Iterable[object]:
    """What stands inside a value: a function's enclosed values, a job's fields."""
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or ()]
    if is_dataclass(value) and not isinstance(value, type):
        reached: Callable = getattr(value, "reaches", tuple)
        return (*(getattr(value, field.name) for field in fields(value)), *reached())
    return ()


def _is_users(name: str) -> bool:
    """Whether a module is a file of the user's own rather than one that is installed."""
    path = _source_file(name)
    if name == "__main__" or path is None:
        return False
    return not any(path.is_relative_to(folder) for folder in sysconfig.get_paths().values())


def _text(definition: FunctionType | type) -> str:
    """The text of a definition in a notebook, or the code that was made of it."""
    functions = _functions(definition)
    try:
        texts = [textwrap.dedent(inspect.getsource(function)) for function in functions]
        return "\n".join(map(without_comments, texts))
    except OSError:
        return repr([function.__code__.co_code for function in functions])


def _functions(definition: FunctionType | type) -> list[FunctionType]:
    """A function itself, or the functions of a class."""
    if isinstance(definition, FunctionType):
        return [definition]
    return [value for value in vars(definition).values() if isinstance(value, FunctionType)]


def _notebook_names(definition: FunctionType | type) -> list[object]:
    """What the global names stand for that a definition in a notebook uses."""
    used = {
        name: function.__globals__
        for function in _functions(definition)
        for name in _names(function.__code__)
    }
    return [values[name] for name, values in used.items() if name in values]


def _names(code: CodeType) -> set[str]:
    """Global names that a function and the functions inside it use."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))
