"""An edit never shows an old number: the loss of every method is changed in a copy of the packages,
and every run is computed anew.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tiny_study import last_losses
print(json.dumps(last_losses(Path(sys.argv[1]))))
"""
METHODS = [
    *("supervised", "selfsup/simclr", "selfsup/byol", "selfsup/swav", "selfsup/cpc"),
    *("selfsup/dino", "selfsup/patient_pairs", "semisup/ce_ssl", "semisup/fixmatch"),
    *("semisup/mixed_teacher", "semisup/distl"),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages and the tiny study, to be edited."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("ecglib", "ecgstudy"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("toolkit.py", "tiny_study.py"):
        shutil.copy(ROOT / "tests" / name, root)
    return root


def last_losses(copy: Path) -> dict[str, float]:
    """The loss with which a run of each method ended, by the name of the method."""
    command = [sys.executable, "-c", SCRIPT, str(copy / "results")]
    ran = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


def folders(copy: Path) -> set[str]:
    return {path.name for path in (copy / "results" / "runs").glob("[!.]*")}


def test_a_changed_loss_is_a_new_number_for_every_method(copy: Path):
    before = last_losses(copy)
    first = folders(copy)
    assert last_losses(copy) == before and folders(copy) == first, "all runs are opened again"
    for name in METHODS:
        path = copy / "ecglib" / f"{name}.py"
        text = path.read_text()
        assert "    def loss(self, batch" in text, name
        larger = "    def loss(self, batch):\n        return 100 * self.smaller_loss(batch)\n\n"
        path.write_text(
            text.replace("    def loss(self, batch", f"{larger}    def smaller_loss(self, batch")
        )
    after = last_losses(copy)
    assert after.keys() == before.keys() and len(after) >= 20
    for name, loss in after.items():
        assert abs(loss) > 5 * abs(before[name]), name
    with (copy / "ecglib" / "lora.py").open("a") as file:
        file.write("\n# a comment\n")
    known = folders(copy)
    assert last_losses(copy) == after and folders(copy) == known, "a comment changes nothing"
