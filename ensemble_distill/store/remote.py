"""Bytes at names in a bucket, through fsspec: s3://…, gs://…, memory://….

A put is whole or not there, so the commit protocol needs one thing more: ``create`` is a conditional put, and
of many writers one wins. Replies get lost after the service did its work; what then stands there is compared
with what was to be written.
"""

from __future__ import annotations

import errno
import functools
import random
import sys
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
# What waiting does not mend: errors, and answers of a service, S3's in words and the others' in numbers.
_FINAL = (PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, TypeError)
_FINAL_CODES = ("400", "401", "403")
# The answers that are no failure.
_REFUSED = ("PreconditionFailed", "412")
_NO_RANGE = ("InvalidRange", "416")


class RemoteStorage:
    """A folder of a bucket. ``sleep`` waits between attempts (seconds)."""

    def __init__(self, url: str, *, sleep: Callable[[float], None] = time.sleep, **options: Any) -> None:
        protocol = url.partition("://")[0]
        options = {"use_listings_cache": False, **options}
        self._whole: dict[str, Any] = {}
        try:
            if protocol in ("gs", "gcs"):
                self.fs = _google()(**options)
                self._path = self.fs._strip_protocol(url).rstrip("/")
                # In one request, whatever its size: it is whole or not there, and its condition holds for all of it.
                self._whole["chunksize"] = sys.maxsize
            else:
                from fsspec.core import url_to_fs

                self.fs, self._path = url_to_fs(url, **options)
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
            self._put(name, lambda: self.fs.pipe_file(path, data, mode="create", **self._whole))
        except FileExistsError:
            # Ours, if an earlier attempt did its work and its reply was lost. What is large is named by its
            # content, and then nobody asks.
            return len(data) <= COMPARED and self.size(name) == len(data) and self.read(name, len(data)) == data
        return True

    def replace(self, name: str, data: bytes) -> None:
        path = self._at(name)
        self._put(name, lambda: self.fs.pipe_file(path, data, **self._whole))

    def read(self, name: str, at_most: int = MAX_RECORD) -> bytes:
        path = self._at(name)
        try:
            # One byte more than there may be shows that there is more, and no more than that is fetched.
            data = self._try(name, lambda: self._range(path, at_most + 1))
        except FileNotFoundError:
            raise Corrupt(f"{self.root}/{name} is missing") from None
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

    def _put(self, name: str, call: Callable[[], object]) -> None:
        try:
            self._try(name, call)
        except FileNotFoundError as error:  # it is the bucket that is not there
            raise self._refused(name, error) from error

    def _range(self, path: str, end: int) -> bytes:
        try:
            return bytes(self.fs.cat_file(path, start=0, end=end))
        except Exception as error:
            if _code(error) in _NO_RANGE:  # there is none in an empty object
                return b""
            raise

    def _try(self, name: str, call: Callable[[], T]) -> T:
        """``call``, again and again while it fails in a way that may pass: waits double, with jitter.

        What is not there is FileNotFoundError, and a condition that does not hold is FileExistsError.
        """
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except (FileExistsError, FileNotFoundError):
                raise
            except Exception as error:
                if _code(error) in _REFUSED:
                    raise FileExistsError(f"{self.root}/{name}") from error
                if attempt == ATTEMPTS - 1 or _is_final(error):
                    raise self._refused(name, error) from error
                self._sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * random.uniform(0.5, 1))
        raise AssertionError

    def _refused(self, name: str, error: Exception) -> StorageError:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return StorageError(
            f"{self.root}/{name}: {reason}",
            hint="check the address, the credentials and the network; what is committed is safe",
        )


def _code(error: BaseException) -> str:
    """What the service answered: a word of S3's, a status of the others', or nothing."""
    response = getattr(error.__cause__, "response", None)  # s3fs keeps it behind an OSError
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    return str(getattr(error, "code", ""))  # gcsfs


def _is_final(error: Exception) -> bool:
    """Whether the same request would be refused again."""
    forbidden = str(error).startswith("Forbidden")  # gcsfs has no class of its own for it
    invalid = getattr(error, "errno", None) == errno.EINVAL
    return isinstance(error, _FINAL) or _code(error) in _FINAL_CODES or forbidden or invalid


@functools.cache
def _google() -> Any:
    """gcsfs over the JSON API, each request sent once: one place that waits and tries again is enough.

    The class that gcsfs gives by default asks another service about each bucket first, for kinds of bucket that
    are no matter here.
    """
    from gcsfs.core import GCSFileSystem

    class Google(GCSFileSystem):  # type: ignore[misc]
        _request = getattr(GCSFileSystem._request, "__wrapped__", GCSFileSystem._request)

    return Google
