"""Reasoning in words: rows that decode and leave, against transformers' ``generate``.

    pytest benchmarks/test_tokens.py --benchmark-only --benchmark-json=out.json

Random weights write nonsense of any length, so a row's length, and whether it is direct, is a
function of its first tokens: the same for every engine, because all of them write the same tokens.
float32, which makes that sure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.record import record
from benchmarks.rivals.generate import generate
from benchmarks.scale import scale
from benchmarks.shaped import shaped_model
from ume_models.backbone.transformers_model import build_transformers_model
from ume_models.rollout.sequence import build_sequence
from ume_models.rollout.tokens import Token

SIZE = scale()
ITEMS, SLOTS, BUDGET = (6, 2, 8) if SIZE.tiny else (128, 16, 64)
ALONE = 2 if SIZE.tiny else 4
"""Items of the engine that takes them one by one."""

Ends = Callable[[Sequence[int]], bool]


def spread(ids: Sequence[int], least: int, most: int) -> int:
    """A number of the tokens, evenly spread."""
    return least + sum((at + 1) * token for at, token in enumerate(ids)) * 7919 % (most - least + 1)


def varied(ids: Sequence[int]) -> bool:
    """Rows of 4 to BUDGET tokens."""
    return len(ids) >= 3 and len(ids) >= spread(ids[:3], 4, BUDGET)


def direct(percent: int, ids: Sequence[int]) -> bool:
    """So many of a hundred rows end with their first token, the others with the budget."""
    return len(ids) == 1 and spread(ids[:1], 1, 100) <= percent


CASES: dict[str, Ends | None] = {
    f"{BUDGET} tokens each": None,
    f"4 to {BUDGET} tokens": varied,
    "TRACE, none direct": partial(direct, 0),
    "TRACE, half direct": partial(direct, 50),
    "TRACE, 96 % direct": partial(direct, 96),
    "TRACE, all direct": partial(direct, 100),
}


class Ending(Token):
    """A policy whose rows end where the case says."""

    case: Ends

    def ends(self, ids: Sequence[int]) -> bool:
        return self.case(ids)


SHAPES = ["small", "qwen2-vl-2b"] if SIZE.name == "full" else ["small"]


@pytest.fixture(scope="module", params=SHAPES)
def shaped(request: Any) -> Any:
    """Weights of the size, and the same in transformers' modules; four layers of the 2B shape."""
    shape = "tiny" if SIZE.tiny else request.param
    model = shaped_model(shape, torch.float32, layers=4 if shape == "qwen2-vl-2b" else None)
    module = build_transformers_model(
        model.config, model.state_dict(), model.model.embed_tokens.weight.shape[0]
    )
    return shape, model, module


@pytest.fixture(scope="module")
def prompts() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(60, 141, (ITEMS,), generator=draw).tolist()
    return [torch.randint(300, 500, (n,), generator=draw) for n in lengths]


@pytest.mark.parametrize("engine", ["token engine", "batched generate", "one at a time"])
@pytest.mark.parametrize("case", CASES)
def test_tokens(benchmark: Any, shaped: Any, prompts: Any, case: str, engine: str) -> None:
    shape, model, module = shaped
    ends = CASES[case]
    items = prompts[:ALONE] if engine == "one at a time" else prompts

    def ours() -> list[list[int]]:
        policy = Token(model.model.embed_tokens.weight, -1, "official", (), BUDGET, slots=SLOTS)
        if ends is not None:
            policy = Ending(**{f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)})
            object.__setattr__(policy, "case", ends)
        rows = [build_sequence(ids.numpy(), model.config) for ids in items]
        return model.rollout.run(rows, policy, trace=True)[1].token_ids

    def theirs() -> list[list[int]]:
        return generate(module, items, 1 if engine == "one at a time" else SLOTS, BUDGET, ends)

    with torch.no_grad():
        record(
            benchmark, ours if engine == "token engine" else theirs,
            section="tokens", group=f"{case}, {shape}", engine=engine,
            role={"token engine": "ours", "one at a time": "reference"}.get(engine, "rival"),
            samples=len(items), batch=SLOTS, rounds=1, warm_up=0, shape=shape,
        )  # fmt: skip
