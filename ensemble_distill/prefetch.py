"""Doing the next things on threads while this one is used, in order."""

from __future__ import annotations

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
