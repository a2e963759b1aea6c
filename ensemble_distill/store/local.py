"""Bytes at names in a local directory.

Every file the tool writes goes through ``create`` or ``replace``, and both are durable when they return:
temporary name in the same directory, fsync, link (or rename), fsync of the directory. What stands under
its own name is therefore whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from ensemble_distill.errors import Corrupt, StorageError, Unsafe
from ensemble_distill.store.storage import MAX_RECORD, check_name, is_name

READ = 1 << 30

_TEMPORARY = re.compile(r"\..*\.part", re.DOTALL)


class System:
    """The calls to the operating system that a local storage makes, one method each: where tests put faults."""

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def open_new(self, path: Path) -> int:
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o666)

    def write(self, handle: int, data: memoryview) -> int:
        return os.write(handle, data)

    def sync(self, handle: int) -> None:
        os.fsync(handle)

    def close(self, handle: int) -> None:
        os.close(handle)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def sync_directory(self, path: Path) -> None:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def open(self, name: str, directory: int | None = None) -> int:
        # NOFOLLOW: a cache from a stranger may hold links. NONBLOCK: it may hold a pipe, which would wait for ever.
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)

    def open_directory(self, name: str, directory: int | None = None) -> int:
        follow = 0 if directory is None else os.O_NOFOLLOW  # the root may be a link: its owner chose it
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | follow, dir_fd=directory)

    def read(self, handle: int, count: int, offset: int) -> bytes:
        return os.pread(handle, count, offset)


class LocalStorage:
    """A directory. ``sync=False`` leaves out the fsyncs, for files that may be lost."""

    def __init__(self, root: str | Path, system: System | None = None, sync: bool = True) -> None:
        self.path = Path(root)
        self.root = str(root)
        self._system = system or System()
        self._sync = sync
        self._durable: set[Path] = set()

    def create(self, name: str, *data: bytes | memoryview) -> bool:
        path = self._path(name)
        created = False
        with _errors(path):
            if not os.path.lexists(path):
                with self._temporary(path, *data) as part, contextlib.suppress(FileExistsError):
                    self._system.link(part, path)
                    created = True
            if self._sync:
                # Also where it stood already: whoever linked it may have died before its name was durable.
                self._system.sync_directory(path.parent)
        return created

    def replace(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with _errors(path), self._temporary(path, data) as part:
            self._system.rename(part, path)
            if self._sync:
                self._system.sync_directory(path.parent)

    def swap(self, name: str, expected: bytes | None, data: bytes) -> bool:
        path = self._path(name)
        folder = path.parent
        with _errors(path):
            self._make_directory(folder)
            with self._locked(folder):
                if (held := self._held(name, max(len(data), len(expected or b"")))) == data:
                    if self._sync:  # whoever wrote it may have died before it was durable
                        self._system.sync_directory(folder)
                    return True
                if held != expected:
                    return False
                self.replace(name, data)
                return True

    def read(self, name: str, at_most: int = MAX_RECORD) -> bytes:
        path = self._path(name)
        with _errors(path), self._opened(name) as handle:
            size = os.fstat(handle).st_size
            if size > at_most:
                raise Unsafe(f"{path} holds {size} bytes, it can hold at most {at_most}")
            parts, offset = [], 0
            while offset < size and (part := self._system.read(handle, min(READ, size - offset), offset)):
                parts.append(part)
                offset += len(part)
            return b"".join(parts) if len(parts) != 1 else parts[0]

    def size(self, name: str) -> int | None:
        path = self._path(name)
        with _errors(path):
            try:
                found = path.lstat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return found.st_size if stat.S_ISREG(found.st_mode) else None

    def list(self, folder: str) -> Iterator[str]:
        path = self._path(folder)
        if path.is_symlink():
            raise Unsafe(f"{path} is a link, expected a folder")
        with _errors(path):
            try:
                entries = os.scandir(path)
            except (FileNotFoundError, NotADirectoryError):
                return
            with entries:
                for entry in entries:
                    if is_name(entry.name):
                        yield f"{folder}/{entry.name}"

    def remove(self, name: str) -> None:
        path = self._path(name)
        with _errors(path):
            with contextlib.suppress(FileNotFoundError):
                self._system.unlink(path)
            if self._sync and path.parent.is_dir():
                self._system.sync_directory(path.parent)

    def free(self) -> int:
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def temporaries(self, folder: str) -> Iterator[str]:
        """What killed writers left directly in a folder ("": the root): plain files under temporary names."""
        path = self._path(folder) if folder else self.path
        with _errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
            for entry in entries:
                if _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    yield f"{folder}/{entry.name}".lstrip("/")

    def now(self) -> float:
        """The time by the clock that dates its files, which may be a server's: seconds since 1970."""
        path = self.path / f".{secrets.token_hex(6)}.part"
        try:
            self._system.close(self._system.open_new(path))
            found = path.lstat().st_mtime
            self._system.unlink(path)
        except OSError:  # nothing can be written there: then nothing will be removed, either
            return time.time()
        return found

    def remove_temporary(self, name: str) -> None:
        """Delete one of ``temporaries``, if it is there."""
        with _errors(self.path / name), contextlib.suppress(FileNotFoundError):
            self._system.unlink(self.path / name)

    def _path(self, name: str) -> Path:
        """Where a name is; Unsafe if a folder on the way is a link, which could lead anywhere."""
        path = self.path / check_name(name, self.root)
        for folder in list(path.parents)[: name.count("/")]:
            if folder.is_symlink():
                raise Unsafe(f"{folder} is a link, expected a folder")
        return path

    def _held(self, name: str, at_most: int) -> bytes | None:
        """What a name holds, no more than a byte beyond ``at_most``; None where it is not there."""
        if (size := self.size(name)) is not None and size > at_most:
            return bytes(at_most + 1)  # something else, whatever it is
        with contextlib.suppress(Corrupt):
            return self.read(name, at_most)
        return None

    def hold(self) -> int | None:
        """A handle that locks the root, made if need be, while it is open; None where somebody else holds it.

        The lock is gone with its process. File systems that cannot lock a folder (some of a network) are not locked.
        """
        with _errors(self.path):
            self._make_directory(self.path)
            handle = self._system.open_directory(str(self.path))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return None
            except OSError:
                pass
            return handle

    @contextlib.contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        """One at a time, of all processes of this machine; the lock of one that dies is gone with it.

        File systems that cannot lock a folder (some of a network) are not locked.
        """
        handle = self._system.open_directory(str(folder))
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # a child that was forked meanwhile has the same handle
            os.close(handle)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """The file, reached without following a link below the root; Unsafe if it is no plain file."""
        *folders, last = name.split("/")
        held: list[int] = []
        try:
            held.append(self._system.open_directory(str(self.path)))
            for folder in folders:
                held.append(self._system.open_directory(folder, held[-1]))
            held.append(self._system.open(last, held[-1]))
            if not stat.S_ISREG(os.fstat(held[-1]).st_mode):
                raise Unsafe(f"{self.path / name} is no plain file")
            yield held[-1]
        except FileNotFoundError:
            raise Corrupt(f"{self.path / name} is missing") from None
        except OSError as error:
            # What lies on the way is a link (ELOOP, or ENOTDIR where a folder was asked for), a socket or a device.
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EMLINK):
                raise Unsafe(f"{self.path / name} is no plain file in plain folders") from None
            raise
        finally:
            for handle in reversed(held):
                os.close(handle)

    @contextlib.contextmanager
    def _temporary(self, path: Path, *data: bytes | memoryview) -> Iterator[Path]:
        # A leading dot keeps it out of list(); the random part keeps writers out of each other's way.
        part = path.parent / f".{path.name[:100]}.{secrets.token_hex(6)}.part"
        self._make_directory(path.parent)
        try:
            handle = self._system.open_new(part)
            try:
                for piece in data:
                    view = memoryview(piece)
                    while view:
                        view = view[self._system.write(handle, view) :]
                if self._sync:
                    self._system.sync(handle)
            finally:
                self._system.close(handle)
            yield part
        finally:
            with contextlib.suppress(OSError):  # renamed, or gone with the disk
                self._system.unlink(part)

    def _make_directory(self, path: Path) -> None:
        """mkdir -p in which each new entry is durable; no link below the root is followed."""
        if path in self._durable:
            return
        if not path.is_dir():
            self._make_directory(path.parent)
            with contextlib.suppress(FileExistsError):
                self._system.mkdir(path)
        if self._sync and path.is_relative_to(self.path):
            # Also where it stood already: whoever made it may have died before it was durable.
            with contextlib.suppress(PermissionError):  # above a directory of ours nothing may be readable
                self._system.sync_directory(path.parent)
        self._durable.add(path)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


def storage_error(path: Path | str, error: OSError) -> StorageError:
    """The one sentence for an operating system error, with what to do about the frequent ones."""
    hints = {
        errno.ENOSPC: "free some space and run the same command again; everything committed is safe",
        errno.EDQUOT: "your quota is full: free some space and run the same command again",
        errno.EACCES: "check the permissions of the directory",
        errno.EPERM: "check the permissions of the directory",
        errno.EROFS: "the file system is read-only: choose another directory",
        errno.EIO: "the disk failed: look at the system's log; everything committed can be checked with `verify`",
    }
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StorageError(f"{path}: {reason}", hint=hints.get(error.errno or 0, "run the same command again"))
