"""Identity: content keys of samples, digests of arrays, canonical JSON. Pure data, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

KEY_BYTES = 16


def sample_keys(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Content keys of a batch: uint8 [B, 16], the first half of a SHA-256 for each sample.

    Hashed are dtype, shape and bytes of each raw input, in the order of the inputs' names: what the
    sample *is*, before any decoding or view, and never its label or its position.
    """
    names = sorted(inputs)
    size = len(inputs[names[0]])
    arrays = [np.ascontiguousarray(_little_endian(inputs[name])) for name in names]
    # The headers are the same for every row, so each is rendered once. Lengths are implied by the
    # shape, hence two different sets of inputs never give the same byte string.
    headers = [f"{name}:{a.dtype.str}:{a.shape[1:]}\n".encode() for name, a in zip(names, arrays, strict=True)]
    rows = [(a.reshape(-1).view(np.uint8).data, a.nbytes // max(size, 1)) for a in arrays]
    sha, digests = hashlib.sha256, bytearray()
    for i in range(size):
        h = sha()
        for header, (data, stride) in zip(headers, rows, strict=True):
            h.update(header)
            h.update(data[i * stride : (i + 1) * stride])
        digests += h.digest()[:KEY_BYTES]
    return np.frombuffer(bytes(digests), np.uint8).reshape(size, KEY_BYTES)


def _little_endian(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def array_digest(array: np.ndarray) -> str:
    """SHA-256 over dtype, shape and little-endian bytes of an array."""
    array = np.ascontiguousarray(_little_endian(array))
    h = hashlib.sha256(f"{array.dtype.str}:{array.shape}\n".encode())
    h.update(array.reshape(-1).view(np.uint8).data)
    return h.hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one rendering of a JSON value that is hashed: sorted keys, no spaces, no NaN, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def json_digest(value: Any) -> str:
    return sha256(canonical_json(value))
