"""The files that benchmarks write, as ``Results``: of pytest-benchmark, sessions and scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ume_models.cli.bench.figures import Figure, Results, Role
from ume_models.errors import DataError

_STATS = ("min", "median", "max", "rounds")
_REMEDY = (
    "give the FILE of `pytest benchmarks --benchmark-only --benchmark-json=FILE`, the "
    "results.json of a GPU session, or a file kept under benchmarks/results"
)
# Files written before the section was noted.
_OLD_OURS = ("fast", "similarity_topk", "contrastive_loss", "accelerated")
_OLD_REFERENCE = ("reference", "official", "as it is", "materialised")


def read_results(path: Path) -> Results:
    """Read one file of results.

    Raises:
        DataError: it is missing, is not JSON, or is not a file of results; named with the remedy.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; {_REMEDY}") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; {_REMEDY}") from None
    except (ValueError, RecursionError) as error:  # of a wrong encoding, too
        raise DataError(f"{path}: is not JSON ({error}); run the benchmarks again") from error
    try:
        if isinstance(content, list):
            return _scripts(path.name, content)
        if "benchmarks" in content:
            return _pytest(path.name, content)
        if "figures" in content:
            return _session(path.name, content)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            f"{path}: is incomplete or damaged ({type(error).__name__}: {error}); run the "
            "benchmarks again"
        ) from error
    raise DataError(f"{path}: holds no measured times; {_REMEDY}")


def _pytest(name: str, content: Mapping[str, Any]) -> Results:
    entries = content["benchmarks"]
    if not entries:
        raise DataError(f"{name}: no benchmark ran; look at what pytest said")
    figures = [_figure(entry) for entry in entries]
    first = entries[0]["extra_info"]
    machine = content.get("machine") or content.get("machine_info", {}).get("ume") or _old(first)
    versions = content.get("versions") or content.get("machine_info", {}).get("ume_versions")
    versions = versions or {k: first[k] for k in ("torch", "transformers", "faiss") if k in first}
    kept = {
        "datetime": content["datetime"],
        "commit": content.get("commit") or content.get("commit_info", {}).get("id"),
        "machine": machine,
        "versions": versions,
        "benchmarks": [
            {
                "name": entry["name"],
                "group": entry["group"],
                "extra_info": entry["extra_info"],
                "stats": {key: entry["stats"][key] for key in _STATS if key in entry["stats"]},
            }
            for entry in entries
        ],
    }
    tried = any(entry["extra_info"].get("tiny") for entry in entries)
    return Results(name, content["datetime"], machine, versions, figures, tried, kept)


def _figure(entry: Mapping[str, Any]) -> Figure:
    info, stats = entry["extra_info"], entry["stats"]
    operation = info.get("operation")
    section = info.get("section") or {"similarity": "similarity", "patching": "scripts"}.get(
        operation, "input class"
    )
    engine = str(info.get("engine", entry["name"]))
    calls = info.get("calls", 1)
    seconds, median = stats["min"] / calls, stats["median"] / calls
    # What a process of its own said, without what does not count; the stats are the whole of it.
    for own in ("encode", "counted"):
        if f"{own}_seconds" in info:
            seconds, median = info[f"{own}_seconds"], info.get(f"{own}_median")
    return Figure(
        section=section,
        group=entry["group"] or entry["name"],
        engine=engine,
        role=info.get("role") or _old_role(engine),
        seconds=seconds,
        median=median,
        samples=info.get("samples", 1),
        rounds=info.get("rounds", stats.get("rounds")),
        batch=info.get("batch"),
        steps=info.get("latent_steps"),
        floor=info.get("floor_seconds"),
        bar=info.get("bar"),
        bar_seconds=info.get("bar_seconds"),
        details=info,
    )


def _old_role(engine: str) -> Role:
    if engine.startswith(_OLD_OURS):
        return "ours"
    return "reference" if engine.startswith(_OLD_REFERENCE) else "rival"


def _old(info: Mapping[str, Any]) -> dict[str, Any]:
    return {key: info[key] for key in ("cpu", "threads", "native_isa") if key in info}


def _session(name: str, content: Mapping[str, Any]) -> Results:
    figures = [
        Figure(
            section="GPU session",
            group=figure["name"],
            engine="this package",
            role="ours",
            seconds=figure["value"],
            median=figure["value"],
            samples=figure.get("samples", 1),
            rounds=figure.get("rounds"),
            floor=figure["floor"],
            details=figure,
        )
        for figure in content["figures"]
        if figure.get("unit") == "s" and not figure["name"].startswith("sweep ")
    ]
    tried = bool(content.get("dry_run")) or any(f.get("dry_run") for f in content["figures"])
    return Results(
        name, content["date"], content["machine"], content["versions"], figures, tried, content,
        content,
    )  # fmt: skip


def _scripts(name: str, content: Sequence[Mapping[str, Any]]) -> Results:
    """What ``python -m benchmarks.patched_script --json`` appends to a file."""
    if not content:
        raise DataError(f"{name}: is empty; {_REMEDY}")
    figures = [
        Figure(
            section="scripts",
            group=f"evaluation script, {run['shape']}, {run['dtype']}",
            engine=engine,
            role=_old_role(engine),
            seconds=seconds * run["samples"],
            samples=run["samples"],
            rounds=run.get("rounds"),
            details=run,
        )
        for run in content
        for engine, seconds in run["seconds_per_sample"].items()
    ]
    first = content[0]
    date = name[:10] if name[:4].isdigit() else "undated"
    versions = {key: first[key] for key in ("torch", "transformers")}
    return Results(name, date, _old(first), versions, figures, False, content)
