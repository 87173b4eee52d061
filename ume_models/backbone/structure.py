"""Whether a model still is what the engine takes it for: its own layers, and nothing around them.

The engine reads parameters and calls hardly a layer, so what wraps, replaces or hooks one (a LoRA
that is not merged, say) would be lost without a word.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

from ume_models.errors import StructureError

_registered = 0


def _count(*_: Any) -> None:
    global _registered
    _registered += 1


# Counted instead of looked for: to read every table of every layer costs several times as much.
torch_modules.register_module_module_registration_hook(_count)
torch_modules.register_module_parameter_registration_hook(_count)


class _Seen:
    """What is looked at in every call, in loops that C runs: 40 µs for 700 modules.

    It does not hold the model itself: the model holds it, and shall be freed without a collection.
    """

    def __init__(self, model: nn.Module) -> None:
        # Every hook that is registered anywhere gets a handle, every handle a number.
        self.counts = (_registered, RemovableHandle.next_id)
        modules = list(model.modules())
        self.tables = [module._modules for module in modules if module._modules]
        self.children = [dict(table) for table in self.tables]
        self.modules = modules[1:]
        self.kinds = [type(module) for module in self.modules]
        self.attributes = [vars(module) for module in self.modules]
        self.sizes = [*map(len, self.attributes)]

    def unchanged(self) -> bool:
        # A replaced forward, or a tensor in the place of a parameter, is one attribute more.
        return (
            self.counts == (_registered, RemovableHandle.next_id)
            and self.tables == self.children
            and [*map(type, self.modules)] == self.kinds
            and [*map(len, self.attributes)] == self.sizes
        )


class Structure:
    """Classes, children and parameters of a model's modules, recorded when it is built.

    Values are not recorded: another parameter, or another module of the same class, is read anew.
    A copy or pickle of the model, and of this with it, is held to the same record.
    """

    def __init__(self, model: nn.Module) -> None:
        self._expected = {path: (type(m), _names(m)) for path, m in model.named_modules()}
        self._seen: _Seen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_seen": None}

    def check(self, model: nn.Module) -> None:
        """Look whether ``model``, the one recorded or its copy, is as recorded.

        Raises:
            StructureError: names the first module that is not, and the remedy.
        """
        root_kind, _ = self._expected[""]
        as_built = type(model) is root_kind and "forward" not in vars(model)
        if not (as_built and self._seen is not None and self._seen.unchanged()):
            seen = _Seen(model)
            self._search(model)
            self._seen = seen

    def _search(self, model: nn.Module) -> None:
        found = {"": model}
        for path, (kind, names) in self._expected.items():
            module = found[path]
            problem = _problem(module, kind, names)
            if problem is not None:
                raise StructureError(
                    f"{path or 'the model'} {problem} (the engine reads weights and does not call "
                    "layers, so this would be lost)"
                )
            for name, child in module._modules.items():
                if child is not None:
                    found[f"{path}.{name}" if path else name] = child


def _names(module: nn.Module) -> frozenset[str]:
    """Of the children and parameters that are there."""
    tables = (*module._modules.items(), *module._parameters.items())
    return frozenset(name for name, value in tables if value is not None)


def _problem(module: nn.Module, kind: type[nn.Module], names: frozenset[str]) -> str | None:
    """How a module differs from what was built, and the remedy."""
    found = type(module)
    if found.__module__.startswith("peft."):
        return "has an adapter that is not merged: merge the adapter first, merge_and_unload()"
    everywhere = torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks
    if module._forward_hooks or module._forward_pre_hooks or everywhere:
        where = " for all modules" if everywhere else ""
        return f"has a forward hook{where}: remove the hook, or undo what set it (weight_norm, say)"
    if "forward" in vars(module):
        return "has a forward that was replaced: take it off, `del module.forward`"
    if found is not kind:
        return (
            f"is a {found.__name__}, not the {kind.__name__} it was built as: put that back, with "
            "what the other computes merged into its weights"
        )
    differing = _names(module) ^ names
    if differing:
        return f"gained or lost {', '.join(sorted(differing))}: undo this"
    return None
