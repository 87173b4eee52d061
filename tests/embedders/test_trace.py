"""TRACE against recordings of its rules: routes, taps and words; prompts are reconstructed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ume_models
from ume_models.errors import OptionError
from ume_models.mmeb import benchmark, evaluate, select_tasks

FAMILY = Path(__file__).parent.parent / "conformance" / "family_seen"
EMB = 499


@pytest.fixture(scope="module", params=["fast", "reference"])
def model(request: Any, family_recorded: Any) -> Any:
    """The checkpoint with the head under which some rows reason and some do not."""
    found = ume_models.load(FAMILY / "checkpoint", family="trace", engine=request.param)
    rows, values = (family_recorded.tensors[f"trace.lm_head.{n}"] for n in ("rows", "values"))
    with torch.no_grad():
        found.lm_head.weight[rows] = values
    return found


@pytest.mark.compat
def test_routes_words_and_embeddings(model: Any, writes: Any) -> None:
    known = json.loads((FAMILY / "routes.json").read_text())
    for names, trace in writes(model, "trace", "trace", max_new_tokens=24):
        assert trace.route == [known[name]["route"] for name in names]
        assert trace.fallback == [known[name]["fallback"] for name in names]
    assert {"direct", "reason"} == {case["route"] for case in known.values()}


def test_a_candidate_never_reasons(model: Any, family_recorded: Any) -> None:
    """Its prompt ends with the answer; what is read is the state before it."""
    inputs = family_recorded.inputs("image_square")
    with_answer = {**inputs, "input_ids": torch.cat(
        [inputs["input_ids"], torch.tensor([[EMB]])], dim=1
    )}  # fmt: skip
    got, trace = model.embed(**with_answer, max_new_tokens=24, return_trace=True)
    assert (trace.token_ids, trace.route, trace.fallback) == ([[]], ["direct"], [False])
    expected = family_recorded.expected("image_square", "last_token")
    assert float((got[0] - expected).abs().max()) <= 1e-5


def test_prompts_say_who_reasons(model: Any) -> None:
    picture = Image.new("RGB", (56, 56), "red")
    query, candidate, mentioned = model.prepare(
        [
            {"instruction": "Find the picture.", "text": "a dog"},
            {"image": picture},
            {"instruction": "Find it.", "text": "what does <|emb|> mean?"},
        ]
    )
    assert int(query.input_ids[-1]) != EMB == int(candidate.input_ids[-1])
    assert "TEXT QUERY" in model.tokenizer.decode(query.input_ids)
    assert "IMAGE" in model.tokenizer.decode(candidate.input_ids)
    assert int(mentioned.input_ids[-1]) != EMB, "in a text it is no answer"
    assert model.encode([{"image": picture}], max_new_tokens=3).shape == (1, 128)


def test_evaluation_without_sides_is_refused(model: Any, tmp_path: Path) -> None:
    model.processor.empty = "reference"
    tasks = select_tasks(benchmark("MMEB-v2"), names=["CIRR"])
    with pytest.raises(OptionError, match="instruction"):
        evaluate(model, tasks, tmp_path, tmp_path / "run")
