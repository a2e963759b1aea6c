"""Systems that fail, and a model of what a power loss may leave: the rig of test_crash.py and of crash_runs.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ensemble_distill.store.local import System

CALLS = (
    "mkdir", "open_new", "write", "sync", "close", "link", "rename", "unlink", "sync_directory",
    "open", "open_directory", "read",
)  # fmt: skip
# Those that change what is on the disk: between two of them, it is the same whenever the process dies.
CHANGES = CALLS[:9]


class Killed(BaseException):
    """Stands for a SIGKILL where the process that dies is the test's own."""


class FaultySystem(System):
    """The calls of a local storage, counted; at call ``at`` (from 0) the fault happens instead of it.

    fault: "kill" (SIGKILL, this very process), "stop" (Killed, at this and at every later call), "short" (a
    write takes one byte only), or an errno, which is raised. Only calls named in ``counted`` count.
    Nothing is really synced: a killed process loses nothing that it wrote.
    """

    def __init__(self, fault: str | int = "", at: int = -1, counted: tuple[str, ...] = CALLS) -> None:
        self.fault, self.at, self.counted = fault, at, counted
        self.calls: list[str] = []
        self.dead = False
        self._open: set[int] = set()

    def _call(self, name: str) -> bool:
        """Counts a call; True if a write is to be short."""
        if self.dead:
            raise Killed
        if name not in self.counted:
            return False
        self.calls.append(name)
        if len(self.calls) - 1 != self.at:
            return False
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "stop":
            self.dead = True
            for handle in self._open:
                os.close(handle)
            raise Killed
        if isinstance(self.fault, int):
            raise OSError(self.fault, os.strerror(self.fault))
        return self.fault == "short"

    def mkdir(self, path: Path) -> None:
        self._call("mkdir")
        super().mkdir(path)

    def open_new(self, path: Path) -> int:
        self._call("open_new")
        handle = super().open_new(path)
        self._open.add(handle)
        return handle

    def write(self, handle: int, data: memoryview) -> int:
        short = self._call("write")
        return super().write(handle, data[:1] if short else data)

    def sync(self, handle: int) -> None:
        self._call("sync")

    def close(self, handle: int) -> None:
        if not self.dead:
            self._open.discard(handle)
            super().close(handle)  # first: Linux closes also where close() fails
        self._call("close")

    def link(self, source: Path, target: Path) -> None:
        self._call("link")
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self._call("rename")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._call("unlink")
        super().unlink(path)

    def sync_directory(self, path: Path) -> None:
        self._call("sync_directory")

    def open(self, name: str, directory: int | None = None) -> int:
        self._call("open")
        return super().open(name, directory)

    def open_directory(self, name: str, directory: int | None = None) -> int:
        self._call("open_directory")
        return super().open_directory(name, directory)

    def read(self, handle: int, count: int, offset: int) -> bytes:
        self._call("read")
        return super().read(handle, count, offset)


# Power loss -----------------------------------------------------------------------------------------


class Event(NamedTuple):
    """What was asked of the disk and done, or acknowledged to the user. ``path`` is relative to the base."""

    call: str
    path: str
    value: Any = None


class Recorder(FaultySystem):
    """Also writes down every change, and every acknowledgement, in one log. ``base`` must have been there before.

    Several recorders may write one log, one after the other: processes that were killed, and that went on.
    """

    def __init__(self, base: Path, log: list[Event] | None = None, **fault: Any) -> None:
        super().__init__(**fault)
        self.base = base
        self.log: list[Event] = [] if log is None else log
        self._files: dict[int, int] = {}

    def ack(self, kind: str, what: str) -> None:
        self.log.append(Event("ack", kind, what))

    def _note(self, call: str, path: Path, value: Any = None) -> None:
        self.log.append(Event(call, str(path.relative_to(self.base)), value))

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self._note("mkdir", path)

    def open_new(self, path: Path) -> int:
        handle = super().open_new(path)
        self._files[handle] = len(self.log)  # the file's number, for ever
        self._note("open_new", path, len(self.log))
        return handle

    def write(self, handle: int, data: memoryview) -> int:
        count = super().write(handle, data)
        self.log.append(Event("write", "", (self._files[handle], bytes(data[:count]))))
        return count

    def sync(self, handle: int) -> None:
        super().sync(handle)
        self.log.append(Event("sync", "", self._files[handle]))

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self._note("link", source, str(target.relative_to(self.base)))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._note("rename", source, str(target.relative_to(self.base)))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._note("unlink", path)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self._note("sync_directory", path)


class WithoutSync(Recorder):
    """A control: files are never synced."""

    def sync(self, handle: int) -> None:
        FaultySystem.sync(self, handle)


class WithoutDirectorySync(Recorder):
    """A control: names are never synced."""

    def sync_directory(self, path: Path) -> None:
        FaultySystem.sync_directory(self, path)


DIRECTORY = -1

# A change of a directory: what each of these names is from then on (a file, DIRECTORY, or None: nothing).
Change = dict[str, int | None]


class Disk:
    """What a disk holds for sure, and what it may hold besides, after the first events of a log."""

    def __init__(self) -> None:
        self.acknowledged: list[tuple[str, str]] = []
        self.events = 0
        self._content: dict[int, bytearray] = {}
        self._synced: dict[int, int] = {}
        self._now: dict[str, int | None] = {}  # names as running processes see them
        self._held: dict[str, Change] = {}
        self._pending: dict[str, list[Change]] = {}

    def apply(self, event: Event) -> None:
        call, path, value = event
        self.events += 1
        if call == "ack":
            self.acknowledged.append((path, value))
        elif call == "mkdir":
            self._change({path: DIRECTORY})
        elif call == "open_new":
            self._content[value], self._synced[value] = bytearray(), 0
            self._change({path: value})
        elif call == "write":
            self._content[value[0]] += value[1]
        elif call == "sync":
            self._synced[value] = len(self._content[value])
        elif call == "link":
            self._change({value: self._now[path]})
        elif call == "rename":
            self._change({value: self._now[path], path: None})
        elif call == "unlink":
            self._change({path: None})
        elif call == "sync_directory":
            held = self._held.setdefault(path, {})
            for change in self._pending.pop(path, []):
                held.update(change)

    def _change(self, names: Change) -> None:
        folder = {str(Path(name).parent) for name in names}
        assert len(folder) == 1, "a rename between directories is not modelled"
        self._now.update(names)
        self._pending.setdefault(folder.pop(), []).append(names)

    def image(self, rng: np.random.Generator, names: float, content: str) -> dict[str, bytes | None]:
        """One tree that the disk may show afterwards: path to bytes, or to None for a directory.

        names: how likely each change that is not synced survives. content: what became of bytes that are not
        synced: "lost", "zeros", "prefix", "whole", or "any" of these for each file.
        """
        tree: dict[str, bytes | None] = {}
        folders = ["."]
        files: dict[int, bytes] = {}  # two names of one file show the same
        while folders:
            folder = folders.pop()
            entries = dict(self._held.get(folder, {}))
            for change in self._pending.get(folder, []):
                if rng.random() < names:
                    entries.update(change)
            for name, file in entries.items():
                if file == DIRECTORY:
                    tree[name] = None
                    folders.append(name)  # what is in a directory that is lost, is lost
                elif file is not None:
                    if file not in files:
                        files[file] = self._bytes(file, rng, content)
                    tree[name] = files[file]
        return tree

    def _bytes(self, file: int, rng: np.random.Generator, content: str) -> bytes:
        data, synced = bytes(self._content[file]), self._synced[file]
        if content == "any":
            content = ("lost", "zeros", "prefix", "whole")[rng.integers(4)]
        if content == "lost":
            return data[:synced]
        if content == "zeros":
            return data[:synced] + bytes(len(data) - synced)
        return data if content == "whole" else data[: rng.integers(synced, len(data) + 1)]


class Image(NamedTuple):
    """A disk after a power loss, what had been acknowledged before, and after how many events it came."""

    tree: dict[str, bytes | None]
    acknowledged: list[tuple[str, str]]
    events: int

    def write(self, base: Path) -> None:
        """Put it into an empty directory."""
        for name, data in self.tree.items():
            if data is None:
                (base / name).mkdir()
            else:
                (base / name).write_bytes(data)


# The corners first, then anything between them.
_KINDS = ((0.0, "lost"), (1.0, "lost"), (1.0, "zeros"), (0.5, "any"), (1.0, "any"), (0.1, "any"), (0.9, "any"))


def disk_images(log: list[Event], rng: np.random.Generator, count: int) -> Iterator[Image]:
    """``count`` disks that POSIX allows after a power loss, spread evenly over the moments between two events."""
    at = np.sort(np.arange(count) % (len(log) + 1))
    disk = Disk()
    for number, events in enumerate(at):
        while disk.events < events:
            disk.apply(log[disk.events])
        kind = _KINDS[rng.integers(len(_KINDS)) if count <= len(log) else number % len(_KINDS)]
        yield Image(disk.image(rng, *kind), list(disk.acknowledged), disk.events)
