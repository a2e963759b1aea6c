"""Where rows lie in a shard's bytes: what makes reading by offset possible without a library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from pydantic import SerializerFunctionWrapHandler, model_serializer

from ensemble_distill.frozen import Config

# A file's bytes in parts, in order: the rows of a large shard are a view of the records, and never copied.
Parts: TypeAlias = Sequence[bytes | memoryview]

SMALL = 1 << 16


class Segment(Config):
    """A run of fixed-stride rows: row i of ``fields`` stands at ``offset + i * stride`` bytes.

    ``count``: of them, where they are no rows of the unit but the tokens of a ragged feature, of all rows one after
    another. None of rows.
    """

    fields: tuple[str, ...]
    offset: int
    stride: int
    count: int | None = None

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So commits from before there were tokens are what they were."""
        dumped: dict[str, Any] = handler(self)
        if self.count is None:
            dumped.pop("count", None)
        return dumped


def read_segments(data: np.ndarray, rows: int, dtype: np.dtype, segments: Sequence[Segment]) -> np.ndarray:
    """The records [rows] of a shard's bytes (uint8 [size]); offsets must have been checked."""
    records = np.zeros(rows, dtype)
    for segment in (s for s in segments if s.count is None):
        raw = data[segment.offset : segment.offset + rows * segment.stride]
        if len(segment.fields) > 1 or segment.fields == dtype.names:
            records.view(np.uint8).reshape(rows, -1)[:] = raw.reshape(rows, segment.stride)
        else:
            field = dtype[segment.fields[0]]
            records[segment.fields[0]] = raw.view(field.base).reshape(rows, *field.shape)
    return records


def read_tokens(data: np.ndarray, token: np.dtype, segments: Sequence[Segment]) -> np.ndarray:
    """The tokens [count] of a shard's bytes, a view of these; offset and count must have been checked."""
    (segment,) = (s for s in segments if s.count is not None)
    assert segment.count is not None
    return data[segment.offset : segment.offset + segment.count * segment.stride].view(token)


def merged(parts: Parts) -> Parts:
    """The same bytes with small neighbours put together: each part is a write."""
    result: list[bytes | memoryview] = []
    for part in parts:
        if result and len(part) <= SMALL and len(result[-1]) <= SMALL:
            result[-1] = bytes(result[-1]) + bytes(part)
        elif len(part):
            result.append(part)
    return tuple(result)
