"""A call that another thread interrupts, wherever that could happen: what chance shows rarely, this shows at once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

POINTS = 64
PATIENCE = 0.2  # seconds


def interrupted(call: Callable[[], T], other: Callable[[], T]) -> tuple[T, list[T]]:
    """What ``call`` gives on one thread while ``other`` runs on a second one, and what that gives, each time.

    At its first POINTS calls and returns of functions, which is where Python changes threads, ``call`` waits for
    ``other`` to run from beginning to end; not where that takes longer, as behind a lock which ``call`` holds.
    """
    runs: list[Future[T]] = []
    patience = PATIENCE

    def pause(frame: FrameType, event: str, argument: object) -> None:
        nonlocal patience
        if len(runs) < POINTS and (not runs or runs[-1].done()):
            runs.append(aside.submit(other))
            if wait(runs[-1:], patience).not_done:
                patience = 0.0

    def watched() -> T:
        before = sys.getprofile()
        sys.setprofile(pause)
        try:
            return call()
        finally:
            sys.setprofile(before)

    with ThreadPoolExecutor(1) as aside, ThreadPoolExecutor(1) as main:
        given = main.submit(watched).result()
        return given, [run.result() for run in runs]
