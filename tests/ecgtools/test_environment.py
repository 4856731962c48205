"""The two commands' ground: the files that name packages agree, the training path needs few of
them, and a Python without them gets an environment of its own.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ecglib
from ecglib.errors import DataError, StorageError
from ecgtools import environment
from ecgtools.environment import LOCK, ROOT, required_packages

TRAINING = {"torch", "numpy", "pandas", "scipy", "scikit-learn", "tqdm", "safetensors"}
# Modules of the package that draw figures or start notebooks.
NOT_TRAINING = {"plot_ecg"}
CONDA_NAMES = {"pytorch": "torch"}
GPU_LIBRARIES = re.compile(
    r"nvidia|cuda|triton"
)  # torch pins these itself, on the machines where it needs them


def pins() -> dict[str, str]:
    """The lock's versions by canonical name."""
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    return {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines)
    }


def ranges(texts: list[str]) -> dict[str, str]:
    """Version ranges by canonical pip name, in a form that can be compared."""
    requirements = [Requirement(text) for text in texts]
    return {canonicalize_name(item.name): str(item.specifier) for item in requirements}


def with_dependencies(names: set[str]) -> set[str]:
    """Installed distributions that these need, themselves included, as their metadata tell."""
    found, waiting = set(), list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def test_the_imported_package_is_this_repository() -> None:
    assert Path(ecglib.__file__).resolve() == ROOT / "ecglib" / "__init__.py"
    assert 'name = "ecg-label-efficiency"' in (ROOT / "pyproject.toml").read_text()
    assert "ecglib" not in pins()


def test_the_lock_is_exact_and_names_no_address() -> None:
    text = LOCK.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines), (
        "a pin is NAME==VERSION"
    )
    assert len(pins()) == len(lines) and "torch==2.13.0" in lines
    assert "://" not in text and "www." not in text


def test_conda_project_and_lock_agree() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    *packages, pip = conda["dependencies"]
    assert conda["channels"] == ["conda-forge"] and pip == {"pip": ["-e ."]}
    by_name = {CONDA_NAMES.get(name, name): text for name, text in ranges(packages).items()}
    assert by_name.pop("python") == "<3.15,>=3.11"
    assert {by_name.pop("setuptools"), by_name.pop("pip")} == {">=77", ""}
    assert by_name == ranges(required_packages())
    for text in required_packages():
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), text


def test_the_lock_holds_all_that_its_packages_need() -> None:
    needed = with_dependencies({Requirement(text).name for text in required_packages()})
    assert not {name for name in needed - pins().keys() if not GPU_LIBRARIES.search(name)}


def test_the_training_path_imports_with_its_own_packages_alone() -> None:
    allowed = with_dependencies(TRAINING)
    blocked = {
        top
        for top, owners in metadata.packages_distributions().items()
        if not any(canonicalize_name(owner) in allowed for owner in owners)
    } - {"ecglib", "ecgstudy", "ecgtools"}
    blocked |= {"captum"}
    assert {
        "wfdb",
        "pooch",
        "h5py",
        "matplotlib",
        "seaborn",
        "papermill",
        "jupytext",
        "nbformat",
        "yaml",
    } <= blocked
    paths = [
        path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / "ecglib").rglob("*.py"))
    ]
    modules = [
        ".".join(path.parts).removesuffix(".__init__")
        for path in paths
        if path.stem not in NOT_TRAINING
    ]
    code = f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocker())
for module in {modules!r}:
    importlib.import_module(module)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def run_all(*arguments: str, **keywords: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(ROOT / "run_all.sh"), *arguments], capture_output=True, text=True, **keywords
    )


def test_help_and_wrong_command_lines(tmp_path: Path) -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    shown = run_all("--help", cwd=tmp_path).stdout
    assert all(word in shown for word in ("smoke", "laptop", "paper", "test", "style", "--data"))
    (tmp_path / "file").touch()
    for arguments, sentence in {
        ("tiny",): "invalid choice: 'tiny'",
        ("smoke", "--data", "nowhere"): "nowhere does not exist",
        ("smoke", "--data", "file"): "file is not a folder",
        ("smoke", "--quick"): "unrecognized arguments: --quick",
        ("pair", "--fresh"): "belong to the profiles",
    }.items():
        result = run_all(*arguments, cwd=tmp_path)
        assert (
            result.returncode == 2 and sentence in result.stderr and result.stderr.count("\n") == 1
        ), result.stderr


def test_no_suitable_python_is_told(tmp_path: Path) -> None:
    for name in ("bash", "dirname", "readlink"):
        (tmp_path / name).symlink_to(shutil.which(name))
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    result = run_all("smoke", env={"PATH": str(tmp_path)})
    assert result.returncode == 2 and "no Python 3.11 to 3.14" in result.stderr


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A Python that lacks the packages and a repository without `.venv`; the list of what is called
    for it.
    """
    calls: list[list[str]] = []

    def call(command: list[str], purpose: str) -> None:
        calls.append(command)
        if "venv" in command:
            (tmp_path / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
            (tmp_path / ".venv" / environment.UNFINISHED).unlink(missing_ok=True)
            (tmp_path / ".venv" / "bin" / "python").unlink(missing_ok=True)
            (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)

    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(environment, "LOCK", tmp_path / "requirements.lock")
    monkeypatch.setattr(environment, "missing_packages", lambda: ["torch>=2", "numpy>=2"])
    monkeypatch.setattr(environment, "call", call)
    return calls


def test_an_environment_is_made_once_and_follows_the_lock(bare: list[list[str]]) -> None:
    python = environment.choose_python()
    assert python == str(environment.VENV / "bin" / "python")
    made = [
        "venv" in bare[0],
        environment.PIP in bare[1],
        "-r" in bare[2],
        "-e" in bare[3],
        len(bare),
    ]
    assert made == [True, True, True, True, 4]
    assert environment.choose_python() == python and len(bare) == 4
    environment.LOCK.write_text(environment.LOCK.read_text() + "\n")
    environment.choose_python()
    assert len(bare) == 7 and "venv" not in bare[4]


def test_packages_are_compiled_but_for_their_tests(bare: list[list[str]]) -> None:
    package = environment.VENV / "lib" / "package"
    (package / "tests").mkdir(parents=True)
    for name in ("good.py", "tests/test_good.py"):
        (package / name).write_text("x = 1\n")
    (package / "broken.py").write_text("x = (\n")
    environment.choose_python()
    assert [path.name.split(".")[0] for path in environment.VENV.rglob("*.pyc")] == ["good"]
    assert environment.is_ready()


def test_an_environment_killed_half_way_is_made_anew(
    bare: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = environment.call

    def killed(command: list[str], purpose: str) -> None:
        whole(command, purpose)
        if "-r" in command:
            raise KeyboardInterrupt

    monkeypatch.setattr(environment, "call", killed)
    with pytest.raises(KeyboardInterrupt):
        environment.choose_python()
    assert not environment.is_ready()
    monkeypatch.setattr(environment, "call", whole)
    environment.choose_python()
    assert environment.is_ready() and "--clear" in bare[3] and len(bare) == 7


def test_an_interpreter_with_the_packages_is_used(
    bare: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "missing_packages", list)
    assert (
        environment.choose_python() == sys.executable and not bare and not environment.VENV.exists()
    )


def test_what_hinders_an_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="installing failed, the lines above say why"):
        environment.call([sys.executable, "-c", "raise SystemExit(1)"], "installing")
    monkeypatch.setattr(environment, "DISK_NEEDED", 1e18)
    with pytest.raises(StorageError, match="make room"):
        environment.check_tools()
    monkeypatch.setattr(environment, "has_module", lambda name: False)
    with pytest.raises(DataError, match="apt install python3-venv"):
        environment.check_tools()
