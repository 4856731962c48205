"""Writing files so that a reader sees either the old content or the new, never half of it."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ecglib.errors import DataError, explain_reading, explain_storage


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path` in one step, on failure it
    is removed.
    """
    path = Path(path)
    with explain_storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `folder`; on success it takes the place of
    `folder`.
    """
    folder = Path(folder)
    with explain_storage(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Move `source` to `target`; an older `target` is set aside first and removed last."""
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
    if target.exists():
        os.replace(target, aside)
    os.replace(source, target)
    shutil.rmtree(aside, ignore_errors=True)


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, default=_plain) + "\n")


def read_json(path: str | Path) -> dict:
    """Read one JSON file; a missing or damaged one is a `DataError`."""
    try:
        with explain_reading(path, "the file is missing; make this folder again"):
            return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); make this folder again.") from None


def _plain(value: object) -> object:
    """JSON form of numpy numbers, paths and tuples inside settings."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def short_hash(value: object, length: int = 12) -> str:
    """Hash of a JSON-like value that does not depend on the order of its keys."""
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def inside(folder: str | Path, name: str, listed_in: str) -> Path:
    """Path of `name` below `folder`; a name that leads outside (absolute, `..`, a link) is a
    `DataError`.
    """
    root = Path(folder).resolve()
    try:
        path = (root / name).resolve()
    # A null byte, a name too long, links in a circle.
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(
            f"{listed_in}: the entry {name!r} is not a file name ({error}); correct the entry."
        ) from None
    if not path.is_relative_to(root):
        raise DataError(
            f"{listed_in}: the entry {name!r} points outside {folder}; correct the entry, it was "
            "not opened."
        )
    return path
