"""Errors that a user can act on; each carries the exit code that the command line promises.

    Error
    ├── UsageError        2   an option, a field or a file that does not exist
    ├── Mismatch          3   data, plan or identity differ from what was expected
    ├── Corrupt           4   bytes that are not what was committed
    ├── Unsafe            5   refused: following it could harm the reader
    ├── StorageError      6   full, I/O, permission
    ├── InvalidOutput     7   a teacher said something that is no distribution, or nothing steady
    ├── OutOfMemory       8   host or device
    └── Interrupted      75   stopped; the same command goes on

A message is one sentence: what, where, expected, found. ``hint`` says what to do next.
"""

from __future__ import annotations

import re


class Error(Exception):
    exit_code = 1
    default_hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(printable(message))
        self.hint = hint or self.default_hint


def printable(text: str) -> str:
    """Text with its control characters escaped: what a stranger's file says must not steer a terminal."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UsageError(Error):
    exit_code = 2


class Mismatch(Error):
    exit_code = 3


class Corrupt(Error):
    exit_code = 4
    default_hint = "restore the file from a copy, or make the cache or the run anew in another directory"


class Unsafe(Error):
    exit_code = 5


class StorageError(Error):
    exit_code = 6


class InvalidOutput(Error):
    exit_code = 7


class OutOfMemory(Error):
    exit_code = 8


class Interrupted(Error):
    exit_code = 75
