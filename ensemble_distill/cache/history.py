"""History: what was sealed in a place, as its manifests and plans say, and not the pointers, which may be lost or put
back. What is appended names the manifest that it was appended to, and a plan all plans that it has grown out of.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from ensemble_distill.cache.commits import Commits
from ensemble_distill.cache.growth import check_grown
from ensemble_distill.cache.plan import MAX_APPENDS, Plan, WorkItem
from ensemble_distill.errors import Corrupt, Unsafe
from ensemble_distill.fingerprint import sha256
from ensemble_distill.store.leases import COPYING, SEALING, Leases, lease_storage
from ensemble_distill.store.records import Commit, Manifest
from ensemble_distill.store.store import Store

PATIENCE = 0.5  # seconds; waited only where something was sealed that is not in force, and somebody seems to seal
_NAME = re.compile(r"manifests/([0-9a-f]{64})\.json")


@dataclass(frozen=True)
class Sealed:
    """A manifest, by its digest, and its plan."""

    digest: str
    manifest: Manifest
    plan: Plan

    def comes_after(self, plan: str) -> bool:
        """Whether it is of a plan, by its digest, or of one that has grown out of that."""
        return plan == self.manifest.plan or plan in self.plan.parents


def newest(store: Store) -> Sealed | None:
    """What was sealed last here, whole or not, as far as it is known; None where nothing is.

    Where CURRENT can be read: what it names, or what was appended to that, as plans, keys and contents tell. Where it
    is lost: of all manifests whose keys are those that lie here, if all can be read. Raises Corrupt for a plan that is
    lost, where it may be the newest, and for two manifests of which neither has grown out of the other.
    """
    current = _current(store)
    known = _line(store, current)
    last = max(known, key=_age, default=None)
    same = [sealed for sealed in known if last is not None and sealed.manifest.plan == last.manifest.plan]
    in_force = next((sealed for sealed in same if sealed.digest == current), None)
    return in_force or _last_of(store, same)


def _last_of(store: Store, same: list[Sealed]) -> Sealed | None:
    """Of what was sealed under one plan, as a cache is again after a repair, the last: that whose commits lie here.

    Corrupt where these are as much of one as of another.
    """
    if len(same) < 2:
        return next(iter(same), None)
    found = {sealed.digest: _commits_here(store, sealed) for sealed in same}
    best = [sealed for sealed in same if found[sealed.digest] == max(found.values())]
    if len(best) > 1:
        raise Corrupt(
            f"{store.root}: {best[0].digest} and {best[1].digest} were sealed under one plan, and the commits do not "
            "tell which was last",
            hint="name it in CURRENT; runs that were trained since it was sealed name it in their config.json",
        )
    return best[0]


def _commits_here(store: Store, sealed: Sealed) -> int:
    """How many of its commits lie here as they were sealed; -1 where its pages cannot be read."""
    try:
        commits = Commits(store, sealed.plan, sealed.manifest)
        return sum(_is_here(store, commits.at(number)) for number in range(sealed.plan.units))
    except (Corrupt, Unsafe):
        return -1


def _is_here(store: Store, commit: Commit) -> bool:
    with contextlib.suppress(Corrupt, Unsafe):
        return store.commit(commit.unit) == commit
    return False


def _age(sealed: Sealed) -> int:
    return len(sealed.plan.parents)


def _line(store: Store, current: str | None) -> list[Sealed]:
    """What was sealed at CURRENT and after it; where that is lost, all that was. Each has grown out of another."""
    listed = dict(manifests(store))
    if current is not None:
        listed[current] = _manifest(store, current)  # also where a listing lacks it
    found = {digest: manifest for digest, manifest in listed.items() if manifest is not None}
    if current not in found if current is not None else len(listed) > len(found):
        return []  # one cannot be read: nothing is known to have come after it
    known = [Sealed(digest, m, plan) for digest, m in found.items() if (plan := _plan(store, m.plan)) is not None]
    own = next((sealed for sealed in known if sealed.digest == current), None)
    if current is None:
        known = [sealed for sealed in known if _is_of(store, sealed)]
    elif own is not None:
        known = [sealed for sealed in known if sealed is own or _comes_after(store, own, sealed)]
    line = {digest: m for digest, m in found.items() if current is None or current in _ancestors(found, digest)}
    _refuse_others(store, line | {sealed.digest: sealed.manifest for sealed in known}, known)
    return known


def _comes_after(store: Store, own: Sealed, later: Sealed) -> bool:
    """Whether something was appended to what is in force: more, of the same samples. Corrupt where these say else."""
    problem = None
    if own.manifest.plan not in later.plan.parents:
        return False
    with contextlib.suppress(Corrupt, Unsafe):
        check_grown(store, own.manifest.plan, later.manifest.plan)
        before, after = (Commits(store, sealed.plan, sealed.manifest) for sealed in (own, later))
        if any(commit.keys != after.get(item, own.plan.groups[0]).keys for item, commit in _pages_of_keys(own, before)):
            return False
        units = ((item, group) for item in own.plan.items() for group in own.plan.groups)
        if all(before.get(*unit).content == after.get(*unit).content for unit in units):
            return True
        problem = f"{store.root}: manifest {later.digest} was appended to another capture of what is in force"
    if problem is None:
        return False
    raise Corrupt(problem, hint="name it in CURRENT, if it is what is meant; or move it out of manifests/")


def _refuse_others(store: Store, line: Mapping[str, Manifest], known: list[Sealed]) -> None:
    """Corrupt for what may be newer than the last, or as new."""
    last = max(known, key=_age, default=None)
    kept = {sealed.digest for sealed in known}
    for digest, manifest in line.items():
        if last is not None and last.comes_after(manifest.plan):
            continue
        if digest in kept and last is not None:
            raise Corrupt(
                f"{store.root}: of manifests {last.digest} and {digest} neither has grown out of the other",
                hint="move the manifest that is not of this cache out of its manifests/",
            )
        if _plan(store, manifest.plan) is None:
            raise Corrupt(
                f"{store.root}/plans/{manifest.plan}.json is lost or damaged, of which manifest {digest} is",
                hint="restore it from a copy",
            )


@dataclass(frozen=True)
class Later:
    """What was sealed after the manifest that CURRENT names: the last of it that is whole, if any is."""

    digest: str
    whole: bool


def put_back(store: Store) -> Later | None:
    """What should be in force and is not, for CURRENT was lost or put back; None if all is well, as far as is known.

    Nor where CURRENT moves meanwhile: who seals writes a manifest before.
    """
    current = _current(store)  # first: what is sealed from here on may be listed, and is not in force yet
    line = sorted(_line(store, current), key=_age, reverse=True)
    own = next((_age(sealed) for sealed in line if sealed.digest == current), -1)
    after = [sealed for sealed in line if _age(sealed) > own]
    if not after or not _rests(store, current):
        return None
    for _, same in groupby(after, key=_age):
        if (last := _last_of(store, list(same))) is not None and is_whole(store, last):
            return Later(last.digest, True)
    return None if current is None else Later(after[0].digest, False)


def _rests(store: Store, current: str | None) -> bool:
    """Whether CURRENT stays where it is; where somebody seems to seal, for the time between a manifest and CURRENT."""
    sealing = any(
        item.startswith((f"{SEALING}-", f"{COPYING}-")) for item in Leases(lease_storage(store.storage)).live()
    )
    for _ in range(10 * sealing):
        if _current(store) != current:
            return False
        time.sleep(PATIENCE / 10)
    return _current(store) == current


def is_whole(store: Store, sealed: Sealed) -> bool:
    """Whether its pages are there, its pages of keys as they were, and its shards, as far as sizes tell."""
    with contextlib.suppress(Corrupt, Unsafe):
        commits = Commits(store, sealed.plan, sealed.manifest)
        units = (store.storage.size(f"objects/{c.object}") == c.size for c in map(commits.at, range(sealed.plan.units)))
        return all(units) and all(
            keys_digest(store, item) == commit.keys for item, commit in _pages_of_keys(sealed, commits)
        )
    return False


def _is_of(store: Store, sealed: Sealed) -> bool:
    """Whether the pages of keys that lie here are those of a manifest, as far as they are whole."""
    with contextlib.suppress(Corrupt, Unsafe):
        pages = _pages_of_keys(sealed, Commits(store, sealed.plan, sealed.manifest))
        there = [held == commit.keys for item, commit in pages if (held := keys_digest(store, item)) is not None]
        return all(there) or sum(there) > len(there) / 2  # some may be damaged
    return False


def _pages_of_keys(sealed: Sealed, commits: Commits) -> Iterator[tuple[WorkItem, Commit]]:
    """Each page of keys, by the item of the first view, and a commit that names it."""
    for name, split in sorted(sealed.plan.splits.items()):
        for page in range(split.pages):
            item = WorkItem(name, 0, page, *split.span(page))
            yield item, commits.get(item, sealed.plan.groups[0])


def keys_digest(store: Store, item: WorkItem) -> str | None:
    """The SHA-256 of a page of keys; None for one that is not there, or of another size."""
    held = store.held_keys(item.split, item.page, item.rows)
    return None if held is None else sha256(held.tobytes())


def manifests(store: Store) -> Iterator[tuple[str, Manifest | None]]:
    """All that are listed, by digest; None for one that cannot be read."""
    for name in store.storage.list("manifests"):
        if (match := _NAME.fullmatch(name)) is not None:
            yield match[1], _manifest(store, match[1])


def _manifest(store: Store, digest: str) -> Manifest | None:
    with contextlib.suppress(Corrupt, Unsafe):
        return store.manifest(digest)
    return None


def _ancestors(found: Mapping[str, Manifest], digest: str) -> list[str]:
    """A manifest, that which it was appended to, and so on, as far as appends go."""
    line = [digest]
    while (parent := found[line[-1]].parent) is not None and parent in found and len(line) <= MAX_APPENDS:
        line.append(parent)
    return line


def _current(store: Store) -> str | None:
    with contextlib.suppress(Corrupt):
        return store.current()
    return None


def _plan(store: Store, digest: str) -> Plan | None:
    with contextlib.suppress(Corrupt, Unsafe):
        return store.plan(digest, Plan)
    return None
