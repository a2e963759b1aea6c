"""IDX files (the format of MNIST and Fashion-MNIST), plain or gzipped, read without a library."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np

from ensemble_distill.errors import Mismatch, UsageError

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

_RESTORE = "restore the file: its SHA-256 should be the one that it was published with"


def read_idx(path: str | Path) -> np.ndarray:
    """The array of an IDX file, in native byte order.

    Raises UsageError if the file is missing, Mismatch if it is not an IDX file of the size it claims.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file", hint="see data/README.md for where it comes from") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise Mismatch(f"{path}: not a whole gzip file ({error})", hint=_RESTORE) from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _DTYPES:
        raise Mismatch(f"{path}: not an IDX file (it starts with {data[:4].hex()})", hint=_RESTORE)
    rank = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    dtype = np.dtype(_DTYPES[data[2]])
    expected = 4 + 4 * rank + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise Mismatch(f"{path}: {len(data)} bytes, expected {expected} for shape {shape}", hint=_RESTORE)
    return np.frombuffer(data, dtype, offset=4 + 4 * rank).reshape(shape).astype(dtype.newbyteorder("="))
