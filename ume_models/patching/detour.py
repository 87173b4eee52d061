"""Another forward of a module for the duration of a block, seen by the calling thread alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ume_models.patching.changes import ABSENT, InstanceForward

_lock = threading.Lock()


class _Switch(InstanceForward):
    """Stands in ``module.__dict__["forward"]`` while some thread is on a detour.

    Args:
        module: whose forward it is.
        before: what stood there, ABSENT for the forward of the class.
    """

    def __init__(self, module: nn.Module, before: Any) -> None:
        super().__init__(module)
        self.before = before
        self.ways: dict[int, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        way = self.ways.get(threading.get_ident())
        if way is None:
            way = self.original if self.before is ABSENT else self.before
        return way(*args, **kwargs)


@contextmanager
def detour(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let this thread's calls of ``module`` run ``forward``; other threads' run as before.

    Exceptions pass, blocks may nest, and afterwards the module's dictionary holds the object it
    held before.
    """
    own, thread = vars(module), threading.get_ident()
    with _lock:
        present = own.get("forward", ABSENT)
        switch = present if isinstance(present, _Switch) else _Switch(module, present)
        own["forward"] = switch
        outer = switch.ways.get(thread)
        switch.ways[thread] = forward
    try:
        yield
    finally:
        with _lock:
            del switch.ways[thread]
            if outer is not None:
                switch.ways[thread] = outer
            elif not switch.ways and own.get("forward") is switch:
                if switch.before is ABSENT:
                    del own["forward"]
                else:
                    own["forward"] = switch.before
