"""Teams: work is shared without gaps, and who fails or dies is named."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

from ume_models.errors import UmeError
from ume_models.mmeb.team import LoneTeam, TeamError, TorchTeam, gather


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
