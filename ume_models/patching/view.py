"""A transformers Qwen2-VL or Qwen2.5-VL module seen as our backbone, on the same parameters.

Nothing is copied and nothing is registered on the module: our modules are made without storage and
hold the very parameters of theirs. Whatever our modules would not compute as theirs do (another
layer type, an adapter that is not merged, a hook, an active dropout) is a reason not to make one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ume_kernels import MoETransition
from ume_kernels.moe_transition.weights import MoEWeights, stack_experts
from ume_models.backbone.config import BackboneConfig, parse_config
from ume_models.backbone.text import RMSNorm, TextModel
from ume_models.backbone.vision import Grid, Norm, VisionModel
from ume_models.errors import UmeError
from ume_models.patching import versions
from ume_models.patching.unwrap import lineage, part, unwrap

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ADAPTER = "latent_moe_transition"


class NoViewError(Exception):
    """The module cannot be seen as our backbone; the message says why."""


@dataclass(frozen=True)
class View:
    """Our modules on the parameters of another model.

    Attributes:
        config: architecture, with the number of rows the embedding really has.
        text, visual: decoder and vision tower.
        adapter: the official latent adapter where the model has one.
    """

    config: BackboneConfig
    text: TextModel
    visual: VisionModel
    adapter: MoETransition | None


# -- what the module looks like now ------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """State of a module tree.

    Attributes:
        identity: ids of all modules, parameters and buffers, and what makes two of them the same
            model: dtypes, devices.
        stamp: changes when a parameter or buffer moves or is written in place.
        obstacle: what our modules would not do, in words; None if nothing.
    """

    identity: tuple[Any, ...]
    stamp: int
    obstacle: str | None


def survey(model: nn.Module) -> Survey:
    """Look at every module below ``model`` once; a millisecond or two for 700 of them."""
    identity: list[Any] = []
    values: list[int] = []
    obstacle = _everywhere()
    seen: set[int] = set()
    queue = [model]
    while queue:
        module = queue.pop()
        own = module.__dict__
        for table in (own["_parameters"], own["_buffers"]):
            for tensor in table.values():
                if tensor is not None:
                    identity += (id(tensor), tensor.dtype, tensor.device)
                    version = 0 if tensor.is_inference() else tensor._version
                    values += (tensor.data_ptr() if _plain(tensor) else 0, version)
        for child in own["_modules"].values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                identity.append(id(child))
                queue.append(child)
        identity.append(type(module).forward)
        identity += [own[name] for name in _SETTINGS if name in own]
        identity.append(bool(own.get("merged_adapters")))  # PEFT merges through .data
        if obstacle is None:
            obstacle = _obstacle(module, own)
    return Survey(tuple(identity), hash(tuple(values)), obstacle)


_SETTINGS = (
    "variance_epsilon", "eps", "scaling", "is_causal", "top_k", "approximate", "_disable_adapters",
)  # fmt: skip
"""Attributes of modules that change what they compute."""


def _everywhere() -> str | None:
    """Why no module's parameters say all of what it computes."""
    torch_modules: Any = nn.modules.module
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return "a forward hook for all modules (register_module_forward_hook) would not be called"
    return None


def _plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) and not tensor.is_meta


def _obstacle(module: nn.Module, own: dict[str, Any]) -> str | None:
    """Why the module's parameters do not say all of what it computes."""
    name = type(module).__name__
    for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]):
        for hook in hooks.values():
            # transformers 5 watches layers for output_hidden_states with hooks of its own
            if not getattr(hook, "__module__", "").startswith("transformers.utils."):
                return f"a hook on a {name} would not be called"
    forward = own.get("forward")
    if forward is not None and not type(forward).__module__.startswith("ume_models.patching"):
        return f"the forward of a {name} was replaced by another library"
    if own["training"]:
        rates = [own.get("attention_dropout"), own.get("dropout")]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates = [module.p]
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return f"dropout is active in a {name}; call model.eval()"
    return None


# -- making the view ---------------------------------------------------------------------------


def make_view(model: nn.Module) -> View:
    """Our modules on the parameters of ``model``, wrapped or not.

    Raises:
        NoViewError: the reason in words.
    """
    root = unwrap(model)
    text, visual = _towers(root)
    config = configuration(root)
    embedding = text._modules["embed_tokens"]
    rows = getattr(embedding, "num_embeddings", config.vocab_size)
    layers = text._modules["layers"]
    if isinstance(layers, nn.ModuleList) and len(layers) != config.num_layers:
        raise NoViewError(
            f"the decoder has {len(layers)} layers, its configuration {config.num_layers}"
        )
    config = replace(config, vocab_size=rows)
    with torch.device("meta"):
        ours = _TextView(config)
        tower = _VisionView(config.vision)
    _check_classes(root, text, visual)
    _check_decoder(text, config)
    _check_tower(visual, config)
    _share(ours, text, config, "decoder")
    _share(tower, visual, config, "vision tower")
    ours.frequencies = _frequencies(text, config.head_dim // 2)
    tower.rotary = _rotary(visual)
    latent = root._modules.get(ADAPTER)
    adapter = None if latent is None else _adapter(latent, config)
    _check_uniform([ours, tower, *([] if adapter is None else [adapter])])
    return View(config, ours.eval(), tower.eval(), None if adapter is None else adapter.eval())


def _towers(root: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Decoder and vision tower, wherever this version of transformers keeps them."""
    home = type(root).forward.__module__ or ""
    if "tokenselection" in home:
        raise NoViewError(f"{type(root).__name__} drops tokens on the way, which is not known here")
    text = next(
        (
            found
            for path in ("model.language_model", "language_model", "model", "")
            if isinstance(found := part(root, path), nn.Module)
            and {"embed_tokens", "layers", "norm"} <= set(found._modules)
        ),
        None,
    )
    visual = next(
        (
            found
            for path in ("model.visual", "visual")
            if isinstance(found := part(root, path), nn.Module)
            and {"patch_embed", "blocks", "merger"} <= set(found._modules)
        ),
        None,
    )
    if text is None or visual is None:
        raise NoViewError(
            f"{type(root).__name__} is not a Qwen2-VL or Qwen2.5-VL model with its vision tower"
        )
    if not versions.modelling_known(home):
        raise NoViewError(f"the modelling code in {home} is not a version that was checked")
    if not any(kind in home for kind in ("qwen2_vl", "qwen2_5_vl")):
        raise NoViewError(f"{type(root).__name__} has a forward of its own (in {home})")
    return text, visual


def configuration(root: nn.Module) -> BackboneConfig:
    """Architecture of a transformers model, from the configuration it holds.

    Raises:
        NoViewError: it has none, or one of an architecture not known here.
    """
    config: Any = getattr(root, "config", None)
    to_dict: Callable[[], dict[str, Any]] | None = getattr(config, "to_dict", None)
    if to_dict is None:
        raise NoViewError(f"{type(root).__name__} has no transformers configuration")
    try:
        return parse_config(to_dict(), "the model's configuration")
    except UmeError as error:
        raise NoViewError(str(error)) from None


def _check_classes(root: nn.Module, *towers: nn.Module) -> None:
    """Every module's forward must be the model's own class's, PyTorch's or transformers'."""
    home = type(root).forward.__module__
    for tower in towers:
        for name, module in tower.named_modules():
            origin = getattr(type(module).forward, "__module__", None) or ""
            package = origin.split(".")[0]
            if origin != home and package not in ("torch", "transformers", "peft", "ume_models"):
                raise NoViewError(f"{name}: a {type(module).__name__} with a forward of {origin}")


_ACTIVATIONS = {
    "silu": ("SiLU", "SiLUActivation"),
    "quick_gelu": ("QuickGELUActivation", "QuickGELU"),
    "gelu": ("GELU", "GELUActivation"),
}


def _check_activation(module: Any, expected: str, where: str) -> None:
    kind = type(module).__name__
    tanh = getattr(module, "approximate", "none") != "none"
    if kind not in _ACTIVATIONS[expected] or tanh:
        raise NoViewError(f"{where} is a {kind}, not {expected}")


def _check_decoder(text: nn.Module, config: BackboneConfig) -> None:
    """What attention and MLP of the decoder do beside their projections."""
    for number, layer in enumerate(text._modules["layers"].children()):  # type: ignore[union-attr]
        attention, where = part(layer, "self_attn"), f"decoder.layers.{number}"
        _check_activation(part(layer, "mlp.act_fn"), "silu", f"{where}.mlp.act_fn")
        if not getattr(attention, "is_causal", True):
            raise NoViewError(f"{where}.self_attn is not causal")
        scaling = getattr(attention, "scaling", config.head_dim**-0.5)
        if abs(scaling - config.head_dim**-0.5) > 1e-6:
            raise NoViewError(f"{where}.self_attn scales by {scaling}")


def _check_tower(visual: nn.Module, config: BackboneConfig) -> None:
    """The activations of the vision tower."""
    for number, block in enumerate(visual._modules["blocks"].children()):  # type: ignore[union-attr]
        mlp: Any = part(block, "mlp")
        found = getattr(mlp, "act_fn", None) or getattr(mlp, "act", None)
        _check_activation(found, config.vision.hidden_act, f"vision tower.blocks.{number}.mlp")
    merger: Any = part(visual, "merger.mlp")
    if isinstance(merger, nn.Sequential):
        _check_activation(merger[1], "gelu", "vision tower.merger.mlp.1")


def _share(ours: nn.Module, theirs: nn.Module, config: BackboneConfig, what: str) -> None:
    """Put their parameters into our modules of the same names.

    Raises:
        NoViewError: a module is missing, of another kind, or its parameters have other shapes.
    """
    for name, mine in ours.named_modules():
        if not mine._parameters:
            continue
        other = _layer(theirs, name, what)
        _check_kind(mine, other, config, f"{what}.{name}")
        wanted = {key: p for key, p in mine._parameters.items() if p is not None}
        given = {key: p for key, p in other._parameters.items() if p is not None}
        if set(wanted) != set(given):
            raise NoViewError(f"{what}.{name} has parameters {sorted(given)}")
        for key, parameter in given.items():
            if parameter.shape != wanted[key].shape:
                raise NoViewError(
                    f"{what}.{name}.{key} is {list(parameter.shape)}, by its configuration "
                    f"{list(wanted[key].shape)}"
                )
            mine._parameters[key] = parameter


def _layer(root: nn.Module, path: str, what: str) -> nn.Module:
    module: nn.Module | None = root
    for name in path.split("."):
        module = None if module is None else _merged(module._modules.get(name), f"{what}.{path}")
    if module is None:
        raise NoViewError(f"{what}.{path} does not exist")
    return module


def _merged(module: nn.Module | None, where: str) -> nn.Module | None:
    """The layer inside of PEFT's wrapper, if the adapter is merged into it."""
    if module is None:
        return None
    names = lineage(module)
    if "ModulesToSaveWrapper" in names:
        raise NoViewError(f"{where} is trained apart by PEFT; call merge_and_unload first")
    if "BaseTunerLayer" not in names:
        return module
    if not getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        raise NoViewError(f"{where} has a LoRA that is not merged; call merge_and_unload first")
    return module._modules.get("base_layer")


def _check_kind(mine: nn.Module, other: nn.Module, config: BackboneConfig, where: str) -> None:
    """Our arithmetic must be that of the other module's class."""
    kind = type(other)
    fits = False
    if isinstance(mine, (RMSNorm, Norm)):
        expected = config.rms_eps if isinstance(mine, RMSNorm) else 1e-6
        rms = mine._parameters.get("bias") is None
        eps = getattr(other, "variance_epsilon" if rms else "eps", None)
        fits = kind.__name__.endswith("RMSNorm") if rms else kind is nn.LayerNorm
        fits = fits and eps == expected
    elif isinstance(mine, (nn.Linear, nn.Conv3d, nn.Embedding, nn.LayerNorm)):
        fits = kind is type(mine)
    if not fits:
        raise NoViewError(f"{where} is a {kind.__module__}.{kind.__name__}, not a plain layer")


def _check_uniform(modules: Sequence[nn.Module]) -> None:
    """One plain dtype on one device.

    Raises:
        NoViewError: sharded, quantised, without storage, or mixed.
    """
    found: set[tuple[torch.dtype, torch.device]] = set()
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                raise NoViewError(f"{name} has no storage (meta device)")
            if not _plain(parameter) or type(parameter.data) is not torch.Tensor:
                raise NoViewError(f"{name} is a {type(parameter).__name__}: sharded or quantised")
            found.add((parameter.dtype, parameter.device))
    if len(found) != 1:
        raise NoViewError(
            "its parameters are not of one type on one device: "
            + ", ".join(sorted(f"{str(d).removeprefix('torch.')} on {where}" for d, where in found))
        )
    dtype, device = next(iter(found))
    if dtype not in DTYPES:
        raise NoViewError(f"its parameters are {dtype}; float32, bfloat16 and float16 are known")
    if device.type not in ("cpu", "cuda"):
        raise NoViewError(f"it is on {device}; a CPU and CUDA are known")


# -- rotary frequencies ------------------------------------------------------------------------
# They are buffers: model.to(dtype=bfloat16), as the official scripts call it, rounds them. A view
# computes with what the model has, so that it stays the same model.


class _TextView(TextModel):
    frequencies: torch.Tensor

    def inv_freq(self) -> torch.Tensor:
        return self.frequencies


class _VisionView(VisionModel):
    rotary: tuple[torch.Tensor, bool]

    def rope_angles(self, grids: Sequence[Grid]) -> torch.Tensor:
        frequencies, rounded = self.rotary
        coordinates = self.patch_coordinates(grids).to(frequencies.device)
        if rounded:  # transformers 4 multiplies in the buffer's type, 5 in float32
            angles = coordinates[..., None].to(frequencies.dtype) * frequencies
        else:
            angles = coordinates[..., None].float() * frequencies.float()
        return angles.float().flatten(1)


def _frequencies(text: nn.Module, count: int) -> torch.Tensor:
    """The decoder's frequencies ``[dh / 2]``, float32."""
    for holder in (text, getattr(text._modules["layers"], "0", text)):
        for path in ("rotary_emb", "self_attn.rotary_emb"):
            rotary = part(holder, path)
            found = rotary._buffers.get("inv_freq") if isinstance(rotary, nn.Module) else None
            if isinstance(rotary, nn.Module) and found is not None and found.shape == (count,):
                if getattr(rotary, "attention_scaling", 1.0) != 1.0:
                    raise NoViewError("its rotary embedding scales attention, which is not known")
                return found.detach().float()
    raise NoViewError("the decoder's rotary frequencies were not found")


def _rotary(visual: nn.Module) -> tuple[torch.Tensor, bool]:
    """The tower's frequencies, and whether angles are computed in their type."""
    rotary = visual._modules.get("rotary_pos_emb")
    found = None if rotary is None else rotary._buffers.get("inv_freq")
    if rotary is None or found is None:
        raise NoViewError("the vision tower's rotary frequencies were not found")
    return found.detach(), "original_inv_freq" not in rotary._buffers


# -- the latent adapter ------------------------------------------------------------------------


class _AdapterView(MoETransition):
    """The adapter with its experts stacked once for the kernels that want them so.

    ``pack_experts`` would move the user's parameters into one storage; a copy leaves them where
    they are. It is renewed for every batch, in place, where recorded graphs read it: not every
    write to a parameter can be noticed.
    """

    _stack: MoEWeights | None = None

    def weights(self) -> MoEWeights:
        weights = super().weights()
        if not weights.ln_weight.is_cuda:
            return weights
        fields = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
        stacked: dict[str, Any] = {n: stack_experts(getattr(weights, n)) for n in fields}
        if self._stack is not None:
            for name in fields:
                stacked[name] = getattr(self._stack, name).copy_(stacked[name])
        self._stack = replace(weights, **stacked)
        return self._stack


def _adapter(latent: nn.Module, config: BackboneConfig) -> MoETransition:
    """The official ``LatentMoETransition``, or ours, on the same parameters."""
    if "LatentMoETransition" not in lineage(latent) and not isinstance(latent, MoETransition):
        raise NoViewError(f"{ADAPTER} is a {type(latent).__name__}, not a LatentMoETransition")
    shape: Any = latent
    mask = latent._buffers.get("_router_exclude_mask")
    excluded = () if mask is None else tuple(int(i) for i in mask.nonzero().flatten().tolist())
    try:
        with torch.device("meta"):
            ours = _AdapterView(
                hidden_size=shape.hidden_size,
                num_experts=shape.num_experts,
                top_k=shape.top_k,
                use_shared_expert=latent._modules.get("shared_expert") is not None,
                step_embed_max_steps=shape.step_embed_max_steps,
                excluded_expert_indices=excluded,
            )
    except (AttributeError, ValueError) as error:
        raise NoViewError(f"{ADAPTER}: {error}") from None
    if not _exact_gelu(latent):
        raise NoViewError(f"{ADAPTER}: its experts' activation is not the exact GELU")
    ours._router_exclude_mask = ours._router_exclude_mask.to(shape.router.weight.device)
    ours.ln.eps = shape.ln.eps
    _share(ours, latent, config, ADAPTER)
    if ours.hidden_size != config.hidden_size:
        raise NoViewError(f"{ADAPTER} has width {ours.hidden_size}, not {config.hidden_size}")
    return ours


def _exact_gelu(latent: nn.Module) -> bool:
    activations = [m for m in latent.modules() if "GELU" in type(m).__name__]
    return all(type(m) is nn.GELU and m.approximate == "none" for m in activations)
