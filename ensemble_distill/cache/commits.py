"""The plan and the commits of a cache: which units there are, and what was committed for each."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from functools import partial

import numpy as np

from ensemble_distill.cache.groups import Group
from ensemble_distill.cache.plan import Plan, WorkItem
from ensemble_distill.errors import Corrupt, Unsafe
from ensemble_distill.fingerprint import KEY_BYTES
from ensemble_distill.prefetch import prefetch
from ensemble_distill.store.records import PAGE_UNITS, Commit, Manifest
from ensemble_distill.store.store import MEND, Store

KEPT_PAGES = 32
READERS = 4
# What a format adds to the rows of a unit: headers, names, a footer, and what it says of each field.
OVERHEAD, OVERHEAD_FIELD = 1 << 16, 1 << 12


def held_plan(store: Store) -> Plan:
    """The plan that a cache is captured under; Corrupt if there is none."""
    return store.plan(_held_digest(store), Plan)


def _held_digest(store: Store) -> str:
    digest = store.plan_digest()
    if digest is None:
        raise Corrupt(f"{store.root}/PLAN is missing")
    return digest


def missing(plan: Plan, done: np.ndarray) -> str:
    """The first ranges of rows that are not committed, for people. done: bool [units]."""
    count = len(done) - int(done.sum())
    numbers: list[int] = []
    for first in range(0, len(done), 1 << 20):  # by parts: there may be very many
        lost = np.flatnonzero(~done[first : first + (1 << 20)])[: 4 * len(plan.groups)] + first
        numbers += [int(n) for n in np.unique(lost // len(plan.groups)) if int(n) not in numbers]
        if len(numbers) >= 3:
            break
    shown = "; ".join(f"{i.split} view {i.view} rows {i.first}–{i.last - 1}" for i in map(plan.item, numbers[:3]))
    return f" (missing: {shown}; {count} units in all)" if count else " (all there, but not sealed)"


def committed_units(store: Store, plan: Plan) -> np.ndarray:
    """Which units are committed, by number: bool [units]. Corrupt for a commit of no unit of the plan."""
    done = np.zeros(plan.units, bool)
    number = plan.unit_number
    try:
        for unit in store.committed():
            done[number(unit)] = True
    except Corrupt as error:
        raise Corrupt(f"{store.root}/commits: {error}", hint=MEND) from error
    return done


class Commits:
    """The commit of each unit of a plan, checked against the plan; the last pages that were used are kept."""

    def __init__(self, store: Store, plan: Plan, manifest: Manifest) -> None:
        if manifest.units != plan.units or len(manifest.pages) != -(-plan.units // PAGE_UNITS):
            raise Corrupt(
                f"{store.root}: its manifest lists {manifest.units} units on {len(manifest.pages)} pages, "
                f"its plan {plan.units}",
                hint=MEND,
            )
        self._store, self._plan, self._manifest = store, plan, manifest
        self._pages: OrderedDict[int, tuple[Commit, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, item: WorkItem, group: Group) -> Commit:
        """The commit of a unit; Corrupt or Unsafe if it does not say what the plan does."""
        return self.at(self._plan.unit_number(item.unit(group)))

    def at(self, number: int) -> Commit:
        """The same by the unit's number."""
        n, i = divmod(number, PAGE_UNITS)
        commits = self._page(n)
        item, group = divmod(number, len(self._plan.groups))
        if i < len(commits):
            check_plan(commits[i], self._plan, self._manifest.plan, self._store.root)
            check_layout(commits[i], self._plan.groups[group], self._plan.item(item), self._store.root)
            return commits[i]
        raise Corrupt(f"{self._store.root}: page {n} of its manifest holds {len(commits)} commits", hint=MEND)

    def _page(self, n: int) -> tuple[Commit, ...]:
        with self._lock:
            if n not in self._pages:
                self._pages[n] = self._store.page(self._manifest.pages[n], self._plan.page_limit(n)).commits
                while len(self._pages) > KEPT_PAGES:
                    self._pages.popitem(last=False)
            self._pages.move_to_end(n)
            return self._pages[n]


def plan_in_force(store: Store, current: str | None = None) -> tuple[Plan, str]:
    """The plan of what is sealed, where more is being appended to it; else the one that is captured under.

    current: the digest of the manifest that is meant (None: what CURRENT names); who goes on to read it names it, for
    CURRENT may move. A pointer or a manifest that cannot be read is for those to tell who read it; Corrupt for a plan
    that is lost.
    """
    digest = _held_digest(store)
    held, sealed = store.plan(digest, Plan), digest
    with contextlib.suppress(Corrupt, Unsafe):
        if held.parents and (current := current or store.current()) is not None:
            sealed = store.manifest(current).plan
    return (store.plan(sealed, Plan), sealed) if sealed in held.parents else (held, digest)


def check_sealed(store: Store, current: str, complete: bool = False) -> None:
    """Corrupt for a committed unit of another content than was sealed: it must not come into a new manifest.

    And for one whose shard is gone or of another size; its bytes are not read, which would take as long as `verify`.
    ``complete``: and where one is not committed any more, or a page of its keys is gone or of another size.
    """
    manifest = store.manifest(current)
    plan = store.plan(manifest.plan, Plan)
    sealed = Commits(store, plan, manifest)

    def check(number: int) -> None:
        unit = plan.unit_name(number)
        if not store.is_committed(unit):
            if complete:
                raise Corrupt(f"{store.root}/commits/{unit}.json is missing", hint=MEND)
            return
        item, group = divmod(number, len(plan.groups))
        if complete and group == 0 and plan.item(item).view == 0:  # one of the units of a page
            check_page(store, plan.item(item))
        found, meant = store.commit(unit), sealed.at(number)
        if found != meant:
            raise Corrupt(f"{store.root}/commits/{unit}.json: not the commit that was sealed", hint=MEND)
        check_size(store, found)

    for _ in prefetch((partial(check, number) for number in range(plan.units)), READERS):
        pass


def check_page(store: Store, item: WorkItem) -> None:
    """Corrupt for a page of keys that is gone or of another size; nothing is read."""
    name = f"keys/{item.split}-{item.page:08d}"
    if store.storage.size(name) != item.rows * KEY_BYTES:
        raise Corrupt(f"{store.root}/{name} is lost or damaged", hint=MEND)


def check_size(store: Store, commit: Commit) -> None:
    """Corrupt for a shard that is gone or of another size; nothing is read."""
    if (size := store.storage.size(f"objects/{commit.object}")) != commit.size:
        held = "not there" if size is None else f"{size} bytes, expected {commit.size}"
        raise Corrupt(f"{store.root}/objects/{commit.object} (unit {commit.unit}): {held}", hint=MEND)


def check_plan(commit: Commit, plan: Plan, digest: str, where: str) -> None:
    """A commit of the plan with this digest, or of one that it has grown out of.

    Corrupt if it was captured under another, which meant other things.
    """
    if commit.plan != digest and commit.plan not in plan.parents:
        raise Corrupt(f"{where}: unit {commit.unit[:200]} was captured under another plan than the one in force")


def check_layout(commit: Commit, group: Group, item: WorkItem, where: str) -> None:
    """A commit's unit, rows, strides, offsets and size against the plan, before anything is read."""
    unit = item.unit(group)
    if commit.unit != unit:
        raise Corrupt(f"{where}: the commit of unit {commit.unit[:200]} stands where {unit}'s should")
    if commit.rows != item.rows:
        raise Corrupt(f"{where}: unit {unit} has {commit.rows} rows, expected {item.rows}")
    fields = [(name, segment.count is not None) for segment in commit.segments for name in segment.fields]
    expected_fields = [(f.name, False) for f in group.fields] + [(f.name, True) for f in group.token_fields]
    if fields != expected_fields:
        names, expected_names = ([name for name, _ in pairs] for pairs in (fields, expected_fields))
        raise Corrupt(f"{where}: unit {unit} holds {str(names)[:200]}, expected {expected_names}")
    dtype, tokens = group.dtype, _tokens(commit, group, where)
    most = item.rows * dtype.itemsize + tokens + OVERHEAD + OVERHEAD_FIELD * len(fields)
    if commit.size > most:
        raise Unsafe(f"{where}: unit {unit} would be a file of {commit.size} bytes, its rows need at most {most}")
    for segment in commit.segments:
        if segment.count is not None:
            continue
        whole = segment.fields == dtype.names
        expected = dtype.itemsize if whole else dtype[segment.fields[0]].itemsize if segment.fields else -1
        if segment.stride != expected or (len(segment.fields) != 1 and not whole):
            raise Unsafe(f"{where}: unit {unit}: stride {segment.stride}, expected {expected}")
        if segment.offset < 0 or segment.offset + item.rows * segment.stride > commit.size:
            raise Unsafe(f"{where}: unit {unit}: rows beyond the end of its file")


def _tokens(commit: Commit, group: Group, where: str) -> int:
    """The bytes that the tokens of a ragged unit may take in its file, their number against rows and plan."""
    counted = [segment for segment in commit.segments if segment.count is not None]
    if len(counted) != len(group.token_fields):
        raise Corrupt(f"{where}: unit {commit.unit} has {len(counted)} tables of tokens")
    if group.token is None:
        return 0
    (segment,), most = counted, commit.rows * group.most_tokens
    assert segment.count is not None
    if not 0 <= segment.count <= most:
        raise Unsafe(f"{where}: unit {commit.unit} has {segment.count} tokens, its rows have at most {most}")
    if segment.stride != group.token.itemsize or len(segment.fields) != 1:
        raise Unsafe(f"{where}: unit {commit.unit}: stride {segment.stride}, expected {group.token.itemsize}")
    if segment.offset < 0 or segment.offset + segment.count * segment.stride > commit.size:
        raise Unsafe(f"{where}: unit {commit.unit}: tokens beyond the end of its file")
    return segment.count * segment.stride + (segment.count + commit.rows) // 2  # and what Parquet says of lists
