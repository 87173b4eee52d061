"""Teams: work is shared without gaps, and who fails or dies is named."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

from ume_models.errors import UmeError
from ume_models.mmeb import benchmark, evaluate, select_tasks, team
from ume_models.mmeb.team import LoneTeam, TeamError, TorchTeam, gather, local_device


@pytest.fixture
def members(request):
    """Three members that meet in one store of this process."""
    store = HashStore()
    made = [TorchTeam(store, rank, 3, silence=3.0) for rank in range(3)]
    yield made
    for member in made:
        member.close()


def test_every_number_is_taken_once(members):
    taken: list[list[int]] = [[], [], []]

    def work(rank: int) -> None:
        for number in members[rank].take(200):
            taken[rank].append(number)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for part in taken for number in part) == [*range(200)]
    assert LoneTeam().leads and [*LoneTeam().take(3)] == [0, 1, 2]


def test_orders_and_tallies_reach_everyone(members):
    members[0].announce({"work": [1, 2]})
    assert [member.orders() for member in members[1:]] == [{"work": [1, 2]}] * 2
    for rank, member in enumerate(members):
        member.tally("items", rank + 1)
    assert members[1].tally("items") == 6


def test_a_failure_is_told_with_its_reason(members):
    members[2].fail("the disk is full")
    members[1].fail("because of the first")
    with pytest.raises(TeamError, match=r"rank 2 \(host .*\) gave up: the disk is full"):
        members[0].check()


def begin(members) -> None:
    for member in members:
        member.begin()


def test_each_evaluation_is_a_round_of_its_own(members):
    for number in range(3):
        begin(members)
        members[0].announce({"round": number})
        assert [member.orders() for member in members[1:]] == [{"round": number}] * 2
        assert [*members[number].take(4)] == [0, 1, 2, 3]
        assert [*members[2 - number].take(4)] == []
        assert members[1].tally("items", 5) == 5
        for member in reversed(members):
            member.finish()
    alone = LoneTeam()
    alone.tally("items", 5)
    alone.begin()
    assert alone.tally("items") == 0


def test_a_failure_ends_its_round_and_not_the_next(members):
    begin(members)
    members[0].fail("no such folder")  # before it announced anything
    for member in members[1:]:
        with pytest.raises(TeamError, match=r"rank 0 .* gave up: no such folder"):
            member.orders()
    begin(members)
    members[0].announce({"work": []})
    assert members[1].orders() == {"work": []}
    members[2].finish()  # has done its part before the leader fails
    members[0].fail("the disk is full")
    begin(members)
    members[0].announce({"work": [1]})
    assert members[2].orders() == {"work": [1]}
    time.sleep(1.1)  # until the next look
    for member in members:
        member.check()


def test_one_team_evaluates_twice(model, miniature, tmp_path):
    both = TorchTeam(HashStore(), 0, 1)
    for name in ("HMDB51", "MSR-VTT"):
        chosen = select_tasks(benchmark("MMEB-v2"), names=[name])
        summary = evaluate(model, chosen, miniature, tmp_path / name, team=both)
        assert [score.task for score in summary.tasks] == [name]
    both.close()


def test_a_process_may_gather_again(monkeypatch):
    met = []

    def rendezvous(url, rank, size, timeout):
        met.append(rank)
        yield HashStore(), rank, size

    monkeypatch.setattr("torch.distributed.rendezvous", rendezvous)
    monkeypatch.setattr(team, "_meetings", {})
    monkeypatch.setattr(team, "_FAREWELL_SECONDS", 0.0)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    first, second = gather(), gather()
    first.announce({"work": [1]})
    first.fail("gone wrong")
    second.announce({"work": [2]})
    assert second.orders() == {"work": [2]}
    second.check()
    assert met == [0]  # the leader's port is taken by its first store
    monkeypatch.setenv("MASTER_PORT", "2")
    third = gather()
    assert met == [0, 0]
    for member in (first, second, third):
        member.close()


TEAMS = """
from ume_models.mmeb.team import gather
taken = []
for number in range(2):
    team = gather()
    for evaluation in range(2):
        team.begin()
        if team.leads:
            team.announce({"of": [number, evaluation]})
        assert team.orders() == {"of": [number, evaluation]}
        taken.append(len([*team.take(5)]))
        team.finish()
    team.close()
print(*taken)
"""


def test_real_processes_gather_and_evaluate_again():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    members = [
        subprocess.Popen(
            [sys.executable, "-c", TEAMS],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        taken = [map(int, member.communicate(timeout=120)[0].split()) for member in members]
    finally:
        for member in members:
            member.kill()
    assert [sum(pair) for pair in zip(*taken, strict=True)] == [5] * 4


LAUNCHERS = {
    "torchrun": ({"RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 1, 2),
    "srun": ({"RANK": "3", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, 1, 4),
    "mpirun": (
        {
            "RANK": "3",
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        1,
        2,
    ),
    "mpiexec": (
        {"RANK": "3", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        1,
        2,
    ),
    # a script of a batch system that starts the processes itself: they inherit its variables
    "by hand": ({"RANK": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 3, 4),
    "nothing told": ({"RANK": "3"}, 3, 4),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_of_a_host_take_different_gpus(monkeypatch, launcher):
    variables, rank, size = LAUNCHERS[launcher]
    for told, _, _ in LAUNCHERS.values():
        for name in told:
            monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    store = HashStore()
    made = [TorchTeam(store, number, 4) for number in range(4)]
    assert (made[3].local_rank(), made[3].local_size()) == (rank, size)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert local_device("cuda", made[3]) == local_device("auto", made[3]) == f"cuda:{rank}"
    assert local_device("cuda:5", made[3]) == "cuda:5"
    assert local_device("cpu", made[3]) == "cpu"
    assert local_device("cuda", LoneTeam()) == local_device("cuda") == "cuda"
    for member in made:
        member.close()


def test_only_processes_of_this_host_count(monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    store, hosts = HashStore(), iter("abab")
    monkeypatch.setattr(team.socket, "gethostname", lambda: next(hosts))
    made = [TorchTeam(store, number, 4) for number in range(4)]
    assert [member.local_rank() for member in made] == [0, 0, 1, 1]
    assert [member.local_size() for member in made] == [2, 2, 2, 2]
    for member in made:
        member.close()


def test_a_silent_process_is_dead(members):
    members[1].close()  # its heart stops, its process is this one and lives
    members[2].finish()  # has done its part: silence is allowed
    members[2].close()

    def watch() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            members[0].check()
            time.sleep(0.2)

    with pytest.raises(TeamError, match=r"rank 1 .* has died"):
        watch()


MEMBER = """
import sys, time
from datetime import timedelta
from torch.distributed import TCPStore
from ume_models.mmeb.team import TorchTeam
store = TCPStore("127.0.0.1", int(sys.argv[1]), 2, False, timedelta(seconds=30))
team = TorchTeam(store, 1, 2)
print("here", flush=True)
time.sleep(600)
"""


def test_a_killed_process_is_named_at_once():
    store = TCPStore("127.0.0.1", 0, 2, True, timedelta(seconds=60), wait_for_workers=False)
    leader = TorchTeam(store, 0, 2)
    other = subprocess.Popen(
        [sys.executable, "-c", MEMBER, str(store.port)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "here\n"
        leader.check()
        assert leader.lost() == ""
        other.kill()
        other.wait()
        assert f"rank 1 (host {os.uname().nodename}, process {other.pid})" == leader.lost()
        with pytest.raises(TeamError, match=f"process {other.pid}.*has died"):
            leader.finish()
    finally:
        other.kill()
        other.stdout.close()
        leader.close()


def test_a_leader_that_is_gone_is_told(monkeypatch):
    class Broken(HashStore):
        def check(self, keys):
            raise RuntimeError("Connection reset by peer")

    member = TorchTeam(Broken(), 1, 2)
    with pytest.raises(TeamError, match="rank 0 cannot be reached"):
        member.check()
    member.fail("no matter")  # nobody is left to hear it
    member.close()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number"),
        ({"WORLD_SIZE": "2"}, "RANK must be a number"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "torchrun"),
    ],
)
def test_incomplete_variables_are_named(monkeypatch, variables, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UmeError, match=message):
        gather()


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert isinstance(gather(), LoneTeam)
