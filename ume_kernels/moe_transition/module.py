"""Drop-in ``nn.Module`` for the official ``LatentMoETransition``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ume_kernels.moe_transition.op import Balance, check_arguments, moe_transition
from ume_kernels.moe_transition.reference import auxiliary, clamp_step, mix_experts, route
from ume_kernels.moe_transition.weights import MoEWeights, SharedExpert, packed_view
from ume_kernels.scalars import plain


class ExpertMLP(nn.Module):
    """``fc2(dropout(gelu(fc1(x))))``, D -> 2D -> D, exact (erf) GELU."""

    def __init__(self, hidden_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 2 * hidden_size)
        self.fc2 = nn.Linear(2 * hidden_size, hidden_size)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[…, D] -> […, D]``."""
        hidden = nn.functional.gelu(self.fc1(x))
        return self.fc2(nn.functional.dropout(hidden, self.dropout, self.training))


def _read(name: str, module: nn.Module, kind: type[nn.Module]) -> Any:
    """``module``, if its parameters are all there is to it: they are read, it is not called."""
    # Older weight_norm and prune write a weight that is not a parameter before every call.
    stale = module._forward_pre_hooks and not vars(module).keys().isdisjoint(("weight", "bias"))
    if stale or type(module).forward is not kind.forward:
        raise TypeError(
            f"{name} is a {type(module).__name__}{' with a computed weight' if stale else ''}, not "
            f"a plain {kind.__name__}: its parameters are read and its forward is not called, so "
            "what wraps it would be lost. Merge the wrapper into the weights (LoRA: "
            "merge_and_unload) or take it off"
        )
    return module


def _linears(name: str, module: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """Both layers of an expert."""
    expert = _read(name, module, ExpertMLP)
    fc1, fc2 = (_read(f"{name}.{n}", getattr(expert, n), nn.Linear) for n in ("fc1", "fc2"))
    return fc1, fc2


def _repack(module: nn.Module, _: Any = None) -> None:
    # What cannot be packed is an error where it is computed or packed on request, not here.
    if isinstance(module, MoETransition) and module._packed:
        with suppress(TypeError, ValueError):
            module.pack_experts()


class MoETransition(nn.Module):
    """Latent transition adapter of PLUME.

    Constructor arguments, state-dict keys and the ``(output, aux)`` result are those of the
    official module (``VLM2Vec/src/model/latent_moe.py``), so it takes its place and its
    checkpoints. Layers are read, not called: their forward hooks do not run (but those of experts
    while dropout acts), and a wrapped layer is an error. The kernels take at most 16 experts and a
    width that is a multiple of 16; PyTorch runs others.

    Args:
        hidden_size: width D of the latent state.
        num_experts: routed experts E.
        top_k: experts per row; probabilities are not renormalised.
        use_shared_expert: add an always-on expert.
        step_embed_max_steps: rows of the step-embedding table; later steps use the last.
        excluded_expert_indices: experts the router must not choose.
        dropout: dropout probability inside the experts while training.

    Raises:
        ValueError: fewer experts remain after exclusion than ``top_k``.
        TypeError: when used or packed, a layer is not the plain one that was built.
    """

    _router_exclude_mask: torch.Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int = 4,
        top_k: int = 2,
        use_shared_expert: bool = True,
        step_embed_max_steps: int = 32,
        excluded_expert_indices: Sequence[int] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.hidden_size = int(hidden_size)
        self.num_experts = max(int(num_experts), 1)
        self.top_k = min(max(int(top_k), 1), self.num_experts)
        self.use_shared_expert = bool(use_shared_expert)
        self.step_embed_max_steps = max(int(step_embed_max_steps), 1)
        self.dropout = float(dropout)

        self._excluded = tuple(int(index) for index in excluded_expert_indices or ())
        mask = self._mask_of(self._excluded)
        self.register_buffer("_router_exclude_mask", mask, persistent=False)

        self.ln = nn.LayerNorm(self.hidden_size)
        self.step_embed = nn.Embedding(self.step_embed_max_steps, self.hidden_size)
        self.router = nn.Linear(2 * self.hidden_size, self.num_experts)
        self.experts = nn.ModuleList(
            [ExpertMLP(self.hidden_size, dropout) for _ in range(self.num_experts)]
        )
        self.shared_expert = ExpertMLP(self.hidden_size, dropout) if use_shared_expert else None
        self._packed = False
        self.register_load_state_dict_post_hook(_repack)

    def pack_experts(self) -> MoETransition:
        """Move the experts' parameters into one storage each, in place, for inference.

        Kernels then take them stacked without a copy per call. Parameters keep their names,
        identity and values and remain what ``load_state_dict`` or an optimizer writes to. ``to``
        and the like, loading, copying and pickling pack them again; what else replaces a parameter
        undoes the packing: results stay right, the copies come back.

        Raises:
            TypeError: an expert is not an ``ExpertMLP`` of two ``nn.Linear``.
            ValueError: an expert's dtype, device or shape is not that of the first.
        """
        weights = self._experts()
        for name, parameters in weights.items():
            first = parameters[0]
            for number, p in enumerate(parameters):
                if (p.dtype, p.device, p.shape) != (first.dtype, first.device, first.shape):
                    raise ValueError(
                        f"experts.{number}.{name} is {p.dtype} {list(p.shape)} on {p.device}, that "
                        f"of expert 0 {first.dtype} {list(first.shape)} on {first.device}: they "
                        "cannot share a storage"
                    )
        self._packed = True
        for parameters in weights.values():
            if parameters[0].is_meta or packed_view(parameters) is not None:
                continue
            stack = torch.stack([p.data for p in parameters])
            for parameter, part in zip(parameters, stack, strict=True):
                parameter.data = part
        return self

    def _experts(self) -> dict[str, tuple[torch.Tensor, ...]]:
        layers = [_linears(f"experts.{i}", module) for i, module in enumerate(self.experts)]
        return {
            "fc1.weight": tuple(fc1.weight for fc1, _ in layers),
            "fc1.bias": tuple(fc1.bias for fc1, _ in layers),
            "fc2.weight": tuple(fc2.weight for _, fc2 in layers),
            "fc2.bias": tuple(fc2.bias for _, fc2 in layers),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # deepcopy and pickle give every parameter a storage of its own
        super().__setstate__(state)
        _repack(self)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> MoETransition:
        super()._apply(fn, recurse)
        _repack(self)
        return self

    def _mask_of(self, excluded: Sequence[int]) -> torch.Tensor:
        chosen = sorted({int(index) for index in excluded})
        if chosen and not 0 <= chosen[0] <= chosen[-1] < self.num_experts:
            raise ValueError(f"experts are 0 … {self.num_experts - 1}, cannot exclude {chosen}")
        if self.num_experts - len(chosen) < self.top_k:
            raise ValueError(
                f"excluding experts {chosen} leaves {self.num_experts - len(chosen)}, "
                f"but each row needs top_k={self.top_k}"
            )
        # On the CPU even where parameters are created on the meta device: it is a value.
        mask = torch.zeros(self.num_experts, dtype=torch.bool, device="cpu")
        mask[chosen] = True
        return mask

    def exclusion_mask(self, excluded: Sequence[int]) -> torch.Tensor | None:
        """Bool mask ``[E]`` on the module's device for a per-call exclusion, None for none.

        Raises:
            ValueError: an index does not exist, or too few experts would remain of those that the
                constructor did not exclude.
        """
        if not excluded:
            return self._router_exclude_mask if self._excluded else None
        return self._mask_of((*self._excluded, *excluded)).to(self.router.weight.device)

    def weights(self) -> MoEWeights:
        """The parameters as the functional op takes them; no copy.

        Raises:
            TypeError: a layer is not the plain one that was built, but wraps it, say.
        """
        shared = None
        if self.shared_expert is not None:
            fc1, fc2 = _linears("shared_expert", self.shared_expert)
            shared = SharedExpert(fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        experts = self._experts()
        ln = _read("ln", self.ln, nn.LayerNorm)
        router = _read("router", self.router, nn.Linear)
        return MoEWeights(
            ln.weight,
            ln.bias,
            _read("step_embed", self.step_embed, nn.Embedding).weight,
            router.weight,
            router.bias,
            experts["fc1.weight"],
            experts["fc1.bias"],
            experts["fc2.weight"],
            experts["fc2.bias"],
            shared,
            ln.eps,
        )

    def forward(
        self,
        z_t: torch.Tensor,
        step_id: int | torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        excluded: Sequence[int] = (),
        balance: Balance = "batch",
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One transition: ``z_t [B, D]`` -> ``(z' [B, D], {"balance_loss", "router_entropy"})``.

        ``context`` is ``[B, D]``, ``[1, D]`` or ``[D]`` (broadcast), or None for zeros;
        ``excluded`` adds to the experts excluded at construction; ``balance`` is that of
        ``moe_transition``.
        """
        step_id, excluded = plain(step_id), tuple(excluded)
        if context is not None:
            context = context.to(z_t)
            if context.ndim == 1:
                context = context.unsqueeze(0)
            if context.shape[0] == 1:
                context = context.expand(z_t.shape[0], -1)
        if self.training and self.dropout > 0:
            return self._forward_dropout(z_t, step_id, context, excluded, balance)
        mask = self.exclusion_mask(excluded)
        return moe_transition(
            z_t, context, step_id, self.weights(), self.top_k, mask, balance=balance
        )

    def _forward_dropout(
        self,
        z: torch.Tensor,
        step: int | torch.Tensor,
        context: torch.Tensor | None,
        excluded: Sequence[int],
        balance: Balance,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # Dropout draws inside each expert, which the functional op does not know.
        weights, mask = self.weights(), self.exclusion_mask(excluded)
        check_arguments(z, context, step, weights, self.top_k, mask, balance)
        step_ids = clamp_step(step, z.shape[0], self.step_embed_max_steps, z.device)
        routing = route(z, context, step_ids, weights, self.top_k, mask)
        u = self.ln(z).to(z.dtype)
        every = torch.stack([expert(u) for expert in self.experts])
        rows = torch.arange(z.shape[0], device=z.device)
        chosen = every[routing.experts, rows[:, None]]
        shared = self.shared_expert(u) if self.shared_expert is not None else None
        return z + mix_experts(routing, chosen, shared), auxiliary(routing.probs, balance)
