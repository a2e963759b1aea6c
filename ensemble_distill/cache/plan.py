"""The plan: what a cache holds, as a pure function of pipeline, sources and weights; and its units.

*Reading* is what a student must agree with, *capture* what further captures must agree with. Provenance
(versions, device, times) is not here but in each commit, so that two workers who plan the same capture
write the same bytes. Whatever a reader allocates follows from the plan, so its fields have bounds.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import FailFast, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ensemble_distill.cache.groups import MAIN, PARTNER, TARGETS, Group, head_of, members_of
from ensemble_distill.cache.renderings import Renderings
from ensemble_distill.codec import HeadCodec, Members, PartnerKey, TopK
from ensemble_distill.config import Format, Gives, Tail, Version
from ensemble_distill.errors import Corrupt
from ensemble_distill.fingerprint import canonical_json
from ensemble_distill.frozen import Config, Name, without_empty
from ensemble_distill.provenance import MAX_LISTED
from ensemble_distill.store.records import PAGE_UNITS
from ensemble_distill.tally import MAX_STATE_BYTES, report_bytes, state_bytes
from ensemble_distill.transforms import ViewsConfig

MIN_UNIT_ROWS = 1024
MAX_UNIT_BYTES = 64 << 20
MAX_ROWS = 1 << 48
MAX_SHARD = 256 << 20
MAX_UNITS = 1 << 28
MAX_APPENDS = 256

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Shares = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], FailFast(), Field(max_length=1 << 16)]

_UNIT = re.compile(r"(\w+)-v([0-9]{6,8})-([0-9]{8,15})\.([A-Za-z0-9_.]+)", re.ASCII)


class Split(Config):
    """Rows of a source, how often each is seen, rows in a unit, and the SHA-256 of its labels.

    ``cuts``: how many rows there were before each append. No unit goes across one, so those of before stay as they are.
    """

    rows: int = Field(ge=0, le=MAX_ROWS)
    views: int = Field(ge=1, lt=2**24)
    unit_rows: int = Field(ge=1, le=MAX_ROWS)
    labels: str | None
    cuts: Annotated[tuple[Annotated[int, Field(ge=1)], ...], FailFast(), Field(max_length=MAX_APPENDS)] = ()

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if any(a >= b for a, b in pairwise((*self.cuts, self.rows))):
            raise ValueError(f"cuts {self.cuts} do not rise to the {self.rows} rows")
        return self

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(handler(self), "cuts")

    @cached_property
    def _parts(self) -> list[tuple[int, int, int]]:
        """Of what each append brought: its first page, its first row, its end."""
        parts, page = [], 0
        for first, last in pairwise((0, *self.cuts, self.rows)):
            parts.append((page, first, last))
            page += -(-(last - first) // self.unit_rows)
        return parts

    @property
    def pages(self) -> int:
        """Work items of one view."""
        page, first, last = self._parts[-1]
        return page - (-(last - first) // self.unit_rows)

    def span(self, page: int) -> tuple[int, int]:
        """The rows of a page: first, and last (exclusive)."""
        start, first, last = next(part for part in reversed(self._parts) if part[0] <= page)
        first += (page - start) * self.unit_rows
        return first, min(last, first + self.unit_rows)

    def page_of(self, rows: np.ndarray) -> np.ndarray:
        """The pages that rows lie on, int64 [B]."""
        starts, firsts = (np.array([part[i] for part in self._parts]) for i in (0, 1))
        part = np.searchsorted(firsts, rows, side="right") - 1
        pages: np.ndarray = starts[part] + (rows - firsts[part]) // self.unit_rows
        return pages


class Reading(Config):
    """inputs: their names, in the order in which members and students are given them; empty where there is only one."""

    key: Literal["sha256/16"] = "sha256/16"
    inputs: Annotated[tuple[str, ...], FailFast(), Field(max_length=1 << 10)] = ()
    classes: Annotated[tuple[str, ...], FailFast(), Field(max_length=1 << 20)]
    heads: dict[str, int]
    combine: Literal["mean_probs", "mean_logits"]
    temperature_before: Annotated[tuple[Annotated[float, Field(gt=0)], ...], FailFast(), Field(max_length=1 << 16)]
    temperature_after: float = Field(gt=0)
    views: ViewsConfig

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(handler(self), "inputs")


class MemberIdentity(Config):
    """weights, structure: SHA-256 of a module's; None of any other callable, which has only the stated version."""

    name: str
    weights: str | None
    structure: str | None
    version: Version | None = None
    share: float = Field(gt=0, le=1)
    gives: Gives = "all"


class Capture(Config):
    """tail: how classes were taken that top-k members do not list; None where there are no such members.

    distortions: by projected tap, the mean of |d′² − d²| / d² over pairs of rows of one batch, d their distance.
    shares_before: of the members there were, before each append of members.
    """

    members: Annotated[tuple[MemberIdentity, ...], FailFast(), Field(max_length=1 << 16)]
    precision: Literal["fp32", "bf16"]
    batch_size: int
    calibration: Digest | None = None
    tail: Tail | None = None
    audit: Renderings = ()
    distortions: Annotated[dict[str, Annotated[float, Field(ge=0)]], Field(max_length=1024)] = {}
    shares_before: Annotated[tuple[Shares, ...], FailFast(), Field(max_length=MAX_APPENDS)] = ()

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(handler(self), "audit", "calibration", "distortions", "shares_before", "tail")


class Calibrated(Config):
    """What temperatures were fitted on: the first ``rows`` rows of a split, by the digests of their keys and labels."""

    members: Annotated[tuple[MemberIdentity, ...], FailFast(), Field(max_length=1 << 16)]
    combine: Literal["mean_probs", "mean_logits"]
    split: Name
    rows: int = Field(ge=1)
    keys: Digest
    labels: Digest


class Worth(Config):
    """NLL (nats) and ECE of a predictor on the rows that its temperature was fitted on, before and after."""

    nll: tuple[float, float]
    ece: tuple[float, float]


class Calibration(Config):
    """Temperatures fitted on held-out labels: of each member, and after averaging. Committed before the plan that
    names it."""

    schema_version: Literal[1] = 1
    on: Calibrated
    temperature_before: Annotated[tuple[float, ...], FailFast(), Field(max_length=1 << 16)]
    temperature_after: float = Field(gt=0)
    worth: dict[str, Worth]


class WorkItem(NamedTuple):
    """One forward pass of the members: rows ``first`` to ``last`` (exclusive) of a split in one view."""

    split: str
    view: int
    page: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.split}-v{self.view:06d}-{self.page:08d}"

    @property
    def rows(self) -> int:
        return self.last - self.first

    def unit(self, group: Group) -> str:
        return f"{self.name}.{group.name}"


class Plan(Config):
    """``parents``: digests of the plans that this one has grown out of, whose units are units of this one too."""

    schema_version: Literal[1] = 1
    reading: Reading
    capture: Capture
    format: Format
    splits: Annotated[dict[Name, Split], Field(min_length=1, max_length=1024)]
    groups: Annotated[tuple[Group, ...], Field(min_length=1, max_length=1024)]
    parents: Annotated[tuple[Digest, ...], FailFast(), Field(max_length=MAX_APPENDS)] = ()

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(handler(self), "parents")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if len({g.name for g in self.groups}) < len(self.groups):
            raise ValueError("two groups have the same name")
        if self.units > MAX_UNITS:
            raise ValueError(f"{self.units} units are more than {MAX_UNITS}")
        if TARGETS not in self._group_numbers or not (
            self.head.classes == self.reading.heads.get(MAIN) == len(self.reading.classes)
        ):
            raise ValueError(
                f"there is no group {TARGETS!r} with targets {MAIN!r} of {len(self.reading.classes)} classes"
            )
        if isinstance(head := self.head, Members):
            self._check_members(head)
        if self.mixes and not isinstance(self.group(TARGETS).codecs.get(PARTNER), PartnerKey):
            raise ValueError(f"its views mix samples, and group {TARGETS!r} holds no keys of partners")
        rows = max(min(split.unit_rows, split.rows) for split in self.splits.values())
        if rows * max(16, *(group.row_bytes for group in self.groups)) > MAX_SHARD:
            raise ValueError(f"a unit of {rows} rows would take more than {MAX_SHARD >> 20} MiB")
        return self

    def _check_members(self, codec: Members) -> None:
        """ValueError unless the members that the codec keeps are those captured, and can be combined as is said."""
        names, reading = tuple(member.name for member in self.capture.members), self.reading
        if not names or codec.members != names or len(set(names)) < len(names):
            raise ValueError(f"the codec keeps the members {str(codec.members)[:200]}, captured are {str(names)[:200]}")
        if len(reading.temperature_before) != len(names):
            raise ValueError(f"{len(reading.temperature_before)} temperatures for {len(names)} members")
        if isinstance(codec.inner, TopK) and (reading.combine, reading.temperature_after) != ("mean_probs", 1):
            raise ValueError("of each member a few classes are kept, which can be combined by mean_probs only")

    # Work items and units are numbered in one order, which digests, pages and statistics use ---------

    @property
    def item_count(self) -> int:
        return sum(split.views * split.pages for split in self.splits.values())

    @property
    def units(self) -> int:
        return self.item_count * len(self.groups)

    def items(self) -> Iterator[WorkItem]:
        """All work items in their order."""
        for name, split in sorted(self.splits.items()):
            for view in range(split.views):
                for page in range(split.pages):
                    yield WorkItem(name, view, page, *split.span(page))

    def item(self, number: int) -> WorkItem:
        """The work item with this number (IndexError beyond the last)."""
        for name, split in sorted(self.splits.items()):
            if number < split.views * split.pages:
                view, page = divmod(number, split.pages)
                return WorkItem(name, view, page, *split.span(page))
            number -= split.views * split.pages
        raise IndexError(number)

    @property
    def predictors(self) -> tuple[str, ...]:
        """Whom statistics are about: the members, and the ensemble last."""
        return (*(member.name for member in self.capture.members), "ensemble")

    def predictors_by(self, group: str) -> tuple[str, ...]:
        """The same when this group of predictions was captured, before the members of later groups were appended."""
        said = self.said
        first = [g.name for g in said].index(group) + 1
        later = {name for g in said[first:] for name in members_of(g)}
        return tuple(name for name in self.predictors if name not in later)

    def shares_by(self, group: str) -> dict[str, float]:
        """The shares of the members at that time, by name."""
        names = self.predictors_by(group)[:-1]
        now = {member.name: member.share for member in self.capture.members}
        before = next((shares for shares in self.capture.shares_before if len(shares) == len(names)), None)
        if before is None or len(names) == len(now):
            return {name: now[name] for name in names}
        return dict(zip(names, before, strict=True))

    @property
    def commit_bytes(self) -> int:
        """The most that the commit of a unit may take, without its statistics."""
        rows = max(split.unit_rows for split in self.splits.values())
        blocks = min(rows, MAX_SHARD) * self.bytes_per_row >> 20
        return 16384 + 70 * min(blocks, MAX_SHARD >> 20) + 300 * sum(len(g.fields) for g in self.groups)

    @property
    def statistics_bytes(self) -> int:
        """The most that the statistics of a unit of targets may take."""
        return state_bytes(self.predictors, len(self.reading.classes))

    @property
    def manifest_bytes(self) -> int:
        """The most that a manifest may take: its pages' digests, the statistics of each split, and the provenance."""
        statistics = report_bytes(self.predictors, len(self.reading.classes)) + 256
        return 67 * -(-self.units // PAGE_UNITS) + len(self.splits) * statistics + MAX_LISTED + 4096

    def page_bytes(self, units: int) -> int:
        """The most that a page of a manifest with this many commits may take."""
        # Units of one item follow each other, and of these one has statistics, and one more for each append of members.
        with_statistics = (units // len(self.groups) + 1) * max(1, len(self.said))
        return (
            units * self.commit_bytes + min(units, with_statistics) * min(self.statistics_bytes, MAX_STATE_BYTES) + 64
        )

    def page_limit(self, n: int) -> int:
        """The most that page ``n`` of a manifest may take, by the units that are on it."""
        return self.page_bytes(min(PAGE_UNITS, self.units - n * PAGE_UNITS))

    def item_rows(self) -> np.ndarray:
        """Rows of each work item, int64 [items]."""
        parts = []
        for _, split in sorted(self.splits.items()):
            bounds = [np.arange(first, last, split.unit_rows) for first, last in pairwise((0, *split.cuts, split.rows))]
            rows = np.diff(np.concatenate([*bounds, [split.rows]]))
            parts.append(np.tile(rows, split.views))
        return np.concatenate(parts)

    def number(self, split: str, view: int, page: int) -> int:
        """The number of a work item."""
        before = sum(s.views * s.pages for name, s in self.splits.items() if name < split)
        return before + view * self.splits[split].pages + page

    def unit_number(self, unit: str) -> int:
        """The number of a unit, from its name: that of its item × groups + that of its group.

        Raises Corrupt for what is no unit of this plan.
        """
        match = _UNIT.fullmatch(unit)
        split = self.splits.get(match[1]) if match else None
        group = self._group_numbers.get(match[4]) if match else None
        if match and split and group is not None:
            view, page = int(match[2]), int(match[3])
            canonical = len(match[2]) == 6 or match[2][0] != "0"
            if canonical and view < split.views and page < split.pages and f"{page:08d}" == match[3]:
                return self.number(match[1], view, page) * len(self.groups) + group
        raise Corrupt(f"{unit[:200]!r} is no unit of this cache's plan")

    def has(self, unit: str) -> bool:
        """Whether there is a unit of this name."""
        with contextlib.suppress(Corrupt):
            return self.unit_number(unit) >= 0
        return False

    def unit_name(self, number: int) -> str:
        item, group = divmod(number, len(self.groups))
        return self.item(item).unit(self.groups[group])

    def locate(self, unit: str) -> tuple[WorkItem, Group]:
        """The work item and the group of a unit; Corrupt if the plan has no such unit."""
        item, group = divmod(self.unit_number(unit), len(self.groups))
        return self.item(item), self.groups[group]

    @cached_property
    def _group_numbers(self) -> dict[str, int]:
        return {group.name: i for i, group in enumerate(self.groups)}

    def content_header(self) -> bytes:
        """What a content digest says beside each unit's content and keys: the reading section, rows and labels.

        Not how it is stored: HDF5 and Parquet give the same, and so do any workers in any order.
        """
        splits = {name: [s.rows, s.views, s.labels] for name, s in self.splits.items()}
        return canonical_json({"reading": self.reading.model_dump(mode="json"), "splits": splits}) + b"\n"

    @property
    def mixes(self) -> bool:
        """Whether there is a view in which samples are mixed with others."""
        return self.reading.views.mix is not None and any(split.views > 1 for split in self.splits.values())

    @property
    def said(self) -> tuple[Group, ...]:
        """The groups that hold what was predicted: one, and one for each append of members."""
        return tuple(group for group in self.groups if MAIN in group.codecs)

    @property
    def head(self) -> HeadCodec:
        """The codec of the predictions, of all groups that hold them together; ValueError where they do not fit."""
        return head_of(self.said)

    def group(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)

    @property
    def rows(self) -> int:
        return sum(split.rows * split.views for split in self.splits.values())

    @property
    def bytes_per_row(self) -> int:
        """At most, where there are ragged features."""
        return sum(group.row_bytes for group in self.groups)


def unit_rows(rows: int, row_bytes: int) -> int:
    """Rows of a unit: about a 64th of the split, at least 1024, at most 64 MiB of the widest group."""
    return max(1, min(max(math.ceil(rows / 64), MIN_UNIT_ROWS), MAX_UNIT_BYTES // row_bytes))
