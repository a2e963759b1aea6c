"""Repair: mend what the cache itself still knows, drop what is damaged, and leave the rest to be captured again."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from ensemble_distill.cache.commits import Commits, committed_units, held_plan, plan_in_force
from ensemble_distill.cache.growth import check_grown
from ensemble_distill.cache.history import keys_digest, newest, put_back
from ensemble_distill.cache.plan import MAX_SHARD, Plan
from ensemble_distill.cache.verify import Damage, Verdict
from ensemble_distill.errors import Corrupt, Error, StorageError, Unsafe
from ensemble_distill.prefetch import prefetch
from ensemble_distill.store import records
from ensemble_distill.store.records import Commit
from ensemble_distill.store.store import Store, page_of

READERS = 4
# Damage for which units are dropped that are sealed, or of a cache that is not.
OF_UNITS = ("shard", "commit", "keys")
# What was in force before, or after.
NOT_IN_FORCE = ("parent", "later")


@dataclass
class Mended:
    """What a repair did: units dropped, files written again from copies, and how many units are missing now.

    left: what is damaged of what is not in force any more, in words: nothing here can mend it. failed: what could not
    be done, in words, by name.
    """

    dropped: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    missing: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> int:
        return len(self.dropped) + len(self.restored) + len(self.removed)

    @contextlib.contextmanager
    def attempt(self, done: list[str], name: str) -> Iterator[None]:
        """One step, which is noted under ``done`` or among what failed: the others go on."""
        try:
            yield
            done.append(name)
        except Error as error:
            self.failed[name] = str(error)

    def check(self, root: str) -> None:
        """StorageError if something failed."""
        if self.failed:
            raise StorageError(
                f"{root}: {len(self.failed)} files could not be mended; the first: {next(iter(self.failed.values()))}",
                hint="move out of the way what stands there, and run the same command again",
            )


def repair(store: Store, check: Callable[[], Verdict], begin: Callable[[], object] = lambda: None) -> Mended:
    """Act on what ``check`` (a ``verify``) finds. A cache that lacks units afterwards is not sealed: capture goes on.

    ``begin`` is called before a unit is dropped or the seal given up; what it raises ends the repair.

    Commits that are not the sealed ones go first, while the seal is in force: without it nobody could tell. Raises
    Corrupt where the plan itself is damaged, for then nobody knows what the rest means; StorageError, at the end,
    where a file could not be written or removed.
    """
    mended = Mended()
    _mend_pointers(store, mended)
    _restore_commits(store, mended)
    _restore_lost(store, mended)
    mended.check(store.root)
    _remove_keys_of_nothing(store, mended)
    while _mend(store, check(), mended, begin):
        pass  # a check gives up its list where that grows long; the rest is found in the next round
    mended.check(store.root)
    mended.missing = int((~committed_units(store, held_plan(store))).sum())
    return mended


def _restore_commits(store: Store, mended: Mended) -> None:
    """Write the sealed commits over those that differ, as far as the manifest and its pages are whole."""
    tasks = (partial(_differs, store, unit, commit) for unit, commit in _sealed(store, *plan_in_force(store)))
    for name, data in filter(None, prefetch(tasks, READERS)):
        with mended.attempt(mended.restored, name):
            store.storage.replace(name, data)


def _restore_lost(store: Store, mended: Mended) -> None:
    """Where CURRENT is lost: the commits that are not there, and whose shards and keys are, of what was sealed last."""
    last = newest(store) if _is_lost(store) else None
    if last is None or last.manifest.plan != store.plan_digest():
        return
    pages: dict[tuple[str, int], str | None] = {}  # of which a page of keys has a unit for each view and group
    with contextlib.suppress(Corrupt, Unsafe):
        for commit in map(Commits(store, last.plan, last.manifest).at, range(last.plan.units)):
            if store.is_committed(commit.unit) or store.storage.size(f"objects/{commit.object}") != commit.size:
                continue
            item, _ = last.plan.locate(commit.unit)
            if (page := page_of(commit.unit)) not in pages:
                pages[page] = keys_digest(store, item)
            if pages[page] == commit.keys:
                with mended.attempt(mended.restored, f"commits/{commit.unit}.json"):
                    store.storage.create(f"commits/{commit.unit}.json", records.seal(commit))


def _is_lost(store: Store) -> bool:
    with contextlib.suppress(Corrupt):
        return store.current() is None
    return True


def _sealed(store: Store, plan: Plan, digest: str) -> Iterator[tuple[str, Commit]]:
    """The units and the commits that the manifest in force lists, where it can be read and is of this plan."""
    with contextlib.suppress(Corrupt, Unsafe):
        current = store.current()
        manifest = store.manifest(current) if current else None
        if manifest is None or manifest.plan != digest:
            return
        commits = Commits(store, plan, manifest)
        for number in range(plan.units):
            with contextlib.suppress(Corrupt, Unsafe):
                yield plan.unit_name(number), commits.at(number)


def _differs(store: Store, unit: str, sealed: Commit) -> tuple[str, bytes] | None:
    """The name of a unit's commit and the bytes that it should have, if it has others."""
    name, data = f"commits/{unit}.json", records.seal(sealed)
    with contextlib.suppress(Corrupt, Unsafe):
        if store.storage.read(name, records.MAX_COMMIT) == data:
            return None
    return name, data


def _mend(store: Store, verdict: Verdict, mended: Mended, begin: Callable[[], object]) -> bool:
    """Act on one list of what is wrong; whether there may be more, and this round was of use."""
    before = mended.files
    if lost := [damage for damage in verdict.damaged if damage.kind in ("plan", "calibration", "orphan")]:
        raise Corrupt(f"{lost[0]}: this cannot be mended", hint=_to_restore(lost[0], store.root))
    if any(damage.kind not in ("stray", *NOT_IN_FORCE) for damage in verdict.damaged):
        begin()
    for damage in verdict.damaged:
        if damage.kind == "stray":
            with mended.attempt(mended.removed, damage.name):
                store.storage.remove(damage.name)
    _drop_units(store, {str(d.unit) for d in verdict.damaged if d.kind == "appended"}, mended)
    # What a manifest was appended to is no part of it: nobody but a copy can restore it.
    mended.left = [str(damage) for damage in verdict.damaged if damage.kind in NOT_IN_FORCE]
    rest = [damage for damage in verdict.damaged if damage.kind not in ("stray", "appended", *NOT_IN_FORCE)]
    if rest:
        # From here on readers are told that the cache is not complete, whatever happens to this process.
        store.storage.remove("CURRENT")
        _drop_damaged(store, rest, mended)
    return verdict.more and mended.files > before


def _to_restore(damage: Damage, root: str) -> str:
    """What a user can do about damage that nothing in the cache can mend."""
    if damage.kind == "calibration":
        return f"restore {damage.name} from a copy of the cache"
    if damage.kind == "orphan":
        return "restore that plan from a copy; or remove the commit, if it is not of this cache"
    if damage.name:  # a commit of a plan that has grown out of PLAN's
        return (
            f"restore PLAN from a copy, or give up what was appended: ensemble-distill append --cache {root} --abandon"
        )
    return "restore PLAN and plans/ from a copy of the cache"


def _drop_damaged(store: Store, damaged: list[Damage], mended: Mended) -> None:
    kept = set()
    for damage in damaged:
        if damage.kind == "keys":
            # Its unit is captured again, which writes the page too, of the same keys or not at all.
            page = page_of(str(damage.unit))
            with mended.attempt(mended.removed, _keys_name(*page)):
                store.lose_keys(*page, damage.keys)
            if _keys_name(*page) in mended.failed:
                kept.add(page)  # its commits alone still know which keys have to stand there
    units = {d.unit for d in damaged if d.unit and d.kind in OF_UNITS}
    _drop_units(store, {unit for unit in units if page_of(unit) not in kept}, mended)


def _drop_units(store: Store, units: set[str], mended: Mended) -> None:
    """Drop units; of a page of keys that no commit names any more, its digest is left to say which it has to be."""
    left = Counter(page_of(unit) for unit in store.committed()) if units else Counter()
    for unit in sorted(units):
        page = page_of(unit)
        left[page] -= 1
        with mended.attempt(mended.dropped, unit):
            _drop(store, unit, left[page] < 1)


def _drop(store: Store, unit: str, last: bool) -> None:
    """The commit first: what has none does not exist, and its object may go if it is not whole."""
    names = []
    with contextlib.suppress(Corrupt, Unsafe):
        commit = store.commit(unit)
        names.append(commit.object)
        if last:
            store.lose_keys(*page_of(unit), commit.keys)
    store.storage.remove(f"commits/{unit}.json")
    for name in names:
        with contextlib.suppress(Corrupt, Unsafe):
            blocks = records.block_hashes(store.storage.read(f"objects/{name}", MAX_SHARD))
            if records.root_hash(blocks) != name.partition(".")[0]:
                store.storage.remove(f"objects/{name}")


def _keys_name(split: str, page: int) -> str:
    return f"keys/{split}-{page:08d}"


def _remove_keys_of_nothing(store: Store, mended: Mended) -> None:
    """Pages of keys that were written before a commit that never came: nobody knows whether they are whole.

    What says which keys a lost page has to have is left, and pages of partners that committed units were mixed with.
    """
    committed = list(store.committed())
    named, mixed = {_keys_name(*page_of(unit)) for unit in committed}, _mixed(held_plan(store), committed)
    for name in [name for name in store.storage.list("keys") if name not in named]:
        if not store.says_lost(name) and not name.startswith(mixed):
            with mended.attempt(mended.removed, name):
                store.storage.remove(name)


def _mixed(plan: Plan, committed: list[str]) -> tuple[str, ...]:
    """How the pages of keys are called of the splits of which a unit of mixed samples is committed."""
    items = (plan.locate(unit)[0] for unit in committed if plan.mixes and plan.has(unit))
    return tuple({f"keys/{item.split}-" for item in items if item.view > 0})


def _mend_pointers(store: Store, mended: Mended) -> None:
    """CURRENT and PLAN, where they are lost, damaged or put back, and the cache itself tells what they said."""
    last = newest(store)
    if (later := put_back(store)) is not None and later.whole:
        store.storage.replace("CURRENT", f"{later.digest}\n".encode())
        mended.restored.append("CURRENT")
    held = _held(store)
    base = held if last is None else last.manifest.plan
    digest = _of_commits(store) if base is None else _appended_to(store, base, held)
    if digest == held:
        return
    store.plan(digest, Plan)  # a plan that is damaged too must not become the one in force
    store.storage.replace("PLAN", f"{digest}\n".encode())
    mended.restored.append("PLAN")


def _of_commits(store: Store) -> str:
    """The digest of the plan under which all was committed; where nothing is, of the only plan that there is."""
    plans = {name.removeprefix("plans/").removesuffix(".json") for name in store.storage.list("plans")}
    if len(plans) == 1:
        return plans.pop()
    committed = {plan for unit in store.committed() if (plan := _plan_of(store, unit)) is not None}
    if committed:
        return _last_grown(store, sorted(committed))
    raise Corrupt(
        f"{store.root}/PLAN is damaged, and there are {len(plans)} plans to choose from",
        hint="restore PLAN from a copy of the cache",
    )


def _held(store: Store) -> str | None:
    """What PLAN says, if that is a plan that is there."""
    with contextlib.suppress(Corrupt):
        digest = store.plan_digest()
        if digest is not None and store.storage.size(f"plans/{digest}.json") is not None:
            return digest
    return None


def _appended_to(store: Store, base: str, held: str | None) -> str:
    """The digest of the plan under which units beyond those of the plan ``base`` were committed.

    Where there are none: that which PLAN names, if it has grown out of that plan, or ``base`` itself.
    """
    known = store.plan(base, Plan)
    found = {plan for unit in store.committed() if (plan := _plan_beyond(store, known, unit)) is not None}
    larger = [plan for plan in found if _has_grown(store, base, plan)]
    if held in larger or (not larger and held is not None and _has_grown(store, base, held)):
        return held
    return _last_grown(store, larger) if larger else base


def _last_grown(store: Store, plans: list[str]) -> str:
    """The plan that has grown out of all others of these; Corrupt where there is none."""
    for digest in plans:
        with contextlib.suppress(Corrupt, Unsafe):
            if {*plans} <= {digest, *store.plan(digest, Plan).parents}:
                return digest
    raise Corrupt(
        f"{store.root}/PLAN is damaged, and its commits are of {len(plans)} plans of which none has grown out of the "
        "others",
        hint="restore PLAN from a copy of the cache",
    )


def _has_grown(store: Store, base: str, plan: str) -> bool:
    """Whether a plan, which may be one that cannot be read, is another that has grown out of ``base``."""
    with contextlib.suppress(Corrupt, Unsafe):
        check_grown(store, base, plan)
        return plan != base
    return False


def _plan_beyond(store: Store, known: Plan, unit: str) -> str | None:
    """The plan under which a unit was committed that ``known`` has not; None for a commit that cannot be read."""
    return None if known.has(unit) else _plan_of(store, unit)


def _plan_of(store: Store, unit: str) -> str | None:
    with contextlib.suppress(Corrupt, Unsafe):
        return store.commit(unit).plan
    return None
