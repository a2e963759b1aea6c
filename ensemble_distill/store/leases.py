"""Leases: who is at work on which work item. They save work, and nothing depends on them being true.

Two workers that both believe they hold a lease capture the same item twice, and the first commit wins. So a
lease needs no clock that others agree with: whoever wants one that another holds watches it, and takes it
when it has not changed for ``ttl`` seconds of its own clock, or at once when its holder was a process of
this machine that is gone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import Field

from ensemble_distill.errors import Corrupt, Error, Unsafe
from ensemble_distill.frozen import Config
from ensemble_distill.store import records
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.storage import Storage

TTL = 60.0
MAX_LEASE = 4096
# What the leases of those are called that may drop a plan, capture under one, or put a manifest in force.
PLANNING, CAPTURING, SEALING, COPYING = "plan", "capture", "seal", "copy"


class Lease(Config):
    """The holder (a random name), where it runs, and how often it has renewed."""

    owner: str
    machine: str
    process: str = Field(pattern=r"^[0-9]{1,9}:\w+$")
    beat: int = 0


class Leases:
    """The leases of one worker. ``storage`` need not sync: a lease that is lost costs an item's work."""

    def __init__(self, storage: Storage, ttl: float = TTL, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage, self.ttl, self._clock = storage, ttl, clock
        self._me = Lease(owner=secrets.token_hex(8), machine=_machine(), process=_process(os.getpid()))
        self._held: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()

    def claim(self, item: str) -> bool:
        """Whether this worker may do the item now."""
        name = f"leases/{item}"
        if not self._storage.create(name, records.dump(self._me)):
            if not self._dead(name):
                return False
            # Another may do the same at the same moment, and both win: harmless, and rare.
            self._storage.remove(name)
            if not self._storage.create(name, records.dump(self._me)):
                return False
        with self._lock:
            self._held.add(item)
        return True

    def release(self, item: str) -> None:
        """Give it back: done, or dropped."""
        with self._lock:
            self._held.discard(item)
        self._storage.remove(f"leases/{item}")

    def release_all(self) -> None:
        for item in list(self._held):
            self.release(item)

    def live(self) -> list[str]:
        """The items that others (or this worker) seem to be at work on; forgets those whose holder is gone."""
        return [name.removeprefix("leases/") for name in self._storage.list("leases") if not self._dead(name)]

    def renew(self) -> None:
        """Show that the holder lives; a lease that cannot be renewed only risks double work."""
        self._me = self._me.model_copy(update={"beat": self._me.beat + 1})
        with self._lock:
            for item in self._held:
                with contextlib.suppress(Error):
                    self._storage.replace(f"leases/{item}", records.dump(self._me))

    @contextlib.contextmanager
    def renewing(self) -> Iterator[None]:
        """Renews on a thread while inside, and gives back on leaving what is still held."""
        done = threading.Event()

        def run() -> None:
            while not done.wait(self.ttl / 4):
                self.renew()

        thread = threading.Thread(target=run, name="leases", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            with contextlib.suppress(Error):
                self.release_all()

    def _dead(self, name: str) -> bool:
        """Whether a lease's holder is gone, as far as can be seen from here."""
        try:
            data = self._storage.read(name, MAX_LEASE)
        except (Corrupt, Unsafe):
            return True  # given back meanwhile, or no lease at all
        try:
            lease = records.load(Lease, data, name)
        except Error:
            lease = None
        here = lease is not None and lease.machine == self._me.machine and lease.owner != self._me.owner
        if here and lease is not None and lease.process != _process(int(lease.process.partition(":")[0])):
            return True
        # One that lives may hang: wherever it runs, it has to renew.
        now = self._clock()
        before, since = self._seen.get(name, (None, now))
        if before != data:
            self._seen[name] = data, now
            return False
        return now - since >= self.ttl


def _machine() -> str:
    """This boot of this machine, as the processes of one container see it."""
    parts = []
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(str(Path(path).readlink()) if "ns" in path else Path(path).read_text().strip())
        except OSError:
            parts.append(secrets.token_hex(8))  # cannot be told: then only time decides
    return " ".join(parts)


def _process(pid: int) -> str:
    """A process and when it began, so that a number that is used again is another process: ``pid:ticks``."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return f"{pid}:gone"
    state, *rest = text.rpartition(")")[2].split()
    return f"{pid}:gone" if state in "ZX" else f"{pid}:{rest[18]}"


@contextlib.contextmanager
def at_work(storage: Storage, kind: str) -> Iterator[str]:
    """While inside, a lease ``kind-…`` says that somebody writes here, for whom nothing may be taken for garbage.

    Gives its name.
    """
    leases, name = Leases(lease_storage(storage)), f"{kind}-{secrets.token_hex(8)}"
    leases.claim(name)
    with leases.renewing():
        yield name


def lease_storage(storage: Storage) -> Storage:
    """The same place, without the fsyncs: a lease that is lost with the power costs nothing."""
    return LocalStorage(storage.path, sync=False) if isinstance(storage, LocalStorage) else storage
