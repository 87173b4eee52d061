"""Setting attributes so that they can be taken back exactly."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ume_models.errors import PatchError
from ume_models.patching.report import Entry

if TYPE_CHECKING:
    from torch import nn


class _Absent:
    """Stands for an attribute that was not there."""


ABSENT = _Absent()


@dataclass
class Change:
    """One attribute of a module, class or instance.

    Attributes:
        owner: whose attribute; what it inherits is not touched.
        name: of the attribute.
        new: what stands there while the change is in force.
        entry: the line of the report.
        old: what stood in the owner's own ``__dict__``, found when applied.
    """

    owner: Any
    name: str
    new: Any
    entry: Entry
    old: Any = field(default=ABSENT, repr=False)

    def current(self) -> Any:
        """What the owner's own dictionary holds."""
        return vars(self.owner).get(self.name, ABSENT)

    def apply(self) -> None:
        """Set the attribute and keep what was there."""
        self.old = self.current()
        _set(self.owner, self.name, self.new)

    def undo(self) -> None:
        """Put the very same object back, or nothing where there was nothing."""
        _set(self.owner, self.name, self.old)


def _set(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type):
        if value is ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
    elif value is ABSENT:
        vars(owner).pop(name, None)
    else:
        # Not setattr: a class may define __setattr__ (nn.Module does).
        vars(owner)[name] = value


def commit(changes: Sequence[Change]) -> None:
    """Apply all changes, or none.

    Raises:
        PatchError: an attribute cannot be set; what was set before is taken back.
    """
    done: list[Change] = []
    for change in changes:
        try:
            change.apply()
        except (AttributeError, TypeError) as error:
            for earlier in reversed(done):
                earlier.undo()
            raise PatchError(f"{change.entry.target}: cannot be replaced ({error})") from error
        done.append(change)


def undo(changes: Sequence[Change]) -> None:
    """Take all changes back, in reverse order, or none; what is back already stays.

    Raises:
        PatchError: somebody replaced one of the targets since.
    """
    for change in changes:
        current = change.current()
        if current is not change.new and current is not change.old:
            raise PatchError(
                f"{change.entry.target}: cannot be reverted, {_whose(current)} stands there now; "
                "take that back first"
            )
    for change in reversed(changes):
        change.undo()


def _whose(value: Any) -> str:
    if value is ABSENT:
        return "nothing"
    kind = value if hasattr(value, "__module__") and hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


class InstanceForward:
    """What stands at ``module.__dict__["forward"]`` of a patched module.

    An object instead of a closure, so that models can be pickled and deep-copied: it refers to
    its module, and a copy of the module gets a copy that refers to the copy. The class's own
    forward stays where it is and is what runs wherever a replacement's conditions do not hold.

    Args:
        module: the module patched. Weights are read from it at call time: FSDP and ``to`` move
            them. The reference is weak: in a cycle, ``del model`` would free no memory before
            the next garbage collection.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> nn.Module:
        """The module patched.

        Raises:
            ReferenceError: it was deleted.
        """
        module = self._module()
        if module is None:
            raise ReferenceError("the module whose forward this is was deleted")
        return module

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _module=weakref.ref(state["_module"]))

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's class."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replacement of the forward; subclasses define it."""
        return self.original(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        # transformers, peft and trainers read which arguments a forward takes
        bound = type(self.module).forward.__get__(self.module)
        return inspect.signature(bound)
