"""The Python in README and docs runs as it stands, beside the files that its pages speak of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from ume_models.mmeb.miniature import write_miniature

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "tests" / "conformance"
# Published checkpoints are too large for a test: small ones of their layout stand in.
CHECKPOINTS = {
    "CUDAOUTOFMEMORY/PLUME-Qwen2-VL-2B": RECORDED / "plume_tiny" / "checkpoint",
    "PLUME-2B": RECORDED / "plume_tiny" / "checkpoint",
    "gme-Qwen2-VL-2B-Instruct": RECORDED / "family_seen" / "checkpoint",
    "path/to/UME-R1-2B": RECORDED / "family_seen" / "checkpoint",
    "Qwen/Qwen2-VL-2B-Instruct": RECORDED / "family_seen" / "checkpoint",
}
NEEDS = {"interfaces.md": ("sentence_transformers", "langchain_core"), "evaluate.md": ("pyarrow",)}
# Recipes for developers show parts of files.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if not page.name.startswith("add-")]


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("chart.png", "photo.jpg", "frame0.png", "frame1.png"):
        Image.effect_noise((90, 70), 60).convert("RGB").save(name)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.name)
def test_snippets_run(page: Path, folder: Path) -> None:
    for library in NEEDS.get(page.name, ()):
        pytest.importorskip(library)
    if page.name == "evaluate.md":  # the page's first command leaves this behind
        write_miniature(folder / "runs" / "miniature" / "miniature")
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets(page), 1):
        for published, small in CHECKPOINTS.items():
            snippet = snippet.replace(f'"{published}"', repr(str(small)))
        if page.name == "README.md":
            names = {}  # each of them by itself
        exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md"], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
