"""contrastive_loss under autograd, compilers and caches; its stats, edges and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import ume_kernels
from ume_kernels import native
from ume_kernels.contrastive_loss import (
    ContrastiveStats,
    blocked,
    contrastive_loss,
    contrastive_loss_reference,
)
from ume_kernels.contrastive_loss.lse import DOUBLE_BACKWARD

Tensor = torch.Tensor


def matrices(n: int, m: int, d: int, seed: int = 0, dtype: Any = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n, d, generator=generator, dtype=torch.float64)
    p = torch.randn(m, d, generator=generator, dtype=torch.float64)
    return [q.to(dtype), p.to(dtype)]


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def test_stats_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "TILE_CPU", (4, 3))
    q, p = matrices(9, 14, 6, dtype=torch.double)
    valid = torch.arange(9) != 4, torch.arange(14) != 5
    loss, stats = contrastive_loss(
        q, p, scale=4.0, row_offset=3, valid=valid, return_stats=True, backend="torch"
    )
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (q, p)]
    scores = 4.0 * unit[0] @ unit[1].T
    counts = [i for i in range(9) if i != 4 and i + 3 != 5]
    assert isinstance(stats, ContrastiveStats)
    assert int(stats.count) == len(counts)
    hits = 0
    for i in range(9):
        if i not in counts:
            assert (stats.loss_per_row[i], stats.lse[i], stats.positive[i]) == (0, 0, 0)
            assert (stats.hardest[i], stats.hardest_index[i]) == (-math.inf, -1)
            continue
        kept = [j for j in range(14) if j != 5]
        rivals = {j: float(scores[i, j]) for j in kept if j != i + 3}
        best = max(rivals, key=lambda j: rivals[j])
        assert int(stats.hardest_index[i]) == best
        assert float(stats.hardest[i]) == pytest.approx(rivals[best])
        assert float(stats.positive[i]) == pytest.approx(float(scores[i, i + 3]))
        assert float(stats.lse[i]) == pytest.approx(float(scores[i, kept].logsumexp(0)))
        hits += float(scores[i, i + 3]) > rivals[best]
    assert float(stats.accuracy) == pytest.approx(hits / len(counts))
    assert float(loss) == pytest.approx(float(stats.loss_per_row.sum()) / len(counts))
    assert not any(t.requires_grad for t in vars(stats).values())


def test_equal_scores_name_the_lowest_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "TILE_CPU", (2, 2))
    q = torch.ones(3, 4)
    p = torch.ones(7, 4)
    _, stats = contrastive_loss(q, p, return_stats=True, backend="torch")
    assert stats.hardest_index.tolist() == [1, 0, 0]
    # as argmax would count it: the positive of row 0 is the first of equals
    assert float(stats.accuracy) == pytest.approx(1 / 3)
    extra = torch.ones(2, 4)
    _, stats = contrastive_loss(q[:1], p[:1], extra_negatives=extra, return_stats=True)
    assert stats.hardest_index.tolist() == [1]
    sets = torch.stack([-extra, -extra, torch.stack([-extra[0], extra[0]])])
    _, stats = contrastive_loss(q, -p, extra_negatives=sets, return_stats=True)
    assert stats.hardest_index.tolist() == [1, 0, 8]


def test_no_row_counts() -> None:
    q, p = (x.requires_grad_() for x in matrices(4, 4, 3))
    with torch.no_grad():
        q[2] = torch.nan
        p[1] = torch.inf
    for loss in (contrastive_loss, contrastive_loss_reference):
        value, stats = loss(q, p, valid=torch.zeros(4, dtype=torch.bool), return_stats=True)
        assert float(value.detach()) == 0
        assert int(stats.count) == 0
        assert float(stats.accuracy) == 0
    dq, dp = gradients(contrastive_loss(q, p, valid=torch.zeros(4, dtype=torch.bool)), q, p)
    assert not bool(dq.any() or dp.any())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"ignore": 0.1}, {"normalize": False}])
def test_bad_values_stay_visible_unless_masked(bad: float, options: dict[str, Any]) -> None:
    q, p = matrices(5, 5, 4)
    clean = contrastive_loss(q, p, valid=torch.arange(5) != 2, **options)
    q[2, 1] = p[2, 0] = bad
    value, stats = contrastive_loss(q, p, return_stats=True, **options)
    assert not math.isfinite(float(value))
    assert int(stats.hardest_index[2]) == -1
    masked = contrastive_loss(q, p, valid=torch.arange(5) != 2, **options)
    assert torch.equal(masked, clean)


def test_masks_follow_the_official_fill_value() -> None:
    # Scores low enough that the -1e4 of the masked columns counts: the analytic mass is exact.
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.double)
    valid = torch.tensor([True, False, False])
    p = -q
    got = contrastive_loss(q, p, scale=1e4, normalize=False, valid=valid)
    # the only valid score is -1e4, beside two masked ones
    assert float(got) == pytest.approx(math.log(3))
    groups = torch.tensor([0, 0, 1])
    got = contrastive_loss(q, p, scale=1e4, normalize=False, valid=valid, groups=groups)
    assert float(got) == pytest.approx(math.log(2))
    listed = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]])
    got = contrastive_loss(q, p, scale=1e4, normalize=False, valid=valid, ignore=listed)
    assert float(got) == pytest.approx((math.log(1) + math.log(2)) / 2)


def test_same_bits_again_and_with_stats() -> None:
    q, p = (x.requires_grad_() for x in matrices(40, 50, 16))
    results = []
    for stats in (False, False, True):
        value = contrastive_loss(q, p, row_offset=4, return_stats=stats)  # type: ignore[call-overload]
        value = value[0] if stats else value
        results.append([value, *gradients(value, q, p)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_derivative_is_refused() -> None:
    q, p = (x.requires_grad_() for x in matrices(4, 4, 3, dtype=torch.double))
    dq, _ = torch.autograd.grad(contrastive_loss(q, p), (q, p), create_graph=True)
    with pytest.raises(RuntimeError, match=DOUBLE_BACKWARD):
        dq.sum().backward()


def test_only_what_needs_a_gradient() -> None:
    q, p = matrices(4, 6, 3)
    p.requires_grad_()
    contrastive_loss(q, p).backward()
    assert q.grad is None
    assert p.grad is not None
    assert not contrastive_loss(q, p.detach()).requires_grad


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_into_one_graph(dynamic: bool | None) -> None:
    def step(q: Tensor, p: Tensor, scale: Tensor, valid: Tensor, extra: Tensor) -> Any:
        return contrastive_loss(
            q, p, scale=scale, valid=valid, groups=torch.zeros_like(valid, dtype=torch.long),
            ignore=0.2, extra_negatives=extra, return_stats=True,
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (5, 6):
        q, p = (x.requires_grad_() for x in matrices(n, n, 4, seed=n))
        scale = torch.tensor(7.0, requires_grad=True)
        extra = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
        inputs = (q, p, scale, torch.arange(n) != 1, extra)
        eager, stats = step(*inputs)
        found, got = compiled(*inputs)
        torch.testing.assert_close(found, eager)
        assert torch.equal(got.hardest_index, stats.hardest_index)
        expected = gradients(eager, q, p, scale)
        for a, b in zip(gradients(found, q, p, scale), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_pairs_and_float_scale() -> None:
    def step(q: Tensor, p: Tensor, ignore: Tensor) -> Tensor:
        return contrastive_loss(q, p, scale=20.0, ignore=ignore, reduction="none")

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    q, p = matrices(5, 5, 4)
    ignore = torch.tensor([[0, 1], [3, 2]])
    torch.testing.assert_close(compiled(q, p, ignore), step(q, p, ignore))
    with pytest.raises(ValueError, match="is a positive"):
        compiled(q, p, torch.tensor([[0, 1], [2, 2]]))


def test_autocast_changes_nothing() -> None:
    q, p = (x.requires_grad_() for x in matrices(6, 6, 16))
    extra = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(1))
    plain = contrastive_loss(q, p, extra_negatives=extra)
    expected = gradients(plain, q, p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contrastive_loss(q, p, extra_negatives=extra)
        got = gradients(found, q, p)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_gradient_cache_gives_the_full_batch() -> None:
    # GradCache: embed without a graph, differentiate the loss, then chunk by chunk with one.
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5))
    encoder.double()
    left, right = matrices(12, 12, 7, dtype=torch.double)
    loss_fn = contrastive_loss
    loss_fn(encoder(left), encoder(right)).backward()
    expected = [w.grad.clone() for w in encoder.parameters()]
    encoder.zero_grad()
    with torch.no_grad():
        cached = [encoder(x) for x in (left, right)]
    cached = [x.requires_grad_() for x in cached]
    loss_fn(*cached).backward()
    for x, cache in zip((left, right), cached, strict=True):
        for chunk, grad in zip(x.split(5), cache.grad.split(5), strict=True):
            encoder(chunk).backward(grad)
    for w, wanted in zip(encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(w.grad, wanted)


def test_inputs_with_any_strides() -> None:
    q, p = matrices(8, 8, 6)
    wide = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))
    wide[:, ::2] = q
    expected = contrastive_loss(q, p)
    for other in (wide[:, ::2], q.T.contiguous().T):
        leaf = other.detach().requires_grad_()
        torch.testing.assert_close(contrastive_loss(leaf, p), expected)
        reference = q.clone().requires_grad_()
        torch.testing.assert_close(
            gradients(contrastive_loss(leaf, p), leaf)[0],
            gradients(contrastive_loss(reference, p), reference)[0],
        )
    every = torch.ones(16, dtype=torch.bool)[::2]
    torch.testing.assert_close(contrastive_loss(q, p, valid=every), expected)
    same = q[:1].expand(8, 6)
    torch.testing.assert_close(
        contrastive_loss(same, p), contrastive_loss_reference(same.clone(), p)
    )


def test_choice_of_backend() -> None:
    q, p = matrices(3, 3, 4, dtype=torch.double)
    assert ume_kernels.explain("contrastive_loss", q, p).backend == "torch"
    with pytest.raises(ume_kernels.dispatch.BackendError, match="float64"):
        contrastive_loss(q, p, backend="native")
    with pytest.raises(ume_kernels.dispatch.BackendError, match="unknown backend"):
        contrastive_loss(q, p, backend="fast")


X = torch.zeros(3, 4)
LONG = torch.zeros(3, dtype=torch.long)
BOOL = torch.ones(3, dtype=torch.bool)
APART = (LONG, torch.tensor([0, 7, 0]))
ELSEWHERE = torch.zeros(1, 2, dtype=torch.long, device="meta")


def pairs(*listed: tuple[int, int]) -> dict[str, Tensor]:
    return {"ignore": torch.tensor(listed)}


ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "q must be a tensor, got a list", {"q": [1.0]}),
    (ValueError, "q must be a matrix", {"q": X[0]}),
    (ValueError, "p must be a matrix", {"p": X[None]}),
    (TypeError, "q must be float32", {"q": LONG[:, None]}),
    (ValueError, "q has 4 columns and p has 5", {"p": torch.zeros(3, 5)}),
    (ValueError, "nothing to compare", {"q": X[:, :0], "p": X[:, :0]}),
    (TypeError, "q is torch.float32 and p is torch.float16", {"p": X.half()}),
    (ValueError, "q is on cpu and p on meta", {"p": X.to("meta")}),
    (ValueError, "both need at least one", {"q": X[:0]}),
    (ValueError, "both need at least one", {"p": X[:0]}),
    (ValueError, "do not fit into 2 columns", {"p": X[:2]}),
    (ValueError, "3 rows from column 1 on", {"row_offset": 1}),
    (ValueError, "do not fit", {"row_offset": -1}),
    (TypeError, "row_offset must be an int", {"row_offset": 1.0}),
    (ValueError, "positive and finite", {"scale": 0.0}),
    (ValueError, "positive and finite", {"scale": math.nan}),
    (ValueError, "positive and finite", {"scale": 1e39}),
    (TypeError, "scale must be a float", {"scale": "50"}),
    (TypeError, "scale must be a float", {"scale": True}),
    (ValueError, "0-d tensor, got", {"scale": torch.ones(1)}),
    (ValueError, "0-d tensor, got torch.int64", {"scale": torch.tensor(5)}),
    (ValueError, "reduction must be", {"reduction": "max"}),
    (TypeError, "valid must be bool, got torch.int64", {"valid": LONG}),
    (TypeError, "valid must be a tensor or a pair", {"valid": [True, True, True]}),
    (ValueError, r"valid must be \[3\]", {"valid": BOOL[:2]}),
    (ValueError, "valid must be a pair of shapes", {"valid": (BOOL[:2], BOOL)}),
    (ValueError, "valid is on meta", {"valid": BOOL.to("meta")}),
    (TypeError, "groups must be integers, got torch.bool", {"groups": BOOL}),
    (ValueError, r"groups must be \[3\]", {"groups": LONG[:, None]}),
    (ValueError, "row 1 and its positive, column 1, differ", {"groups": APART}),
    (TypeError, "extra_negatives must be a tensor", {"extra_negatives": 1.0}),
    (ValueError, r"extra_negatives must be \[H, 4\]", {"extra_negatives": torch.zeros(2, 5)}),
    (ValueError, r"\[3, H, 4\]", {"extra_negatives": torch.zeros(2, 2, 4)}),
    (ValueError, "extra_negatives is empty", {"extra_negatives": X[:0]}),
    (TypeError, "extra_negatives is torch.float64", {"extra_negatives": X.double()}),
    (ValueError, "extra_negatives is on meta", {"extra_negatives": X.to("meta")}),
    (TypeError, "ignore must be", {"ignore": "all"}),
    (TypeError, "ignore must be", {"ignore": True}),
    (TypeError, "as a tuple is", {"ignore": (0.1,)}),
    (ValueError, "margin of ignore must be finite", {"ignore": math.inf}),
    (ValueError, "margin of ignore must be finite", {"ignore": (None, math.nan)}),
    (TypeError, "must be an int64 tensor", {"ignore": X}),
    (TypeError, "must be an int64 tensor", {"ignore": ([(0, 1)], 0.1)}),
    (ValueError, r"must be \[E, 2\]", {"ignore": LONG}),
    (ValueError, "pairs of ignore are on meta", {"ignore": ELSEWHERE}),
    (ValueError, r"ignore\[0\] = \(0, 3\) is outside \[3, 3\]", pairs((0, 3))),
    (ValueError, r"ignore\[1\] = \(-1, 0\) is outside", pairs((0, 1), (-1, 0))),
    (ValueError, r"ignore\[1\] = \(2, 2\) is a positive", pairs((0, 1), (2, 2))),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "options"), ERRORS, ids=[e[1] for e in ERRORS])
def test_bad_arguments(kind: type[Exception], message: str, options: dict[str, Any]) -> None:
    q, p = options.get("q", X), options.get("p", X)
    rest = {k: v for k, v in options.items() if k not in ("q", "p")}
    with pytest.raises(kind, match=message):
        contrastive_loss(q, p, **rest)


def test_an_offset_in_a_pair_of_masks_is_checked_against_columns() -> None:
    p = torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"groups must be \[5\]"):
        contrastive_loss(X, p, groups=LONG)
    with pytest.raises(ValueError, match="is a positive"):
        contrastive_loss(X, p, row_offset=2, ignore=torch.tensor([[1, 3]]))


HOST = ["torch", "native"]


@pytest.fixture(params=HOST)
def host(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and native.module is None:
        pytest.skip(str(native.missing))
    return str(request.param)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(host: str, default: torch.dtype) -> None:
    q, p = (x.requires_grad_() for x in matrices(30, 30, 16))
    expected = contrastive_loss(q, p, backend=host)
    wanted = gradients(expected, q, p)
    torch.set_default_dtype(default)
    try:
        loss = contrastive_loss(q, p, backend=host)
        found = gradients(loss, q, p)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_what_a_pair_that_does_not_exist_holds_has_no_effect(host: str, bad: float) -> None:
    q, p = matrices(5, 9, 8)
    ignored = torch.stack([torch.arange(5), torch.full((5,), 8)], dim=1)
    options: dict[str, Any] = {"normalize": False, "scale": 1.0, "reduction": "none"}
    expected = contrastive_loss(q, p[:8], backend=host, **options)
    p[8] = bad
    loss = contrastive_loss(q, p, ignore=ignored, backend=host, **options)
    torch.testing.assert_close(loss, expected)


def test_a_scale_of_zero_has_a_gradient(host: str) -> None:
    q, p = matrices(7, 7, 5)
    found, wanted = (torch.zeros((), requires_grad=True) for _ in range(2))
    grad = gradients(contrastive_loss(q, p, scale=found, backend=host), found)[0]
    expected = gradients(contrastive_loss_reference(q, p, scale=wanted), wanted)[0]
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_copies_of_the_positive_survive_a_margin_of_zero(host: str, normalize: bool) -> None:
    q, p = matrices(12, 12, 33)
    p[6:] = p[:6]
    q[:] = p + 0.1 * q  # the positive and its copy are each row's largest scores
    options: dict[str, Any] = {"ignore": 0.0, "reduction": "none", "normalize": normalize}
    options["bidirectional"] = False  # the copies' queries are no copies
    loss = contrastive_loss(q, p, backend=host, **options)
    assert float(loss.min()) > 0.6  # log 2: the copy takes half
    torch.testing.assert_close(
        loss, contrastive_loss_reference(q, p, **options), rtol=1e-4, atol=1e-3
    )


def test_forward_mode_is_refused() -> None:
    q, p = matrices(4, 4, 5)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: contrastive_loss(x, p), (q,), (torch.ones_like(q),))
