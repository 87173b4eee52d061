"""Automatic patching: what is watched, when it acts, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ume_models.patching import hook, repositories

LOSS = """
import torch
import torch.nn.functional as F

class SimpleContrastiveLoss:
    def __init__(self, temperature=0.02):
        self.temperature = temperature

    def __call__(self, x, y, target=None, reduction="mean"):
        if target is None:
            target = torch.arange(len(x)) * (len(y) // len(x))
        return F.cross_entropy(x @ y.T / self.temperature, target, reduction=reduction)

class DistributedContrastiveLoss(SimpleContrastiveLoss):
    def gather_tensor(self, t):
        return t
"""


def repository(folder: Path, loss: str = LOSS, script: str = "") -> Path:
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "__init__.py").touch()
    (folder / "src" / "loss.py").write_text(loss)
    (folder / "run.py").write_text(
        script
        or "from src.loss import SimpleContrastiveLoss as L\n"
        "print(hasattr(L.__call__, '__ume_original__'))\n"
    )
    return folder / "run.py"


def test_everything_that_recipes_know_is_watched() -> None:
    known = {name for recipe in repositories.RECIPES for name in recipe.modules}
    known |= {name for name, _, _ in repositories._TRIGGERS}
    assert known - {"__main__"} == set(hook.WATCHED)


def test_only_whole_names_count() -> None:
    assert hook.known_as("src.loss") == "src.loss"
    assert hook.known_as("VLM2Vec.src.loss") == "src.loss"
    for name in ("loss", "mysrc.loss", "src.losses", "torch.eval", "src.loss.x"):
        assert hook.known_as(name) is None


def test_starting_python_loads_nothing_heavy(run_script: Any, tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(
        "import sys\n"
        "print('ume_models.patching.hook' in sys.modules, 'torch' in sys.modules, "
        "'rich' in sys.modules)\n"
    )
    assert run_script(script).stdout.split() == ["True", "False", "False"]
    assert run_script(script, accelerate=None).stdout.split() == ["False", "False", "False"]


def test_a_repository_is_patched_as_it_is_imported(run_script: Any, tmp_path: Path) -> None:
    script = repository(tmp_path / "repo")
    file = tmp_path / "report.json"
    done = run_script(script, UME_ACCELERATE_REPORT=str(file))
    assert done.stdout.strip() == "True"
    assert "ume: src.loss (vlm2vec): 1 replaced" in done.stderr
    (report,) = json.loads(file.read_text())
    assert report["entries"][0]["target"] == "src.loss.SimpleContrastiveLoss.__call__"
    for switched_off in ("0", None):
        done = run_script(script, accelerate=switched_off)
        assert done.stdout.strip() == "False"
        assert "ume:" not in done.stderr


@pytest.mark.parametrize("first", [True, False])
def test_the_import_does_the_same(run_script: Any, tmp_path: Path, first: bool) -> None:
    lines = ["import ume_models.patching.auto as auto", "from src.loss import *"]
    script = repository(
        tmp_path / "repo",
        script="\n".join(lines if first else lines[::-1])
        + '\nprint(hasattr(SimpleContrastiveLoss.__call__, "__ume_original__"))'
        + "\nprint([r.recipe for r in auto.reports()])\n",
    )
    done = run_script(script, accelerate=None)
    assert done.stdout.split("\n")[:2] == ["True", "['vlm2vec']"]


def test_modules_of_the_same_name_are_left_alone(run_script: Any, tmp_path: Path) -> None:
    script = repository(
        tmp_path / "repo",
        loss="class Loss:\n    def __call__(self): return 7\n",
        script="from src.loss import Loss\nprint(Loss()())\n",
    )
    done = run_script(script)
    assert done.stdout.strip() == "7"
    assert "ume:" not in done.stderr


def test_an_unknown_version_is_an_error_unless_lenient(run_script: Any, tmp_path: Path) -> None:
    script = repository(tmp_path / "repo", loss=LOSS.replace("self, x, y,", "self, left, right,"))
    done = run_script(script, check=False)
    assert done.returncode != 0
    told = "PatchError: src.loss.SimpleContrastiveLoss.__call__: its parameter 2 is 'left'"
    assert told in done.stderr
    assert "UME_ACCELERATE=lenient" in done.stderr
    lenient = run_script(script, accelerate="lenient", UME_ACCELERATE_REPORT="/nowhere/r.json")
    assert lenient.stdout.strip() == "False"


def test_a_wrong_value_is_said_and_does_not_stop_python(run_script: Any, tmp_path: Path) -> None:
    script = repository(tmp_path / "repo")
    done = run_script(script, accelerate="yess")
    assert done.stdout.strip() == "False"
    told = "ume: UME_ACCELERATE='yess' is not 1, lenient or 0: nothing is accelerated"
    assert done.stderr.splitlines().count(told) == 1


def test_the_start_up_file_is_installed() -> None:
    import sysconfig

    installed = Path(sysconfig.get_path("purelib")) / "ume_accelerate.pth"
    if not installed.exists():
        pytest.skip("the package is not installed in this environment")
    code = "import sys; print('ume_models.patching.auto' in sys.modules)"
    for value, expected in (("1", "True"), ("", "False")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"UME_ACCELERATE": value, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected
