"""A run of ``ume embed`` that is killed, anywhere, goes on and writes the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FAKE_MODEL = Path(__file__).with_name("fake_model.py")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_items(folder: Path, count: int) -> Path:
    path = folder / "items.jsonl"
    lines = [json.dumps({"text": f"item {number}"}) for number in range(count)]
    # One item that is skipped: its record must survive as well.
    lines[count // 2] = json.dumps({"image": "missing.png"})
    path.write_text("\n".join(lines))
    return path


def embed_command(*arguments: object) -> list[str]:
    return [sys.executable, str(FAKE_MODEL), *map(str, arguments)]


def test_every_step_on_disk_may_be_the_last(
    tmp_path: Path, child_environment: dict[str, str]
) -> None:
    items = tmp_path / "items.jsonl"
    runs = tmp_path / "runs"
    items.write_text("\n".join(json.dumps({"text": f"item {n}"}) for n in range(7)))
    output = subprocess.run(
        embed_command("--crash-points", runs, "embed", items, "--shard-size", 4),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=child_environment,
    )
    assert output.returncode == 0, output.stderr
    killed = int(output.stdout)
    whole = contents(runs / "whole")
    assert len(whole) == 5
    assert killed == 6 * len(whole)  # opened, half written, flushed, renamed from and to, flushed
    for step in range(killed):
        assert contents(runs / str(step)) == whole, f"killed at step {step}"


def test_killed_at_any_moment(
    tmp_path: Path, ume: Callable[..., Any], child_environment: dict[str, str]
) -> None:
    items = write_items(tmp_path, 40)
    options = ("embed", items, "--shard-size", 4, "--on-error", "skip")
    whole = tmp_path / "whole"
    assert ume(*options, "-o", whole).exit_code == 3

    chance = random.Random(0)
    out = tmp_path / "killed"
    kills = 0
    while True:
        shards = len(list(out.glob("*.safetensors")))
        with subprocess.Popen(
            embed_command("--pause", 0.02, *options, "-o", out),
            stderr=subprocess.DEVNULL,
            env=child_environment,
        ) as process:
            # The clock starts with the first new shard, so that every round gets further.
            while process.poll() is None and len(list(out.glob("*.safetensors"))) <= shards:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.3))
            if process.poll() is None and kills < 3:
                os.kill(process.pid, signal.SIGKILL)
            code = process.wait(timeout=120)
        if code != -signal.SIGKILL:
            break
        kills += 1
    assert kills >= 1
    assert code == 3
    assert contents(out) == contents(whole)


def test_ctrl_c_in_a_real_process(tmp_path: Path, child_environment: dict[str, str]) -> None:
    items = write_items(tmp_path, 40)
    out = tmp_path / "out"
    with subprocess.Popen(
        embed_command(
            "--pause", 0.05, "embed", items, "-o", out, "--shard-size", 4, "--on-error", "skip"
        ),
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        while process.poll() is None and not list(out.glob("*.safetensors")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr
