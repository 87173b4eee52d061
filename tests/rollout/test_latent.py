"""Properties of the rollout itself: its passes, its positions, and no host reads in the loop."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ume_models.rollout import engine as engine_module
from ume_models.rollout.headers import Headers
from ume_models.rollout.latent import Latent

HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "item")


class RecordOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model(load_recorded):
    return load_recorded(engine="fast")


def test_the_loop_reads_nothing_on_the_host(model, recorded, monkeypatch):
    """With the adapter's masked form, which is what runs where a host read would wait."""
    monkeypatch.setenv("UME_BACKEND", "moe_transition:torch")
    recorder = RecordOps()
    roll = Latent._roll

    def recording(*args):
        with recorder:
            return roll(*args)

    monkeypatch.setattr(Latent, "_roll", recording)
    batch = recorded.batch(recorded.names, "left", pad_id=0)
    got = model.embed(**batch, exclude_experts=(1,))
    assert len(recorder.names) > 500
    assert not [name for name in recorder.names if name in HOST_READS]
    monkeypatch.undo()
    assert float((model.embed(**batch, exclude_experts=(1,)) - got).abs().max()) <= 2e-6


@pytest.mark.parametrize("steps", [0, 1, 2, 8])
def test_k_latents_cost_k_passes_after_the_prefill(model, recorded, monkeypatch, steps):
    calls = []
    decode = model.model.decode

    def counting(embeds, lengths, *rest):
        calls.append((embeds.shape[1], lengths.tolist()))
        return decode(embeds, lengths, *rest)

    monkeypatch.setattr(model.model, "decode", counting)
    names = ["text_only", "video_8"]
    model.embed(**recorded.batch(names, "right", pad_id=0), latent_steps=steps)
    prompt = [len(recorded.tensors[f"{n}.input_ids"]) + len(model.prefix_ids) for n in names]
    suffix = len(model.suffix_ids)
    expected = [(1, [n + k for n in prompt]) for k in range(steps - 1)]
    expected.append((suffix + min(steps, 1), [n + max(steps - 1, 0) for n in prompt]))
    assert calls == expected, "one token per row at the row's own KV length, then one chunk"


def test_the_prefill_computes_no_logits_and_no_padding(model, recorded, monkeypatch):
    rows = []
    prefill = model.model.prefill

    def counting(embeds, *rest):
        rows.append(len(embeds))
        return prefill(embeds, *rest)

    monkeypatch.setattr(model.model, "prefill", counting)
    names = ["text_only", "text_long"]
    # these prompts have no image, so only the system turn before it would be a shared header
    monkeypatch.setattr(Headers, "match", lambda *_: None)
    model.embed(**recorded.batch(names, "left", pad_id=0))
    real = sum(len(recorded.tensors[f"{n}.input_ids"]) + len(model.prefix_ids) for n in names)
    assert rows == [real]
    vocabulary = model.model.embed_tokens.weight.shape[0]

    class NoHead(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and func.overloadpacket.__name__ in ("mm", "addmm"):
                assert out.shape[-1] != vocabulary, "logits were computed"
            return out

    with NoHead():
        model.embed(**recorded.inputs("text_only"))


def test_the_vision_tower_is_called_in_pieces(model, recorded, monkeypatch):
    batch = recorded.batch(recorded.names, "left", pad_id=0)
    expected = model.embed(**batch)
    sizes = []
    tower = type(model.visual).forward

    def counting(self, patches, grids):
        sizes.append(len(grids))
        return tower(self, patches, grids)

    monkeypatch.setattr(type(model.visual), "forward", counting)
    monkeypatch.setitem(engine_module.VISION_PATCHES, "cpu", 150)
    got = model.embed(**batch)
    assert len(sizes) > 2
    assert sum(sizes) == 8
    assert float((got - expected).abs().max()) <= 2e-6
