"""transformers' own plug points: what is registered gives the same numbers and goes away again."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from ume_kernels.triton_backend import interpreting
from ume_models.errors import PatchError
from ume_models.patching import apply, plug_points, revert
from ume_models.patching.grouped_attention import attention

pytestmark = pytest.mark.compat

Tensor = torch.Tensor
FAMILIES = plug_points.FAMILIES
NEEDED: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 512,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "image_token_id": 110,
    "vision_start_token_id": 112,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip
VISIONS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16,
        "fullatt_block_indexes": [1],
    },
}  # fmt: skip


def transformers_5() -> bool:
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


@cache
def built(family: str, implementation: str) -> Any:
    """One model for all tests; it looks its attention up when it is called."""
    return build(family, implementation)


def build(family: str, implementation: str) -> Any:
    """The same weights whatever the attention is."""
    import transformers

    name = FAMILIES[family]
    vision = {**VISION, **VISIONS[family]}
    config = getattr(transformers, f"{name}Config")(**NEEDED, vision_config=vision)
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    model = kind._from_config(config, attn_implementation=implementation)
    torch.manual_seed(0)
    for parameter in model.parameters():
        # the published initialisation is so small that a hidden token would hardly be seen
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return model.eval()


@pytest.fixture
def models(every_registry_as_before: None) -> Iterator[Callable[[str, str], Any]]:
    """``models(family, implementation)`` with "ume" registered."""
    report = apply("transformers", attention=True)
    yield built
    revert(report)


@pytest.fixture(autouse=True)
def every_registry_as_before() -> Iterator[None]:
    before = registries()
    yield
    assert registries() == before


def registries() -> list[tuple[str, list[Any]]]:
    """Every registry, with its keys in their order."""
    from transformers.modeling_utils import AttentionInterface

    found: list[tuple[str, Any]] = [("attention", AttentionInterface._global_mapping)]
    masks = plug_points._masking_utils()
    if masks is not None:
        found.append(("masks", masks.AttentionMaskInterface._global_mapping))
    if transformers_5():
        found.append(("classes", plug_points._monkey_patching().get_patch_mapping()))
    for family in FAMILIES:
        modeling = vars(plug_points._modeling(family))
        found.extend((name, modeling[name]) for name in modeling if "ATTENTION_CLASSES" in name)
    return [(name, list(mapping.items())) for name, mapping in found]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def padded(side: str) -> dict[str, Tensor]:
    """Three rows; the shorter ones are padded on a side, or there are none."""
    lengths = (9, 9, 9) if side == "none" else (9, 4, 7)
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(ids)
    generator = torch.Generator().manual_seed(1)
    for row, length in enumerate(lengths):
        at = slice(9 - length, 9) if side == "left" else slice(0, length)
        ids[row, at] = torch.randint(3, 100, (length,), generator=generator)
        mask[row, at] = 1
    return {"input_ids": ids, "attention_mask": mask}


# -- attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_batches_equal_sdpa_and_eager(models: Any, family: str, side: str) -> None:
    inputs = padded(side)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        found, *others = (models(family, a)(**inputs).logits for a in ("ume", "sdpa", "eager"))
    for expected in others:
        assert relative(found[real], expected[real]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_images_equal_sdpa(models: Any, family: str) -> None:
    grid = torch.tensor([[1, 4, 4], [1, 2, 6]])
    torch.manual_seed(2)
    inputs = {
        "input_ids": torch.tensor(
            [[5, 112, *[110] * 4, 7, 8, 9], [0, 5, 112, *[110] * 3, 7, 8, 9]]
        ),
        "pixel_values": torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4),
        "image_grid_thw": grid,
    }
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    if transformers_5():
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == 110).int()
    with torch.no_grad():
        found, expected = (models(family, a)(**inputs).logits for a in ("ume", "sdpa"))
    real = inputs["attention_mask"].bool()
    assert relative(found[real], expected[real]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["none", "left"])
def test_cached_decoding_equals_eager(models: Any, family: str, side: str) -> None:
    inputs = padded(side)
    options = {
        "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    found, expected = (models(family, a).generate(**inputs, **options) for a in ("ume", "eager"))
    assert torch.equal(found.sequences, expected.sequences)
    for got, wanted in zip(found.logits, expected.logits, strict=True):
        assert relative(got, wanted) <= 1e-5


def test_a_preallocated_cache_equals_sdpa(models: Any) -> None:
    if not getattr(models("qwen2_vl", "sdpa"), "_supports_static_cache", True):
        pytest.skip("this transformers has no preallocated cache for Qwen2-VL")
    inputs = padded("left")
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    options |= {"disable_compile": True, "output_logits": True, "return_dict_in_generate": True}
    found, expected = (models("qwen2_vl", a).generate(**inputs, **options) for a in ("ume", "sdpa"))
    for got, wanted in zip(found.logits, expected.logits, strict=True):
        assert relative(got, wanted) <= 1e-5


@pytest.mark.parametrize("side", ["none", "right"])
def test_gradients_equal_sdpa(models: Any, side: str) -> None:
    inputs = padded(side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    gradients = []
    for implementation in ("ume", "sdpa"):
        model = copy.deepcopy(models("qwen2_vl", implementation)).train()
        model(**inputs, labels=labels).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for found, expected in zip(*gradients, strict=True):
        assert relative(found, expected) <= 1e-5


def test_a_loaded_model_can_change_to_it(models: Any) -> None:
    model = copy.deepcopy(models("qwen2_vl", "sdpa"))
    if not hasattr(model, "set_attn_implementation"):
        pytest.skip("this transformers cannot change the attention of a loaded model")
    model.set_attn_implementation("ume")
    inputs = padded("left")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        found = model(**inputs).logits
        expected = models("qwen2_vl", "ume")(**inputs).logits
    assert torch.equal(found[real], expected[real])


def boolean(mask: Tensor) -> bool:
    return mask.dtype is torch.bool


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
        )
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("heads", [(6, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kind", ["none", "bool", "added", "per head", "too long"])
def test_attention_is_its_formula(heads: tuple[int, int], queries: int, kind: str) -> None:
    torch.manual_seed(3)
    batch, length, dim = 2, 7, 4
    # as modules make them: heads were the last but one axis
    q = torch.randn(batch, queries, heads[0], dim, dtype=torch.float64).transpose(1, 2)
    k, v = (
        torch.randn(batch, length, heads[1], dim, dtype=torch.float64).transpose(1, 2)
        for _ in range(2)
    )
    mask = None
    if kind != "none":
        shape = (batch, heads[0] if kind == "per head" else 1, queries, length)
        mask = torch.rand(shape) < 0.6
        mask[..., 0] = True
        if kind == "added":
            mask = torch.randn(shape, dtype=torch.float64)
    given = mask
    if kind == "too long":
        given = torch.cat([mask, torch.ones_like(mask)], dim=-1)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    others = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    found, none = attention(None, *leaves, given, scaling=0.3, is_causal=False)
    assert none is None
    expected = naive(*others, mask, 0.3)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("length", [5, 8])
def test_causal_attention_starts_at_the_first_key(length: int) -> None:
    """What stands behind the queries' own keys belongs to a cache that is not filled yet."""
    torch.manual_seed(4)
    q, k, v = (torch.randn(2, heads, n, 4) for heads, n in ((4, 5), (2, length), (2, length)))
    mask = torch.ones(5, length).tril().bool()[None, None]
    found, _ = attention(nn.Module(), q, k, v, None)
    torch.testing.assert_close(found, naive(q, k, v, mask, 0.5))


@pytest.mark.interpreted
@pytest.mark.skipif(not interpreting(), reason="tests/gpu has the compiled kernels")
def test_single_tokens_take_the_decode_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    calls = []
    kernel = plug_points.attention.__globals__["attend_cache"]

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return kernel(*arguments)

    monkeypatch.setitem(plug_points.attention.__globals__, "attend_cache", counted)
    expected = naive(q, k, v, None, 0.25)
    torch.testing.assert_close(attention(None, q, k, v, None)[0], expected)
    assert not calls
    monkeypatch.setenv("UME_BACKEND", "decode:triton")
    torch.testing.assert_close(attention(None, q, k, v, None)[0], expected)
    assert len(calls) == 1
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    for options in ({"dropout": 0.5}, {"scaling": 0.3}, {"attention_mask": mask}):
        attention(None, q, k, v, **{"attention_mask": None, **options})
    attention(None, q.requires_grad_(), k, v, None)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["softcap", "position_bias", "output_attentions"])
def test_what_it_has_not_is_refused(name: str) -> None:
    q = torch.ones(1, 2, 1, 4)
    with pytest.raises(ValueError, match=rf'"ume" has no {name}; .*"eager"'):
        attention(None, q, q, q, None, **{name: True})
    with pytest.raises(ValueError, match=r"expected \[B, H or 1, Q, L\]"):
        attention(None, q, q, q, torch.ones(1, 1))


# -- registries ------------------------------------------------------------------------------------


def test_nothing_is_left_after_revert() -> None:
    before = registries()
    report = apply("transformers", attention=True, norms=transformers_5())
    during = registries()
    assert during != before
    assert report.active
    again = apply("transformers", attention=True)
    assert not again.changes
    assert {entry.action for entry in again.entries} == {"left alone"}
    assert registries() == during
    revert(report)
    assert registries() == before
    with pytest.raises((ValueError, KeyError), match="ume"):
        build("qwen2_vl", "ume")


def test_a_name_that_somebody_else_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, "ume", print)
    before = registries()
    with pytest.raises(PatchError, match=r"print.* is registered there"):
        apply("transformers", attention=True)
    assert registries() == before


def test_nothing_asked_for_is_an_error() -> None:
    with pytest.raises(PatchError, match="attention=True, norms=True"):
        apply("transformers")


def test_without_a_patch_mapping_norms_are_missing() -> None:
    if transformers_5():
        pytest.skip("transformers 5 has one")
    with pytest.raises(PatchError, match="has no patch mapping"):
        apply("transformers", norms=True)
    report = apply("transformers", norms=True, strict=False)
    assert [entry.target for entry in report.missing] == ["transformers.monkey_patching"]
    assert not report.changes


@pytest.fixture
def norms() -> Iterator[None]:
    if not transformers_5():
        pytest.skip("transformers 4 has no patch mapping")
    report = apply("transformers", norms=True)
    yield
    revert(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_built_with_our_norm(norms: None, family: str) -> None:
    found = build(family, "sdpa")
    kinds = {type(m).__name__ for m in found.modules() if "RMSNorm" in type(m).__name__}
    assert kinds == {f"Ume{FAMILIES[family]}RMSNorm"}
    inputs = padded("right")
    real = inputs["attention_mask"].bool()
    report = apply("transformers", norms=True)
    assert not report.changes
    plain = plug_points._monkey_patching()
    plain.unregister_patch_mapping([f"{FAMILIES[family]}RMSNorm"])
    try:
        expected = build(family, "sdpa")
    finally:
        ours = getattr(plug_points, f"Ume{FAMILIES[family]}RMSNorm")
        plain.register_patch_mapping({f"{FAMILIES[family]}RMSNorm": ours})
    assert not any(type(m).__module__ == plug_points.__name__ for m in expected.modules())
    assert found.state_dict().keys() == expected.state_dict().keys()
    with torch.no_grad():
        assert relative(found(**inputs).logits[real], expected(**inputs).logits[real]) <= 1e-5
    # with gradients the original's formula runs
    for model in (found, expected):
        model(**inputs).logits[real].square().mean().backward()
    grads = [[p.grad for p in model.parameters()] for model in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True) if a is not None)


def test_models_with_our_norm_can_be_copied_and_pickled(norms: None) -> None:
    model = build("qwen2_vl", "sdpa")
    inputs = padded("none")
    with torch.no_grad():
        expected = model(**inputs).logits
        buffer = io.BytesIO(pickle.dumps(model))
        for other in (copy.deepcopy(model), pickle.load(buffer)):
            assert torch.equal(other(**inputs).logits, expected)


def test_a_name_that_matches_nothing_is_an_error(norms: None) -> None:
    mapping = plug_points._monkey_patching().get_patch_mapping
    before = mapping()
    change, *_ = plug_points._norm_changes()
    lost = plug_points.PatchMapping(change.owner, "NoSuchRMSNorm", change.new, change.entry)
    with pytest.raises(TypeError, match="does not reach"):
        lost.apply()
    assert mapping() == before
