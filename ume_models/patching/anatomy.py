"""The parts of a transformers Qwen2-VL or Qwen2.5-VL model, in every layout, and what is wrong.

Layouts: ``model.layers`` beside ``visual`` (transformers up to 4.51, and VLM2Vec's copies of its
classes), ``model.language_model`` and ``model.visual`` (4.52 and later), or the inner models alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ume_models.errors import PatchError
from ume_models.patching import versions
from ume_models.patching.changes import InstanceForward
from ume_models.patching.unwrap import flattened, inside, lineage, part

MODELS = frozenset(
    f"{family}{kind}"
    for family in ("Qwen2VL", "Qwen2_5_VL")
    for kind in ("ForConditionalGeneration", "Model", "TextModel")
)
NORMS = frozenset(("Qwen2RMSNorm", "Qwen2VLRMSNorm", "Qwen2_5_VLRMSNorm"))
GATED = frozenset(("Qwen2MLP", "Qwen2_5_VLMLP"))
PATCHES = frozenset(("PatchEmbed", "Qwen2_5_VisionPatchEmbed"))
ADAPTERS = frozenset(("LatentMoETransition",))
SILU = frozenset(("SiLU", "SiLUActivation"))


@dataclass(frozen=True)
class Problem:
    """Why a part cannot be patched.

    Attributes:
        target: dotted name of the part; empty for the model.
        reason: what was found and what was expected.
        remedy: what the user can do.
        looked_for: True where something is missing or of another shape; False where it is there
            and must not be touched.
    """

    target: str
    reason: str
    remedy: str
    looked_for: bool = True


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a model are.

    Attributes:
        root: the model without wrappers.
        text: the decoder, which holds ``layers``.
        text_path, visual_path: their names below the root; empty for the root itself.
        multimodal_path: the model between root and decoder, None where there is none.
        visual: the vision tower, None for a text model.
        head: whether the root has an ``lm_head``.
    """

    root: nn.Module
    text: nn.Module
    text_path: str
    multimodal_path: str | None
    visual: nn.Module | None
    visual_path: str
    head: bool


def dissect(root: nn.Module) -> Anatomy:
    """Find the parts.

    Raises:
        PatchError: not one of the models known here, or its decoder or vision tower is not where
            any known layout has it.
    """
    kind = type(root).__name__
    if not MODELS & lineage(root):
        if "PlumeForEmbedding" in lineage(root):
            raise PatchError(f"{kind} is this package's own engine; there is nothing to speed up")
        if "DataParallel" in lineage(root):
            raise PatchError(
                "DataParallel copies a module's attributes to replicas on other devices, and with "
                "them what refers to the first one; use DistributedDataParallel"
            )
        held = next((n for n, child in root.named_children() if MODELS & lineage(child)), None)
        if held is not None:
            raise PatchError(f"{kind} is not known here, but the model in it is: pass model.{held}")
        raise PatchError(
            f"{kind} is not a model known here; known are {', '.join(sorted(MODELS))} of "
            "transformers (bare or inside of PEFT, DDP, FSDP, torch.compile) and VLM2Vec's "
            "MMEBModel around one"
        )
    text_path = _first(root, ("model.language_model", "language_model", "model", ""), "layers")
    if text_path is None:
        raise PatchError(
            f"{kind}: none of model.language_model, language_model, model has decoder layers; "
            "was a part removed or renamed? Load the model again"
        )
    visual_path = _first(root, ("model.visual", "visual"), "blocks")
    bare = not any(name.endswith("TextModel") for name in lineage(root)) and text_path
    if visual_path is None and bare:
        raise PatchError(
            f"{kind}: neither visual nor model.visual has vision blocks; was the vision tower "
            "removed or renamed? The text model alone can be patched: pass "
            f"model.{text_path}"
        )
    text = part(root, text_path)
    assert isinstance(text, nn.Module)
    outer, _, _ = text_path.rpartition(".")
    visual = None if visual_path is None else part(root, visual_path)
    return Anatomy(
        root,
        text,
        text_path,
        outer if text_path and text_path.endswith("language_model") else None,
        visual if isinstance(visual, nn.Module) else None,
        visual_path or "",
        head=part(root, "lm_head") is not None,
    )


def _first(root: nn.Module, paths: tuple[str, ...], child: str) -> str | None:
    found = (p for p in paths if isinstance(part(root, f"{p}.{child}"), nn.ModuleList))
    return next(found, None)


def problems(anatomy: Anatomy) -> list[Problem]:
    """Parts that are missing, of unexpected class or shape."""
    hidden = flattened(anatomy.root)  # shapes cannot be seen in the pieces FSDP1 keeps
    found = [*_in_text(anatomy, hidden)]
    if anatomy.visual is not None:
        found.extend(_in_visual(anatomy, hidden))
    return found


def _in_text(anatomy: Anatomy, hidden: bool) -> Iterator[Problem]:
    config = _text_config(anatomy.text)
    layers = part(anatomy.text, "layers")
    assert isinstance(layers, nn.ModuleList)
    prefix = f"{anatomy.text_path}." if anatomy.text_path else ""
    width = getattr(config, "hidden_size", None)
    for name in ("embed_tokens", "norm"):
        if part(anatomy.text, name) is None:
            yield _absent(f"{prefix}{name}")
    if len(layers) == 0:
        yield _absent(f"{prefix}layers.0")
    yield from _norm(anatomy.text, "norm", prefix, width, hidden)
    if width is None:
        sizes: dict[str, tuple[int, int]] = {}
    else:
        inner, heads = config.intermediate_size, config.num_attention_heads
        dim = getattr(config, "head_dim", None) or width // heads
        keys = (getattr(config, "num_key_value_heads", None) or heads) * dim
        sizes = {
            "self_attn.q_proj": (width, heads * dim),
            "self_attn.k_proj": (width, keys),
            "self_attn.v_proj": (width, keys),
            "self_attn.o_proj": (heads * dim, width),
            "mlp.gate_proj": (width, inner),
            "mlp.up_proj": (width, inner),
            "mlp.down_proj": (inner, width),
        }
    for number, layer in enumerate(layers):
        at = f"{prefix}layers.{number}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield from _norm(layer, name, at, width, hidden)
        for name, size in sizes.items():
            yield from _linear(layer, name, at, size, hidden)


def _in_visual(anatomy: Anatomy, hidden: bool) -> Iterator[Problem]:
    visual, prefix = anatomy.visual, f"{anatomy.visual_path}."
    for name in ("patch_embed.proj", "merger.ln_q", "merger.mlp.0", "merger.mlp.2"):
        if part(visual, name) is None:
            yield _absent(f"{prefix}{name}")
    blocks = part(visual, "blocks")
    assert isinstance(blocks, nn.ModuleList)
    convolution = part(visual, "patch_embed.proj")
    width = getattr(convolution, "out_channels", None)
    if len(blocks) == 0:
        yield _absent(f"{prefix}blocks.0")
    for number, block in enumerate(blocks):
        at = f"{prefix}blocks.{number}."
        for name in ("norm1", "norm2", "mlp"):
            if part(block, name) is None:
                yield _absent(f"{at}{name}")
        if width is not None:
            yield from _linear(block, "attn.qkv", at, (width, 3 * width), hidden)
            yield from _linear(block, "attn.proj", at, (width, width), hidden)


def _text_config(text: nn.Module) -> Any:
    config = getattr(text, "config", None)
    return getattr(config, "text_config", None) or config


_RELOAD = "was the model edited, or is its configuration another model's? Load it again"


def _absent(target: str) -> Problem:
    return Problem(target, "does not exist", _RELOAD)


def _norm(owner: object, name: str, at: str, width: int | None, hidden: bool) -> Iterator[Problem]:
    norm = part(owner, name)
    if norm is None:
        if at.count("layers"):
            yield _absent(f"{at}{name}")
        return
    weight = getattr(norm, "weight", None)
    if not NORMS & lineage(norm):
        yield _strange(f"{at}{name}", norm, "an RMSNorm of transformers")
    elif not hidden and width is not None and tuple(getattr(weight, "shape", ())) != (width,):
        shape = tuple(getattr(weight, "shape", ()))
        yield Problem(f"{at}{name}.weight", f"is {shape}, expected ({width},)", _RELOAD)


def _linear(
    owner: object, name: str, at: str, size: tuple[int, int], hidden: bool
) -> Iterator[Problem]:
    found = part(owner, name)
    if found is None:
        yield _absent(f"{at}{name}")
        return
    if not isinstance(found, nn.Linear):
        return  # quantised and other kinds have a message of their own
    shape = (found.in_features, found.out_features)
    weight = getattr(found, "weight", None)
    if type(found) is nn.Linear and not hidden and weight is not None and shape == size:
        shape = (weight.shape[1], weight.shape[0]) if weight.dim() == 2 else tuple(weight.shape)
    if shape != size:
        told = f"maps {shape[0]} to {shape[-1]} features, expected {size[0]} to {size[1]}"
        yield Problem(f"{at}{name}", told, _RELOAD)


def _strange(target: str, module: object, expected: str) -> Problem:
    kind = type(module)
    package = kind.__module__.split(".")[0]
    return Problem(
        target,
        f"is {kind.__module__}.{kind.__qualname__}, expected {expected}",
        f"if {package} replaced it, load the model without that",
    )


def foreign(module: nn.Module, target: str, arithmetic: bool = True) -> Problem | None:
    """Who else replaced a module's forward, if anybody; replacements of ours are nobody's.

    Args:
        module: a part of a model.
        target: its name.
        arithmetic: what the class computes is going to be computed by us, so it must be known.
    """
    own = vars(module).get("forward")
    if "_hf_hook" in vars(module):
        return offloaded(module, target)
    if own is not None and not isinstance(own, InstanceForward):
        return Problem(
            target,
            f"its forward was already replaced, by {_home(own)}",
            "take that back first, or load the model without it",
            looked_for=False,
        )
    for kind in type(module).__mro__:
        if "forward" in vars(kind):
            home = _home(vars(kind)["forward"])
            # torch's own wrappers and this package's recipes are known; others may change numbers
            if home.split(".")[0] not in (kind.__module__.split(".")[0], "torch", "ume_models"):
                return Problem(
                    target,
                    f"the forward of {kind.__name__} was already replaced, by {home}",
                    "load the model in a process that does not do that",
                    looked_for=False,
                )
            tried = ADAPTERS & lineage(module)
            if arithmetic and not tried and not versions.modelling_known(kind.__module__):
                return Problem(
                    target,
                    f"the modelling code in {kind.__module__} is not a version that was checked",
                    "load the model with transformers' own class",
                    looked_for=False,
                )
            break
    return None


def offloaded(module: nn.Module, target: str) -> Problem:
    """The problem of a module on which accelerate has a hook."""
    kind = type(vars(module)["_hf_hook"]).__name__
    return Problem(
        target,
        f"accelerate moves its weights around ({kind})",
        "call accelerate.hooks.remove_hook_from_submodules(model) and place the whole model on "
        'one device, as device_map={"": device} does',
        looked_for=False,
    )


def _home(function: Any) -> str:
    """Module in which a function was written, seen through methods, partials and decorators."""
    while True:
        inner = getattr(function, "__func__", None) or getattr(function, "func", None)
        if inner is None:
            break
        function = inner
    function = inspect.unwrap(function)
    return str(getattr(function, "__module__", None) or type(function).__module__)


def silu(module: object) -> bool:
    """Whether an activation is SiLU."""
    return bool(SILU & lineage(inside(module)))
