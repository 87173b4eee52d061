"""One Markdown row per case, engines side by side, from the results of pytest-benchmark.

    python -m benchmarks.report RESULTS.json
    python -m benchmarks.report RESULTS.json --keep benchmarks/results/NAME.json

``--keep`` writes what the table is made of, without the names of the machine and its user.
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


def trimmed(results: dict[str, Any]) -> dict[str, Any]:
    """The part of the results that is worth keeping."""
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
    print(markdown(results))
    if arguments.keep:
        arguments.keep.write_text(json.dumps(trimmed(results), indent=2) + "\n")


if __name__ == "__main__":
    main()
