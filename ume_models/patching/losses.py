"""Contrastive losses of PLUME's training and of VLM2Vec, without the matrix of all scores.

The replaced functions return what the originals return; the loss itself is
``ume_kernels.contrastive_loss``, which never holds the ``[N, M]`` scores and accumulates in
float32.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ume_kernels.contrastive_loss import contrastive_loss, distributed_contrastive_loss
from ume_kernels.contrastive_loss.arguments import Reduction
from ume_models.patching import versions
from ume_models.patching.forwards import undisturbed
from ume_models.patching.recipes import Recipe, Target, difference
from ume_models.patching.report import Entry
from ume_models.patching.suffix_mask import RepairedBackbone

Tensor = torch.Tensor
PlumeLoss = tuple[Tensor, float, float, dict[str, float] | None]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)


def fused_cross_entropy(
    x: Tensor, y: Tensor, temperature: float, reduction: Reduction = "mean"
) -> Tensor:
    """``cross_entropy(x y^T / temperature, target)`` where row i's positive is ``y[i (M // N)]``.

    Cross entropy does not depend on the order of the columns: where there are several targets per
    query, the positives are moved to the front.

    Args:
        x: ``[N, D]`` queries; y: ``[M, D]`` targets, ``M >= N``. Check with `fits`.
        temperature: positive.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        The loss in the dtype the original has: that of x, float32 under autocast.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    kept = torch.float32 if autocast else x.dtype
    if autocast and x.dtype is not torch.float64:
        # as the product of the original
        x, y = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, y))
    each = len(y) // len(x)
    if each > 1:
        front = y[: len(x) * each].unflatten(0, (len(x), each)).transpose(0, 1).flatten(0, 1)
        y = torch.cat([front, y[len(x) * each :]])
    loss = contrastive_loss(
        x,
        y,
        scale=1 / temperature,
        normalize=False,
        bidirectional=False,
        reduction=reduction,
    )
    return loss.to(kept)


def fits(x: Any, y: Any, temperature: Any) -> bool:
    """Whether `fused_cross_entropy` can stand for the original: else that runs, errors and all."""
    return (
        undisturbed()
        and type(x) in _PLAIN
        and type(y) in _PLAIN
        and x.ndim == y.ndim == 2
        and x.dtype == y.dtype
        and x.dtype in _DTYPES
        and x.device == y.device
        and x.shape[1] == y.shape[1] > 0
        and 0 < len(x) <= len(y)
        and _positive(temperature)
    )


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


class _Alone(TorchDispatchMode):
    """Refuses what waits for other processes: they need not be trying the same now."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "c10d" in func.namespace:
            raise RuntimeError(f"it calls {func} on its own")
        return func(*args, **(kwargs or {}))


def _alone() -> AbstractContextManager[Any]:
    # A mode loads torch._dynamo, seconds; without a group there is nobody to wait for.
    grouped = dist.is_available() and dist.is_initialized()
    return _Alone() if grouped else nullcontext()


def _rows(*sizes: int) -> list[Tensor]:
    """Few values, whatever the precision of products is set to: the smallest are always exact."""
    generator = torch.Generator("cpu").manual_seed(5)
    return [
        torch.randn(size, 8, generator=generator, dtype=torch.float32, device="cpu")
        for size in sizes
    ]


# -- VLM2Vec ------------------------------------------------------------------------------------


def _simple_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def __call__(
        self: Any, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: Any = "mean"
    ) -> Tensor:
        known = target is None and reduction in ("mean", "sum", "none")
        if known and fits(x, y, self.temperature):
            return fused_cross_entropy(x, y, self.temperature, reduction)
        return original(self, x, y, target=target, reduction=reduction)

    return __call__


def _try_simple_loss(original: Callable[..., Any], replacement: Callable[..., Any]) -> str | None:
    loss = SimpleNamespace(temperature=0.3)
    x, same, twice = _rows(4, 4, 8)
    cases = [(y, reduction) for y in (same, twice) for reduction in ("mean", "sum", "none")]
    with _alone():
        wanted = [original(loss, x, y, reduction=reduction) for y, reduction in cases]
    return difference(wanted, [replacement(loss, x, y, reduction=r) for y, r in cases])


# -- PLUME's training ---------------------------------------------------------------------------


def _plume_loss(original: Callable[..., PlumeLoss]) -> Callable[..., PlumeLoss]:
    # The trial runs in one process: what the original does across several must be known.
    home = sys.modules.get(original.__module__)
    known = home and versions.unknown(original, home, home, KNOWN, frozenset()) is None

    @functools.wraps(original)
    def _distributed_bidirectional_contrastive_loss(
        qry_reps: Tensor,
        pos_reps: Tensor,
        valid_mask: Tensor,
        logit_scale: float,
        cross_device: bool = True,
        local_loss: bool = True,
        return_debug_stats: bool = False,
    ) -> PlumeLoss:
        # Nothing here may differ between ranks, or one would wait for the others: not the
        # number of rows, not whether any counts.
        fused = (
            not return_debug_stats
            and undisturbed()
            and type(qry_reps) in _PLAIN
            and type(pos_reps) in _PLAIN
            and qry_reps.ndim == 2
            and qry_reps.shape == pos_reps.shape
            and qry_reps.dtype == pos_reps.dtype
            and qry_reps.dtype in _DTYPES
            and valid_mask.dtype is torch.bool
            and valid_mask.shape == qry_reps.shape[:1]
            and _positive(logit_scale)
        )
        if not fused:
            return original(
                qry_reps, pos_reps, valid_mask, logit_scale, cross_device, local_loss,
                return_debug_stats,
            )  # fmt: skip
        gathers = getattr(original, "__globals__", {}).get("dist_nn", dist) is not None
        across = (
            cross_device
            and gathers
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
        )
        if across and not known:
            return original(qry_reps, pos_reps, valid_mask, logit_scale, True, local_loss)
        run = _across_ranks if across else _on_one
        return run(qry_reps, pos_reps, valid_mask, float(logit_scale), local_loss)

    return _distributed_bidirectional_contrastive_loss


def _try_plume_loss(original: Callable[..., Any], replacement: Callable[..., Any]) -> str | None:
    q, p = _rows(6, 6)
    valid = torch.tensor([True, False, True, True, False, True])
    cases: list[dict[str, Any]] = [
        {"cross_device": False, "local_loss": local} for local in (True, False)
    ]
    with _alone():
        wanted = [original(q, p, valid, 3.0, **options) for options in cases]
    return difference(wanted, [replacement(q, p, valid, 3.0, **options) for options in cases])


def _prepared(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What the product of the original is given, and the options that go with it.

    Under autocast float32 rows are normalised first and rounded then, as in the original.
    """
    kind = q.device.type
    if not torch.is_autocast_enabled(kind) or q.dtype is not torch.float32:
        return q, p, {}
    lower = torch.get_autocast_dtype(kind)
    q, p = (F.normalize(t, p=2, dim=-1).to(lower) for t in (q, p))
    return q, p, {"normalize": False}


def _kept(q: Tensor) -> torch.dtype:
    """Dtype of the original's loss."""
    return torch.float32 if torch.is_autocast_enabled(q.device.type) else q.dtype


def _on_one(q: Tensor, p: Tensor, valid: Tensor, scale: float, _: bool) -> PlumeLoss:
    count = float(valid.sum())
    if q.numel() == 0 or count == 0:
        return q.sum() * 0.0, 0.0, 0.0, None
    rows, columns, options = _prepared(q, p)
    loss = contrastive_loss(rows, columns, scale=scale, valid=valid, **options)
    return loss.to(_kept(q)), count, count, None


def _across_ranks(q: Tensor, p: Tensor, valid: Tensor, scale: float, local: bool) -> PlumeLoss:
    counts = valid.sum().repeat(2).to(torch.float32)
    dist.all_reduce(counts[1:])
    mine, everywhere = counts.tolist()
    if everywhere == 0:
        return q.sum() * 0.0, 0.0, 0.0, None
    rows, columns, options = _prepared(q, p)
    loss = distributed_contrastive_loss(
        rows, columns, scale=scale, valid=valid, local_loss=local, **options
    )
    return loss.to(_kept(q)), mine, everywhere, None


def _backbone(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _get_backbone_model(model: torch.nn.Module) -> Any:
        backbone = original(model)
        return RepairedBackbone(backbone) if isinstance(backbone, torch.nn.Module) else backbone

    return _get_backbone_model


KNOWN = {  # PLUME 4911f27 to 18db7e4
    "_compute_contrastive_debug_stats": "bcc3b8b8dfa0ba71",
    "_distributed_bidirectional_contrastive_loss": "b08526b121a7e90b",
    "_get_backbone_model": "6a56d619a9f25374",
    "_unwrap_model": "00f2f26d6b44fcb2",
}

RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="plume-train",
        modules=("plume.train.train_plume", "__main__"),
        marks=("_distributed_bidirectional_contrastive_loss", "_stack_optional_reps"),
        known=KNOWN,
        targets=(
            Target(
                "_distributed_bidirectional_contrastive_loss",
                (
                    "qry_reps",
                    "pos_reps",
                    "valid_mask",
                    "logit_scale",
                    "cross_device",
                    "local_loss",
                    "return_debug_stats",
                ),
                make=_plume_loss,
                by="ume_kernels.contrastive_loss",
                reason="no matrix of scores, and a rank without valid pairs no longer leaves the "
                "others waiting in the backward; the original with return_debug_stats",
                trial=_try_plume_loss,
            ),
            Target(
                "_get_backbone_model",
                ("model",),
                make=_backbone,
                by="ume_models.patching.suffix_mask",
                reason="the suffix call passes a mask of the suffix's length, which only "
                "flash-attention reads as meant",
                action="repaired",
            ),
        ),
    ),
    Recipe(
        name="vlm2vec",
        modules=("src.loss",),
        marks=("SimpleContrastiveLoss", "DistributedContrastiveLoss.gather_tensor"),
        targets=(
            Target(
                "SimpleContrastiveLoss.__call__",
                ("self", "x", "y", "target", "reduction"),
                make=_simple_loss,
                by="ume_kernels.contrastive_loss",
                reason="no matrix of scores; DistributedContrastiveLoss calls it; the original "
                "with explicit targets, or fewer targets than queries",
                trial=_try_simple_loss,
            ),
        ),
        left_alone=(
            Entry(
                "src.loss.InExampleContrastiveLoss",
                "left alone",
                reason="scores only each row's own candidates: there is no large matrix",
            ),
        ),
    ),
    Recipe(
        name="vlm2vec",
        modules=("src.grad_cache.loss",),
        marks=("SimpleContrastiveLoss", "LossName2LossCls"),
        targets=(),
        left_alone=(
            Entry(
                "src.grad_cache.loss.SimpleContrastiveLoss",
                "left alone",
                reason="it returns all scores and the predictions, so they must be computed; "
                "GradCache with src.loss has the faster one",
            ),
        ),
    ),
)
