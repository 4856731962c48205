"""The runner, on tiny notebooks: order, skipping, continuing, and one sentence for each thing that
goes wrong.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from ecglib.errors import DataError, StorageError
from ecgtools import runner as study
from ecgtools.notebooks import (
    NotebookFailure,
    notebook_sources,
    parameter_names,
    read_notebook,
    write_pairs,
)

FIRST = """# %% [markdown]
# # First

# %% tags=["parameters"]
number: int = 1
data = None
results = "../results/laptop"

# %%
from pathlib import Path

folder = Path(results, "tables")
folder.mkdir(parents=True, exist_ok=True)
(folder / "first.csv").write_text(f"{number}")
"""
SECOND = """# %% [markdown]
# # Second

# %% tags=["parameters"]
seconds = 0.0
bad = False
results = "../results/laptop"

# %%
import sys
import time
from pathlib import Path

Path(results, "started").touch()
time.sleep(seconds)
number = int(Path(results, "tables", "first.csv").read_text())

# %%
if bad:
    raise ValueError("the number is bad; change it")
Path(results, "tables", "second.csv").write_text(f"{number + 1}")
sys.executable
"""
CONFIG = "about: a few seconds\ncommon: {number: 2}\n01_second: {bad: false}\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with two notebooks and a smoke profile."""
    files = {
        "notebooks/00_first.py": FIRST,
        "notebooks/01_second.py": SECOND,
        "configs/smoke.yaml": CONFIG,
    }
    for name, text in files.items():
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "repository"


def configure(root: Path, text: str) -> None:
    (root / "configs" / "smoke.yaml").write_text(text)


def test_runs_in_order_then_skips_what_is_unchanged(
    root: Path, capfd: pytest.CaptureFixture
) -> None:
    results = study.run_study("smoke", root=root)
    assert results == root / "results" / "smoke"
    assert (
        results / "tables" / "second.csv"
    ).read_text() == "3"  # the config's number reached the first notebook
    shown = capfd.readouterr().err
    for name in (
        "executed/00_first.ipynb",
        "executed/01_second.ipynb",
        "tables/first.csv",
        "tables/second.csv",
    ):
        assert name in shown and name in (results / "files.txt").read_text()
    assert shown.startswith("Profile smoke: a few seconds. 2 notebooks")
    executed = nbformat.read(results / "executed" / "01_second.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].data["text/plain"] == repr(sys.executable)

    times = {path: path.stat().st_mtime_ns for path in (results / "tables").iterdir()}
    study.run_study("smoke", root=root)
    assert capfd.readouterr().err.count("unchanged, skipped") == 2
    assert times == {path: path.stat().st_mtime_ns for path in (results / "tables").iterdir()}

    # A changed notebook runs again, the ones before it do not; so does one whose table was deleted.
    source = root / "notebooks" / "01_second.py"
    source.write_text(source.read_text().replace("number + 1", "number + 10"))
    study.run_study("smoke", root=root)
    assert capfd.readouterr().err.count("unchanged, skipped") == 1
    (results / "tables" / "second.csv").unlink()
    study.run_study("smoke", root=root)
    assert (results / "tables" / "second.csv").read_text() == "12"


def test_keys_follow_everything_that_a_notebook_depends_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys(data: Path | None = None) -> list[str]:
        config = study.read_config(root / "configs" / "smoke.yaml")
        return [step.key for step in study.plan(root, config, data, root / "results" / "smoke")]

    before = keys()
    assert keys() == before
    configure(root, CONFIG.replace("false", "true"))
    assert keys()[0] == before[0] and keys()[1] != before[1]
    configure(root, CONFIG.replace("2", "3"))
    assert keys()[0] != before[0] and keys()[1] == before[1]  # it follows by what the second reads
    configure(root, CONFIG)
    data = tmp_path / "ecgs"
    data.mkdir()
    with_data = keys(data)
    (data / "index.csv").write_text("a\n")
    assert with_data[0] != before[0] and keys(data)[0] != with_data[0]
    assert keys(data)[1] == before[1]  # it has no parameter `data`
    second = root / "notebooks" / "01_second.py"
    second.write_text(SECOND + "%%time\nx = 1\n")
    plain = keys()[1]
    with_import = SECOND + "%%time\nfrom ecglib import files\n"
    second.write_text(with_import)
    seen: list[set[str]] = []
    monkeypatch.setattr(study, "fingerprint", lambda names: seen.append(set(names)))
    assert keys()[1] not in (before[1], plain) and "ecglib.files" in seen[1]


def test_real_ecgs_may_have_sizes_of_their_own(root: Path, tmp_path: Path) -> None:
    configure(root, CONFIG + "with_data:\n  common: {number: 7}\n  01_second: {bad: true}\n")
    config, results = study.read_config(root / "configs" / "smoke.yaml"), root / "results" / "smoke"
    (tmp_path / "ecgs").mkdir()
    plain = [step.parameters for step in study.plan(root, config, None, results)]
    real = [step.parameters for step in study.plan(root, config, tmp_path / "ecgs", results)]
    assert [plain[0]["number"], plain[1]["bad"]] == [2, False] and [
        real[0]["number"],
        real[1]["bad"],
    ] == [7, True]
    configure(root, CONFIG + "with_data:\n  01_second: {misspelt: true}\n")
    with pytest.raises(DataError, match="sets `misspelt`"):
        study.plan(root, study.read_config(root / "configs" / "smoke.yaml"), None, results)


def test_a_failing_cell_stops_the_run_and_the_next_run_goes_on(
    root: Path, capfd: pytest.CaptureFixture
) -> None:
    configure(root, CONFIG.replace("false", "true"))
    with pytest.raises(NotebookFailure) as failure:
        study.run_study("smoke", root=root)
    message, executed = (
        str(failure.value),
        root / "results" / "smoke" / "executed" / "01_second.ipynb",
    )
    assert "01_second failed: ValueError: the number is bad; change it" in message
    assert "if bad:" in message and str(executed) in message and executed.exists()
    configure(root, CONFIG)
    capfd.readouterr()
    study.run_study("smoke", root=root)
    assert "00_first: done before" in capfd.readouterr().err


def test_a_cell_with_an_error_in_its_syntax_is_told(root: Path) -> None:
    source = root / "notebooks" / "00_first.py"
    source.write_text(FIRST + "\n# %%\nfor\n")
    with pytest.raises(NotebookFailure, match="00_first failed: SyntaxError: invalid syntax"):
        study.run_study("smoke", root=root)


def test_a_dead_kernel_is_told(root: Path) -> None:
    source = root / "notebooks" / "00_first.py"
    source.write_text(source.read_text() + "\nimport os\nos._exit(9)\n")
    with pytest.raises(NotebookFailure, match="00_first failed: its Python stopped"):
        study.run_study("smoke", root=root)


def test_fresh_says_so_and_deletes_the_old_results(
    root: Path, capfd: pytest.CaptureFixture
) -> None:
    old = root / "results" / "smoke" / "tables" / "old.csv"
    old.parent.mkdir(parents=True)
    old.touch()
    study.run_study("smoke", root=root, fresh=True, last="00_first")
    assert not old.exists() and "deleting" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (CONFIG + "02_third: {a: 1}\n", "a notebook `02_third` that does not exist"),
        (CONFIG.replace("bad", "colour"), "`colour`, a parameter that 01_second does not have"),
        (CONFIG.replace("number", "colour"), "`colour`, a parameter that no notebook has"),
        (CONFIG + "00_first: 5\n", "must be a mapping of parameters"),
        (
            CONFIG + "side_by_side: [[01_second, 02_third]]\n",
            "`side_by_side` names a notebook `02_third`",
        ),
        ("common: {}\n", "a sentence `about`"),
        ("about: [", "not valid YAML"),
    ],
)
def test_a_wrong_config_is_told_before_anything_runs(
    root: Path, config: str, sentence: str
) -> None:
    configure(root, config)
    with pytest.raises(DataError, match=sentence) as error:
        study.run_study("smoke", root=root)
    assert "\n" not in str(error.value) and not (root / "results").exists()


def test_a_wrong_notebook_is_told(root: Path) -> None:
    source = root / "notebooks" / "00_first.py"
    source.write_text(FIRST.replace('tags=["parameters"]', ""))
    with pytest.raises(DataError, match="0 cells are tagged"):
        parameter_names(source)
    source.write_text(FIRST.replace("data = None", "data = = None"))
    with pytest.raises(DataError, match="not valid Python"):
        parameter_names(source)
    (root / "notebooks" / "01_other.py").touch()
    with pytest.raises(DataError, match="has the number of"):
        notebook_sources(root / "notebooks")
    with pytest.raises(DataError, match="holds no notebook"):
        notebook_sources(root / "configs")


def test_missing_data_and_unwritable_results(root: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        study.run_study("smoke", root=root, data=root / "nowhere")
    (
        root / "results"
    ).touch()  # a file in the folder's place; the super-user may write to any folder
    with pytest.raises(StorageError, match="results"):
        study.run_study("smoke", root=root)
    (root / "results").unlink()
    executed = root / "results" / "smoke" / "executed"
    executed.mkdir(parents=True)
    (executed / "00_first.ipynb").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="the disk is full"):
        study.run_study("smoke", root=root)


def test_a_second_run_in_the_same_folder_is_refused(root: Path) -> None:
    results = root / "results" / "smoke"
    with study.hold(results), pytest.raises(DataError, match="another run is writing there"):
        study.run_study("smoke", root=root)
    assert not any(results.iterdir())


def start_and_wait(root: Path, name: str = "started") -> subprocess.Popen:
    """Start a run in a process of its own and wait until a notebook at work has written the file
    `name`.
    """
    started = root / "results" / "smoke" / name
    started.unlink(missing_ok=True)
    code = (
        "import signal, sys; from functools import partial; from pathlib import Path; from "
        "ecgtools import runner as study\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        ""  # a shell's background job ignores it
        "study.run_study = partial(study.run_study, root=Path(sys.argv[1])); "
        "sys.exit(study.main(['smoke']))"
    )
    environment = os.environ | {
        "PYTHONPATH": str(study.ROOT),
        "TMPDIR": str(root),
    }  # SIGKILL leaves a folder there
    command = [sys.executable, "-c", code, str(root)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if started.exists():
            return process
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("the second notebook did not start within a minute")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_where_it_was(
    root: Path, capfd: pytest.CaptureFixture, how: signal.Signals
) -> None:
    configure(root, CONFIG.replace("bad: false", "seconds: 60"))
    process = start_and_wait(root)
    kernels = descendants(process.pid)
    process.send_signal(how)
    _, shown = process.communicate(timeout=300)
    if how == signal.SIGINT:
        assert (
            process.returncode == 130
            and "Start again to go on" in shown
            and "Traceback" not in shown
        )
    for _ in range(100):  # no kernel is left behind to write into the next run's folder
        if not any(Path("/proc", kernel).exists() for kernel in kernels):
            break
        time.sleep(0.1)
    assert kernels and not any(Path("/proc", kernel).exists() for kernel in kernels)
    assert list(json.loads((root / "results" / "smoke" / "study.json").read_text())) == ["00_first"]
    configure(root, CONFIG)
    capfd.readouterr()
    results = study.run_study("smoke", root=root)
    assert "00_first: done before" in capfd.readouterr().err
    assert (results / "tables" / "second.csv").read_text() == "3"


COPIED = ("ecglib", "ecgstudy", "ecgtools", "requirements.lock", "pyproject.toml")
BEGIN = """# %% [markdown]
# # A lesson

# %% tags=["parameters"]
results = "../results/laptop"

# %%
from pathlib import Path

results = Path(results)
for folder in ("records", "tables", "pretrained"):
    (results / folder).mkdir(exist_ok=True)
"""
LESSONS = {  # by notebook what it does; three imports a method, nine a figure
    "00_records": '(results / "records" / "values").write_text("5")',
    "03_three": """
import json
from ecglib.toy_method import double

value = double(int((results / "records" / "values").read_text()))
(results / "pretrained" / "three.json").write_text(json.dumps(value))
""",
    "04_four": """
import subprocess
import sys

reading = [sys.executable, "-c", "print(open('records/values').read())"]
text = subprocess.run(reading, cwd=results, capture_output=True, text=True).stdout
(results / "tables" / "four.csv").write_text(text)
""",
    "09_nine": """
from ecgstudy.analysis.toy_figure import draw

found = [path.read_text() for path in sorted((results / "pretrained").glob("*.json"))]
table = (results / "tables" / "four.csv").read_text()
(results / "tables" / "nine.svg").write_text(draw(found, table))
""",
}
TOYS = {
    "ecglib/toy_method.py": 'def double(x):\n    """Twice x."""\n    return 2 * x\n',
    "ecgstudy/analysis/toy_figure.py": 'def draw(*parts):\n    return f"red {parts}"\n',
}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the packages with four small lessons, a method and a figure."""
    root = tmp_path / "copied"
    root.mkdir()
    for name in COPIED:
        whole = study.ROOT / name
        (shutil.copytree if whole.is_dir() else shutil.copy)(whole, root / name)
    for folder in ("notebooks", "configs"):
        (root / folder).mkdir()
    (root / "configs" / "smoke.yaml").write_text(
        "about: a few seconds\nside_by_side: [[03_three, 04_four]]\n"
    )
    for name, code in LESSONS.items():
        (root / "notebooks" / f"{name}.py").write_text(f"{BEGIN}\n# %%\n{code.strip()}\n")
    for name, code in TOYS.items():
        (root / name).write_text(code)
    return root


def edit(path: Path, old: str, new: str) -> None:
    """Replace a piece of a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def executed_anew(root: Path) -> list[str]:
    """Run the copied study in a process of its own; the numbers of the lessons that it executed."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "ecgtools.runner", "smoke"]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return sorted(re.findall(r"(\d\d)_\w+ done in", result.stderr))


def test_a_step_runs_again_where_what_it_depends_on_has_changed(copied: Path) -> None:
    notebooks, results = copied / "notebooks", copied / "results" / "smoke"
    assert executed_anew(copied) == ["00", "03", "04", "09"]
    state = json.loads((results / "study.json").read_text())
    read = {name[:2]: set(entry["read"]) for name, entry in state.items()}
    assert read["03"] == read["04"] == {"records/values"} and not read["00"]
    assert read["09"] == {"pretrained/", "pretrained/three.json", "tables/four.csv"}

    edit(copied / "ecglib" / "toy_method.py", "Twice x.", "Two times x.")
    edit(copied / "ecgstudy" / "analysis" / "toy_figure.py", "def", "# A comment.\ndef")
    assert executed_anew(copied) == []
    edit(notebooks / "03_three.py", "import json\n", "import json\nimport math\n")
    assert executed_anew(copied) == ["03"]  # it wrote the same again
    edit(copied / "ecglib" / "toy_method.py", "2 * x", "2 * x + 1")
    assert (
        executed_anew(copied) == ["03", "09"] and "11" in (results / "tables/nine.svg").read_text()
    )
    edit(copied / "ecgstudy" / "analysis" / "toy_figure.py", "red", "blue")
    edit(notebooks / "00_records.py", "A lesson", "The records")
    assert executed_anew(copied) == ["00", "09"]
    assert "The records" in (results / "executed" / "00_records.ipynb").read_text()
    edit(results / "tables" / "four.csv", "5", "6")
    (results / "pretrained" / "another.json").write_text("1")
    assert executed_anew(copied) == ["09"]


MEETING = """# %% [markdown]
# # A notebook that meets another

# %% tags=["parameters"]
results = "../results/smoke"
own = "a"
other = "b"
seconds = 60

# %%
import time
from pathlib import Path

folder = Path(results)
(folder / own).touch()
for _ in range(10 * seconds):
    if (folder / other).exists():
        break
    time.sleep(0.1)
assert (folder / other).exists(), "nobody came"
"""
TOGETHER = """about: a meeting
side_by_side:
  - [01_second, 02_third]
01_second: {own: a, other: b}
02_third: {own: b, other: a}
"""


@pytest.fixture
def meeting(root: Path) -> Path:
    """A repository whose second and third notebook each wait until the other is at work."""
    for name in ("01_second", "02_third"):
        (root / "notebooks" / f"{name}.py").write_text(MEETING)
    configure(root, TOGETHER)
    return root


def test_notebooks_of_a_group_run_at_the_same_time(
    meeting: Path, capfd: pytest.CaptureFixture
) -> None:
    results = study.run_study("smoke", root=meeting)
    state = json.loads((results / "study.json").read_text())
    assert set(state) == {"00_first", "01_second", "02_third"}
    assert {"a", "b"} == {*state["01_second"]["files"], *state["02_third"]["files"]} - {
        "tables/first.csv"
    }
    capfd.readouterr()
    study.run_study("smoke", root=meeting)
    assert capfd.readouterr().err.count("done before and unchanged") == 3


def test_a_failing_notebook_leaves_the_one_beside_it_alone(
    meeting: Path, capfd: pytest.CaptureFixture
) -> None:
    configure(meeting, TOGETHER.replace("other: b}", "other: nowhere, seconds: 1}"))
    with pytest.raises(NotebookFailure, match=r"These failed, as told above: \[2/3\] 01_second"):
        study.run_study("smoke", root=meeting)
    assert "AssertionError: nobody came" in capfd.readouterr().err
    assert set(json.loads((meeting / "results" / "smoke" / "study.json").read_text())) == {
        "00_first",
        "02_third",
    }
    (meeting / "results" / "smoke" / "nowhere").touch()
    study.run_study("smoke", root=meeting)
    assert "02_third: done before" in capfd.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_group_leaves_no_process_behind(meeting: Path, how: signal.Signals) -> None:
    configure(
        meeting,
        TOGETHER.replace("other: a}", "other: nowhere}").replace("other: b}", "other: nowhere}"),
    )
    process = start_and_wait(meeting, "b")
    children = descendants(process.pid)
    process.send_signal(how)
    _, shown = process.communicate(timeout=60)
    assert (
        process.returncode == 130 and "Start again to go on" in shown and "Traceback" not in shown
    )
    assert len(children) >= 2, "two notebooks with a kernel each"
    assert not [child for child in children if Path("/proc", child).exists()]


def descendants(process: int | str) -> list[str]:
    """All processes below one."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    own = [child for task in tasks for child in task.read_text().split()]
    return own + [below for child in own for below in descendants(child)]


def test_the_command_line_answers_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def fail_with(error: Exception) -> int:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(study, "run_study", fail)
        return study.main(["smoke"])

    assert fail_with(NotebookFailure("00_first failed: ValueError: no")) == 1
    assert fail_with(DataError("the folder is missing; make it.")) == 2
    assert fail_with(StorageError("the disk is full; free some space.")) == 2
    assert fail_with(KeyboardInterrupt()) == 130
    shown = capfd.readouterr().err
    assert "Traceback" not in shown and "run_all.sh: the folder is missing; make it.\n" in shown


def test_pairs_are_stable_stripped_and_checked(root: Path) -> None:
    folder = root / "notebooks"
    written = write_pairs(folder)
    assert [path.name for path in written] == ["00_first.ipynb", "01_second.ipynb"]
    texts = [path.read_text() for path in written]
    assert write_pairs(folder) == [] and write_pairs(folder, check=True) == []
    notebook = nbformat.read(written[0], as_version=4)
    nbformat.validate(notebook)
    assert [cell["id"] for cell in notebook.cells] == ["cell-00", "cell-01", "cell-02"]
    assert notebook.cells == read_notebook(folder / "00_first.py").cells
    written[0].write_text(texts[0].replace("number", "count"))
    assert write_pairs(folder, check=True) == [written[0]] and "count" in written[0].read_text()
    assert write_pairs(folder) == [written[0]] and [path.read_text() for path in written] == texts
