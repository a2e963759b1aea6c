"""What people see: a live line on a terminal, plain lines elsewhere, nothing with --quiet; and signals."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ensemble_distill.errors import printable
from ensemble_distill.phase import Phase

PLAIN_SECONDS = 10.0
BAR = 24


class Console:
    """Prints results and progress; rich obeys NO_COLOR by itself. ``aside``: on stderr, for stdout has JSON."""

    def __init__(self, quiet: bool = False, aside: bool = False) -> None:
        width = None if (sys.stderr if aside else sys.stdout).isatty() else 120
        self.rich = RichConsole(stderr=aside, quiet=quiet, highlight=False, soft_wrap=True, width=width)
        self._live: Live | None = None
        self._last = time.monotonic()
        logging.basicConfig(format="note: %(message)s", level=logging.WARNING, stream=sys.stderr, force=True)

    def say(self, text: str) -> None:
        self.rich.print(Text(printable(text)))

    def table(self, table: Table) -> None:
        self.rich.print(table)

    @contextmanager
    def live(self) -> Iterator[None]:
        """While inside, ``progress`` keeps one line up to date on a terminal."""
        if not self.rich.is_terminal:
            yield
            return
        with Live(console=self.rich, refresh_per_second=8, transient=True) as self._live:
            yield
        self._live = None

    def progress(self, text: str, share: float | None = None) -> None:
        """The state of affairs: the live line, with a bar where a share is given, or a plain line every ten seconds."""
        if self._live is not None:
            line = Text(text, no_wrap=True, overflow="ellipsis")
            self._live.update(line if share is None else _barred(line, share))
        elif time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            self.say(text)

    def phase(self, phase: Phase) -> None:
        """How far something is: ``reading test  640/1,280 rows  3,200 rows/s  0:01 left``."""
        unit, pace = phase.unit, phase.per_second
        shown = f"{pace:,.0f}" if pace >= 10 else f"{pace:.2g}"
        left = f"  {shown} {unit}/s  {duration(phase.seconds_left)} left" if phase.done else ""
        self.progress(f"{phase.name}  {phase.done:,}/{phase.total:,} {unit}{left}", phase.share)


def _barred(line: Text, share: float) -> Table:
    result = Table.grid(padding=(0, 2))
    result.add_row(ProgressBar(total=1.0, completed=share, width=BAR), line)
    return result


def table(title: str, columns: list[str], rows: list[list[Any]]) -> Table:
    """A table with its first column to the left and figures to the right."""
    result = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        result.add_row(*map(str, row))
    return result


GRACE = 25.0
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def stoppable(grace: float = GRACE) -> Iterator[Callable[[], float | None]]:
    """Gives ``stop()``: None, or once SIGINT, SIGTERM or SIGUSR1 came the seconds that are left to end in order.

    After ``grace`` seconds, or at a second SIGINT, whatever goes on is interrupted. Nothing that was committed
    or saved is lost either way.
    """
    deadline: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal deadline
        if number == signal.SIGALRM or (deadline is not None and number == signal.SIGINT):
            raise KeyboardInterrupt
        if deadline is None:
            deadline = time.monotonic() + grace
            signal.setitimer(signal.ITIMER_REAL, max(grace, 1e-3))

    old = {s: signal.signal(s, handle) for s in (*STOPPING, signal.SIGALRM)}
    try:
        yield lambda: None if deadline is None else max(0.0, deadline - time.monotonic())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            signal.signal(number, handler)


def size(count: float) -> str:
    """Bytes for people: 1234567 → 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
