"""Top-k on a GPU: every backend and every kind of corpus ranks as the definition does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ume_kernels.similarity_topk import similarity_topk, similarity_topk_reference
from ume_kernels.similarity_topk.stream import CudaLanes, Rows, copied, spans
from ume_models.retrieval import ExactIndex

pytestmark = [pytest.mark.gpu(dry=True)]


@pytest.fixture(params=["cuda", "triton", "torch"])
def backend(request: pytest.FixtureRequest, dry_run: bool) -> str:
    if dry_run and request.param == "cuda":
        pytest.skip("CUDA C++ has no dry run here; tests/emulator runs it on a CPU")
    return str(request.param)


def usable(backend: str, dtype: torch.dtype) -> str:
    if backend == "cuda" and dtype is torch.float32:
        pytest.skip("the CUDA C++ kernels take 16-bit inputs")
    return backend


def integers(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Products of these are exact in every dtype, so that rankings must be identical."""
    return torch.randint(-2, 3, (rows, width)).to(device, dtype)


def same(got, expected) -> None:
    assert torch.equal(got[1].cpu(), expected[1].cpu())
    assert torch.equal(got[0].cpu(), expected[0].cpu())


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 40, 8), (9, 300, 24), (70, 700, 24), (300, 9000, 200), (33, 70000, 64)]
)
def test_exact_products_rank_exactly(device, dtype, backend, shape, wide, dry_run):
    queries, candidates, width = shape
    if dry_run and candidates > 300:
        pytest.skip("takes too long in the interpreter")
    dtype = torch.float32 if wide else dtype
    backend = usable(backend, dtype)
    q = integers(queries, width, dtype, device)
    c = integers(candidates, width, dtype, device)
    for k in {1, min(100, candidates), min(128, candidates)}:
        expected = similarity_topk_reference(q, c, k)
        same(similarity_topk(q, c, k, backend=backend), expected)
        same(similarity_topk(q, c, k, backend=backend, block=256), expected)


def test_masks_and_more_than_the_fused_limit(device, dtype, backend):
    backend = usable(backend, dtype)
    q, c = integers(20, 16, dtype, device), integers(600, 16, dtype, device)
    for shape in ((600,), (20, 600)):
        allowed = torch.rand(shape, device=device) < 0.1
        got = similarity_topk(q, c, 90, allowed=allowed, backend=backend)
        same(got, similarity_topk_reference(q, c, 90, allowed=allowed))
        got = similarity_topk(q, c, 90, allowed=allowed.cpu(), backend=backend, block=256)
        same(got, similarity_topk_reference(q, c, 90, allowed=allowed))
    same(similarity_topk(q, c, 300), similarity_topk_reference(q, c, 300))


def test_segments(device, dtype):
    q, c = integers(5, 16, dtype, device), integers(600, 16, dtype, device)
    lists = [torch.randperm(600)[:size] for size in (0, 3, 100, 599, 600)]
    expected = similarity_topk_reference(
        q.cpu(), c.cpu(), 90, segments=lists, allowed=torch.arange(600) % 3 == 0
    )
    allowed = torch.arange(600, device=device) % 3 == 0
    same(similarity_topk(q, c, 90, segments=lists, allowed=allowed), expected)
    same(similarity_topk(q, c.cpu(), 90, segments=lists, allowed=allowed, block=256), expected)


def test_cosine_is_near_the_definition(device, dtype, backend):
    backend = usable(backend, dtype)
    q = torch.randn(20, 96, device=device).to(dtype)
    c = torch.randn(300, 96, device=device).to(dtype)
    scores, indices = similarity_topk(q, c, 20, normalize=True, backend=backend)
    truth = (
        torch.nn.functional.normalize(q.double(), dim=1)
        @ torch.nn.functional.normalize(c.double(), dim=1).mT
    )
    torch.testing.assert_close(scores.double(), truth.topk(20).values, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.double(), truth.gather(1, indices), atol=1e-5, rtol=0)


@pytest.mark.parametrize("where", ["host", "pinned", "memmap", "device"])
def test_a_corpus_elsewhere_ranks_the_same(device, dtype, backend, where, tmp_path, dry_run):
    backend = usable(backend, dtype)
    queries, candidates, width = (5, 300, 8) if dry_run else (50, 20_000, 64)
    q = integers(queries, width, dtype, device)
    c = integers(candidates, width, dtype, device)
    expected = similarity_topk_reference(q, c, 40)
    corpus = c.cpu()
    if where == "device":
        corpus = c
    elif where == "pinned" and not dry_run:
        corpus = corpus.pin_memory()
    elif where == "memmap":
        kind = "float16" if dtype is torch.float16 else "float32"
        np.save(tmp_path / "c.npy", corpus.float().numpy().astype(kind))
        corpus = np.load(tmp_path / "c.npy", mmap_mode="r")
        backend = backend if kind == "float16" else "torch"
    # many small blocks, so that a buffer used too early would be seen
    for block in (256, None) if dry_run else (256, 1000, None):
        same(similarity_topk(q, corpus, 40, backend=backend, block=block), expected)


@pytest.mark.gpu
def test_streams_wait_for_each_other(device):
    """A slow computation on each block: the next ones must not overwrite what it reads."""
    matrix = torch.arange(64.0)[:, None].repeat(1, 1 << 16)
    seen = []
    for _, block in copied(Rows(matrix), spans(64, 4), CudaLanes(device)):
        torch.cuda._sleep(5_000_000)
        seen.append(block.clone())
    assert torch.equal(torch.cat(seen).cpu(), matrix)


def test_an_index_goes_to_a_device_or_comes_to_its_queries(device, dtype, tmp_path):
    c, q = torch.randn(500, 16).to(dtype), torch.randn(6, 16).to(dtype)
    names = [str(row) for row in range(500)]
    index = ExactIndex(c, names)
    index.save(tmp_path)
    expected = index.search(q, 9)
    moved = index.to(device)
    mapped = ExactIndex.load(tmp_path, mapped=True)
    assert moved.device == device
    for other, queries in ((moved, q), (index, q.to(device)), (mapped, q.to(device))):
        found = other.search(queries, 9)
        assert found.scores.device == device
        torch.testing.assert_close(found.scores.cpu(), expected.scores, atol=1e-4, rtol=1e-4)
        listed = other.search(queries, 9, candidates=[names[:40]] * 6)
        assert all(int(name) < 40 for ids in listed.ids for name in ids)


def test_a_nan_is_refused(device, dtype, backend):
    backend = usable(backend, dtype)
    q, c = integers(3, 16, dtype, device), integers(300, 16, dtype, device)
    c[299, 3] = float("nan")
    with pytest.raises(ValueError, match="score is NaN"):
        similarity_topk(q, c, 2, backend=backend)
    assert similarity_topk(q, c[:299], 2, backend=backend)[1].max() < 299
