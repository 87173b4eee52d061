"""What stands in the place of the forward of single modules of a transformers model.

Every one of them calls the original wherever its own conditions do not hold: inside of
``torch.compile`` and other tracers, with gradients where there is no backward, with number formats
it was not made for. Weights are read when called.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from ume_kernels.linear import linear
from ume_kernels.prefill import rms_norm, silu_mul, silu_mul_
from ume_models.errors import PatchError
from ume_models.patching.changes import InstanceForward

WORTH_REUSING = 1 << 18
"""Values of a CPU tensor above which not allocating another one is worth the longer way there."""


def undisturbed() -> bool:
    """Whether nothing records, counts or transforms PyTorch's operations one by one.

    ``torch.compile``, ``torch.jit.trace``, ``torch.func``, forward-mode differentiation and
    dispatch modes (FLOP counters, fake tensors) would not see what a kernel of ours does.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _watched(*modules: nn.Module) -> bool:
    """Whether somebody has hooks on these modules, and so expects that they are called."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


class LinearForward(InstanceForward):
    """``nn.Linear`` by ``ume_kernels.linear``: native for few rows without gradient."""

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., K] -> [..., N]``."""
        dtype = input.dtype
        if (
            (dtype is not torch.bfloat16 and dtype is not torch.float32)
            or (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is not dtype)
            or not undisturbed()
        ):
            return self.original(input)
        module: Any = self.module
        return linear(input, module.weight, module.bias)


class RMSNormForward(InstanceForward):
    """transformers' RMSNorm in one pass: statistics in float32, rounded before the weight."""

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., D] -> [..., D]``."""
        module: Any = self.module
        weight = module.weight
        if (
            weight.dtype is not hidden_states.dtype  # the original's product is promoted
            or _needs_grad(hidden_states, weight)
            or not undisturbed()
        ):
            return self.original(hidden_states)
        return rms_norm(hidden_states, weight, module.variance_epsilon)


class SwiGLUForward(InstanceForward):
    """``down(silu(gate(x)) * up(x))``, the product written over the gate.

    The two are the widest tensors of a layer; the original allocates two more.
    """

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., D] -> [..., D]``."""
        module: Any = self.module
        if _watched(module.act_fn) or not undisturbed():
            return self.original(x)
        gate, up = module.gate_proj(x), module.up_proj(x)
        if _needs_grad(gate, up) or gate.dtype is not up.dtype:
            product = module.act_fn(gate) * up
        elif type(module.gate_proj) is not nn.Linear or _watched(module.gate_proj):
            product = silu_mul(gate, up)  # somebody else may hold the gate
        elif gate.is_cpu and gate.numel() < WORTH_REUSING:
            product = F.silu(gate) * up
        else:
            product = silu_mul_(gate, up)
        return module.down_proj(product)


class PatchEmbedForward(InstanceForward):
    """The vision tower's Conv3d as the matrix product it is: its stride equals its kernel."""

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Patches ``[P, C·T·p·p] -> [P, E]``."""
        module: Any = self.module
        convolution = module.proj
        if (
            torch.compiler.is_compiling()
            or type(convolution) is not nn.Conv3d
            or _watched(convolution)
            or convolution.weight.dim() != 5
        ):
            return self.original(hidden_states)
        weight = convolution.weight.flatten(1)
        patches = hidden_states.view(-1, weight.shape[1]).to(weight.dtype)
        return F.linear(patches, weight, convolution.bias)


class NoLogits(InstanceForward):
    """Stands in for the language-model head of an embedder: logits of no words, ``[..., 0]``."""

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[..., D] -> [..., 0]``."""
        return hidden_states[..., :0]


_WITHOUT_LOGITS = (
    "this model was accelerated with logits=False; ume_models.patching.revert the report, then "
    "accelerate it without that option"
)


class RefuseLabels(InstanceForward):
    """Forward of a model without logits: a loss over labels would be one over no words."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The original.

        Raises:
            PatchError: with ``labels``.
        """
        if kwargs.get("labels") is not None:
            raise PatchError(f"labels: {_WITHOUT_LOGITS}")
        return self.original(*args, **kwargs)


class RefuseGeneration(InstanceForward):
    """``generate`` of a model without logits."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises PatchError."""
        raise PatchError(f"generate: {_WITHOUT_LOGITS}")


class RefuseReplicas(InstanceForward):
    """``nn.DataParallel`` copies a module's attributes, so its replicas would run the original."""

    def __call__(self) -> Any:
        """Raises PatchError."""
        raise PatchError(
            f"nn.DataParallel cannot take a patched {type(self.module).__name__}; use "
            "DistributedDataParallel, or ume_models.patching.revert(model) first"
        )


class SuffixMaskForward(InstanceForward):
    """A decoder that reads the attention mask of a call on a cache as flash-attention does.

    See ``repair_suffix_mask``. Everything else reaches the original as it came.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.places = {name: place for place, name in enumerate(names)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The original with a repaired ``attention_mask``."""

        def given(name: str) -> Any:
            place = self.places.get(name, len(args))
            return args[place] if place < len(args) else kwargs.get(name)

        mask, cache = given("attention_mask"), given("past_key_values")
        if cache is None or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return self.original(*args, **kwargs)
        new = given("inputs_embeds")
        new = given("input_ids") if new is None else new
        if not isinstance(new, torch.Tensor) or mask.shape[1] != new.shape[1]:
            return self.original(*args, **kwargs)
        mask = repair_suffix_mask(mask, new.shape[1], cached_tokens(cache))
        place = self.places["attention_mask"]
        if place < len(args):
            args = (*args[:place], mask, *args[place + 1 :])
        else:
            kwargs["attention_mask"] = mask
        return self.original(*args, **kwargs)


def repair_suffix_mask(
    attention_mask: torch.Tensor | None, new_tokens: int, cached: int
) -> torch.Tensor | None:
    """The mask that means under every attention what this one means under flash-attention.

    Flash-attention takes a mask of ones for "nothing is padding" and drops it, however long it
    is. The official PLUME evaluation relies on that: its call on a cache passes a mask of the new
    tokens only. Other attentions read it as a mask of the whole sequence: they fail
    (transformers up to 4.52) or hide all cached tokens but the first few (4.53 and later).

    Args:
        attention_mask: ``[B, new_tokens]`` of ones is what is repaired; any other mask, longer,
            with zeros, or of more dimensions, is returned as it is.
        new_tokens: tokens of this call.
        cached: tokens in the cache before it.

    Returns:
        None instead of such a mask. Inside of ``torch.compile``, where values cannot be looked
        at, the mask with ones for the cached tokens put in front.
    """
    if (
        attention_mask is None
        or cached == 0
        or attention_mask.dim() != 2
        or attention_mask.shape[1] != new_tokens
    ):
        return attention_mask
    if torch.compiler.is_compiling():
        before = attention_mask.new_ones((attention_mask.shape[0], cached))
        return torch.cat([before, attention_mask], dim=1)
    return None if bool((attention_mask == 1).all()) else attention_mask


def cached_tokens(cache: Any) -> int:
    """Tokens in a key-value cache: any of transformers' classes, or the older nested tuples."""
    if isinstance(cache, tuple | list):
        return int(cache[0][0].shape[-2]) if cache and cache[0] else 0
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor) and torch.compiler.is_compiling():
        return 0  # a static cache's length is a value, which a graph does not know
    return int(length)
