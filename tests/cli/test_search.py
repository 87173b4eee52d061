"""ume search: rankings, formats, and the settings it takes from the index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ume_models.processing import Item

Ume = Callable[..., Any]
WriteItems = Callable[..., Path]


@pytest.fixture
def index(ume: Ume, write_items: WriteItems, pictures: Path, tmp_path: Path) -> Path:
    """A store of eight texts and three pictures, in shards of three."""
    lines: list[object] = [{"text": f"text {n}", "id": f"t{n}"} for n in range(8)]
    lines += [{"image": f"media/{name}.png", "id": name} for name in ("red", "green", "blue")]
    out = tmp_path / "index"
    assert ume("embed", write_items(*lines), "-o", out, "--shard-size", 3).exit_code == 0
    return out


def test_results_are_ranked_by_inner_product(
    ume: Ume, write_items: WriteItems, index: Path, pictures: Path, fake_model: ModuleType
) -> None:
    queries = write_items({"text": "text 3"}, {"image": "media/blue.png"}, name="q.jsonl")
    result = ume("search", "--index", index, "--queries", queries, "-k", 4, "--json", "-")
    assert result.exit_code == 0, result.stderr
    assert "searched 11 items: exact, " in result.stderr
    answers = json.loads(result.stdout)
    items = [Item(f"text {n}") for n in range(8)]
    items += [Item("", (pictures / f"{name}.png",)) for name in ("red", "green", "blue")]
    names = [*(f"t{n}" for n in range(8)), "red", "green", "blue"]
    vectors = np.stack([fake_model.vector(item).numpy() for item in items])
    for answer, best in zip(answers, (3, 10), strict=True):
        scores = vectors @ vectors[best]
        order = np.argsort(-scores, kind="stable")[:4]
        assert [found["id"] for found in answer["results"]] == [names[row] for row in order]
        assert [found["rank"] for found in answer["results"]] == [1, 2, 3, 4]
        found_scores = [found["score"] for found in answer["results"]]
        np.testing.assert_allclose(found_scores, scores[order], atol=1e-6)
    assert answers[0]["results"][0]["text"] == "text 3"
    assert answers[1]["query"] == {"id": "2", "images": ["media/blue.png"]}


def test_the_table_is_plain_text(ume: Ume, write_items: WriteItems, index: Path) -> None:
    queries = write_items({"text": "[bold]text[/] 3", "id": "a[b]"}, name="q.jsonl")
    result = ume("search", "--index", index, "--queries", queries, "-k", 2)
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "a[b]  [bold]text[/] 3" in result.stdout  # the user's brackets are not markup
    assert len([line for line in result.stdout.splitlines() if line.strip()]) == 3


def test_more_results_than_items(ume: Ume, write_items: WriteItems, index: Path) -> None:
    queries = write_items({"text": "x"}, name="q.jsonl")
    result = ume("search", "--index", index, "--queries", queries, "-k", 99, "--json", "-")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)[0]["results"]) == 11
    assert "11 items only" in result.stderr


def test_both_indexes_agree(ume: Ume, write_items: WriteItems, index: Path) -> None:
    pytest.importorskip("faiss")
    queries = write_items({"text": "x"}, {"text": "y"}, name="q.jsonl")
    common = ("search", "--index", index, "--queries", queries, "--json", "-", "--index-type")
    exact, faiss = (json.loads(ume(*common, kind).stdout) for kind in ("exact", "faiss"))
    for left, right in zip(exact, faiss, strict=True):
        assert [f["id"] for f in left["results"]] == [f["id"] for f in right["results"]]


def test_missing_faiss_names_the_command(
    ume: Ume, write_items: WriteItems, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    queries = write_items({"text": "x"}, name="q.jsonl")
    result = ume("search", "--index", index, "--queries", queries, "--index-type", "faiss")
    assert result.exit_code == 1
    assert "pip install faiss-cpu" in result.stderr


def test_files_are_written(ume: Ume, write_items: WriteItems, index: Path, tmp_path: Path) -> None:
    queries = write_items({"text": "<script>alert(1)</script>"}, name="q.jsonl")
    html, answers = tmp_path / "new" / "g.html", tmp_path / "new" / "r.json"
    result = ume(
        "search", "--index", index, "--queries", queries, "--html", html, "--json", answers
    )
    assert result.exit_code == 0
    assert len(json.loads(answers.read_text())[0]["results"]) == 10
    page = html.read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count('href="data:image/') == 3
    assert str(html) in result.stderr


def test_queries_use_the_settings_of_the_index(
    ume: Ume,
    write_items: WriteItems,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake_model: ModuleType,
) -> None:
    items = write_items({"text": "a"})
    out = tmp_path / "out"
    chosen = ("--latent-steps", 3, "--context", "none", "--dtype", "float32", "--mode", "disc")
    assert ume("embed", items, "-o", out, *chosen, "--multi-image", "first").exit_code == 0
    loaded: dict[str, Any] = {}

    def load(path: str | None = None, **options: Any) -> Any:
        loaded.update(options)
        return fake_model.load(path, **options)

    monkeypatch.setattr("ume_models.load", load)
    assert ume("search", "--index", out, "--queries", items, "-k", 1).exit_code == 0
    assert loaded == {
        "device": "auto",
        "dtype": "float32",
        "family": "plume",
        "profile": "official",
        "engine": "fast",
        "multi_image": "first",
        "pictures": None,
        "empty": "error",
        "mode": "disc",
        "latent_steps": 3,
        "context": "none",
        "disc_offset": 0,
    }


def edit_encoding(index: Path, **changes: Any) -> None:
    """Change settings of a manifest."""
    path = index / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["encoding"].update(changes)
    path.write_text(json.dumps(manifest))


def test_an_index_written_before_profiles_is_searched_as_then(
    ume: Ume, write_items: WriteItems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, out = write_items({"text": "a"}), tmp_path / "out"
    assert ume("embed", items, "-o", out, "--profile", "before-profiles").exit_code == 0
    encoding = json.loads((out / "manifest.json").read_text())["encoding"]
    assert not {"embedder", "profile", "profile_fingerprint"} & {*encoding}
    assert ume("search", "--index", out, "--queries", items).exit_code == 0
    # Going on with it under another profile would mix the two.
    again = ume("embed", items, "-o", out)
    assert again.exit_code == 1
    assert "--profile before-profiles" in again.stderr
    assert "official" in again.stderr


def test_an_index_under_a_convention_that_changed_is_refused(
    ume: Ume, write_items: WriteItems, index: Path
) -> None:
    edit_encoding(index, profile_fingerprint="0" * 16)
    queries = write_items({"text": "x"}, name="q.jsonl")
    result = ume("search", "--index", index, "--queries", queries)
    assert result.exit_code == 1
    assert "0" * 16 in result.stderr
    assert str(index) in result.stderr


def test_an_index_of_an_unknown_family_is_refused(
    ume: Ume, write_items: WriteItems, index: Path
) -> None:
    edit_encoding(index, embedder="tomorrow")
    queries = write_items({"text": "x"}, name="q.jsonl")
    result = ume("search", "--index", index, "--queries", queries)
    assert result.exit_code == 1
    assert "tomorrow" in result.stderr


def test_another_model_is_refused(
    ume: Ume, write_items: WriteItems, index: Path, tmp_path: Path
) -> None:
    queries = write_items({"text": "x"}, name="q.jsonl")
    result = ume("search", "--index", index, "--queries", queries, "--model", "other")
    assert result.exit_code == 1
    assert "fingerprint" in result.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda index: (index / "manifest.json").unlink(), "not an embedding store"),
        (lambda index: (index / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda index: next(index.glob("*.safetensors")).unlink(), "1 of 4 shards are missing"),
        (lambda index: next(index.glob("shard*.json")).write_text("{}"), "1 of 4 shards"),
    ],
)
def test_a_damaged_index_is_named(
    ume: Ume,
    write_items: WriteItems,
    index: Path,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    damage(index)
    queries = write_items({"text": "x"}, name="q.jsonl")
    result = ume("search", "--index", index, "--queries", queries)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_bad_query_is_named(ume: Ume, write_items: WriteItems, index: Path) -> None:
    queries = write_items({"text": "x"}, {"image": "media/torn.png"}, name="q.jsonl")
    result = ume("search", "--index", index, "--queries", queries)
    assert result.exit_code == 1
    assert "q.jsonl, line 2" in result.stderr
    assert "truncated" in result.stderr
    nan = write_items({"text": "make it NaN"}, name="nan.jsonl")
    result = ume("search", "--index", index, "--queries", nan)
    assert result.exit_code == 1
    assert "not finite" in result.stderr
