"""PLUME's latent adapter: the forward of the official ``LatentMoETransition`` on our kernels.

The module keeps its parameters and its class; only what its forward computes with them changes:
one pass over the experts (two launches on a GPU, no host synchronisation) instead of a loop over
ranks and experts that asks the device after each.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ume_kernels.moe_transition import MoEWeights, SharedExpert, moe_transition
from ume_kernels.moe_transition.reference import auxiliary, clamp_step, mix_experts, route
from ume_models.patching import versions
from ume_models.patching.changes import InstanceForward
from ume_models.patching.forwards import undisturbed
from ume_models.patching.recipes import Recipe, Target, difference, tried
from ume_models.patching.versions import ORIGINAL

Tensor = torch.Tensor
Result = tuple[Tensor, dict[str, Tensor]]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PLAIN = (Tensor, nn.Parameter)

KEPT = (
    "same output and aux; the original runs while expert dropout acts, where a layer has hooks or "
    "is wrapped (LoRA, DeepSpeed ZeRO-3), under autocast of another dtype and in torch.compile"
)


class Unfit(Exception):
    """The adapter, or a call of it, is not one the kernels can take; the message tells why."""


def obstacle(module: nn.Module) -> str | None:
    """Why the kernels cannot take this adapter's weights as it is now; None if they can."""
    try:
        collect(module)
    except Unfit as reason:
        return str(reason)
    return None


def collect(module: Any) -> MoEWeights:
    """The parameters of an official ``LatentMoETransition``, as the op takes them; no copy.

    Raises:
        Unfit: a layer is missing, wrapped, hooked, or of another kind than the official one.
    """
    parts = module._modules
    try:
        ln, table, router = parts["ln"], parts["step_embed"], parts["router"]
        experts, shared = parts["experts"], parts.get("shared_expert")
        steps = module.step_embed_max_steps
    except (KeyError, AttributeError) as error:
        raise Unfit(f"it lacks a part of the official adapter ({error})") from error
    both = ("weight", "bias")
    ln_weight, ln_bias = _parameters("ln", ln, nn.LayerNorm, both)
    (embedding,) = _parameters("step_embed", table, nn.Embedding, both[:1])
    router_weight, router_bias = _parameters("router", router, nn.Linear, both)
    if table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
        raise Unfit("step_embed has options that change its values or gradients")
    if table.padding_idx is not None or table.num_embeddings != steps:
        raise Unfit("step_embed is not a table of step_embed_max_steps rows")
    layers = [_layers(f"experts.{i}", expert) for i, expert in enumerate(experts)]
    always = None if shared is None else SharedExpert(*_layers("shared_expert", shared))
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = zip(*layers, strict=True)
    return MoEWeights(
        ln_weight,
        ln_bias,
        embedding,
        router_weight,
        router_bias,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        always,
        ln.eps,
    )


def _untouched(name: str, module: Any) -> dict[str, Any]:
    """The module's attributes, if nothing listens to it and its forward is its class's.

    This runs for a dozen modules at every step: dictionaries, not ``nn.Module.__getattr__``.
    """
    own: dict[str, Any] = module.__dict__
    if (
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        raise Unfit(f"{name} has hooks, or its forward was replaced")
    return own


def _parameters(
    name: str, layer: Any, kind: type[nn.Module], wanted: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """Parameters of a layer that is exactly of its kind."""
    if type(layer) is not kind:
        raise Unfit(f"{name} is a {type(layer).__name__}, not a plain {kind.__name__}")
    own = _untouched(name, layer)["_parameters"]
    found = tuple(own[key] for key in wanted)
    if any(type(p) not in _PLAIN for p in found):
        raise Unfit(f"{name} lacks a weight or bias, or holds a sharded or quantised one")
    return found


def _layers(name: str, expert: Any) -> tuple[Tensor, ...]:
    """Weights of ``fc2(dropout(gelu(fc1(x))))``, both layers."""
    if type(expert).__name__ != "ExpertMLP":
        raise Unfit(f"{name} is a {type(expert).__name__}, not the official ExpertMLP")
    inside = _untouched(name, expert)["_modules"]
    act, dropout = inside.get("act"), inside.get("dropout")
    if type(act) is not nn.GELU or act.approximate != "none":
        raise Unfit(f"{name} has another activation than the exact GELU")
    if dropout is not None and dropout.training and dropout.p > 0:
        raise Unfit("dropout inside the experts is active")
    both = ("weight", "bias")
    return (
        *_parameters(f"{name}.fc1", inside.get("fc1"), nn.Linear, both),
        *_parameters(f"{name}.fc2", inside.get("fc2"), nn.Linear, both),
    )


def transition(
    module: Any, z_t: Any, step_id: int | Tensor, context: Tensor | None = None
) -> Result:
    """What the official forward returns, computed by ``ume_kernels.moe_transition``.

    Args:
        module: an official ``LatentMoETransition`` of either copy (evaluation: with excluded
            experts; training: with dropout, while it does not act).
        z_t: ``[B, D]`` in the dtype of the parameters.
        step_id: int, or an integer tensor of 1 or B elements; clamped into the table.
        context: ``[B, D]``, ``[1, D]``, ``[D]`` or None for zeros; cast to the dtype of ``z_t``.

    Returns:
        ``(z' [B, D], {"balance_loss", "router_entropy"})``, in the dtypes of the original.

    Raises:
        Unfit: the original must run.
    """
    if not undisturbed():
        raise Unfit("something records or transforms PyTorch's operations one by one")
    weights = collect(module)
    if type(z_t) not in _PLAIN or z_t.ndim != 2 or z_t.dtype not in _DTYPES or not len(z_t):
        raise Unfit("z_t is not a plain floating-point matrix with rows")
    rows, device = len(z_t), z_t.device
    for tensor in _tensors(weights):
        if tensor.dtype != z_t.dtype or tensor.device != device or tensor.is_meta:
            raise Unfit("z_t and the parameters differ in dtype or device")
    autocast = torch.is_autocast_enabled(device.type)
    if autocast and torch.get_autocast_dtype(device.type) != z_t.dtype:
        raise Unfit("autocast would compute in another dtype")
    if z_t.shape[1] != weights.hidden_size:
        raise Unfit("z_t has another width")
    step: int | Tensor
    if isinstance(step_id, Tensor):
        step = step_id.to(device=device, dtype=torch.long).reshape(-1)
        if step.numel() not in (1, rows):
            raise Unfit("step_id does not fit the rows")
    else:
        step = min(max(int(step_id), 0), module.step_embed_max_steps - 1)
    if context is not None:
        context = context.to(device=device, dtype=z_t.dtype)
        if context.ndim == 1:
            context = context.unsqueeze(0)
        if context.ndim == 2 and context.shape[0] == 1:
            context = context.expand(rows, -1)
        if context.shape != z_t.shape:
            raise Unfit("context does not fit z_t")
    excluded = getattr(module, "_router_exclude_mask", None)
    if excluded is not None:
        excluded = excluded.to(device=device, dtype=torch.bool)
        if excluded.is_cpu and not bool(excluded.any()):
            excluded = None
    top_k = int(module.top_k)
    native = z_t.dtype in (torch.bfloat16, torch.float32)  # where the op's linear layers may be
    gathers = z_t.is_cpu and (not native or _needs_grad(z_t, context, weights))
    run = _gathered if gathers else moe_transition
    if not autocast:
        out, aux = run(z_t, context, step, weights, top_k, excluded)
        # all of the original is computed in the dtype of z_t
        return out, {name: value.to(z_t.dtype) for name, value in aux.items()}
    with torch.autocast(device.type, enabled=False):
        # under autocast its softmax, and what follows from it, is float32
        return run(z_t, context, step, weights, top_k, excluded)


def _tensors(weights: MoEWeights) -> list[Tensor]:
    listed = [weights.fc1_weight, weights.fc1_bias, weights.fc2_weight, weights.fc2_bias]
    found = [weights.ln_weight, weights.ln_bias, weights.step_embed]
    found += [weights.router_weight, weights.router_bias]
    found += [tensor for parts in listed for tensor in parts]
    if weights.shared is not None:
        s = weights.shared
        found += [s.fc1_weight, s.fc1_bias, s.fc2_weight, s.fc2_bias]
    return found


def _needs_grad(z: Tensor, context: Tensor | None, weights: MoEWeights) -> bool:
    used = [z, *_tensors(weights), *(() if context is None else (context,))]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in used)


def _gathered(
    z: Tensor,
    context: Tensor | None,
    step: int | Tensor,
    weights: MoEWeights,
    top_k: int,
    excluded: Tensor | None,
) -> Result:
    """The transition on a CPU: each expert once, for the rows that chose it.

    With gradients, where the op evaluates every expert for every row: a GPU hides that, a CPU does
    not. As in the original, an expert that no row chose gets no gradient. Without gradients, where
    the op's linear layers are PyTorch's own: not in bfloat16 and float32.
    """
    ids = clamp_step(step, len(z), weights.step_embed.shape[0], z.device)
    routing = route(z, context, ids, weights, top_k, excluded)
    u = F.layer_norm(z, (z.shape[-1],), weights.ln_weight, weights.ln_bias, weights.ln_eps)
    rows, slots, results = [], [], []
    for e in range(weights.num_experts):
        row, slot = (routing.experts == e).nonzero(as_tuple=True)
        if row.numel():
            hidden = F.gelu(F.linear(u[row], weights.fc1_weight[e], weights.fc1_bias[e]))
            results.append(F.linear(hidden, weights.fc2_weight[e], weights.fc2_bias[e]))
            rows.append(row)
            slots.append(slot)
    at = torch.cat(rows) * top_k + torch.cat(slots)
    chosen = torch.cat(results)[at.argsort()].view(len(z), top_k, -1)
    shared = None
    if weights.shared is not None:
        s = weights.shared
        shared = F.linear(F.gelu(F.linear(u, s.fc1_weight, s.fc1_bias)), s.fc2_weight, s.fc2_bias)
    return z + mix_experts(routing, chosen, shared), auxiliary(routing.probs)


class AdapterForward(InstanceForward):
    """Forward of one adapter instance: `transition`, or the original where that does not fit."""

    def __call__(self, z_t: Tensor, step_id: int | Tensor, context: Tensor | None = None) -> Result:
        """``z_t [B, D]`` -> ``(z' [B, D], {"balance_loss", "router_entropy"})``."""
        try:
            return transition(self.module, z_t, step_id, context)
        except Unfit:
            return self.original(z_t, step_id, context)


def _of_class(original: Callable[..., Result]) -> Callable[..., Result]:
    @functools.wraps(original)
    def forward(
        self: nn.Module, z_t: Tensor, step_id: int | Tensor, context: Tensor | None = None
    ) -> Result:
        try:
            return transition(self, z_t, step_id, context)
        except Unfit:
            return original(self, z_t, step_id, context)

    return forward


def _try_forward(original: Callable[..., Any], replacement: Callable[..., Any]) -> str | None:
    """A small adapter of the module's class, where it is made as the official ones are."""
    kind = inspect.unwrap(original).__globals__["LatentMoETransition"]
    init = getattr(kind.__init__, ORIGINAL, kind.__init__)  # ours also patches the script that runs
    module: nn.Module = kind.__new__(kind)
    sizes = {"hidden_size": 16, "num_experts": 4, "top_k": 2}
    try:
        inspect.signature(init).bind(module, **sizes)
    except TypeError:
        return None
    init(module, **sizes)
    module.to("cpu", torch.float32).eval()
    generator = torch.Generator("cpu").manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    for parameter in module.parameters():
        parameter.copy_(draw(*parameter.shape) / 3)
    z, context = draw(2, 5, 16)
    wanted = original(module, z, step_id=1, context=context)
    got = replacement(module, z, step_id=1, context=context)
    # With an obstacle the original runs at every call: the same numbers, and nothing replaced.
    return difference(wanted, got) or obstacle(module)


def unknown(kind: type[nn.Module]) -> str | None:
    """Why an adapter class is not the official one, in words; None if it computes the same."""
    forward = versions.plain(kind.forward)
    return tried(_try_forward, forward, _of_class(forward))


RECIPES: tuple[Recipe, ...] = tuple(
    Recipe(
        name=name,
        modules=(module,),
        marks=("LatentMoETransition._build_step_ids", "ExpertMLP"),
        targets=(
            Target(
                "LatentMoETransition.forward",
                ("self", "z_t", "step_id", "context"),
                make=_of_class,
                by="ume_kernels.moe_transition",
                reason=KEPT,
                trial=_try_forward,
            ),
        ),
    )
    for name, module in (
        ("plume-eval", "src.model.latent_moe"),
        ("plume-train", "plume.train.latent_moe"),
    )
)
