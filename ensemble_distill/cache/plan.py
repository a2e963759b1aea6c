"""The plan: what a cache holds, as a pure function of pipeline, sources and weights; and its units.

*Reading* is what a student must agree with, *capture* what further captures must agree with. Provenance
(versions, device, times) is not here but in each commit, so that two workers who plan the same capture
write the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from ensemble_distill.codecs.dense import Dense
from ensemble_distill.codecs.features import Features
from ensemble_distill.config import Config, Format, ViewsConfig
from ensemble_distill.errors import Corrupt

_UNIT = re.compile(r"(?P<split>\w+)-v(?P<view>[0-9]+)-(?P<page>[0-9]+)\.(?P<group>.+)")
MIN_UNIT_ROWS = 1024
MAX_UNIT_BYTES = 64 << 20


class FieldSpec(Config):
    """One named array of a row: numpy dtype (little-endian), shape without the row axis, and its codec."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: Dense | Features = Field(discriminator="name")


class Group(Config):
    """Fields captured and read together: one shard and one commit for each work item."""

    name: str
    fields: tuple[FieldSpec, ...]

    @property
    def dtype(self) -> np.dtype:
        """The record of one row, padded as C would."""
        return np.dtype([(f.name, f.dtype, f.shape) for f in self.fields], align=True)


class Split(Config):
    """Rows of a source, how often each is seen, rows in a unit, and the SHA-256 of its labels."""

    rows: int
    views: int
    unit_rows: int
    labels: str | None


class Reading(Config):
    key: Literal["sha256/16"] = "sha256/16"
    classes: tuple[str, ...]
    heads: dict[str, int]
    combine: str
    temperature_before: tuple[float, ...]
    temperature_after: float
    views: ViewsConfig


class MemberIdentity(Config):
    name: str
    weights: str
    structure: str
    share: float


class Capture(Config):
    members: tuple[MemberIdentity, ...]
    precision: Literal["fp32", "bf16"]
    batch_size: int


class WorkItem(Config):
    """One forward pass of the members: rows ``first`` to ``last`` (exclusive) of a split in one view."""

    split: str
    view: int
    page: int
    first: int
    last: int

    def unit(self, group: Group) -> str:
        return f"{self.split}-v{self.view:06d}-{self.page:08d}.{group.name}"


class Plan(Config):
    schema_version: Literal[1] = 1
    reading: Reading
    capture: Capture
    format: Format
    splits: dict[str, Split]
    groups: tuple[Group, ...]

    def items(self) -> Iterator[WorkItem]:
        """All work items, in the one order that digests and statistics use."""
        for name, split in sorted(self.splits.items()):
            for view in range(split.views):
                for page in range(math.ceil(split.rows / split.unit_rows)):
                    first = page * split.unit_rows
                    last = min(split.rows, first + split.unit_rows)
                    yield WorkItem(split=name, view=view, page=page, first=first, last=last)

    def locate(self, unit: str) -> WorkItem:
        """The work item of a unit, from its name; Corrupt if the plan has no such unit."""
        match = _UNIT.fullmatch(unit)
        split = self.splits.get(match["split"]) if match else None
        if match and split and match["group"] in {group.name for group in self.groups}:
            view, page = int(match["view"]), int(match["page"])
            first = page * split.unit_rows
            item = WorkItem(
                split=match["split"], view=view, page=page, first=first, last=min(split.rows, first + split.unit_rows)
            )
            if view < split.views and first < split.rows and item.unit(self.group(match["group"])) == unit:
                return item
        raise Corrupt(f"{unit!r} is no unit of this cache's plan")

    def group(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)

    @property
    def units(self) -> int:
        pages = (s.views * math.ceil(s.rows / s.unit_rows) for s in self.splits.values())
        return sum(pages) * len(self.groups)

    @property
    def rows(self) -> int:
        return sum(split.rows * split.views for split in self.splits.values())

    @property
    def bytes_per_row(self) -> int:
        return sum(group.dtype.itemsize for group in self.groups)


def unit_rows(rows: int, row_bytes: int) -> int:
    """Rows of a unit: about a 64th of the split, at least 1024, at most 64 MiB of the widest group."""
    return max(1, min(max(math.ceil(rows / 64), MIN_UNIT_ROWS), MAX_UNIT_BYTES // row_bytes))
