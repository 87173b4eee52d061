"""Packed prefill through variable-length attention, against the row-by-row path.

FlashAttention needs a GPU: a plain loop with its semantics stands in for it, once for each
signature that PyTorch's function has had.
"""

from __future__ import annotations

import math

import pytest
import torch

import ume_models
from ume_models.backbone import packed_attention, vision
from ume_models.backbone.packed_attention import Span, attend_packed


def flash(q, k, v, starts_q, starts_k, longest_q, longest_k, causal):
    """Rows written out; causal masks are aligned to the bottom right, equal head counts only."""
    for x in (q, k, v):
        assert x.ndim == 3
        assert x.stride(-1) == 1
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert int(starts_q[-1]) == len(q)
    assert int(starts_k[-1]) == len(k) == len(v)
    assert int(starts_q.diff().max()) == longest_q
    assert int(starts_k.diff().max()) == longest_k
    assert q.shape[1] == k.shape[1]
    out = torch.empty_like(q)
    for row in range(len(starts_q) - 1):
        queries = slice(int(starts_q[row]), int(starts_q[row + 1]))
        keys = slice(int(starts_k[row]), int(starts_k[row + 1]))
        n, m = queries.stop - queries.start, keys.stop - keys.start
        for head in range(q.shape[1]):
            scores = q[queries, head] @ k[keys, head].T / math.sqrt(q.shape[2])
            if causal:
                seen = torch.arange(m) <= torch.arange(n)[:, None] + m - n
                scores = scores.masked_fill(~seen, float("-inf"))
            out[queries, head] = scores.softmax(-1) @ v[keys, head]
    return out


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    return flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    return_aux=None, scale=None, window_size=(-1, -1),
):  # fmt: skip
    assert window_size in ((-1, -1), (-1, 0))
    return flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))


def torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, num_splits=None,
):  # fmt: skip
    assert window_size in ((-1, -1), (-1, 0))
    if query.shape[1] != key.shape[1]:
        assert enable_gqa
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))


VERSIONS = [torch_2_10, torch_2_11, torch_2_12]


@pytest.fixture(params=VERSIONS, ids=lambda f: f.__name__)
def packed(request, monkeypatch):
    """Both places that ask take the packed way."""
    calls = []

    def counting(*args, **options):
        calls.append(len(args[3]) - 1)
        return request.param(*args, **options)

    counting.__signature__ = packed_attention.inspect.signature(request.param)
    monkeypatch.setattr(packed_attention, "varlen_attn", lambda: counting)
    monkeypatch.setattr(packed_attention, "variable_length", lambda *_: True)
    monkeypatch.setattr(vision, "variable_length", lambda *_: True)
    return calls


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def model(request, checkpoint_dir, qwen25_checkpoint):
    directory = checkpoint_dir if request.param == "qwen2_vl" else qwen25_checkpoint
    return ume_models.load(directory, max_new_tokens=0)


@torch.no_grad()
def test_whole_prefills_agree(model, packed):
    """Rows without a header, rows behind one, and several read tokens per row."""
    torch.manual_seed(0)
    text, config = model.model, model.config
    counts, cached = [5, 9, 1, 7], [0, 4, 6, 0]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    spans = [
        Span(i, c, s, n) for i, (c, s, n) in enumerate(zip(cached, starts, counts, strict=True))
    ]
    wanted = [2, 4, 13, 14, 21]
    embeds = torch.randn(sum(counts), config.hidden_size)
    positions = torch.randint(0, 40, (3, sum(counts)))
    shape = (config.num_layers, 2, len(counts), config.num_kv_heads, 32, config.head_dim)
    arena = torch.zeros(shape)
    for row, length in enumerate(cached):
        arena[:, :, row, :, :length] = torch.randn_like(arena[:, :, row, :, :length])
    ours = arena.clone()
    got = text.prefill(embeds, positions, spans, ours, wanted)
    assert packed == [len(counts)] * (config.num_layers - 1), "one call per layer but the last"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_attention, "variable_length", lambda *_: False)
        expected = text.prefill(embeds, positions, spans, arena, wanted)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, arena, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_images_attend_within_their_segments(model, packed):
    torch.manual_seed(0)
    grids = [(1, 4, 6), (1, 12, 10), (3, 8, 4), (1, 2, 2), (1, 2, 2)]
    patches = torch.randn(sum(t * h * w for t, h, w in grids), model.config.vision.patch_dim)
    got = model.visual(patches, grids)
    assert len(packed) == model.config.vision.depth
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "variable_length", lambda *_: False)
        expected = model.visual(patches, grids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_embeddings_do_not_change(model, packed, recorded):
    batch = recorded.batch(recorded.names, "left", pad_id=0)
    got = model.embed(**batch)
    assert packed
    with pytest.MonkeyPatch.context() as patch:
        for module in (packed_attention, vision):
            patch.setattr(module, "variable_length", lambda *_: False)
        expected = model.embed(**batch)
    assert float((got - expected).abs().max()) <= 1e-5


def test_bottom_right_alignment(packed):
    """The last query sees every key; the first of three sees all but two."""
    q, k = torch.zeros(3, 2, 8), torch.zeros(5, 1, 8)
    v = torch.eye(5)[:, None, :].repeat(1, 1, 2)[..., :8]
    starts_q, starts_k = (torch.tensor([0, n], dtype=torch.int32) for n in (3, 5))
    out = attend_packed(q, k, v, starts_q, starts_k, 3, 5, causal=True)
    seen = (out[:, 0, :5] > 0).sum(1)
    assert seen.tolist() == [3, 4, 5]
    assert torch.equal(out[:, 0], out[:, 1])
    everything = attend_packed(q, k, v, starts_q, starts_k, 3, 5, causal=False)
    assert (everything[:, 0, :5] > 0).all()


def test_the_installed_signature_is_one_of_these():
    """What this PyTorch accepts is what ``attend_packed`` passes."""
    attention = packed_attention.varlen_attn()
    assert attention is not None
    accepted = packed_attention.inspect.signature(attention).parameters
    assert {"window_size", "is_causal"} & set(accepted)
    names = list(accepted)[:7]
    assert names == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_the_cpu_attends_row_by_row():
    assert not packed_attention.variable_length(torch.device("cpu"), torch.bfloat16, 64)
    assert not packed_attention.variable_length(torch.device("cuda"), torch.float32, 64)
