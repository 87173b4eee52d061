"""transformers' own plug points: an attention implementation and replacement classes.

Optional, and nothing else here needs them. They are registries of the whole process: what is
registered concerns models loaded from then on. Every transformers version has others, so each is
looked for before it is used, and looked up again afterwards: transformers says nothing about a
name that matches no class.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

from ume_models.errors import PatchError
from ume_models.patching.changes import ABSENT, Change
from ume_models.patching.forwards import undisturbed
from ume_models.patching.grouped_attention import attention
from ume_models.patching.report import Entry

NAME = "ume"
"""``attn_implementation="ume"``."""

FAMILIES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}
_HOME = "transformers.models.{0}.modeling_{0}"
_OURS = "Ume"

BY = "ume_models.patching.grouped_attention"
_LOADED = "models loaded with it need it for as long as they run"
_ATTENTION = (
    f'attn_implementation="{NAME}": keys and values are not repeated for grouped queries, single '
    f"tokens take the decode kernel where there is one; {_LOADED}"
)
_NORM = "RMSNorm by ume_kernels.prefill without a gradient; models loaded meanwhile keep it"


def plan(
    *, attention: bool = False, norms: bool = False, strict: bool = True
) -> tuple[list[Change], list[Entry]]:
    """What registering would change; registers nothing.

    Args:
        attention: offer ``attn_implementation="ume"`` to Qwen2-VL and Qwen2.5-VL.
        norms: build their RMSNorm layers from ours (transformers 5); same parameters and keys.
        strict: what this transformers does not have is an error; else it is listed as missing.

    Raises:
        PatchError: nothing was asked for, transformers is not installed, a plug point is missing,
            or something else is registered there.
    """
    if not attention and not norms:
        raise PatchError("nothing to register: pass attention=True, norms=True, or both")
    _transformers()
    changes: list[Change] = []
    entries: list[Entry] = []
    for asked, look in ((attention, _attention_changes), (norms, _norm_changes)):
        if not asked:
            continue
        try:
            wanted = look()
        except _Missing as missing:
            if strict:
                raise PatchError(
                    f"{missing}; strict=False lists it and registers the rest"
                ) from None
            entries.append(Entry(missing.target, "missing", reason=str(missing)))
            continue
        for change in wanted:
            if change.current() is change.new:
                reason = "already registered by this package"
                entries.append(Entry(change.entry.target, "left alone", reason=reason))
            elif change.current() is not ABSENT:
                raise PatchError(
                    f"{change.entry.target}: {change.current()!r} is registered there; unregister "
                    "it first"
                )
            else:
                changes.append(change)
                entries.append(change.entry)
    return changes, entries


# -- registries ----------------------------------------------------------------------------------


class _Missing(Exception):
    """This transformers does not have a plug point."""

    def __init__(self, target: str, reason: str) -> None:
        self.target = target
        super().__init__(f"transformers {_transformers().__version__} {reason}")


class Key(Change):
    """One key of a registry that is a dictionary."""

    def current(self) -> Any:
        """What the registry holds."""
        return self.owner.get(self.name, ABSENT)

    def apply(self) -> None:
        """Register, and keep what was there."""
        self.old = self.current()
        self.owner[self.name] = self.new

    def undo(self) -> None:
        """Put the very same object back, or remove the key."""
        if self.old is ABSENT:
            self.owner.pop(self.name, None)
        else:
            self.owner[self.name] = self.old


class PatchMapping(Change):
    """One class name in transformers' patch mapping; `owner` is the module that builds it."""

    def current(self) -> Any:
        """What is registered under the name."""
        return _monkey_patching().get_patch_mapping().get(self.name, ABSENT)

    def apply(self) -> None:
        """Register, and see whether transformers finds the name."""
        registry = _monkey_patching()
        registry.register_patch_mapping({self.name: self.new})
        with registry.apply_patches():
            found = vars(self.owner).get(self.name)
        if found is not self.new:
            registry.unregister_patch_mapping([self.name])
            raise TypeError(f"the patch mapping does not reach it, {found} is built")

    def undo(self) -> None:
        """Unregister."""
        _monkey_patching().unregister_patch_mapping([self.name])


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise PatchError(
            f'transformers is not installed ({error}); pip install "transformers>=4.52.3"'
        ) from error
    return transformers


def _monkey_patching() -> Any:
    from transformers import monkey_patching

    return monkey_patching


def _masking_utils() -> Any:
    try:
        from transformers import masking_utils
    except ImportError:
        return None
    return masking_utils


def _modeling(family: str) -> Any:
    return import_module(_HOME.format(family))


# -- attention -----------------------------------------------------------------------------------


def _attention_changes() -> list[Change]:
    """``AttentionInterface``, the masks that go with it, and the tables older models read."""
    from transformers import modeling_utils

    target = "transformers.AttentionInterface"
    interface = getattr(modeling_utils, "AttentionInterface", None)
    mapping = getattr(interface, "_global_mapping", None)
    if not isinstance(mapping, dict):
        raise _Missing(target, "has no AttentionInterface")
    changes = [_key(mapping, attention, f"{target}[{NAME!r}]", BY, _ATTENTION)]
    masks = _masking_utils()
    registry = getattr(getattr(masks, "AttentionMaskInterface", None), "_global_mapping", None)
    if isinstance(registry, dict) and "sdpa" in registry:
        told = "the masks of sdpa: none where causal attention needs none, else bool"
        where = f"transformers.AttentionMaskInterface[{NAME!r}]"
        changes.append(_key(registry, registry["sdpa"], where, "transformers' sdpa_mask", told))
    for family in FAMILIES:
        changes.extend(_family_attention(family, interface, masks))
    return changes


def _family_attention(family: str, interface: Any, masks: Any) -> Iterator[Change]:
    """Nothing where a model family reads the interface; the keys of its own tables otherwise."""
    modeling = _modeling(family)
    if isinstance(getattr(modeling, "ALL_ATTENTION_FUNCTIONS", None), interface):
        if masks is None:
            raise _Missing(modeling.__name__, "has an attention interface without masks")
        return
    prefix = family.upper()
    names = (f"{prefix}_ATTENTION_CLASSES", f"{prefix}_VISION_ATTENTION_CLASSES")
    text, vision = (getattr(modeling, name, None) for name in names)
    if not isinstance(text, dict) or not isinstance(vision, dict) or "sdpa" not in text:
        raise _Missing(
            modeling.__name__, f"lets {FAMILIES[family]} read neither registry nor table"
        )
    ours = _owned(f"{_OURS}{FAMILIES[family]}Attention")
    yield _key(text, ours, f"{modeling.__name__}.{names[0]}[{NAME!r}]", BY, _ATTENTION)
    told = "the vision tower has no grouped queries and keeps PyTorch's attention"
    where = f"{modeling.__name__}.{names[1]}[{NAME!r}]"
    yield _key(vision, vision["sdpa"], where, "transformers' sdpa", told)


def _key(mapping: dict[str, Any], new: Any, target: str, by: str, reason: str) -> Change:
    return Key(mapping, NAME, new, Entry(target, "replaced", by, reason))


def _attention_class(name: str, original: Any) -> type:
    """transformers 4.52's attention module of a family, with its last step replaced by ours."""
    rotate = vars(sys.modules[original.__module__])["apply_multimodal_rotary_pos_emb"]

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        cache_position: torch.Tensor | None = None,
        position_embeddings: Any = None,
    ) -> tuple[torch.Tensor, Any, Any]:
        if output_attentions:
            return original.forward(
                self, hidden_states, attention_mask, position_ids, past_key_value, True,
                use_cache, cache_position, position_embeddings,
            )  # fmt: skip
        batch, count, _ = hidden_states.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (
            project(hidden_states).view(batch, count, -1, self.head_dim).transpose(1, 2)
            for project in projections
        )
        cos, sin = position_embeddings
        q, k = rotate(q, k, cos, sin, self.rope_scaling["mrope_section"])
        if past_key_value is not None:
            # rotary embedding and position are for caches that rotate or place by themselves
            told = {"sin": sin, "cos": cos, "cache_position": cache_position}
            k, v = past_key_value.update(k, v, self.layer_idx, told)
        mixed, _ = attention(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        return self.o_proj(mixed.reshape(batch, count, -1)), None, past_key_value

    return type(name, (original,), {"forward": forward, "__module__": __name__})


# -- norms ---------------------------------------------------------------------------------------


def _norm_changes() -> list[Change]:
    """transformers 5: one class of each family in the patch mapping."""
    target = "transformers.monkey_patching"
    try:
        registry = _monkey_patching()
    except ImportError:
        raise _Missing(target, "has no patch mapping (5.x has)") from None
    needed = (
        "register_patch_mapping",
        "unregister_patch_mapping",
        "get_patch_mapping",
        "apply_patches",
    )
    for name in needed:
        if not hasattr(registry, name):
            raise _Missing(target, f"has no monkey_patching.{name}")
    changes: list[Change] = []
    for family, prefix in FAMILIES.items():
        modeling, name = _modeling(family), f"{prefix}RMSNorm"
        if not isinstance(vars(modeling).get(name), type):
            raise _Missing(f"{modeling.__name__}.{name}", f"has no class {name}")
        ours = _owned(f"{_OURS}{name}")
        entry = Entry(
            f"{modeling.__name__}.{name}", "replaced", f"{__name__}.{ours.__name__}", _NORM
        )
        changes.append(PatchMapping(modeling, name, ours, entry))
    return changes


def _norm_class(name: str, original: Any) -> type:
    """A subclass with the same parameters and keys, so that it stays an RMSNorm to everybody."""
    from ume_kernels.prefill import rms_norm

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if (
            weight.dtype is not hidden_states.dtype  # the original's product is promoted
            or (torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad))
            or not undisturbed()
        ):
            return original.forward(self, hidden_states)
        return rms_norm(hidden_states, weight, self.variance_epsilon)

    return type(name, (original,), {"forward": forward, "__module__": __name__})


# -- classes -------------------------------------------------------------------------------------


def _owned(name: str) -> Any:
    """A class of ours, by a name in this module under which pickle finds it, too."""
    found = globals().get(name)
    if found is None:
        found = globals()[name] = _make(name)
    return found


def _make(name: str) -> type:
    for family, prefix in FAMILIES.items():
        if name == f"{_OURS}{prefix}RMSNorm":
            return _norm_class(name, vars(_modeling(family))[f"{prefix}RMSNorm"])
        if name == f"{_OURS}{prefix}Attention":
            table = vars(_modeling(family))[f"{family.upper()}_ATTENTION_CLASSES"]
            return _attention_class(name, table["sdpa"])
    raise KeyError(name)


def __getattr__(name: str) -> Any:
    # Unpickling a model looks its classes up here, possibly in a process that registered nothing.
    if name.startswith(_OURS):
        try:
            return _owned(name)
        except KeyError:
            pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
