"""Rows of a sealed cache: read shard by shard, verified, kept within a memory budget, gathered by batch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from ensemble_distill.cache.commits import Commits
from ensemble_distill.cache.groups import Group
from ensemble_distill.cache.partial import LooseCommits, Part
from ensemble_distill.cache.plan import MAX_UNIT_BYTES, Plan, WorkItem
from ensemble_distill.cache.ragged import Table, read_table
from ensemble_distill.codecs.domain import BadRow
from ensemble_distill.errors import Corrupt, UsageError
from ensemble_distill.prefetch import prefetch
from ensemble_distill.store.store import Store

READERS = 4  # reading and hashing release the interpreter's lock


class Rows:
    """Gathers records of any group. What is read is checked against its hashes before it is used.

    A split's view that fits the budget is read once, in order, into one array: then a batch is one gather.
    A larger one is kept by units, the least recently used dropped first: right, but slow under a perfect
    shuffle, since each batch then touches most units.
    """

    def __init__(
        self, store: Store, plan: Plan, commits: Commits | LooseCommits, parts: Mapping[str, Part], memory: int
    ) -> None:
        self._store, self._plan, self._commits, self._parts, self._memory = store, plan, commits, parts, memory
        self._held: OrderedDict[tuple[str, ...], Table] = OrderedDict()
        self._lock = threading.Lock()

    def gather(self, group: Group, split: str, view: int, rows: np.ndarray) -> np.ndarray:
        """The records (``group.padded`` [B]) of these rows (int64 [B])."""
        spec = self._plan.splits[split]
        if group.ragged is not None:
            self._check_batch(group, len(rows))
        if spec.rows * self._plan.bytes_per_row <= self._memory:
            table = self._keep((group.name, split, str(view)), partial(self._read_view, group, split, view))
            return table.take(rows)
        result = np.empty(len(rows), group.padded)
        units = spec.page_of(rows)
        for page in np.unique(units):
            item = self._item(split, view, int(page))
            table = self._keep((item.unit(group),), partial(self._read_unit, group, item))
            mask = units == page
            result[mask] = table.take(rows[mask] - item.first)
        return result

    def _check_batch(self, group: Group, rows: int) -> None:
        """UsageError for rows that are small as they are kept, and too large with all tokens that there might be."""
        if (size := rows * group.padded.itemsize) > max(self._memory, 2 * MAX_UNIT_BYTES):
            raise UsageError(
                f"{self._store.root}: {rows} rows of {group.name} take {size / 1e6:.1f} MB once they are padded, "
                f"more than the {self._memory / 1e6:.1f} MB that may be kept in memory",
                hint="choose a smaller batch_size, or raise --memory, or memory= of open_cache",
            )

    def _keep(self, name: tuple[str, ...], read: Callable[[], Table]) -> Table:
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
            table = read()
            while self._held and sum(t.nbytes for t in self._held.values()) + table.nbytes > self._memory:
                self._held.popitem(last=False)
            self._held[name] = table
            return table

    def _read_view(self, group: Group, split: str, view: int) -> Table:
        rows = self._plan.splits[split].rows
        items = [self._item(split, view, int(page)) for page in np.flatnonzero(self._parts[split].pages)]
        table = Table(group, np.zeros((rows, group.dtype.itemsize), np.uint8))
        if group.token is not None:
            counts = [self._commits.get(item, group).segments[-1].count or 0 for item in items]
            table = replace(table, starts=np.zeros(rows, np.int64), tokens=np.zeros(sum(counts), group.token))
        parts, at = prefetch((partial(self._read_unit, group, item) for item in items), READERS), 0
        for item, part in zip(items, parts, strict=True):
            at = table.put(item.first, part, at)
        return table

    def _read_unit(self, group: Group, item: WorkItem) -> Table:
        """One unit's rows, read at the committed offsets."""
        commit = self._commits.get(item, group)
        if commit.size > max(self._memory, 2 * MAX_UNIT_BYTES):
            raise UsageError(
                f"{self._store.root}: unit {commit.unit} takes {commit.size / 1e6:.1f} MB, "
                f"more than the {self._memory / 1e6:.1f} MB that may be kept in memory",
                hint="raise --memory, or memory= of open_cache",
            )
        data = np.frombuffer(self._store.object(commit), np.uint8)
        try:
            return read_table(data, commit, group)
        except BadRow as error:
            raise Corrupt(f"{self._store.root}: unit {commit.unit}: row {error.row}: {error.problem}") from error

    def _item(self, split: str, view: int, page: int) -> WorkItem:
        return self._plan.item(self._plan.number(split, view, page))
