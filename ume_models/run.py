"""``python -m ume_models.run script.py …``: an unmodified script of a known repository, faster.

Also ``torchrun … -m ume_models.run script.py …``. The script runs in this process as ``__main__``,
as ``python script.py …`` runs it. Processes that it starts are accelerated as well.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Accelerate, then run the script that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m ume_models.run script.py [arguments of the script]")
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(f"{script}: there is no such script; give its path")
    os.environ.setdefault("UME_ACCELERATE", "1")
    from ume_models.patching import auto  # noqa: F401

    del sys.argv[0]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
