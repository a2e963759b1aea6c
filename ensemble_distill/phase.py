"""How far something that takes long is, for whoever called it to show."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Phase:
    """``done`` of ``total`` rows, or what ``unit`` names. ``report`` is told at the start and after each batch."""

    name: str
    total: int
    report: Report
    unit: str = "rows"
    done: int = 0
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.report(self)

    def add(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        self.report(self)

    @property
    def share(self) -> float:
        return self.done / max(1, self.total)

    @property
    def per_second(self) -> float:
        return self.done / max(1e-9, time.perf_counter() - self.started)

    @property
    def seconds_left(self) -> float:
        """At the pace so far; none is known before anything is done, and infinity says so."""
        return (self.total - self.done) / self.per_second if self.done else float("inf")


Report = Callable[[Phase], None]


def silent(phase: Phase) -> None:
    """A report that nobody hears."""
