"""Join a source with a cache: by position, proved by key; by key where the order differs; never by guess."""

from __future__ import annotations

import logging

import numpy as np

from ensemble_distill.errors import Mismatch

log = logging.getLogger(__name__)


class KeyTable:
    """The keys of one split in the order they were captured: uint8 [N, 16].

    held: the rows that there are, int64 [n], where these are not all.
    """

    def __init__(self, split: str, keys: np.ndarray, held: np.ndarray | None = None) -> None:
        self.split, self.keys = split, keys
        self._held = np.arange(len(keys)) if held is None else held
        self._is_held = np.zeros(len(keys), bool)
        self._is_held[self._held] = True
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None
        self._told = False

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, keys: np.ndarray, positions: np.ndarray | None = None) -> np.ndarray:
        """Rows int64 [B] of samples with these keys (uint8 [B, 16]), at these positions of the source.

        A sample's own position serves first, so that equal inputs keep their own row. Raises Mismatch for
        a key that the cache does not hold.
        """
        found = np.full(len(keys), -1, np.int64)
        if positions is not None:
            claimed = np.minimum(positions, len(self.keys) - 1)
            own = (positions < len(self.keys)) & (self.keys[claimed] == keys).all(axis=1) & self._is_held[claimed]
            found[own] = positions[own]
        if (lost := np.flatnonzero(found < 0)).size:
            found[lost] = self._search(keys[lost])
            if (found < 0).any():
                self._refuse(keys, positions, int(np.argmax(found < 0)))
            if positions is not None and not self._told:
                self._told = True
                log.warning("the order of %s differs from the cache's: its rows are found by key", self.split)
        return found

    def twins(self, key: np.ndarray) -> np.ndarray:
        """All rows, int64 [n], of the samples with this key (uint8 [16])."""
        table, order = self._by_key()
        first, last = (np.searchsorted(table, as_scalars(key[None])[0], side=side) for side in ("left", "right"))
        return order[first:last]

    def _by_key(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys in their order, and the row of each."""
        if self._sorted is None:
            table = as_scalars(self.keys[self._held])
            order = np.argsort(table, kind="stable")
            self._sorted = table[order], self._held[order]
        return self._sorted

    def _search(self, keys: np.ndarray) -> np.ndarray:
        table, order = self._by_key()
        if not len(table):
            return np.full(len(keys), -1)
        wanted = as_scalars(keys)
        place = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
        return np.where(table[place] == wanted, order[place], -1)

    def _refuse(self, keys: np.ndarray, positions: np.ndarray | None, i: int) -> None:
        key = keys[i].tobytes().hex()
        sample = "a sample" if positions is None else f"sample {positions[i]}"
        expected = ""
        if positions is not None and positions[i] < len(self.keys):
            expected = f" (at this position it holds {self.keys[positions[i]].tobytes().hex()})"
        raise Mismatch(
            f"{sample} of {self.split} has key {key}, which this cache does not hold{expected}: "
            "the source differs from what was captured",
            hint="restore the source, or capture it as it is now: ensemble-distill cache PIPELINE --out NEW_DIR",
        )


def as_scalars(keys: np.ndarray) -> np.ndarray:
    """[N, 16] bytes as [N] comparable scalars; all are 16 bytes, so S16's padding cannot confuse two."""
    return np.ascontiguousarray(keys).view("S16").reshape(-1)
