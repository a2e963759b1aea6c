"""Counter-based random numbers: Philox-4x32-10, vectorised. A number is a function, never a state.

Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3". Our own copy, because
what it draws is part of a cache's identity and must not change with a library's version.
"""

from __future__ import annotations

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # table 2 of the paper
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_CODECS = 0x6A09E667


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Counters uint32 [N, 4] under one 64-bit key (two 32-bit words) give uint32 [N, 4]."""
    x0, x1, x2, x3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * x0, _M1 * x2
        x0, x1, x2, x3 = (
            (p1 >> _SHIFT) ^ x1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ x3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=1).astype(np.uint32)


def uniforms(keys: np.ndarray, seed: int, view: int, count: int) -> np.ndarray:
    """What codecs draw, in [0, 1): float64 [B, count], a pure function of (seed, content key, view, number).

    keys: uint8 [B, 16]. Another stream than that of views under the same seed. A row of more than 1024 numbers
    goes on under a changed counter.
    """
    counter = np.ascontiguousarray(keys).view("<u4").copy()
    word, parts = (seed + _CODECS) & 0xFFFFFFFF, []
    for block in range(-(-count // 4)):
        if block and block % 256 == 0:
            counter[:, 3] ^= np.uint32(block // 256 * 0x9E3779B9 & 0xFFFFFFFF)
        parts.append(philox(counter, (word, view << 8 | block % 256)))
    return np.concatenate(parts, axis=1)[:, :count] / 2.0**32


def permutation(size: int, seed: int, stream: int) -> np.ndarray:
    """A permutation of ``range(size)``: int64 [size], a pure function of (size, seed, stream)."""
    counter = np.zeros((size, 4), np.uint32)
    counter[:, 0] = np.arange(size, dtype=np.uint64).astype(np.uint32)
    counter[:, 1] = np.arange(size, dtype=np.uint64) >> _SHIFT
    words = philox(counter, (seed, stream))
    return np.argsort(words[:, 0].astype(np.uint64) << _SHIFT | words[:, 1], kind="stable")
