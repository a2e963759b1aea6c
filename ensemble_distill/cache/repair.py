"""Repair: mend what the cache itself still knows, drop what is damaged, and leave the rest to be captured again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from ensemble_distill.cache.commits import committed_units, held_plan, plan_in_force
from ensemble_distill.cache.plan import MAX_SHARD, Plan
from ensemble_distill.cache.verify import Verdict
from ensemble_distill.errors import Corrupt, Error, Unsafe
from ensemble_distill.store import records
from ensemble_distill.store.records import PAGE_UNITS, Commit
from ensemble_distill.store.store import Store, page_of


@dataclass
class Mended:
    """What a repair did: units dropped, files written again from copies, and how many units are missing now."""

    dropped: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    missing: int = 0

    @property
    def files(self) -> int:
        return len(self.dropped) + len(self.restored) + len(self.removed)


def repair(store: Store, check: Callable[[], Verdict]) -> Mended:
    """Act on what ``check`` (a ``verify``) finds. A cache that lacks units afterwards is not sealed: capture goes on.

    Raises Corrupt where the plan itself is damaged, for then nobody knows what the rest means.
    """
    mended = Mended()
    _mend_pointer(store, mended)
    while _mend(store, check(), mended):
        pass  # a check gives up its list where that grows long; the rest is found in the next round
    mended.missing = int((~committed_units(store, held_plan(store))).sum())
    return mended


def _mend(store: Store, verdict: Verdict, mended: Mended) -> bool:
    """Act on one list of what is wrong; whether there may be more, and this round was of use."""
    before = mended.files
    if lost := [str(damage) for damage in verdict.damaged if damage.kind == "plan"]:
        raise Corrupt(f"{lost[0]}: this cannot be mended", hint="restore PLAN and plans/ from a copy of the cache")
    if not verdict.ok:
        plan, _ = plan_in_force(store)
        # From here on readers are told that the cache is not complete, whatever happens to this process.
        store.storage.remove("CURRENT")
        commits = _sealed_commits(store, verdict, plan)
        dropped = {d.unit for d in verdict.damaged if d.unit and d.kind in ("shard", "commit", "keys")}
        for damage in verdict.damaged:
            name = f"commits/{damage.unit}.json"
            if damage.kind == "commit copy" and damage.unit not in dropped:
                store.storage.replace(name, records.seal(commits[str(damage.unit)]))
                mended.restored.append(name)
            elif damage.kind == "stray":
                store.storage.remove(name)
                mended.removed.append(name)
            elif damage.kind == "keys":
                # Its unit is captured again, which writes the page too; the units beside it prove that it is the same.
                split, page = page_of(str(damage.unit))
                store.storage.remove(f"keys/{split}-{page:08d}")
                mended.removed.append(f"keys/{split}-{page:08d}")
        for unit in sorted(dropped):
            _drop(store, unit, commits.get(unit))
            mended.dropped.append(unit)
    return verdict.more and mended.files > before


def _drop(store: Store, unit: str, sealed: Commit | None) -> None:
    """The commit first: what has none does not exist, and its object may go if it is not whole."""
    names = {sealed.object} if sealed is not None else set()
    with contextlib.suppress(Error):
        names.add(store.commit(unit).object)
    store.storage.remove(f"commits/{unit}.json")
    for name in names:
        with contextlib.suppress(Corrupt, Unsafe):
            blocks = records.block_hashes(store.storage.read(f"objects/{name}", MAX_SHARD))
            if records.root_hash(blocks) != name.partition(".")[0]:
                store.storage.remove(f"objects/{name}")


def _mend_pointer(store: Store, mended: Mended) -> None:
    """PLAN, where it is lost or damaged and the only plan there is tells what it said."""
    plans = list(store.storage.list("plans"))
    with contextlib.suppress(Corrupt):
        digest = store.plan_digest()
        if digest is not None and f"plans/{digest}.json" in plans:
            return
    if len(plans) != 1:
        raise Corrupt(f"{store.root}/PLAN is damaged, and there are {len(plans)} plans to choose from")
    digest = plans[0].removeprefix("plans/").removesuffix(".json")
    store.plan(digest, Plan)  # a plan that is damaged too must not become the one in force
    store.storage.replace("PLAN", f"{digest}\n".encode())
    mended.restored.append("PLAN")


def _sealed_commits(store: Store, verdict: Verdict, plan: Plan) -> dict[str, Commit]:
    """The manifest's copies of the commits of the units that are damaged, where their pages are whole."""
    if not verdict.sealed:
        return {}
    found: dict[str, Commit] = {}
    manifest = store.manifest(verdict.manifest_digest)
    pages: dict[int, tuple[Commit, ...]] = {}
    for damage in verdict.damaged:
        if damage.unit is None:
            continue
        n, i = divmod(plan.unit_number(damage.unit), PAGE_UNITS)
        if n not in pages:
            try:
                pages[n] = store.page(manifest.pages[n], plan.page_bytes(PAGE_UNITS)).commits
            except Error:
                pages[n] = ()
        if i < len(pages[n]):
            found[damage.unit] = pages[n][i]
    return found
