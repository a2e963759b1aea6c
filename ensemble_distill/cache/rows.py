"""Rows of a sealed cache: read shard by shard, verified, kept within a memory budget, gathered by batch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from ensemble_distill.cache.plan import Group, Plan, WorkItem
from ensemble_distill.errors import Corrupt, Unsafe
from ensemble_distill.formats.layout import read_segments
from ensemble_distill.store.records import Commit
from ensemble_distill.store.store import Store


class Rows:
    """Gathers records of any group. What is read is checked against its hashes before it is used.

    A split's view that fits the budget is read once, in order, into one array: then a batch is one gather.
    A larger one is kept by units, the least recently used dropped first: right, but slow under a perfect
    shuffle, since each batch then touches most units.
    """

    def __init__(self, store: Store, plan: Plan, commits: Mapping[str, Commit], memory: int) -> None:
        self._store, self._plan, self._commits, self._memory = store, plan, commits, memory
        self._items: dict[tuple[str, int], list[WorkItem]] = {}
        for item in plan.items():
            self._items.setdefault((item.split, item.view), []).append(item)
        self._held: OrderedDict[tuple[str, ...], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def gather(self, group: Group, split: str, view: int, rows: np.ndarray) -> np.ndarray:
        """The records (structured [B]) of these rows (int64 [B])."""
        stride = group.dtype.itemsize
        spec = self._plan.splits[split]
        if spec.rows * self._plan.bytes_per_row <= self._memory:
            table = self._keep((group.name, split, str(view)), partial(self._read_view, group, split, view))
            return np.take(table, rows, axis=0).view(group.dtype).reshape(-1)
        result = np.empty((len(rows), stride), np.uint8)
        units = rows // spec.unit_rows
        for page in np.unique(units):
            item = self._items[split, view][page]
            table = self._keep((item.unit(group),), partial(self._read_unit, group, item))
            mask = units == page
            result[mask] = table[rows[mask] - item.first]
        return result.view(group.dtype).reshape(-1)

    def _keep(self, name: tuple[str, ...], read: Callable[[], np.ndarray]) -> np.ndarray:
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
            table = read()
            while self._held and sum(t.nbytes for t in self._held.values()) + table.nbytes > self._memory:
                self._held.popitem(last=False)
            self._held[name] = table
            return table

    def _read_view(self, group: Group, split: str, view: int) -> np.ndarray:
        table = np.empty((self._plan.splits[split].rows, group.dtype.itemsize), np.uint8)
        for item in self._items[split, view]:
            table[item.first : item.last] = self._read_unit(group, item)
        return table

    def _read_unit(self, group: Group, item: WorkItem) -> np.ndarray:
        """One unit's records as bytes, uint8 [rows, stride], read at the committed offsets."""
        unit = item.unit(group)
        commit = self._commits[unit]
        check_layout(commit, group, item, str(self._store.root))
        data = np.frombuffer(self._store.object(commit), np.uint8)
        records = read_segments(data, commit.rows, group.dtype, commit.segments)
        return records.view(np.uint8).reshape(commit.rows, -1)


def check_layout(commit: Commit, group: Group, item: WorkItem, where: str) -> None:
    """The commit's rows, strides and offsets against the plan and the file's size, before any read."""
    if commit.rows != item.last - item.first:
        raise Corrupt(f"{where}: unit {commit.unit} has {commit.rows} rows, expected {item.last - item.first}")
    fields = [name for segment in commit.segments for name in segment.fields]
    if fields != [f.name for f in group.fields]:
        raise Corrupt(f"{where}: unit {commit.unit} holds {fields}, expected {[f.name for f in group.fields]}")
    for segment in commit.segments:
        whole = segment.fields == group.dtype.names
        expected = group.dtype.itemsize if whole else group.dtype[segment.fields[0]].itemsize
        if segment.stride != expected or (len(segment.fields) > 1 and not whole):
            raise Unsafe(f"{where}: unit {commit.unit}: stride {segment.stride}, expected {expected}")
        if segment.offset < 0 or segment.offset + commit.rows * segment.stride > commit.size:
            raise Unsafe(f"{where}: unit {commit.unit}: rows beyond the end of its file")
