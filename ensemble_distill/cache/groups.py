"""Groups: the fields that are captured and read together, as the arrays of their codecs; one shard for each work item.

``MAIN`` holds predictions, ``ROW`` figures of rows, ``PARTNER`` the keys of mixed samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from ensemble_distill.codec import AnyCodec, Arrays, Features, HeadCodec, Members
from ensemble_distill.frozen import Config

TARGETS, MAIN, ROW, PARTNER = "targets", "main", "row", "partner"
MAX_ROW_BYTES = 1 << 28


class FieldSpec(Config):
    """One named array of a row: numpy dtype (little-endian) and shape without the row axis."""

    name: str = Field(pattern=r"^[A-Za-z0-9_./]+$", max_length=200)
    dtype: Literal["<f2", "<u2", "<u4", "|i1", "|u1"]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_ROW_BYTES)], ...], Field(max_length=8)]


class Group(Config):
    """Fields captured and read together: one shard and one commit for each work item.

    codecs: by head or tap (``main``, ``row``, ``tap/<member>.<module>``); the fields are the arrays that they make.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=200)
    codecs: Annotated[dict[str, AnyCodec], Field(min_length=1, max_length=64)]
    fields: Annotated[tuple[FieldSpec, ...], Field(min_length=1, max_length=1024)]

    @classmethod
    def of(cls, name: str, codecs: dict[str, AnyCodec]) -> Group:
        """The group of these codecs."""
        return cls(name=name, codecs=codecs, fields=_fields_of(codecs))

    @cached_property
    def dtype(self) -> np.dtype:
        """The record of one row, padded as C would."""
        return np.dtype([(f.name, f.dtype, f.shape) for f in self.fields], align=True)

    @cached_property
    def ragged(self) -> Features | None:
        """The codec of a ragged feature, which has a group for itself; None where rows are all that there is."""
        codecs = [c for c in self.codecs.values() if isinstance(c, Features) and c.mask is not None]
        return codecs[0] if codecs else None

    @cached_property
    def token_fields(self) -> tuple[FieldSpec, ...]:
        """What a token of the ragged feature has: one array; empty without one."""
        return () if self.ragged is None else _fields_of({next(iter(self.codecs)): self.ragged}, Features.token)

    @cached_property
    def token(self) -> np.dtype | None:
        """The record of one token of the ragged feature."""
        fields = [(f.name, f.dtype, f.shape) for f in self.token_fields]
        return np.dtype(fields, align=True) if fields else None

    @cached_property
    def padded(self) -> np.dtype:
        """The record of one row as readers are handed it: that of ``dtype``, or a ragged one with all its tokens."""
        if self.ragged is None:
            return self.dtype
        fields = _fields_of({next(iter(self.codecs)): self.ragged}, Features.padded)
        return np.dtype([(f.name, f.dtype, f.shape) for f in fields], align=True)

    @property
    def most_tokens(self) -> int:
        """Of a row; 0 without a ragged feature."""
        return 0 if self.ragged is None else self.ragged.dims[0]

    @property
    def row_bytes(self) -> int:
        """What a row takes; at most, where it is ragged."""
        return self.dtype.itemsize + (0 if self.token is None else self.most_tokens * self.token.itemsize)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.fields != _fields_of(self.codecs):
            raise ValueError(f"the fields of group {self.name!r} are not the arrays of its codecs")
        if len({f.name for f in self.fields}) < len(self.fields):
            raise ValueError("two fields have the same name")
        if self.ragged is not None and len(self.codecs) > 1:
            raise ValueError(f"group {self.name!r} holds a ragged feature, and more")
        size = sum(math.prod(f.shape) * 8 for f in self.fields)
        if not 0 < size <= 8 * MAX_ROW_BYTES:
            raise ValueError(f"a row of group {self.name!r} would take {size} bytes")
        return self


def _fields_of(
    codecs: Mapping[str, Any], arrays: Callable[[Any], Arrays] = lambda codec: codec.arrays()
) -> tuple[FieldSpec, ...]:
    return tuple(
        FieldSpec(name=field_name(head, name), dtype=dtype, shape=shape)
        for head, codec in sorted(codecs.items())  # as canonical JSON has them
        for name, (dtype, shape) in arrays(codec).items()
    )


def members_of(group: Group) -> tuple[str, ...]:
    """The members whose predictions a group keeps apart; none where it keeps an average."""
    codec = group.codecs[MAIN]
    return codec.members if isinstance(codec, Members) else ()


def padded_arrays(codec: AnyCodec) -> Arrays:
    """What a row is decoded from."""
    return codec.padded() if isinstance(codec, Features) else codec.arrays()


def field_name(head: str, array: str) -> str:
    return f"{head}/{array}" if array else head


def head_of(groups: Sequence[Group]) -> HeadCodec:
    """How groups of predictions keep them together; ValueError where they do not fit."""
    codecs = [group.codecs[MAIN] for group in groups]
    first = codecs[0] if codecs else None
    if not isinstance(first, HeadCodec):
        raise ValueError(f"{MAIN!r} is kept as {first and first.name}")
    if len(codecs) == 1:
        return first
    parts = [codec for codec in codecs if isinstance(codec, Members)]
    if len(parts) < len(codecs) or any(part.inner != parts[0].inner for part in parts):
        raise ValueError("the groups of targets keep their members in different ways")
    members = tuple(name for part in parts for name in part.members)
    if len(set(members)) < len(members):
        raise ValueError("a member is kept in two groups")
    return Members(inner=parts[0].inner, members=members)
