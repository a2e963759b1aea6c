"""What a store asks of a place that keeps bytes at names; and what a name may look like."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

from ensemble_distill.errors import Unsafe

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")

# Records of a cache are far smaller; a larger file is not read at all.
MAX_RECORD = 256 << 20


class Storage(Protocol):
    """Eight operations. What ``create``, ``replace`` and ``swap`` have acknowledged survives any later crash, whole.

    ``root`` says where it is, for people. Errors: StorageError for what the place cannot do now, Corrupt for a
    name that should be there and is not, Unsafe for what is no plain file or is larger than it may be.
    """

    root: str

    def create(self, name: str, *data: bytes | memoryview) -> bool:
        """Write ``name``, whose bytes may come in parts, unless it exists.

        True if this call created it, also when its reply was lost.
        """
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write ``name`` whole, over whatever was there."""
        ...

    def swap(self, name: str, expected: bytes | None, data: bytes) -> bool:
        """Write ``name`` whole if it still holds ``expected`` (None: if it is not there); False if it does not.

        True also where it holds ``data`` already: a reply may have been lost after the work was done.
        """
        ...

    def read(self, name: str, at_most: int = MAX_RECORD) -> bytes:
        """The whole of ``name``, which may hold ``at_most`` bytes."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of ``name``, or None where there is no such file."""
        ...

    def list(self, folder: str) -> Iterator[str]:
        """The names directly in a folder, in any order; not those of files still being written."""
        ...

    def remove(self, name: str) -> None:
        """Delete ``name`` if it is there."""
        ...

    def free(self) -> int | None:
        """Bytes that can still be written, or None where nobody knows."""
        ...


def check_name(name: str, root: str) -> str:
    """Names are made from digests and plans, and checked all the same: relative, plain, no dots in front."""
    if not is_name(name):
        raise Unsafe(f"{root}: {name[:80]!r} is no name that a cache could hold")
    return name


def is_name(name: str) -> bool:
    return len(name) <= 512 and _NAME.fullmatch(name) is not None
