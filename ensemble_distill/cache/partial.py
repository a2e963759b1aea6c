"""What can be used of a cache that is not complete, where the user says that a part will do."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ensemble_distill.cache.commits import Commits, check_layout, check_plan
from ensemble_distill.cache.groups import Group
from ensemble_distill.cache.plan import Plan, Split, WorkItem
from ensemble_distill.errors import Corrupt
from ensemble_distill.store.records import Commit
from ensemble_distill.store.store import Store


@dataclass(frozen=True)
class Part:
    """The first ``views`` views of a split, and in them the rows of some pages: bool [pages]."""

    views: int
    pages: np.ndarray

    def has(self, rows: np.ndarray, split: Split) -> np.ndarray:
        """Which of these rows (int64 [B], within the split) can be used: bool [B]."""
        held: np.ndarray = self.pages[split.page_of(rows)]
        return held


def whole(plan: Plan) -> dict[str, Part]:
    """All of a plan, by split."""
    return {name: Part(split.views, np.ones(split.pages, bool)) for name, split in plan.splits.items()}


def usable(plan: Plan, done: np.ndarray) -> dict[str, Part]:
    """By split: its leading views that are whole; where not even the first is, what there is of that one.

    done: which units are committed, bool [units]. So an epoch has the same samples whatever its view. Splits of
    which nothing can be used are left out.
    """
    items = np.asarray(done.reshape(-1, len(plan.groups)).all(axis=1))
    parts, first = {}, 0
    for name, split in sorted(plan.splits.items()):
        grid = items[first : first + split.views * split.pages].reshape(split.views, split.pages)
        first += grid.size
        complete = int(np.logical_and.accumulate(grid.all(axis=1)).sum())
        part = Part(complete, np.ones(split.pages, bool)) if complete else Part(1, grid[0])
        if part.pages.any():
            parts[name] = part
    return parts


class LooseCommits:
    """The commits of units that no manifest lists yet, each read when it is asked for and checked against the plan."""

    def __init__(self, store: Store, plan: Plan, plan_digest: str) -> None:
        self._store, self._plan, self._digest = store, plan, plan_digest
        self.root = store.root

    def get(self, item: WorkItem, group: Group) -> Commit:
        """The commit of a unit; Corrupt or Unsafe if it does not say what the plan does."""
        commit = self._store.commit(item.unit(group))
        check_plan(commit, self._plan, self._digest, self._store.root)
        check_layout(commit, group, item, self._store.root)
        return commit


class SealedCommits(LooseCommits):
    """The same of what is being appended to: of units that are sealed, the commit that was sealed."""

    def __init__(self, store: Store, plan: Plan, plan_digest: str) -> None:
        super().__init__(store, plan, plan_digest)
        self._sealed: tuple[Plan, Commits] | None = None
        if (current := store.current()) is not None and (manifest := store.manifest(current)).plan in plan.parents:
            sealed = store.plan(manifest.plan, Plan)
            self._sealed = sealed, Commits(store, sealed, manifest)

    def get(self, item: WorkItem, group: Group) -> Commit:
        if self._sealed is not None and self._sealed[0].has(item.unit(group)):
            return self._sealed[1].get(item, group)
        return super().get(item, group)


def part_digest(plan: Plan, parts: dict[str, Part], commits: LooseCommits) -> str:
    """SHA-256 of what is used: a run that is resumed must find the same, and a cache that has grown is another.

    Corrupt where two units of the same rows name different keys: one of them is of other samples.
    """
    content = hashlib.sha256(b"part of " + plan.content_header())
    keys: dict[tuple[str, int], str] = {}
    for item in plan.items():
        part = parts.get(item.split)
        if part is not None and item.view < part.views and part.pages[item.page]:
            for group in plan.groups:
                commit = commits.get(item, group)
                if keys.setdefault((item.split, item.page), commit.keys) != commit.keys:
                    raise Corrupt(f"{commits.root}: unit {commit.unit} was captured of other samples than those before")
                content.update(f"{commit.unit} {commit.content} {commit.keys}\n".encode())
    return content.hexdigest()
