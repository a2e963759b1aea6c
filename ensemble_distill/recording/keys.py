"""The pages of keys of a capture: what samples were, and have to be whenever one of their units is captured."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial

import numpy as np

from ensemble_distill.cache.plan import Plan, WorkItem
from ensemble_distill.errors import Corrupt, Mismatch, Unsafe
from ensemble_distill.sources.arrays import Source
from ensemble_distill.sources.loading import load
from ensemble_distill.store.store import Store

KEPT = 64 << 20  # bytes of pages


class KeyPages:
    """Writes pages, and proves partners by them. done: which units are committed, bool [units], as far as is known."""

    def __init__(self, plan: Plan, store: Store, sources: Mapping[str, Source], done: np.ndarray) -> None:
        self._plan, self._store, self._sources, self._done = plan, store, sources, done
        self._kept: dict[tuple[str, int], np.ndarray] = {}

    def put(self, item: WorkItem, keys: np.ndarray) -> str:
        """Commit the page of an item (uint8 [rows, 16]), and its SHA-256; Mismatch if other samples were captured."""
        return self._store.put_keys(item.split, item.page, keys, partial(self._committed, item))

    def prove(self, split: str, rows: np.ndarray, keys: np.ndarray) -> None:
        """Mismatch where what samples are mixed with (rows int64 [B], keys uint8 [B, 16]) is not what was captured.

        A page that is not there yet is written from the source: its own capture finds it there, of the same samples.
        """
        spec = self._plan.splits[split]
        pages = spec.page_of(rows)
        for page in np.unique(pages):
            item, of_page = self._plan.item(self._plan.number(split, 0, int(page))), pages == page
            wrong = np.flatnonzero((self._page(item)[rows[of_page] - item.first] != keys[of_page]).any(axis=1))
            if wrong.size:
                raise Mismatch(
                    f"{self._store.root}: row {rows[of_page][wrong[0]]} of {split}, which others are mixed with, is "
                    "not the sample that was captured before: the source has changed",
                    hint="restore the source, or capture it as it is now into another directory",
                )

    def _page(self, item: WorkItem) -> np.ndarray:
        place = (item.split, item.page)
        if place not in self._kept:
            if sum(page.nbytes for page in self._kept.values()) > KEPT:
                self._kept.clear()
            held = self._store.held_keys(item.split, item.page, item.rows)
            self._kept[place] = self._written(item) if held is None else held
        return self._kept[place]

    def _written(self, item: WorkItem) -> np.ndarray:
        rows, step = np.arange(item.first, item.last), self._plan.capture.batch_size
        parts = [load(self._sources[item.split], rows[i : i + step])[1] for i in range(0, len(rows), step)]
        keys = np.concatenate(parts)
        self.put(item, keys)
        return keys

    def _committed(self, item: WorkItem) -> str | None:
        """The SHA-256 that the keys of an item have, as a committed unit of the same samples says, if there is one."""
        for view in range(self._plan.splits[item.split].views):
            first = self._plan.number(item.split, view, item.page) * len(self._plan.groups)
            for number in np.flatnonzero(self._done[first : first + len(self._plan.groups)]) + first:
                with contextlib.suppress(Corrupt, Unsafe):
                    return self._store.commit(self._plan.unit_name(int(number))).keys
        return None
