"""One Markdown table from the results of pytest-benchmark or of ``benchmarks.gpu_session``.

    python -m benchmarks.report RESULTS.json
    python -m benchmarks.report RESULTS.json --keep benchmarks/results/NAME.json

``--keep`` writes what the table is made of, without the names of the machine and its user. Results
of a dry run are refused: they are no measurement.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per case with the best round of each engine, in seconds per sample."""
    cases: dict[str, dict[str, Any]] = {}
    for entry in results["benchmarks"]:
        info = entry["extra_info"]
        case = cases.setdefault(entry["group"], {"case": entry["group"]})
        case[info["engine"]] = entry["stats"]["min"] / info["samples"]
        if info["engine"] == "fast":
            extra = info["peak_bytes"] - info["weight_bytes"] - info["arena_bytes"]
            case.update(extra=extra / 1e9, tokens=info["prompt_tokens"])
    return list(cases.values())


def markdown(results: dict[str, Any]) -> str:
    """The table, and the machine it was measured on."""
    info = results["benchmarks"][0]["extra_info"]
    lines = [
        "| input | prompt tokens | official loop | fast engine | ratio "
        "| memory above weights and arena |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows(results):
        if "fast" in row and "reference" in row:
            lines.append(
                f"| {row['case']} | {row['tokens']:.0f} | {row['reference']:.2f} s "
                f"| {row['fast']:.2f} s | **{row['reference'] / row['fast']:.1f}×** "
                f"| {row['extra']:.2f} GB |"
            )
    lines += [
        "",
        f"Seconds per sample, best round; {info['cpu']}, {info['threads']} threads, "
        f"torch {info['torch']}, transformers {info['transformers']}, {results['datetime'][:10]}.",
    ]
    return "\n".join(lines)


_OURS = ("similarity_topk", "contrastive_loss")


def similarity_markdown(results: dict[str, Any]) -> str:
    """A table per comparison of ``benchmarks/test_similarity.py``, with how much faster ours is.

    Raises:
        ValueError: the sizes were those of a try.
    """
    refuse_dry_run(results)
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in results["benchmarks"]:
        engines = groups.setdefault(entry["group"], {})
        engines[entry["extra_info"]["engine"]] = entry["extra_info"] | entry["stats"]
    lines = []
    for group, engines in groups.items():
        ours = [name for name in engines if name.startswith(_OURS)]
        memory = any("extra_bytes" in engine for engine in engines.values())
        titles = [group, "time", *(f"{name} is faster by" for name in ours)]
        titles.append("extra peak memory" if memory else "recall")
        lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for name, engine in engines.items():
            cells = [name, _duration(engine["min"])]
            for mine in ours:
                ratio = f"**{engine['min'] / engines[mine]['min']:.2f}×**"
                cells.append("–" if name in ours else ratio)
            cells.append(
                f"{engine['extra_bytes'] / 1e6:.0f} MB" if memory else f"{engine['recall']:.4f}"
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    info = results["benchmarks"][0]["extra_info"]
    lines.append(
        f"Best round; {info['cpu']}, {info['threads']} threads, {info['native_isa']}, "
        f"torch {info['torch']}, faiss {info.get('faiss')}, {results['datetime'][:10]}."
    )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def gpu_markdown(results: dict[str, Any]) -> str:
    """The figures of a GPU session with their floors, ratios, clock and power.

    Raises:
        ValueError: it was a dry run.
    """
    refuse_dry_run(results)
    gpu = results["machine"]["gpu"]
    lines = [
        "| measured | time | floor | of the floor | ratio | SM clock, power |",
        "|---|---|---|---|---|---|",
    ]
    for figure in results["figures"]:
        if "missed" in figure or figure["name"].startswith("sweep "):
            continue
        state = figure["nvml"] or {}
        now = f"{state.get('sm_mhz', 0):.0f} MHz, {state.get('power_w', 0):.0f} W" if state else "–"
        if figure["unit"] != "s":
            value = f"{figure['value'] / 1e12:.3g} T{figure['unit']}"
            lines.append(f"| {figure['name']} | {value} | – | – | – | {now} |")
            continue
        floor, share = "–", "–"
        if figure["floor"] is not None:
            floor, share = _duration(figure["floor"]), f"{figure['of_floor']:.0%}"
        ratios = "; ".join(f"**{r:.1f}×** {name}" for name, r in figure["ratio_to"].items())
        lines.append(
            f"| {figure['name']} | {_duration(figure['value'])} | {floor} | {share} "
            f"| {ratios or '–'} | {now} |"
        )
    missed = [figure for figure in results["figures"] if "missed" in figure]
    not_measured = [f"{figure['name']} ({figure['missed'][:80]})" for figure in missed]
    versions = results["versions"]
    lines += [
        "",
        f"Seconds per call, median; floor: bytes that must be read at the datasheet's bandwidth. "
        f"{gpu['name']}, driver {gpu['driver']}, torch {versions['torch']}, Triton "
        f"{versions['triton']}, transformers {versions['transformers']}, {results['date'][:10]}.",
    ]
    if not_measured:
        lines.append("Not measured: " + "; ".join(not_measured) + ".")
    return "\n".join(lines)


def table(results: dict[str, Any]) -> str:
    """The table of whatever was measured."""
    if "figures" in results:
        return gpu_markdown(results)
    info = results["benchmarks"][0]["extra_info"]
    return (similarity_markdown if info.get("operation") == "similarity" else markdown)(results)


def refuse_dry_run(results: dict[str, Any]) -> None:
    """Raise ValueError for the results of a dry run."""
    measured = [*results.get("figures", ()), results]
    tried = any(entry["extra_info"].get("tiny") for entry in results.get("benchmarks", ()))
    if tried or any(part.get("dry_run") for part in measured):
        raise ValueError("these results are of a dry run: nothing was measured")


def trimmed(results: dict[str, Any]) -> dict[str, Any]:
    """The part of the results that is worth keeping."""
    if "figures" in results:
        refuse_dry_run(results)
        return results
    refuse_dry_run(results)
    return {
        "datetime": results["datetime"],
        "benchmarks": [
            {
                "name": entry["name"],
                "group": entry["group"],
                "extra_info": entry["extra_info"],
                "stats": {k: entry["stats"][k] for k in ("min", "median", "max", "rounds")},
            }
            for entry in results["benchmarks"]
        ],
    }


def main() -> None:
    """Read the arguments, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--keep", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    try:
        print(table(results))
    except ValueError as error:
        raise SystemExit(f"{arguments.results}: {error}") from None
    if arguments.keep:
        arguments.keep.write_text(json.dumps(trimmed(results), indent=2) + "\n")


if __name__ == "__main__":
    main()
