"""Evaluations in processes of their own that are killed, or work together.

    python processes.py kill DATA OUTPUT SEED KILLS
    python processes.py team DATA OUTPUT SIZE [VICTIM]

Everything is imported and the model loaded once; evaluations then run in forks, which takes
milliseconds where a new process takes seconds. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

TASKS = (
    "ImageNet-1K,OK-VQA,WebQA,CIRR,RefCOCO-Matching,HMDB51,SmthSmthV2,MSR-VTT,MomentSeeker,"
    "ActivityNetQA,ViDoRe_docvqa,ViDoRe_esg_reports_v2_multilingual,VisRAG_ChartQA,ViDoSeek-page"
)
SIZES = {"text": 32, "image": 24, "video": 12}


def main() -> None:
    torch.set_num_threads(1)  # a fork does not inherit the threads of a pool

    import ume_models
    from ume_models.mmeb import EvalOptions, benchmark, evaluate, gather, select_tasks

    model = ume_models.load(empty="reference", device="cpu")
    _ = model.fingerprint
    tasks = select_tasks(benchmark("MMEB-v2"), names=TASKS.split(","))
    command, data, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])

    def run() -> None:
        team = gather()
        try:
            evaluate(model, tasks, data, output, options=EvalOptions(shard_sizes=SIZES), team=team)
        finally:
            team.close()

    if command == "kill":
        print(json.dumps(kill(run, random.Random(int(sys.argv[4])), int(sys.argv[5]))))
    else:
        victim = int(sys.argv[5]) if len(sys.argv) > 5 else None
        print(json.dumps(work_together(run, int(sys.argv[4]), output, victim)))


def fork(run, log: Path | None = None) -> int:
    """Start ``run`` in a fork; what it raises goes to ``log``."""
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
        os._exit(0)
    except BaseException as error:
        if log is None:
            traceback.print_exc()
        else:
            log.write_text(f"{type(error).__name__}: {error}")
        os._exit(1)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(run, random_numbers: random.Random, kills: int) -> dict:
    """Kill evaluations of one folder at random moments, then let one finish."""
    killed, longest = 0, 2.0
    while killed < kills:
        pid = fork(run)
        time.sleep(random_numbers.uniform(0.02, longest))
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        killed += code == -signal.SIGKILL
        if code == 0:  # done before it could be killed: the next ones only score
            longest = max(longest / 2, 0.1)
        elif code != -signal.SIGKILL:
            return {"killed": killed, "code": code}
    return {"killed": killed, "code": wait(fork(run))}


def work_together(run, size: int, output: Path, victim: int | None) -> dict:
    """Processes of one team; one of them may be killed when the first shards are written."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size))
    pids, logs = [], []
    for rank in range(size):
        os.environ["RANK"] = str(rank)
        logs.append(output.parent / f"{output.name}-rank-{rank}.log")
        pids.append(fork(run, logs[-1]))
    if victim is not None:
        deadline = time.monotonic() + 60
        while not list(output.glob("embeddings/*/shard-*.safetensors")):
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        os.kill(pids[victim], signal.SIGKILL)
        codes = [wait(pids[victim])]
        codes += [wait(pid) for pid in pids if pid != pids[victim]]
    else:
        codes = [wait(pid) for pid in pids]
    told = [log.read_text() for log in logs if log.is_file()]
    return {"codes": codes, "pids": pids, "told": told}


if __name__ == "__main__":
    main()
