"""How far a capture is, and what it waits for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far a capture is. seconds: what the calling thread spent on each, since the start.

    ``late``: units that another worker had committed when this one came to it.
    """

    units: int
    units_total: int
    rows: int = 0
    bytes: int = 0
    late: int = 0
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"source": 0.0, "teachers": 0.0, "disk": 0.0, "others": 0.0}
    )

    @property
    def seconds_so_far(self) -> float:
        return time.perf_counter() - self.started

    @property
    def rows_per_second(self) -> float:
        return self.rows / max(1e-9, self.seconds_so_far)

    def waited(self, seconds: float) -> None:
        self.seconds["source"] += seconds

    @property
    def waiting_for(self) -> str:
        """What most of the time went to: ``teachers 97%``."""
        total = sum(self.seconds.values()) or 1.0
        name, value = max(self.seconds.items(), key=lambda item: item[1])
        return f"{name} {value / total:.0%}"

    @property
    def shares(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        shown = {name: value for name, value in self.seconds.items() if value or name != "others"}
        return ", ".join(f"{name} {value / total:.0%}" for name, value in shown.items())
