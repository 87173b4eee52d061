from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from ume_models.processing import prefetch


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("ume-load")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers: int) -> None:
    def slow_at_first(n: int) -> int:
        time.sleep(0.02 if n == 0 else 0)
        return n * n

    assert list(prefetch(slow_at_first, range(20), workers, 5)) == [n * n for n in range(20)]
    assert threads() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_comes_at_its_place(workers: int) -> None:
    def fail_at_three(n: int) -> int:
        if n == 3:
            raise KeyError("three")
        return n

    source = prefetch(fail_at_three, range(10), workers, 4)
    assert [next(source) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(source)
    assert threads() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_of_the_iterable_comes_after_earlier_results(workers: int) -> None:
    def batches() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("source")

    source = prefetch(lambda n: n, batches(), workers, 8)
    assert [next(source), next(source)] == [1, 2]
    with pytest.raises(OSError, match="source"):
        next(source)


def test_work_runs_ahead_but_no_further_than_the_depth() -> None:
    begun: list[int] = []
    taken: list[int] = []
    source = prefetch(lambda n: begun.append(n) or n, range(100), 3, 4)
    for n in source:
        taken.append(n)
        # at most `depth` not yet taken, and this one just taken
        assert len(begun) <= len(taken) + 4
        if n == 50:
            break
    deadline = time.monotonic() + 5
    while len(begun) < 54 and time.monotonic() < deadline:
        time.sleep(0.001)
    source.close()
    assert len(begun) <= 55


def test_batches_overlap() -> None:
    both = threading.Barrier(2, timeout=10)
    # each call waits for the other: passes only if two run at the same time
    assert len(list(prefetch(lambda n: both.wait(), range(4), 2, 2))) == 4


def test_early_close_waits_for_running_work_and_drops_the_rest() -> None:
    finished: list[int] = []

    def work(n: int) -> int:
        time.sleep(0.01)
        finished.append(n)
        return n

    source = prefetch(work, range(1000), 2, 50)
    assert next(source) == 0
    source.close()
    assert threads() == []
    count = len(finished)
    assert count < 50
    time.sleep(0.05)
    assert len(finished) == count


def test_a_consumer_that_fails_leaves_no_threads() -> None:
    def consume() -> None:
        for _ in prefetch(lambda n: n, range(1000), 2, 4):
            raise RuntimeError("consumer")

    with pytest.raises(RuntimeError, match="consumer"):
        consume()
    assert threads() == []


def test_arguments_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="workers"):
        prefetch(str, [1], -1, 2)
    with pytest.raises(ValueError, match="depth"):
        prefetch(str, [1], 1, 0)
