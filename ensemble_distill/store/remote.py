"""Bytes at names in a bucket, through fsspec: s3://…, gs://…, memory://….

A put is whole or not there, so the commit protocol needs one thing more: ``create`` and ``swap`` are conditional
puts, and of many writers one wins. Replies get lost after the service did its work; what then stands there is
compared with what was to be written.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import random
import secrets
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
        self._kind = {"s3a": "s3", "gcs": "gs"}.get(protocol, protocol)
        options = {"use_listings_cache": False, **options}
        self._whole: dict[str, Any] = {}
        try:
            if self._kind == "gs":
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

    def swap(self, name: str, expected: bytes | None, data: bytes) -> bool:
        path = self._at(name)
        at_most = max(len(data), len(expected or b""))
        for _ in range(ATTEMPTS):
            held, version = self._try(name, lambda: self._held(path, at_most))
            if held == data:  # also where the reply to an earlier attempt was lost
                return True
            if held != expected:
                return False
            try:
                self._try(name, functools.partial(self._put_over, path, version, data))
            except (FileExistsError, FileNotFoundError) as error:
                if held is None and isinstance(error, FileNotFoundError):  # it is the bucket that is not there
                    raise self._refused(name, error) from error
                continue  # it changed meanwhile, or it was us
            return True
        raise StorageError(f"{self.root}/{name}: it changes all the time", hint="run the same command again")

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

    def _held(self, path: str, at_most: int) -> tuple[bytes | None, str]:
        """What an object holds, no more than a byte beyond ``at_most``, and the version of it that does.

        An object that is not there has no version.
        """
        try:
            if self._kind == "gs":
                bucket, key, _ = self.fs.split_path(path)
                version = str(self.fs.call("GET", "b/{}/o/{}", bucket, key, json_out=True)["generation"])
                return self._range(path, at_most + 1, generation=version), version
            if self._kind == "s3":
                from fsspec.asyn import sync

                bucket, key, _ = self.fs.split_path(path)
                reply = self.fs.call_s3("get_object", Bucket=bucket, Key=key)
                with contextlib.closing(reply["Body"]) as body:
                    return bytes(sync(self.fs.loop, body.read, at_most + 1)), str(reply["ETag"])
            return self._range(path, at_most + 1), "any"
        except FileNotFoundError:
            return None, ""

    def _put_over(self, path: str, version: str, data: bytes) -> None:
        """Write over this version of an object; one of the two errors of ``_try`` if there is another now.

        Where versions are unknown, two writers at once are not told apart.
        """
        if not version:
            self.fs.pipe_file(path, data, mode="create", **self._whole)
        elif self._kind == "gs":
            _google_upload(self.fs, path, data, ifGenerationMatch=version)
        elif self._kind == "s3":
            bucket, key, _ = self.fs.split_path(path)
            self.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfMatch=version)
        else:
            self.fs.pipe_file(path, data)

    def _put(self, name: str, call: Callable[[], object]) -> None:
        try:
            self._try(name, call)
        except FileNotFoundError as error:  # it is the bucket that is not there
            raise self._refused(name, error) from error

    def _range(self, path: str, end: int, **how: Any) -> bytes:
        try:
            return bytes(self.fs.cat_file(path, start=0, end=end, **how))
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


def _google_upload(fs: Any, path: str, data: bytes, **condition: str) -> None:
    """An upload of gcsfs with a condition that gcsfs has no name for."""
    bucket, key, _ = fs.split_path(path)
    boundary = secrets.token_hex(16)
    head = f"--{boundary}\r\nContent-Type: application/json\r\n\r\n{json.dumps({'name': key})}\r\n--{boundary}\r\n"
    kind = "Content-Type: application/octet-stream\r\n\r\n"
    fs.call(
        "POST",
        f"{fs._location}/upload/storage/v1/b/{bucket}/o",
        uploadType="multipart",
        headers={"Content-Type": f'multipart/related; boundary="{boundary}"'},
        data=(head + kind).encode() + data + f"\r\n--{boundary}--\r\n".encode(),
        **condition,
    )
