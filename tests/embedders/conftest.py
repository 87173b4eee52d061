"""Recorded single-pass embeddings of other families, and models of them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ume_models
from ume_models.errors import ItemError
from ume_models.rollout import tokens

FAMILY = Path(__file__).parent.parent / "conformance" / "family_seen"


@pytest.fixture(scope="session")
def family_recorded(recorded: Any) -> Any:
    """The recorded families; their pictures are those of PLUME's recording."""
    tensors = {**recorded.tensors, **load_file(FAMILY / "cases.safetensors")}
    return type(recorded)(tensors, recorded.names)


@pytest.fixture(scope="session")
def load_family() -> Callable[..., Any]:
    """``load`` of the families' checkpoint, one model per set of options."""
    loaded: dict[tuple[tuple[str, Any], ...], Any] = {}

    def get(**options: Any) -> Any:
        key = tuple(sorted(options.items()))
        if key not in loaded:
            loaded[key] = ume_models.load(FAMILY / "checkpoint", **options)
        return loaded[key]

    return get


@pytest.fixture
def own_inputs(recorded_inputs: Any, family_processor: Any) -> Callable[..., None]:
    """Asserts that a family's official profile gives the inputs that its own code did.

    What that code refuses is refused; its cut texts are tested beside.
    """

    def check(family: Any) -> None:
        recorded = recorded_inputs(f"processing_families/{family.family}")
        processor = family_processor(family.profiles["official"])
        for key, case in recorded.cases.items():
            item = {"text": case.get("text_given", ""), "instruction": case.get("instruction", "")}
            if "fails" in case:
                with pytest.raises(ItemError):
                    processor.plan([{**item, **recorded.media(key)}])
            elif not key.startswith("text_long"):
                recorded.check(processor, key, item)

    return check


@pytest.fixture
def agrees(family_recorded: Any) -> Callable[[Any, str], None]:
    """Asserts that a model gives the recorded embeddings: alone and in shuffled batches."""

    def check(model: Any, variant: str) -> None:
        for name in family_recorded.names:
            got = model.embed(**family_recorded.inputs(name))[0]
            assert float((got - family_recorded.expected(name, variant)).abs().max()) <= 1e-5, name
        for seed, side in ((0, "left"), (1, "right")):
            names = list(family_recorded.names)
            random.Random(seed).shuffle(names)
            got = model.embed(**family_recorded.batch(names, side, pad_id=480))
            expected = torch.stack([family_recorded.expected(n, variant) for n in names])
            assert float((got - expected).abs().max()) <= 1e-5, side

    return check


@pytest.fixture
def writes(family_recorded: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Asserts that a model writes the recorded ids and gives the recorded embeddings.

    Alone, and in shuffled batches of which only some rows decode at a time; yields names and trace.
    """

    def check(model: Any, ids: str, variant: str, **options: Any) -> Any:
        names = list(family_recorded.names)
        for seed, side, slots in ((None, "", 1), (0, "left", 2), (1, "right", 4)):
            monkeypatch.setitem(tokens.SLOTS, "cpu", slots)
            random.Random(seed).shuffle(names)
            batches = [[name] for name in names] if seed is None else [names[:]]
            for batch in batches:
                inputs = (
                    family_recorded.inputs(batch[0])
                    if seed is None
                    else family_recorded.batch(batch, side, pad_id=480)
                )
                got, trace = model.embed(**inputs, **options, return_trace=True)
                recorded_ids = [family_recorded.tensors[f"{n}.{ids}.ids"].tolist() for n in batch]
                assert trace.token_ids == recorded_ids
                expected = torch.stack([family_recorded.expected(n, variant) for n in batch])
                assert float((got - expected).abs().max()) <= 1e-5
                yield batch, trace

    return check


@pytest.fixture
def recorded_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """The families' checkpoint with changes of its ``config.json``."""

    def make(**changes: Any) -> Path:
        target = tmp_path / "checkpoint"
        shutil.copytree(FAMILY / "checkpoint", target)
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, **changes}))
        return target

    return make
