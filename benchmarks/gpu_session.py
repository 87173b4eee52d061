"""One GPU session: build, prove, measure, sweep — inside ten minutes, in one command.

    python -m benchmarks.gpu_session --out DIR
    python -m benchmarks.gpu_session --out DIR --dry-run          tiny sizes on a CPU, no figures
    python -m benchmarks.gpu_session --out DIR --steps long,sweep

Every step is a process of its own with a time limit, and every figure is on disk as soon as it is
known, so that a step that hangs or faults costs itself only, and a session that is cut keeps what
it had. DIR gets ``results.json``, ``figures.jsonl``, ``log.txt`` and proposed tuning tables;
``ume bench report DIR/results.json`` prints the table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOG = "log.txt"


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: how it is called on the command line.
        least: seconds kept for it while steps before it run.
        most: seconds after which it is ended, if the session has so many left.
        dry: seconds it may take in a dry run; 0 leaves it out.
    """

    name: str
    least: float
    most: float
    dry: float


STEPS = (
    Step("build", 20, 90, 0),
    Step("smoke", 25, 70, 60),
    Step("ceilings", 15, 40, 30),
    Step("adapter", 20, 60, 40),
    Step("loss", 25, 60, 40),
    Step("topk", 25, 60, 40),
    Step("long", 25, 70, 40),
    Step("embedding", 35, 90, 50),
    Step("short", 40, 170, 40),
    Step("tests", 60, 170, 0),
    Step("memcheck", 25, 60, 90),
    Step("racecheck", 25, 60, 0),
    Step("sweep", 30, 240, 30),
    Step("long-rival", 0, 200, 40),
    Step("million", 0, 200, 0),
)
"""In this order. What must be shown comes first; the sweep takes what is left, and the batched
rival, which compiles for minutes, and the loss of a million rows are for a session of their own
(``--steps long-rival,million``)."""


MEASURING = (
    "ceilings", "adapter", "loss", "topk", "long", "embedding", "short", "sweep", "long-rival",
    "million",
)  # fmt: skip


def command_of(step: Step, out: Path, dry_run: bool, seconds: float) -> list[str] | str:
    """The command line of a step, or why it cannot run here."""
    python = sys.executable
    if step.name == "build":
        return [python, "setup.py", "build_ext", "--inplace"]
    if step.name in ("smoke", "tests"):
        what = ["tests/gpu/test_smoke.py"] if step.name == "smoke" else ["tests", "--durations=5"]
        report = f"--junitxml={out / f'{step.name}.xml'}"
        return [python, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", report, *what]
    if step.name in ("memcheck", "racecheck"):
        exercise = [python, "-m", "benchmarks.gpu.exercise"]
        if dry_run:
            return exercise
        sanitizer = shutil.which("compute-sanitizer")
        if sanitizer is None:
            return "compute-sanitizer is not installed"
        return [sanitizer, "--tool", step.name, "--error-exitcode", "9", *exercise]
    own = [python, "-m", "benchmarks.gpu_session", "--out", str(out), "--measure", step.name]
    return [*own, "--seconds", f"{seconds:.0f}", *(["--dry-run"] if dry_run else [])]


def environment(step: Step, dry_run: bool) -> dict[str, str]:
    """The environment of a step."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env["PYTHONUNBUFFERED"] = "1"
    if dry_run:
        # Kernels in Triton's interpreter, tests on the CPU, and no GPU even where there is one.
        env.update(TRITON_INTERPRET="1", UME_GPU_DRY_RUN="1", CUDA_VISIBLE_DEVICES="")
        env.setdefault("OMP_NUM_THREADS", "1")
    elif step.name == "build":
        env.setdefault("UME_CUDA_ARCHS", "90")
    elif step.name == "memcheck":
        # An allocation per tensor, so that running over its end is seen.
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return env


def run_step(step: Step, out: Path, dry_run: bool, seconds: float) -> dict[str, Any]:
    """Run one step for at most ``seconds``; what became of it."""
    command = command_of(step, out, dry_run, max(seconds - 15, 10))
    if isinstance(command, str):
        return {"name": step.name, "status": "skipped", "seconds": 0.0, "note": command}
    began = time.perf_counter()
    with (out / LOG).open("a", encoding="utf-8") as log:
        log.write(f"\n==== {step.name}\n")
        log.flush()
        at = log.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(step, dry_run),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status, code = "cut", None
            _end(process)
    text = (out / LOG).read_text(encoding="utf-8", errors="replace")[at:].strip().splitlines()
    taken = round(time.perf_counter() - began, 1)
    note = next((line for line in reversed(text) if line.strip()), "")[:300]
    if status == "ok" and step.name in MEASURING:
        note = ""  # warnings of libraries; the figures speak for themselves
    return {"name": step.name, "status": status, "exit": code, "seconds": taken, "note": note}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step and what it started: compilers and data workers are in its session."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(5)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def measure(name: str, out: Path, dry_run: bool, seconds: float) -> None:
    """One measuring step, in this process."""
    import torch

    from benchmarks.gpu import adapter, ceilings, embedding, rollout, similarity, sweep
    from benchmarks.gpu.figures import Recorder
    from benchmarks.gpu.sizes import DRY, REAL, Sizes

    sizes = DRY if dry_run else REAL
    if not dry_run and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --dry-run tries the script on a CPU")
    torch.manual_seed(0)
    steps: dict[str, Callable[[Sizes, Recorder], None]] = {
        "ceilings": ceilings.run,
        "adapter": adapter.run,
        "loss": similarity.loss,
        "topk": similarity.topk,
        "million": similarity.million,
        "short": rollout.short,
        "long": rollout.long,
        "long-rival": rollout.long_rival,
        "embedding": embedding.run,
        "sweep": lambda s, r: sweep.run(s, r, seconds),
    }
    record = Recorder(out, name, dry_run)
    try:
        steps[name](sizes, record)
    except Exception as error:
        record.missed(f"step {name}", error)
        raise


def session(out: Path, dry_run: bool, minutes: float, chosen: list[str] | None) -> int:
    """Run the steps and print the table; 1 if one of them failed."""
    from benchmarks.gpu.figures import LINES, collect, line

    out.mkdir(parents=True, exist_ok=True)
    for name in (LINES, LOG):
        (out / name).unlink(missing_ok=True)
    until = time.perf_counter() + 60 * minutes
    planned = [s for s in STEPS if (chosen is None or s.name in chosen) and (s.dry or not dry_run)]
    done: list[dict[str, Any]] = []
    for number, step in enumerate(planned):
        left = until - time.perf_counter()
        kept = 0.0 if dry_run else sum(s.least for s in planned[number + 1 :])
        limit = min(left, step.dry if dry_run else max(step.least, min(step.most, left - kept)))
        if limit < 5:
            done.append({"name": step.name, "status": "skipped", "seconds": 0.0, "note": "no time"})
            continue
        done.append(run_step(step, out, dry_run, limit))
        collect(out, done, dry_run)
        print(f"{step.name}: {done[-1]['status']}, {done[-1]['seconds']:.0f} s", flush=True)
    results = collect(out, done, dry_run)
    print()
    for entry in done:
        head = f"{entry['name']:10} {entry['status']:8} {entry['seconds']:6.1f} s"
        print(f"{head}  {entry['note'][:90]}")
    print()
    if dry_run:
        measured = sum("missed" not in figure for figure in results["figures"])
        missed = [figure for figure in results["figures"] if "missed" in figure]
        print(f"dry run: {measured} figures would have been measured, {len(missed)} missed")
        for figure in missed:
            print(f"  {figure['name']}: {figure['missed']}")
    else:
        for figure in results["figures"]:
            print(line(figure))
    return int(any(entry["status"] in ("failed", "cut") for entry in done))


def main() -> None:
    """Read the arguments; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, no figures")
    parser.add_argument("--minutes", type=float, default=9.5, help="time for everything")
    parser.add_argument("--steps", help="only these, separated by commas")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 0.5 <= arguments.minutes < float("inf"):
        parser.error(f"--minutes must be at least 0.5, got {arguments.minutes}")
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"--out {arguments.out} is a file")
    out = arguments.out.resolve()
    if arguments.measure:
        measure(arguments.measure, out, arguments.dry_run, arguments.seconds)
        return
    chosen = arguments.steps.split(",") if arguments.steps else None
    unknown = set(chosen or ()) - {step.name for step in STEPS}
    if unknown:
        raise SystemExit(f"unknown steps {sorted(unknown)}; there are {[s.name for s in STEPS]}")
    raise SystemExit(session(out, arguments.dry_run, arguments.minutes, chosen))


if __name__ == "__main__":
    main()
