"""Access to the compiled module ``ume_kernels._C``, which may be absent.

torch is imported first on purpose: it loads its OpenMP runtime for the whole process, and the
native module then uses that one. There is one thread pool, and ``torch.set_num_threads`` governs
both.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch  # noqa: F401  - before _C, see above

from ume_kernels.version import __version__

_REBUILD = f"{sys.executable} -m pip install --force-reinstall --no-deps ."


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("ume_kernels._C")
    except ImportError as error:
        return None, f"the native module ume_kernels._C cannot be imported: {error}"
    if module.__version__ != __version__:
        return None, (
            f"the native module was built for version {module.__version__}, "
            f"the package is {__version__}"
        )
    return module, None


module, missing = _load()
"""The native module or None, and why it is None."""

remedy: str | None = None if missing is None else f"from the source tree: {_REBUILD}"
"""The command that installs the native module, None when it is there."""


def require() -> ModuleType:
    """The native module; ImportError with the remedy when it is not there."""
    if module is None:
        raise ImportError(f"{missing}; {remedy}")
    return module


def cpu_isa() -> str | None:
    """Fastest CPU instruction set the native kernels can use here, None without the module."""
    return None if module is None else str(module.cpu_isa())
