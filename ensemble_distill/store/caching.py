"""A bounded copy on local disk of what is read from a bucket, shared by all processes that name its folder."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ensemble_distill.errors import Error, UsageError
from ensemble_distill.fingerprint import sha256
from ensemble_distill.store import records
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.storage import MAX_RECORD, Storage

# The names that copies have, also while they are written.
_COPY = re.compile(r"(objects|pages)-[0-9a-f]{64}\.\w+|\.(objects|pages)-[0-9a-f]{64}\.\w+\.[0-9a-f]{12}\.part")


class CachedStorage:
    """Reads shards and pages, whose names say their content, through a folder of at most ``size`` bytes.

    A copy is held against its name whenever it is read, and fetched again if it is not what it should be. The
    least recently used go first, and no file of another name is touched. Everything else passes straight through.
    UsageError for a folder that is a cache itself.
    """

    def __init__(self, storage: Storage, folder: str | Path, size: int) -> None:
        self.root = storage.root
        self._storage, self._size = storage, size
        self._copies = LocalStorage(folder, sync=False)
        if os.path.lexists(self._copies.path / "PLAN"):
            raise UsageError(f"{folder} is a cache, and no folder for copies", hint="give an empty or a new folder")

    def read(self, name: str, at_most: int = MAX_RECORD) -> bytes:
        if not name.startswith(("objects/", "pages/")):
            return self._storage.read(name, at_most)
        copy = name.replace("/", "-")
        with contextlib.suppress(Error, OSError):
            data = self._copies.read(copy, at_most)
            if _is_named_by(name, data):
                os.utime(self._copies.path / copy)  # used now
                return data
        data = self._storage.read(name, at_most)
        if len(data) <= self._size and _is_named_by(name, data):
            with contextlib.suppress(Error):  # a full disk only costs the copy
                self._copies.replace(copy, data)
                self._evict()
        return data

    def _evict(self) -> None:
        held = []
        for entry in os.scandir(self._copies.path):
            if not (_COPY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)):
                continue
            with contextlib.suppress(OSError):  # another process was faster
                found = entry.stat(follow_symlinks=False)
                held.append((found.st_mtime_ns, found.st_size, entry.path))
        total = sum(size for _, size, _ in held)
        for _, size, path in sorted(held):
            if total <= self._size:
                break
            with contextlib.suppress(OSError):
                Path(path).unlink()
            total -= size

    def create(self, name: str, *data: bytes | memoryview) -> bool:
        return self._storage.create(name, *data)

    def replace(self, name: str, data: bytes) -> None:
        self._storage.replace(name, data)

    def swap(self, name: str, expected: bytes | None, data: bytes) -> bool:
        return self._storage.swap(name, expected, data)

    def size(self, name: str) -> int | None:
        return self._storage.size(name)

    def list(self, folder: str) -> Iterator[str]:
        return self._storage.list(folder)

    def remove(self, name: str) -> None:
        self._storage.remove(name)

    def free(self) -> int | None:
        return self._storage.free()


def _is_named_by(name: str, data: bytes) -> bool:
    """Whether a shard's or page's bytes are those that its name says."""
    folder, _, file = name.partition("/")
    digest = records.root_hash(records.block_hashes(data)) if folder == "objects" else sha256(data)
    return file.partition(".")[0] == digest
