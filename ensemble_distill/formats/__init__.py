"""Formats: a shard's records to the bytes of one file, and where in those bytes they lie."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import numpy as np

from ensemble_distill.formats.layout import Parts, Segment

SUFFIX = {"hdf5": ".h5", "parquet": ".parquet"}


class FormatModule(Protocol):
    def encode(self, records: np.ndarray, tokens: np.ndarray | None) -> tuple[Parts, tuple[Segment, ...]]: ...


def encode(format: str, records: np.ndarray, tokens: np.ndarray | None = None) -> tuple[Parts, tuple[Segment, ...]]:
    """The bytes of one shard holding ``records`` (structured [N], which must stay as they are), and its segments.

    ``tokens``: of a ragged feature, structured [tokens of all rows] with one field; their segment is the last.
    """
    module = importlib.import_module(f"ensemble_distill.formats.{format}")
    return cast(FormatModule, module).encode(records, tokens)
