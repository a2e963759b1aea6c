"""Bytes at names in a local directory: create-once, read, list, replace.

Every file the tool writes goes through ``create`` or ``replace``, and both are durable when they return:
temporary name in the same directory, fsync, link (or rename), fsync of the directory. What stands under
its own name is therefore whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from ensemble_distill.errors import Corrupt, StorageError, Unsafe

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")


class LocalStorage:
    """A directory; names are relative, derived from digests and plans, and checked all the same."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def create(self, name: str, data: bytes) -> bool:
        """Write ``name`` unless it exists; True if this call created it. Durable on return."""
        path = self._path(name)
        created = False
        if not path.exists():
            with self._temporary(path, data) as part, contextlib.suppress(FileExistsError):
                os.link(part, path)
                created = True
        # Also where it stood already: whoever linked it may have died before its name was durable.
        _sync_directory(path.parent)
        return created

    def replace(self, name: str, data: bytes) -> None:
        """Write ``name`` whole, over whatever was there. Durable on return."""
        path = self._path(name)
        with self._temporary(path, data) as part:
            os.replace(part, path)
            _sync_directory(path.parent)

    def read(self, name: str) -> bytes:
        """The whole of ``name``; Corrupt if it is missing, since names are only read where a record names them."""
        path = self._path(name)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise Corrupt(f"{path} is missing") from None
        except OSError as error:
            raise storage_error(path, error) from error

    def remove(self, name: str) -> None:
        """Delete ``name`` if it is there. Durable on return."""
        path = self._path(name)
        path.unlink(missing_ok=True)
        _sync_directory(path.parent)

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def list(self, prefix: str) -> list[str]:
        """The names directly under a folder, sorted, temporaries left out."""
        folder = self._path(prefix)
        if not folder.is_dir():
            return []
        return sorted(f"{prefix}/{e.name}" for e in os.scandir(folder) if _NAME.fullmatch(e.name))

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise Unsafe(f"{self.root}: {name!r} is no name that a cache could hold")
        return self.root / name

    @contextlib.contextmanager
    def _temporary(self, path: Path, data: bytes) -> Iterator[Path]:
        # A leading dot keeps it out of list(); the random part keeps writers out of each other's way.
        part = path.parent / f".{path.name}.{secrets.token_hex(6)}.part"
        try:
            _make_directory(path.parent)
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield part
        except OSError as error:
            raise storage_error(path, error) from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def storage_error(path: Path, error: OSError) -> StorageError:
    """The one sentence for an operating system error, with what to do about the frequent ones."""
    hints = {
        errno.ENOSPC: "free some space and run the same command again; everything committed is safe",
        errno.EDQUOT: "your quota is full: free some space and run the same command again",
        errno.EACCES: "check the permissions of the directory",
        errno.EROFS: "the file system is read-only: choose another directory",
    }
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StorageError(f"{path}: {reason}", hint=hints.get(error.errno or 0, "run the same command again"))


def _make_directory(path: Path) -> None:
    """mkdir -p in which each new entry is durable."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir()
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
