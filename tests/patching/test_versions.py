"""What is replaced is known by a digest, which formatting does not change and all else does."""

from __future__ import annotations

import linecache
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from known_standins import STANDINS

from ume_models import patching
from ume_models.errors import PatchError
from ume_models.patching import recipes, repositories, versions

SOURCE = '''
SCALE = 2

def half(x):
    return x / SCALE

class Model:
    def pool(self, x):
        return half(x)

    def encode(self, x: int) -> int:
        """Encodes."""
        return self.pool(x) + 1  # and one
'''


@pytest.fixture
def digests(request):
    """``digests(source)``: of the method of the model above."""

    def of(source: str) -> dict[str, str]:
        module = ModuleType("toy.model")
        file = f"<{len(linecache.cache)} {hash(source)}>"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)
        exec(compile(source, file, "exec"), vars(module))
        return versions.digests(vars(module.Model)["encode"], module.Model, module)

    return of


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("  # and one", "", set()),
        ('"""Encodes."""', "", set()),
        ("x: int) -> int", "x)", set()),
        ("self.pool(x) + 1", "(self.pool(\n            x) + 1)", set()),
        ("+ 1", "+ 2", {"Model.encode"}),
        ("encode(self, x: int)", "encode(self, x=3)", {"Model.encode"}),
        ("x / SCALE", "x // SCALE", {"half"}),
        ("SCALE = 2", "SCALE = 3", {"half"}),
        ("return half(x)", "return half(half(x))", {"Model.pool"}),
    ],
)
def test_what_changes_a_digest(digests, old, new, changed):
    assert old in SOURCE
    before, after = digests(SOURCE), digests(SOURCE.replace(old, new))
    assert before.keys() == after.keys() == {"Model.encode", "Model.pool", "half"}
    assert {name for name in before if before[name] != after[name]} == changed


SCRIPTS = {
    "plume-eval": ("plume/VLM2Vec", "eval_twomode"),
    "ume-r1": ("ume_r1", "eval_twomode"),
    "vlm2vec": ("vlm2vec", "src.model.model"),
}


@pytest.fixture
def changed(imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``changed(recipe, old, new)``: its module, edited; the versions as published are known."""

    def edit(name: str, old: str, new: str) -> ModuleType:
        folder, module = SCRIPTS[name]
        with imported(STANDINS / folder, module) as (original,):
            for recipe in repositories.RECIPES:
                if recipe.name == name and recipe.recognises(original):
                    for target in recipe.targets:
                        found = recipes.find(original, target.path)
                        if found:
                            known = versions.digests(found[2], found[0], original)
                            for function, digest in known.items():
                                monkeypatch.setitem(recipe.known, function, digest)
        copy = tmp_path / folder
        shutil.copytree(STANDINS / folder, copy)
        file = copy / f"{module.replace('.', '/')}.py"
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new), encoding="utf-8")
        with imported(copy, module) as (edited,):
            return edited

    return edit


@pytest.mark.parametrize(
    ("name", "old", "new", "named"),
    [
        ("plume-eval", "step_id=step_idx,", "step_id=step_idx + 1,", "_latent_reasoning_generate_"),
        ("plume-eval", "model.module if", "model if", "_unwrap_model"),
        ("plume-eval", "_get_backbone_model", "_backbone_of", "_get_backbone_model"),
        ("plume-eval", "prefix_token_ids", "prefix_ids", "prefix_token_ids"),
        ("ume-r1", "get_gen_embedding_idx", "gen_embedding_idx", "get_gen_embedding_idx"),
        ("ume-r1", "hidden_states[-1]", "hidden_states[-2]", "encode_embeddings"),
        ("vlm2vec", "hidden_states[-1]", "hidden_states[-2]", "encode_input"),
        ("vlm2vec", "attention_mask.sum(dim=1) - 1", "attention_mask.sum(dim=1) - 2", "_pooling"),
        ("vlm2vec", "_dist_gather_tensor", "_gather", "_dist_gather_tensor"),
    ],
)
def test_another_version_is_an_error_that_names_it(changed, name, old, new, named):
    module = changed(name, old, new)
    with pytest.raises(PatchError, match=named):
        patching.apply(module)
    before = dict(vars(module))
    if any(recipe.recognises(module) for recipe in repositories.RECIPES):
        report = patching.apply(module, strict=False)
        assert any(named in f"{e.target} {e.reason}" for e in report.entries if e.unknown)
        patching.revert(report)
    assert dict(vars(module)) == before


def test_another_repositorys_folder_is_told(imported):
    with (
        imported(STANDINS / "plume/VLM2Vec", "eval_twomode"),
        pytest.raises(PatchError, match="that of 'plume-eval'"),
    ):
        patching.apply("ume-r1")
