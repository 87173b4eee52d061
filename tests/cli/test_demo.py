"""ume demo on the shipped items, with stand-ins whose quality is known in advance."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ume_models.assets import heldout
from ume_models.processing import Item

Ume = Callable[..., Any]


@pytest.fixture
def perfect(monkeypatch: pytest.MonkeyPatch, ume: Ume) -> Ume:
    """``ume`` with a model that knows the answers, and errs once with the other engine."""
    tasks = heldout().tasks
    answer_of = {
        query["id"]: relevant[0]
        for task in tasks
        for query, relevant in zip(task.queries, task.relevant, strict=True)
    }
    columns = {
        candidate["id"]: column
        for task in tasks
        for column, candidate in enumerate(task.candidates)
    }

    def encode_detailed(model: Any, items: Sequence[Item], **options: Any) -> Any:
        rows = torch.zeros(len(items), len(columns))
        for row, item in enumerate(items):
            rows[row, columns[answer_of.get(item.id, item.id)]] = 1.0
        if model.engine == "reference" and items[0].id == tasks[0].queries[0]["id"]:
            rows[0] = rows[0].roll(1)
        return SimpleNamespace(embeddings=rows)

    monkeypatch.setattr("ume_models.encode.encode_detailed", encode_detailed)
    return ume


def test_a_perfect_model_scores_perfectly(perfect: Ume, tmp_path: Path) -> None:
    html = tmp_path / "new" / "demo.html"
    result = perfect("demo", "--html", html, "--engine", "fast")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    for task in heldout().tasks:
        [line] = [line for line in lines if f" {task.name} " in line]
        assert task.kind in line
        assert line.count("1.00") == 3  # hit@1, hit@5, MRR
        assert f" {len(task.candidates)} " in line
        assert f"{1 / len(task.candidates):.3f}" in line  # chance
    assert "Speed-up" not in result.stdout
    assert str(html) in result.stdout
    page = html.read_text()
    assert "right answer: rank 1" in page
    assert not re.search("right answer: rank [2-9]", page)
    assert page.count("data:image/") > 50
    assert not re.search(r"https?://", page)


def test_engines_are_compared(perfect: Ume, tmp_path: Path) -> None:
    result = perfect("demo", "--html", tmp_path / "demo.html", "--queries", 2)
    assert result.exit_code == 0
    queries = 2 * len(heldout().tasks)
    assert "largest difference of two numbers 1.0e+00" in result.stdout
    assert "smallest cosine 0.0000000" in result.stdout
    assert f"Same best result for {1 - 1 / queries:.1%}" in result.stdout
    assert re.search(r"Speed-up in this run: [\d.]+×", result.stdout)
    assert "threads" in result.stdout
    assert "\x1b" not in result.output


def test_a_slow_reference_engine_is_stopped_and_that_is_said(
    perfect: Ume, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ume_models.cli.demo._REFERENCE_SECONDS", 0.0)
    result = perfect("demo", "--html", tmp_path / "demo.html", "--queries", 2)
    assert result.exit_code == 0
    total = len(heldout().tasks)
    assert f"stopped after 1 of {total} tasks" in result.stdout
    items = 2 + len(heldout().tasks[0].candidates)
    assert f"fast engine: {items} items" in result.stdout  # the same items on both sides
    assert f"reference engine: {items} items" in result.stdout
    assert "same best result for 50.0%" in result.stdout.lower()


def test_the_items_are_read_as_they_ship(
    ume: Ume, monkeypatch: pytest.MonkeyPatch, fake_model: ModuleType, tmp_path: Path
) -> None:
    result = ume("demo", "--html", tmp_path / "demo.html", "--queries", 1, "--engine", "reference")
    assert result.exit_code == 0, result.output
    assert "reference engine:" in result.stdout
    page = (tmp_path / "demo.html").read_text()
    assert 'class="problem"' not in page  # every picture was found
    assert 'class="strip"' in page


def test_missing_items_are_a_plain_failure(
    ume: Ume, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ume_models.assets._HERE", tmp_path)
    result = ume("demo", "--html", tmp_path / "demo.html")
    assert result.exit_code == 1
    assert "held-out items are missing" in result.stderr
    assert "Traceback" not in result.output
