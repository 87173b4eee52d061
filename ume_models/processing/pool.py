"""An ordered, bounded thread pool which works ahead of the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ume_models.errors import OptionError

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def prefetch(
    fn: Callable[[Batch], Result],
    planned_batches: Iterable[Batch],
    workers: int = 2,
    depth: int = 4,
) -> Generator[Result, None, None]:
    """Yield ``fn(batch)`` for each batch, in order, computed ahead in threads.

    Threads are enough: decoding, resizing and table look-ups release the interpreter lock.

    Args:
        fn: called in a worker thread; must be thread-safe.
        planned_batches: read in the calling thread, at most ``depth`` batches ahead.
        workers: threads; 0 calls ``fn`` in the calling thread, when the result is asked for.
        depth: how many batches may be in work or finished and not yet taken: the memory bound.

    Yields:
        Results in the order of the batches. An exception of ``fn`` or of the iterable is raised
        at its place in that order and ends the iteration.

    Closing the generator early (``close()``, leaving a ``for`` loop and dropping it, an exception
    in the consumer) cancels batches not yet begun and waits for those that have.
    """
    if workers < 0:
        raise OptionError(f"workers must be at least 0, got {workers}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if workers == 0:
        return _inline(fn, planned_batches)
    return _threaded(fn, planned_batches, workers, depth)


def _inline(
    fn: Callable[[Batch], Result], batches: Iterable[Batch]
) -> Generator[Result, None, None]:
    for batch in batches:
        yield fn(batch)


def _threaded(
    fn: Callable[[Batch], Result], batches: Iterable[Batch], workers: int, depth: int
) -> Generator[Result, None, None]:
    source = iter(batches)
    pending: deque[Future[Result]] = deque()
    source_error: BaseException | None = None
    exhausted = False
    executor = ThreadPoolExecutor(max_workers=min(workers, depth), thread_name_prefix="ume-load")
    try:
        while True:
            while not exhausted and len(pending) < depth:
                try:
                    batch = next(source)
                except StopIteration:
                    exhausted = True
                except Exception as error:  # raised at its place in the order
                    source_error, exhausted = error, True
                else:
                    pending.append(executor.submit(fn, batch))
            if not pending:
                break
            result = pending.popleft().result()
            yield result
            del result  # do not hold a batch while the next one is awaited
        if source_error is not None:
            raise source_error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
