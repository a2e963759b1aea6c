"""Bytes at names in a bucket, through fsspec: s3://…, gs://…, memory://….

A put is whole or not there, so the commit protocol needs one thing more: ``create`` is a conditional put, and
of many writers one wins. Replies get lost after the service did its work; what then stands there is compared
with what was to be written.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ensemble_distill.errors import Corrupt, StorageError, Unsafe, UsageError
from ensemble_distill.store.storage import MAX_RECORD, check_name, is_name

T = TypeVar("T")

ATTEMPTS = 8
FIRST_WAIT = 0.2
LONGEST_WAIT = 20.0
COMPARED = 1 << 20
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
# What waiting does not mend.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, TypeError)


class RemoteStorage:
    """A folder of a bucket. ``sleep`` waits between attempts (seconds)."""

    def __init__(self, url: str, *, sleep: Callable[[float], None] = time.sleep, **options: Any) -> None:
        protocol = url.partition("://")[0]
        try:
            from fsspec.core import url_to_fs

            self.fs, self._path = url_to_fs(url, use_listings_cache=False, **options)
        except (ImportError, ValueError) as error:
            extra = EXTRAS.get(protocol)
            raise UsageError(
                f"{url}: {str(error).splitlines()[0]}",
                hint=f"pip install 'ensemble-distill[{extra}]'" if extra else "give a directory, s3://… or gs://…",
            ) from error
        if hasattr(self.fs, "retries"):
            self.fs.retries = 1  # s3fs: one place that waits and tries again is enough, and it is this one
        self.root = url.rstrip("/")
        self._sleep = sleep

    def create(self, name: str, *parts: bytes | memoryview) -> bool:
        path, data = self._at(name), b"".join(parts)
        try:
            self._try(name, lambda: self.fs.pipe_file(path, data, mode="create"))
        except FileExistsError:
            # Ours, if an earlier attempt did its work and its reply was lost. What is large is named by its
            # content, and then nobody asks.
            return len(data) <= COMPARED and self.size(name) == len(data) and self.read(name, len(data)) == data
        return True

    def replace(self, name: str, data: bytes) -> None:
        path = self._at(name)
        self._try(name, lambda: self.fs.pipe_file(path, data))

    def read(self, name: str, at_most: int = MAX_RECORD) -> bytes:
        path = self._at(name)
        try:
            # One byte more than there may be shows that there is more, and no more than that is fetched.
            data = bytes(self._try(name, lambda: self.fs.cat_file(path, start=0, end=at_most + 1)))
        except FileNotFoundError:
            raise Corrupt(f"{self.root}/{name} is missing") from None
        except OSError as error:
            if self.size(name) == 0:  # there is no range in an empty object
                return b""
            raise self._refused(name, error) from error
        if len(data) > at_most:
            raise Unsafe(f"{self.root}/{name} holds more than the {at_most} bytes that it can hold")
        return data

    def size(self, name: str) -> int | None:
        path = self._at(name)
        try:
            info = self._try(name, lambda: self.fs.info(path, refresh=True))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def list(self, folder: str) -> Iterator[str]:
        path = self._at(folder)
        try:
            found = self._try(folder, lambda: self.fs.ls(path, detail=False, refresh=True))
        except FileNotFoundError:
            return
        for entry in found:
            name = str(entry).rstrip("/").rpartition("/")[2]
            if is_name(name):
                yield f"{folder}/{name}"

    def remove(self, name: str) -> None:
        path = self._at(name)
        try:
            self._try(name, lambda: self.fs.rm_file(path))
        except FileNotFoundError:
            return

    def free(self) -> None:
        return None

    def _at(self, name: str) -> str:
        return f"{self._path}/{check_name(name, self.root)}"

    def _try(self, name: str, call: Callable[[], T]) -> T:
        """``call``, again and again while it fails in a way that may pass: waits double, with jitter."""
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except FileExistsError:
                raise
            except _FINAL as error:
                if isinstance(error, FileNotFoundError):
                    raise
                raise self._refused(name, error) from error
            except Exception as error:
                if "InvalidRange" in str(error) or getattr(error, "errno", None) == errno.EINVAL:
                    raise
                if attempt == ATTEMPTS - 1:
                    raise self._refused(name, error) from error
                self._sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1))
        raise AssertionError

    def _refused(self, name: str, error: Exception) -> StorageError:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return StorageError(
            f"{self.root}/{name}: {reason}",
            hint="check the address, the credentials and the network; what is committed is safe",
        )
