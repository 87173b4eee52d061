"""The layout rule: imports point one way, and each kind of knowledge has one home."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import from its own level and from lower ones.
LEVELS = {
    "ume_models.__main__": 9,
    "ume_models.cli": 9,
    "ume_models.mmeb": 8,
    "ume_models.retrieval": 8,
    "ume_models.interfaces": 8,
    "ume_models": 7,  # the façade: what `import ume_models` offers
    "ume_models.patching": 7,
    "ume_models.run": 7,
    "ume_models.embedders": 6,
    # The contract, and what knows nothing of a model but that.
    "ume_models.embedder": 5,
    "ume_models.profile": 5,
    "ume_models.encode": 5,
    "ume_models.store": 5,
    "ume_models.rollout": 4,
    "ume_models.processing": 4,
    "ume_models.backbone": 3,
    # What every room may use, and what uses none of them.
    "ume_models.assets": 2,
    "ume_models.atomic": 2,
    "ume_models.disk_space": 2,
    "ume_models.json_files": 2,
    "ume_models.errors": 2,
    "ume_models.machine": 2,
    "ume_kernels": 1,
    "ume_kernels._C": 0,
}
# Circles that cannot be opened; each is closed by an import inside of a function.
LATE = {
    # from_pretrained of a class is load, which picks the class
    ("ume_models.embedders.base", "ume_models.embedders.loading"),
    # torch.compiler.disable loads the compiler: only while a graph is traced
    ("ume_kernels.similarity_topk.op", "ume_kernels.similarity_topk.outside_graphs"),
    # the hook stands in every process before torch does
    ("ume_models.patching.hook", "ume_models.patching.repositories"),
}
# The backbone, what hands models to transformers' own classes, and what uses its registries.
KNOW_TRANSFORMERS = (
    "ume_models.backbone",
    "ume_models.interfaces",
    "ume_models.patching.plug_points",
    "ume_models.patching.environment",  # supplies names that it no longer has
)
# Opens what the official evaluation pickled, with a reader that knows arrays only.
READS_ARRAYS = "ume_models.mmeb.stored"
SOURCES = sorted([*(ROOT / "ume_kernels").rglob("*.py"), *(ROOT / "ume_models").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str | None:
    """The entry of LEVELS a module belongs to; None for an unknown one."""
    parts = module.split(".")
    if parts[0] == "ume_kernels":
        return "ume_kernels._C" if parts[1:2] == ["_C"] else "ume_kernels"
    name = ".".join(parts[:2])
    return name if name in LEVELS else None


def type_checking_only(tree: ast.Module) -> set[ast.AST]:
    """Every node below `if TYPE_CHECKING:`."""
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }


def imports(path: Path, *, at_run_time: bool = False) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import in a file, wherever in the file it stands."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ignored = type_checking_only(tree) if at_run_time else set()
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).split(".")
            if path.name != "__init__.py":
                package.pop()
            package = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # `from package import module` imports the module, not only the package.
                known = (ROOT / (full.replace(".", "/") + ".py")).exists()
                known = known or (ROOT / full.replace(".", "/")).is_dir()
                yield node.lineno, full if known else base


def test_every_module_has_a_room() -> None:
    assert SOURCES
    homeless = [str(p.relative_to(ROOT)) for p in SOURCES if room(module_name(p)) is None]
    assert not homeless, "add the room to LEVELS, AGENTS.md says where"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    own = room(module_name(path))
    assert own is not None
    for line, target in imports(path):
        if target.split(".")[0] not in ("ume_kernels", "ume_models"):
            continue
        other = room(target)
        assert other is not None, f"{path}:{line}: {target} has no room"
        assert LEVELS[other] <= LEVELS[own], f"{path}:{line}: {other} is above {own}"


def test_no_module_imports_itself_through_others() -> None:
    """Wherever an import stands, also inside of a function; what only types need does not count."""
    modules = {module_name(path): path for path in SOURCES}
    imported = {
        name: {target for _, target in imports(path, at_run_time=True)} & {*modules} - {name}
        for name, path in modules.items()
    }
    for importer, target in LATE:
        assert target in imported[importer], f"{importer} -> {target} is no circle: take it out"
        imported[importer].remove(target)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "a circle: " + " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(imported[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in modules:
        visit(name, ())


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_third_party_knowledge_stays_home(path: Path) -> None:
    own = module_name(path)
    for line, target in imports(path, at_run_time=True):
        top = target.split(".")[0]
        where = f"{path}:{line}"
        if top == "transformers":
            assert own.startswith(KNOW_TRANSFORMERS), f"{where}: not the place"
        if own != READS_ARRAYS:
            assert top not in ("pickle", "dill", "joblib", "shelve"), f"{where}: no pickle"
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"\btorch\.load\(", source), f"{path}: no pickle: torch.load"


def test_native_sources_know_no_torch() -> None:
    csrc = ROOT / "csrc"
    files = [p for p in csrc.rglob("*") if p.suffix in (".h", ".cuh", ".inc", ".cpp", ".cu")]
    assert csrc / "bindings.cpp" in files
    for path in files:
        for header in re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8")):
            top = header.split("/")[0]
            assert top not in ("torch", "ATen", "c10"), f"{path}: includes {header}"
            if top == "pybind11" or header == "Python.h":
                assert path.name == "bindings.cpp", f"{path}: only bindings.cpp knows pybind11"
