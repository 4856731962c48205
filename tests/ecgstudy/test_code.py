"""A run knows its code: an edit of what it reaches is another run, a comment is not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ecgstudy.code import code_of, fingerprint, imported_modules, without_comments

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
from ecgstudy.code import fingerprint
print(fingerprint(["ecglib.selfsup.simclr"]), fingerprint(["ecglib.selfsup.byol"]))
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A copy of the packages that may be edited."""
    for name in ("ecglib", "ecgstudy"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def hashes(study: Path) -> list[str]:
    """Fingerprints of two sister methods, in a fresh process."""
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.run(
        command, cwd=study, capture_output=True, text=True, check=True
    ).stdout.split()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new, 1))


def test_comments_docstrings_and_blank_lines_do_not_count():
    plain = "def f(x):\n    return '# no comment' + x\n"
    dressed = (
        'def f(x):\n    """What it does."""\n\n    # why\n    return \'# no comment\' + x  # so\n'
    )
    assert without_comments(plain) == without_comments(dressed)
    assert without_comments(plain) != without_comments(plain.replace("+ x", "+ 2 * x"))


def test_a_new_entry_of_a_registry_does_not_count():
    registry = 'ENCODERS = {"a": "module:A"}\nx = 1\n'
    assert without_comments(registry) == without_comments(registry.replace("}", ', "b": "n.m:B"}'))
    assert without_comments(registry) == "x = 1"
    numbers = 'SIZES = {"a": "7"}\n'
    assert without_comments(numbers) != without_comments(numbers.replace("7", "8"))


def test_imports_are_found_wherever_they_stand():
    source = (
        "import numpy\nimport ecglib.train\n"
        "def f():\n    from ecglib.selfsup import simclr\n    from ecglib.records import Records\n"
    )
    expected = ("ecglib.train", "ecglib.selfsup", "ecglib.selfsup.simclr", "ecglib.records")
    assert imported_modules(source) == expected


def test_only_what_is_reached_changes_the_hash(study: Path):
    before = hashes(study)
    assert hashes(study) == before
    edit(study / "ecglib" / "selfsup" / "simclr.py", "temperature", "temperature_")
    method = hashes(study)
    assert method[0] != before[0] and method[1] == before[1]
    (study / "ecglib" / "lora.py").write_text("broken = 1\n")
    assert hashes(study) == method
    with (study / "ecglib" / "augment.py").open("a") as file:
        file.write("\n# a comment at the end\n")
    assert hashes(study) == method
    with (study / "ecglib" / "augment.py").open("a") as file:
        file.write("\nCONSTANT = 1\n")
    assert all(new != old for new, old in zip(hashes(study), method, strict=True))


def test_a_table_beside_a_module_counts(study: Path):
    script = (
        'from ecgstudy.code import fingerprint; print(fingerprint(["ecglib.sources.cinc2021"]))'
    )
    command = [sys.executable, "-c", script]

    def printed() -> str:
        return subprocess.run(command, cwd=study, capture_output=True, text=True, check=True).stdout

    before = printed()
    with (study / "ecglib" / "sources" / "cinc2021_classes.csv").open("a") as file:
        file.write("\n")
    assert printed() != before


def test_a_closure_a_partial_and_a_class_reach_their_modules():
    from functools import partial

    from ecglib.selfsup.byol import BYOL
    from ecglib.selfsup.simclr import SimCLR

    def around(method: type):
        def run() -> type:
            return method

        return run

    assert code_of(around(SimCLR)) != code_of(around(BYOL))
    assert code_of(partial(print, SimCLR)) == code_of(SimCLR)
    assert code_of(SimCLR) == code_of(SimCLR, int, print)
    assert fingerprint(["ecglib.selfsup.simclr"]) != fingerprint([])


def test_what_a_notebook_defines_counts_with_what_it_uses_there(tmp_path: Path):
    text = (
        "from ecgstudy.code import code_of\nFACTOR = 1\n"
        "def scaled(x):\n    return {factor} * x\n"
        "class Method:\n    def loss(self, batch):\n        return scaled(batch)\n"
        "print(code_of(Method))\n"
    )
    seen = set()
    for factor in (1, 2):
        script = tmp_path / "cells.py"
        script.write_text(text.format(factor=factor))
        command = [sys.executable, str(script)]
        ran = subprocess.run(
            command,
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        seen.add(ran.stdout)
    assert len(seen) == 2
