"""Seeing through what other libraries put around a model or around its parts.

Everything is recognised by class name, so that none of those libraries has to be installed.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_INSIDE = {
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
    "PeftModel": "base_model",
    "BaseTuner": "model",
}
"""Class of a wrapper: the attribute that holds what it wraps."""

_AROUND_A_LAYER = {"BaseTunerLayer": "base_layer", "ModulesToSaveWrapper": "original_module"}
"""The same for PEFT's wrappers of single layers."""

_SEGMENTS = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")
)
"""Parts of a dotted name that say nothing about the model."""


def lineage(module: object) -> frozenset[str]:
    """Names of the module's class and of those it inherits from.

    FSDP2 gives every module it shards a class of its own, which inherits from the original.
    """
    return frozenset(kind.__name__ for kind in type(module).__mro__)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile``, DDP, FSDP, DeepSpeed and PEFT wrappers."""
    return _inside(model, _INSIDE)


def inside(module: object) -> object:
    """A part of a model without the wrappers around it, PEFT's of single layers among them."""
    return _inside(module, _INSIDE | _AROUND_A_LAYER) if isinstance(module, nn.Module) else module


def _inside(module: nn.Module, wrappers: dict[str, str]) -> nn.Module:
    seen: set[int] = set()
    while id(module) not in seen:
        seen.add(id(module))
        names = lineage(module)
        for kind, attribute in wrappers.items():
            # Not getattr: wrappers pass unknown names on to what they wrap.
            held = module._modules.get(attribute) if kind in names else None
            if held is not None:
                module = held
                break
    return module


def part(module: object, path: str) -> object:
    """The part of a module at a dotted path, without wrappers; None where there is none."""
    found: object = inside(module)
    for name in filter(None, path.split(".")):
        if not isinstance(found, nn.Module):
            return None
        found = inside(found._modules.get(name))
    return found


def named_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below a model with its dotted name, wrappers left out of the names.

    The matrices that PEFT adds to a layer are left out: they are PEFT's. So is everything inside
    of the official latent adapter, which is replaced as a whole.
    """
    skipped: tuple[str, ...] = ()
    for raw, module in model.named_modules():
        if raw and raw.startswith(skipped or ("\0",)):
            continue
        names = lineage(module)
        if "BaseTunerLayer" in names:
            skipped += tuple(f"{raw}.{child}" for child in module._modules if child != "base_layer")
        if "LatentMoETransition" in names:
            skipped += (f"{raw}.",)
        yield ".".join(name for name in raw.split(".") if name not in _SEGMENTS), module


def flattened(model: nn.Module) -> bool:
    """Whether FSDP1 holds the parameters as flat pieces, so that their shapes cannot be seen."""
    return any("FullyShardedDataParallel" in lineage(module) for module in model.modules())
