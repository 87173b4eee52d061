"""``python -m ume_models.run``: a script runs as Python runs it, and is accelerated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ume_models.errors import PatchError
from ume_models.patching import environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, sys
import neighbour
if __name__ == "__main__":
    print(sys.argv, sys.path[0], os.environ["UME_ACCELERATE"], neighbour.VALUE, __file__)
    print("ume_models.patching.auto" in sys.modules)
    sys.exit(3)
"""


def test_a_script_runs_as_main_with_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "neighbour.py").write_text("VALUE = 7\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "ume_models.run", "job.py", "--x", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == [f"['job.py', '--x', '1'] {tmp_path} 1 7 job.py", "True"]


@pytest.mark.parametrize("arguments", [[], ["gone.py"]])
def test_without_a_script(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ume_models.run", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 1 and "script" in done.stderr


def test_names_that_are_gone_are_supplied(monkeypatch: pytest.MonkeyPatch) -> None:
    newer, older = ModuleType("library.new"), ModuleType("library.old")
    newer.moved = object()  # type: ignore[attr-defined]
    older.kept = kept = object()  # type: ignore[attr-defined]
    for module in (newer, older):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "library.gone", None)  # cannot be imported
    table = {
        "library.old": {"kept": "", "moved": "library.new.moved", "Gone": ""},
        "library.gone": {"function": ""},
    }
    entries = environment._supply(table)
    assert [e.target for e in entries] == [
        "library.old.moved", "library.old.Gone", "library.gone.function",
    ]  # fmt: skip
    assert older.kept is kept and older.moved is newer.moved  # type: ignore[attr-defined]
    assert not isinstance(3, older.Gone)  # type: ignore[attr-defined]
    with pytest.raises(PatchError, match=r"library\.old\.Gone"):
        older.Gone()  # type: ignore[attr-defined]
    assert environment._supply(table) == []
