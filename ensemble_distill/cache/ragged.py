"""Ragged features: the real tokens of a unit's rows stand one after another, and each row says where its own begin.

Legend of shapes: B rows, T tokens that a row may have, N tokens of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ensemble_distill.cache.groups import Group
from ensemble_distill.codecs.domain import BadRow
from ensemble_distill.formats.layout import read_segments, read_tokens
from ensemble_distill.store.records import Commit


def unpacked(bits: np.ndarray, tokens: int) -> np.ndarray:
    """The mask bool [B, T] of its bits uint8 [B, ⌈T/8⌉], the lowest of a byte first."""
    mask: np.ndarray = np.unpackbits(bits, axis=1, count=tokens, bitorder="little").view(bool)
    return mask


class Tokens:
    """Collects the real tokens of a unit, batch by batch in the order of its rows."""

    def __init__(self, token: np.dtype) -> None:
        self._token, self._count = token, 0
        self._parts: list[np.ndarray] = []

    def add(self, mask_BT: np.ndarray, values_BTD: np.ndarray) -> np.ndarray:
        """Where the tokens of each row begin, uint32 [B]."""
        counts = mask_BT.sum(axis=1)
        starts: np.ndarray = (self._count + counts.cumsum() - counts).astype(np.uint32)
        self._parts.append(values_BTD[mask_BT])
        self._count += int(counts.sum())
        return starts

    def table(self) -> np.ndarray:
        """All of them, structured [N]."""
        return np.concatenate(self._parts).view(self._token).reshape(-1)


@dataclass(frozen=True)
class Table:
    """Rows of a group in memory: records uint8 [rows, stride]; where they are ragged the first token of each row, int64
    [rows], and all tokens, structured [N]."""

    group: Group
    records: np.ndarray
    starts: np.ndarray | None = None
    tokens: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.records, self.starts, self.tokens) if a is not None)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The records of these rows (int64 [B]), ``group.padded`` [B]: tokens where they were, zeros where none was."""
        records = np.take(self.records, rows, axis=0).view(self.group.dtype).reshape(-1)
        if self.tokens is None or self.starts is None:
            return records
        padded, name = np.zeros(len(rows), self.group.padded), self.group.token_fields[0].name
        for kept in set(padded.dtype.names or ()) - {name}:
            padded[kept] = records[kept]
        mask = _mask(self.group, records)
        counts = mask.sum(axis=1)
        # Behind the start of its row, a token's place is its own among those of the row.
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        padded[name][mask] = self.tokens[name][np.repeat(self.starts[rows], counts) + within]
        return padded

    def put(self, first: int, part: Table, at: int) -> int:
        """A part's rows to ``first`` and on, and its tokens to ``at`` and on; where the next tokens go."""
        rows = slice(first, first + len(part.records))
        self.records[rows] = part.records
        if self.tokens is None or self.starts is None or part.tokens is None or part.starts is None:
            return at
        self.starts[rows] = at + part.starts
        self.tokens[at : at + len(part.tokens)] = part.tokens
        return at + len(part.tokens)


def read_table(data: np.ndarray, commit: Commit, group: Group) -> Table:
    """The rows of a shard's bytes (uint8 [size]), whose layout was checked; BadRow where its tokens do not add up."""
    records = read_segments(data, commit.rows, group.dtype, commit.segments)
    raw = records.view(np.uint8).reshape(commit.rows, -1)
    if group.token is None:
        return Table(group, raw)
    tokens = read_tokens(data, group.token, commit.segments)
    return Table(group, raw, _checked_starts(group, records, len(tokens)), tokens)


def _checked_starts(group: Group, records: np.ndarray, count: int) -> np.ndarray:
    """Where each row's tokens begin, int64 [rows]: where those of the row before end, up to the last of the unit."""
    starts = records[_name(group, "start")].astype(np.int64)
    bits, mask = records[_name(group, "mask")], _mask(group, records)
    if (beyond := bits[:, -1] >> (group.most_tokens - 1) % 8 > 1).any():
        raise BadRow(int(beyond.argmax()), f"a token beyond the {group.most_tokens} of a row")
    ends = mask.sum(axis=1).cumsum()
    if (wrong := starts != np.append(0, ends[:-1])).any():
        raise BadRow(int(wrong.argmax()), "its tokens do not begin where those of the row before end")
    if ends[-1] != count:
        raise BadRow(len(ends) - 1, f"its tokens end at {ends[-1]}, and the unit has {count}")
    return starts


def _mask(group: Group, records: np.ndarray) -> np.ndarray:
    return unpacked(records[_name(group, "mask")], group.most_tokens)


def _name(group: Group, array: str) -> str:
    """The field of an array of the row."""
    return f"{next(iter(group.codecs))}/{array}"
