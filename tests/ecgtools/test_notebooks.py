"""Every notebook: its pair agrees, it keeps the rules of a lesson, and it runs under the smoke
profile.
"""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from ecglib.records import Records
from ecgtools import runner as study
from ecgtools.environment import PROFILES, ROOT
from ecgtools.notebooks import notebook_sources, parameter_names, read_notebook
from toolkit import heart_signal, write_wfdb

FOLDER = ROOT / "notebooks"
SOURCES = notebook_sources(FOLDER) if any(FOLDER.glob("*.py")) else []
LONGEST_FUNCTION = 25  # lines; what is longer belongs in the package

each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def code_of(source: Path) -> list[str]:
    """The code cells of a notebook."""
    return [cell.source for cell in read_notebook(source).cells if cell.cell_type == "code"]


@each_notebook
def test_pair_agrees_and_carries_no_output(source: Path) -> None:
    pair = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert pair.cells == read_notebook(source).cells, "run `./run_all.sh pair`"
    assert all(
        not cell.outputs and cell.execution_count is None
        for cell in pair.cells
        if cell.cell_type == "code"
    )


@pytest.mark.skipif(not SOURCES, reason="no notebooks yet")
def test_every_pair_has_its_source() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {source.stem for source in SOURCES}


@each_notebook
def test_starts_with_text_and_has_one_parameters_cell(source: Path) -> None:
    assert read_notebook(source).cells[0].cell_type == "markdown"
    assert "results" in parameter_names(source)


@each_notebook
def test_a_reader_can_run_it_anywhere(source: Path) -> None:
    for cell in code_of(source):
        tree = ast.parse(cell)  # magics and shell commands are no Python
        assert not re.search(r"get_ipython|\bif\b.*\b(smoke|profile)\b", cell), cell
        absolute = [text for text in texts(tree) if re.match(r"/\w+/|[A-Za-z]:\\|~/", text)]
        assert not absolute, f"absolute path {absolute[0]}"


def texts(tree: ast.AST) -> list[str]:
    """String literals of a cell, without the later pieces of f-strings."""
    pieces = {
        id(piece)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for piece in node.values[1:]
    }
    constants = [
        node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in pieces
    ]
    return [node.value for node in constants if isinstance(node.value, str)]


@each_notebook
def test_functions_in_cells_are_short(source: Path) -> None:
    for cell in code_of(source):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < LONGEST_FUNCTION, (
                    f"{node.name} belongs in the package"
                )


@pytest.mark.skipif(not SOURCES, reason="no notebooks yet")
@pytest.mark.parametrize("profile", PROFILES)
def test_config_keys_exist(profile: str, tmp_path: Path) -> None:
    config = study.read_config(ROOT / "configs" / f"{profile}.yaml")
    assert len(study.plan(ROOT, config, None, tmp_path)) == len(SOURCES)


@each_notebook
def test_runs_headless(source: Path) -> None:
    """Up to this notebook, in `results/smoke`: what `./run_all.sh smoke` or an earlier test has run
    is skipped.
    """
    results = study.run_study("smoke", last=source.stem)
    executed = nbformat.read(results / "executed" / f"{source.stem}.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    warnings = [
        output.text
        for output in outputs
        if output.get("name") == "stderr" and "Warning:" in output.text
    ]
    assert not warnings, warnings[0]


def test_ones_own_folder_is_prepared(tmp_path: Path) -> None:
    """What the README promises: a folder of WFDB records with a labels.csv needs nothing else."""
    own = tmp_path / "own"
    rows = ["record,patient_id,AF,LBBB"]
    for number in range(40):
        write_wfdb(own / "ward", f"r{number}", heart_signal(seed=number))
        rows.append(f"ward/r{number},{number // 2},{number % 2},{(number // 3) % 2}")
    (own / "labels.csv").write_text("\n".join(rows) + "\n")
    results = study.run_study("smoke", own, results=tmp_path / "results", last="00_prepare_data")
    records = Records.load(results / "records")
    assert (
        len(records) == 40 and records.classes == ("AF", "LBBB") and not records.about["simulated"]
    )
