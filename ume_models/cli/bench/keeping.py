"""Results of named machines, kept with their date and versions."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ume_models.atomic import write_atomically
from ume_models.cli.bench.figures import Results
from ume_models.errors import DataError


def kept_name(results: Results) -> str:
    """``DATE-MACHINE.json``: the GPU, or the CPU and its cores."""
    gpu = results.machine.get("gpu")
    name = gpu["name"] if gpu else str(results.machine.get("cpu", "unknown"))
    if not gpu and "cores" in results.machine:
        name += f" {results.machine['cores']} cores"
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    return f"{results.date[:10]}-{slug}.json"


def keep(parts: Sequence[Results], target: Path) -> list[Path]:
    """Write what is worth keeping, without the names of the machine and its user.

    Args:
        parts: files of results.
        target: a folder, where each gets the name of ``kept_name``; or, for one, a file.

    Returns:
        The files written.

    Raises:
        DataError: the results are of a try, two would get one name, or several are given for one
            file. Nothing is written then.
        OSError: a file cannot be written; it is named.
    """
    for results in parts:
        refuse_try(results)
    if target.suffix == ".json" and not target.is_dir():
        if len(parts) > 1:
            raise DataError(f"{target}: is one file for {len(parts)} results; name a folder")
        paths = [target]
    else:
        paths = [target / kept_name(results) for results in parts]
    if len(set(paths)) < len(paths):
        raise DataError(
            f"{target}: two of the results are of one machine and day and would get one name; "
            "keep them one by one, each with the name of a file"
        )
    for path, results in zip(paths, parts, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(results.kept, indent=2) + "\n").encode())
    return paths


def refuse_try(results: Results) -> None:
    """Raise DataError for the results of a try or dry run: nothing was measured."""
    if results.tried:
        raise DataError(
            f"{results.name}: these results are of a dry run: nothing was measured. Run it with "
            "real sizes"
        )
