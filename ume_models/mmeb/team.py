"""The processes of one evaluation: who takes which shard, and who has died.

Launched by ``torchrun`` (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT), the
processes share the output folder and a key-value store of torch; no tensor travels between them.
Shards are taken from one counter, so a fast process takes more of them and none is computed twice.
A team may evaluate several times: each evaluation is a round with keys of its own in the store.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ume_models.errors import UmeError

_BEAT_SECONDS = 1.0
_SILENCE_SECONDS = 60.0  # a host that swaps or compiles may be late; a dead one stays silent
_POLL_SECONDS = 0.2
_FAREWELL_SECONDS = 5.0
# The number of a process on its host, as launchers tell it, and its number among all.
_LOCAL_RANKS = (
    ("LOCAL_RANK", "RANK"),
    ("SLURM_LOCALID", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_RANK"),
    ("MPI_LOCALRANKID", "PMI_RANK"),
)
_LOCAL_SIZES = (
    ("LOCAL_WORLD_SIZE", "RANK"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPI_LOCALNRANKS", "PMI_RANK"),
)
# Stores of this process by meeting place, and how many teams met there: rank 0 cannot listen twice.
_meetings: dict[tuple[str | int | None, ...], tuple[Any, Iterator[int]]] = {}


class TeamError(UmeError):
    """Another process of this evaluation failed or died."""


class Team:
    """One process alone; the base of ``TorchTeam``.

    Attributes:
        rank: number of this process, 0 leads.
        size: number of processes.
    """

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this process plans and scores."""
        return self.rank == 0

    def begin(self) -> None:
        """Begin an evaluation, which knows nothing of what the team did in earlier ones.

        Every process calls it equally often, before it does anything else for the evaluation.
        """

    def local_rank(self) -> int:
        """Number of this process among those of its host; may wait for them to come."""
        return 0

    def local_size(self) -> int:
        """How many processes of the team this host has; may wait for all to come."""
        return 1

    def announce(self, value: Mapping[str, Any]) -> None:
        """Tell the others what to do (the leader, once per evaluation)."""

    def orders(self) -> Any:
        """What the leader announced; waits for it."""
        raise UmeError("a process alone gives itself no orders")

    def take(self, count: int) -> Iterator[int]:
        """Numbers below ``count``, each to one process of the team only.

        Raises:
            TeamError: another process has died.
        """
        yield from range(count)

    def check(self) -> None:
        """Raise TeamError if another process has failed or died."""

    def tally(self, name: str, amount: int = 0) -> int:
        """Add to a common counter and return its value."""
        raise NotImplementedError

    def finish(self) -> None:
        """This process has done its part; the leader waits for all others."""

    def fail(self, reason: str) -> None:
        """Tell the others that this process gives up."""

    def close(self) -> None:
        """Stop what runs in the background."""


class LoneTeam(Team):
    """One process alone."""

    def __init__(self) -> None:
        self._tallies: dict[str, int] = {}

    def begin(self) -> None:
        self._tallies.clear()

    def tally(self, name: str, amount: int = 0) -> int:
        self._tallies[name] = self._tallies.get(name, 0) + amount
        return self._tallies[name]


class TorchTeam(Team):
    """Processes that meet in a key-value store of ``torch.distributed``.

    Args:
        store: where they meet.
        rank, size: this process's number, and how many there are.
        silence: seconds without a sign of life after which a process counts as dead.
    """

    def __init__(
        self, store: Any, rank: int, size: int, *, silence: float = _SILENCE_SECONDS
    ) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._silence = silence
        self._host = socket.gethostname()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._checked = 0.0
        self._leader = "rank 0"
        self._round = 0
        self._failed = False
        self._over = threading.Event()
        self._say(f"who/{rank}", {"host": self._host, "pid": os.getpid()})
        self._store.set(f"beat/{rank}", "0")
        self._heart = threading.Thread(target=self._beat, name="ume-team", daemon=True)
        self._heart.start()

    def begin(self) -> None:
        self._round += 1
        self._failed = False

    def local_rank(self) -> int:
        told = self._told_by_launcher(_LOCAL_RANKS)
        return self._on_this_host(range(self.rank)) if told is None else told

    def local_size(self) -> int:
        told = self._told_by_launcher(_LOCAL_SIZES)
        return self._on_this_host(range(self.size)) if told is None else told

    def announce(self, value: Mapping[str, Any]) -> None:
        self._say(self._key("orders"), value)

    def orders(self) -> Any:
        while not self._has(self._key("orders")):
            self._pause()
        self._remember_leader()
        return json.loads(self._store.get(self._key("orders")))

    def take(self, count: int) -> Iterator[int]:
        while True:
            self.check()
            number = self.tally("taken", 1) - 1
            if number >= count:
                return
            yield number

    def tally(self, name: str, amount: int = 0) -> int:
        try:
            return int(self._store.add(self._key(name), amount))
        except RuntimeError:
            raise self._leader_lost() from None

    def finish(self) -> None:
        try:
            self._store.set(self._key(f"done/{self.rank}"), "1")
        except RuntimeError:
            raise self._leader_lost() from None
        while self.leads and not all(map(self._is_done, range(self.size))):
            self._pause()

    def fail(self, reason: str) -> None:
        self._tell(f"rank {self.rank} (host {self._host}, process {os.getpid()}) gave up: {reason}")

    def close(self) -> None:
        self._over.set()
        self._heart.join(timeout=2 * _BEAT_SECONDS)
        if not self._failed:
            return
        try:
            self._store.set(f"left/{self.rank}", "1")
            deadline = time.monotonic() + _FAREWELL_SECONDS
            # The store goes with the leader: let the others read why first.
            while (
                self.leads
                and time.monotonic() < deadline
                and not all(map(self._has_left, self._others()))
            ):
                time.sleep(_POLL_SECONDS)
        except (RuntimeError, TeamError):
            pass

    def check(self) -> None:
        now = time.monotonic()
        if now - self._checked < _BEAT_SECONDS:
            return
        self._checked = now
        if self._has(self._key("failed")):
            self._failed = True
            raise TeamError(self._store.get(self._key("failed")).decode())
        for rank in self._others():
            if not self._is_done(rank) and self._is_dead(rank, now):
                reason = (
                    f"{self._name(rank)} has died. Finished shards are kept: start the same "
                    "command again, without --overwrite, to go on."
                )
                self._tell(reason)
                raise TeamError(reason)

    def _key(self, name: str) -> str:
        return f"round/{self._round}/{name}"

    def _is_done(self, rank: int) -> bool:
        return self._has(self._key(f"done/{rank}"))

    def _told_by_launcher(self, variables: Iterable[tuple[str, str]]) -> int | None:
        for name, number_among_all in variables:
            # What a batch script starts inherits the script's own variables: they tell another
            # process's number.
            mine = os.environ.get(number_among_all) == str(self.rank)
            if mine and os.environ.get(name, "").isdigit():
                return int(os.environ[name])
        return None

    def _on_this_host(self, ranks: Iterable[int]) -> int:
        count = 0
        for rank in ranks:
            while not self._has(f"who/{rank}"):
                self._pause()
            count += self._who(rank)["host"] == self._host
        return count

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def _has_left(self, rank: int) -> bool:
        return (
            self._has(f"left/{rank}")
            or self._is_done(rank)
            or self._is_dead(rank, time.monotonic())
        )

    def _tell(self, reason: str) -> None:
        """Let the others end with this reason, if they have none yet."""
        self._failed = True
        try:
            if not self._store.check([self._key("failed")]):
                self._store.set(self._key("failed"), reason)
        except RuntimeError:
            pass  # the leader has gone before: it told why itself

    def lost(self) -> str:
        """Names of the processes of this host that are gone, for a process told to end."""
        gone = [
            self._name(rank)
            for rank in self._others()
            if not self._is_done(rank) and self._pid_is_gone(rank)
        ]
        return ", ".join(gone)

    def _is_dead(self, rank: int, now: float) -> bool:
        if self._pid_is_gone(rank):
            return True
        if not self._has(
            f"beat/{rank}"
        ):  # it has not come yet; its launcher tells if it never does
            return False
        beat = self._store.get(f"beat/{rank}")
        last, since = self._seen.get(rank, (b"", now))
        if beat != last:
            last, since = beat, now
        self._seen[rank] = (last, since)
        return now - since > self._silence

    def _pid_is_gone(self, rank: int) -> bool:
        if not self._has(f"who/{rank}"):
            return False
        who = self._who(rank)
        return who["host"] == self._host and not _runs(who["pid"])

    def _name(self, rank: int) -> str:
        if not self._has(f"who/{rank}"):
            return f"rank {rank}"
        who = self._who(rank)
        return f"rank {rank} (host {who['host']}, process {who['pid']})"

    def _who(self, rank: int) -> Any:
        return json.loads(self._store.get(f"who/{rank}"))

    def _say(self, name: str, value: Mapping[str, Any]) -> None:
        self._store.set(name, json.dumps(value))

    def _has(self, name: str) -> bool:
        try:
            return bool(self._store.check([name]))
        except RuntimeError:  # the connection is broken
            raise self._leader_lost() from None

    def _leader_lost(self) -> TeamError:
        return TeamError(
            f"{self._leader} cannot be reached any more: it has died. Finished shards are kept: "
            "start the same command again, without --overwrite, to go on."
        )

    def _remember_leader(self) -> None:
        """Its name, while it can still be asked: the store goes with it."""
        if self._leader == "rank 0":
            self._leader = self._name(0)

    def _pause(self) -> None:
        self._remember_leader()
        time.sleep(_POLL_SECONDS)
        self.check()

    def _beat(self) -> None:
        count = 0
        while not self._over.wait(_BEAT_SECONDS):
            count += 1
            try:
                self._store.set(f"beat/{self.rank}", str(count))
            except RuntimeError:
                return  # the next call of the main thread tells


def gather() -> Team:
    """The team that the environment describes: this process alone, or what a launcher started.

    Each call makes a new team; every process calls it equally often.

    Raises:
        UmeError: the variables of the launcher are incomplete or the processes do not meet.
    """
    size = _number("WORLD_SIZE", 1)
    if size <= 1:
        return LoneTeam()
    rank = _number("RANK", None)
    from torch.distributed import PrefixStore

    place = (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"), rank, size)
    if place not in _meetings:
        _meetings[place] = _meet(rank, size), itertools.count()
    store, teams = _meetings[place]
    return TorchTeam(PrefixStore(f"ume_eval/{next(teams)}", store), rank, size)


def _meet(rank: int, size: int) -> Any:
    from datetime import timedelta

    from torch.distributed import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(minutes=5)))
    except (ValueError, RuntimeError) as error:
        raise UmeError(
            f"the processes do not meet ({error}); start them with torchrun, which sets RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        ) from None
    return store


def local_device(device: str, team: Team | None = None) -> str:
    """The device of this process: on a host with several processes, each takes its own GPU.

    Args:
        device: as the user gave it; a certain GPU is taken as it is.
        team: the processes; None for one alone.

    Raises:
        TeamError: another process has failed or died.
    """
    import torch

    if team is None or team.size == 1 or device not in ("auto", "cuda"):
        return device
    if not torch.cuda.is_available():
        return device
    return f"cuda:{team.local_rank() % torch.cuda.device_count()}"


def _number(variable: str, default: int | None) -> int:
    text = os.environ.get(variable)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise UmeError(f"{variable} must be a number, got {text!r}; start with torchrun")
    return int(text)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:  # one that ended and was not collected is no longer at work
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as handle:
            return handle.read().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True
