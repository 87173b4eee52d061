"""Scripts of the stand-in repositories, run as a user runs them."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import known_standins  # noqa: E402, F401

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def startup_line() -> str:
    """The line that setup.py installs."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "STARTUP_LINE":
            return str(ast.literal_eval(node.value))
    raise AssertionError("setup.py has no STARTUP_LINE")


@pytest.fixture
def run_script(tmp_path: Path) -> Run:
    """``run_script(script, *arguments, accelerate="1", launcher=(...))`` in its own folder.

    What the installed start-up file does is done by a sitecustomize here, with the same line: the
    tests run from the source tree too.
    """
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import known_standins; del sys.path[0]\n"
        f"{startup_line()}\n",
        encoding="utf-8",
    )

    def run(
        script: Path,
        *arguments: str,
        accelerate: str | None = "1",
        launcher: tuple[str, ...] = (),
        check: bool = True,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        env.pop("UME_ACCELERATE", None)
        if accelerate is not None:
            env["UME_ACCELERATE"] = accelerate
        paths = [str(site), str(script.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        done = subprocess.run(
            [sys.executable, *launcher, str(script), *arguments],
            cwd=script.parent,
            env=env,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if check:
            assert done.returncode == 0, done.stderr[-4000:]
        return done

    return run


Imported = Callable[..., "AbstractContextManager[list[ModuleType]]"]


@pytest.fixture(scope="session")
def imported() -> Imported:
    """``with imported(folder, *names) as modules``: modules of a repository, as new objects.

    Repositories share package names (``src``): what was imported under them comes back afterwards.
    """

    @contextmanager
    def importing(folder: Path, *names: str) -> Iterator[list[ModuleType]]:
        tops = {name.split(".")[0] for name in names}

        def take() -> dict[str, ModuleType]:
            found = {name: m for name, m in sys.modules.items() if name.split(".")[0] in tops}
            for name in found:
                del sys.modules[name]
            return found

        before, path = take(), list(sys.path)
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        try:
            yield [importlib.import_module(name) for name in names]
        finally:
            take()
            sys.modules.update(before)
            sys.path[:] = path

    return importing
