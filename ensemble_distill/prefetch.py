"""Doing the next things on threads while this one is used, in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(tasks: Iterable[Callable[[], T]], workers: int = 1) -> Iterator[T]:
    """The tasks' results in order, up to two tasks a worker ahead. A task's error is raised in its turn."""
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="prefetch")
    pending: deque[Future[T]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def timed(items: Iterator[T], waited: Callable[[float], None]) -> Iterator[T]:
    """The same items; ``waited`` is told the seconds that each took to come."""
    while True:
        start = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        finally:
            waited(time.perf_counter() - start)
        yield item
