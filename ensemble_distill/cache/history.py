"""History: what was sealed in a place, as its manifests and plans say, and not the pointers, which may be lost or put
back. A plan names all plans that it has grown out of, so of two manifests it can be told which came first.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ensemble_distill.cache.commits import Commits
from ensemble_distill.cache.plan import Plan
from ensemble_distill.errors import Corrupt, Unsafe
from ensemble_distill.fingerprint import KEY_BYTES
from ensemble_distill.store.records import Manifest
from ensemble_distill.store.store import Store

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
    """What was sealed last here; None if nothing was. Of several manifests of one plan that in force, or a whole one.

    Where CURRENT can be read, only what was appended to that counts. Raises Corrupt for a plan that is lost, where it
    may be the newest, and for two manifests of which neither has grown out of the other.
    """
    found, current = dict(manifests(store)), _current(store)
    known = [Sealed(digest, m, plan) for digest, m in found.items() if (plan := _plan(store, m.plan)) is not None]
    base = next((sealed.manifest.plan for sealed in known if sealed.digest == current), None)
    line = [sealed for sealed in known if base is None or sealed.comes_after(base)]
    last = max(line, key=lambda sealed: len(sealed.plan.parents), default=None)
    for digest, manifest in found.items():
        if last is not None and last.comes_after(manifest.plan):
            continue
        if digest == current or manifest.parent in {sealed.digest for sealed in line}:
            raise Corrupt(
                f"{store.root}/plans/{manifest.plan}.json is lost or damaged, of which manifest {digest} is",
                hint="restore it from a copy",
            )
        if last is not None and digest in {sealed.digest for sealed in line}:
            raise Corrupt(
                f"{store.root}: of manifests {last.digest} and {digest} neither has grown out of the other",
                hint="move the manifest that is not of this cache out of its manifests/",
            )
    if last is None:
        return None
    same = [sealed for sealed in line if sealed.manifest.plan == last.manifest.plan]
    in_force = [sealed for sealed in same if sealed.digest == current]
    return next(iter(in_force), None) or next((sealed for sealed in same[1:] if is_whole(store, sealed)), same[0])


def put_back(store: Store) -> Sealed | None:
    """What was sealed after the manifest that CURRENT names, or is whole where CURRENT is lost; None if all is well."""
    last = newest(store)
    if last is None or last.digest == _current(store):
        return None
    return last if _current(store) is not None or is_whole(store, last) else None


def is_whole(store: Store, sealed: Sealed) -> bool:
    """Whether its pages, its shards and its pages of keys are there, as far as sizes tell."""
    with contextlib.suppress(Corrupt, Unsafe):
        commits = map(Commits(store, sealed.plan, sealed.manifest).at, range(sealed.plan.units))
        return all(store.storage.size(f"objects/{commit.object}") == commit.size for commit in commits) and all(
            store.storage.size(f"keys/{item.split}-{item.page:08d}") == item.rows * KEY_BYTES
            for item in sealed.plan.items()
            if item.view == 0
        )
    return False


def manifests(store: Store) -> Iterator[tuple[str, Manifest]]:
    """All that can be read, by digest."""
    for name in store.storage.list("manifests"):
        if (match := _NAME.fullmatch(name)) is not None:
            with contextlib.suppress(Corrupt, Unsafe):
                yield match[1], store.manifest(match[1])


def _current(store: Store) -> str | None:
    with contextlib.suppress(Corrupt):
        return store.current()
    return None


def _plan(store: Store, digest: str) -> Plan | None:
    with contextlib.suppress(Corrupt, Unsafe):
        return store.plan(digest, Plan)
    return None
