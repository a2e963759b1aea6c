"""Seal: the manifest of a complete store, written page by page, in memory that does not grow with the units."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any

import numpy as np
from pydantic_core import from_json

from ensemble_distill.cache.commits import check_sealed, committed_units, missing
from ensemble_distill.cache.groups import Group
from ensemble_distill.cache.growth import check_grown
from ensemble_distill.cache.history import Sealed, is_whole, manifests
from ensemble_distill.cache.plan import Plan, WorkItem
from ensemble_distill.cache.sums import Sums
from ensemble_distill.errors import Corrupt, Mismatch, Unsafe
from ensemble_distill.fingerprint import sha256
from ensemble_distill.prefetch import prefetch
from ensemble_distill.store import records
from ensemble_distill.store.leases import SEALING, at_work
from ensemble_distill.store.records import PAGE_UNITS, Commit, Manifest
from ensemble_distill.store.store import Store

READERS = 4


def seal(plan: Plan, plan_digest: str, store: Store, done: np.ndarray | None = None) -> str:
    """Write the manifest and put it in force; its digest. Mismatch if units are missing, Corrupt if one is wrong.

    Mismatch, too, if somebody else sealed meanwhile: what was read here may be older than what they read.

    done: which units are committed, bool [units], where the caller knows it.
    """
    with at_work(store.storage, SEALING):  # what is written and not yet in force must not be taken for garbage
        return _seal(plan, plan_digest, store, done)


def _seal(plan: Plan, plan_digest: str, store: Store, done: np.ndarray | None) -> str:
    parent = store.current()  # first: whatever is sealed from here on may know more than this
    if store.plan_digest() != plan_digest:
        raise Mismatch(f"{store.root}: its plan has changed meanwhile", hint="run the same command again")
    if parent is not None and store.storage.size(f"manifests/{parent}.json") is not None:
        check_sealed(store, parent)
        check_grown(store, store.manifest(parent).plan, plan_digest)
    done = committed_units(store, plan) if done is None else done
    if not done.all():
        raise Mismatch(
            f"{store.root} is not complete: {done.sum()}/{plan.units} units committed{missing(plan, done)}",
            hint="run `ensemble-distill cache` for them: it goes on where it stopped",
        )
    sealing = _Sealing(plan, plan_digest, store, _grown_from(plan, plan_digest, store, parent))
    for part in _commits(plan, store):
        sealing.add(part)
    return store.put_manifest(sealing.manifest(), parent)


def remake(store: Store) -> bool:
    """Write the manifest in force again, with its pages, where it cannot be read and its commits are all as they were.

    Whether it was: what is sealed is a pure function of the commits, so it has the digest that CURRENT names.
    """
    with contextlib.suppress(Corrupt, Unsafe, Mismatch):
        if (current := store.current()) is None or _is_readable(store, current):
            return False
        for digest, plan in _plans(store):
            if all(map(store.is_committed, (item.unit(group) for item in plan.items() for group in plan.groups))):
                sealing = _Sealing(plan, digest, store, None)
                for part in _commits(plan, store):
                    sealing.add(part)
                made = sealing.manifest()
                for parent in (None, *(name for name, m in manifests(store) if m and m.plan in plan.parents[-1:])):
                    data = records.dump(made.model_copy(update={"parent": parent}))
                    if sha256(data) == current:
                        store.storage.replace(f"manifests/{current}.json", data)
                        return True
    return False


def _plans(store: Store) -> Iterator[tuple[str, Plan]]:
    """The plans that lie here, as far as they can be read, by digest; those that have grown most first."""
    found = []
    for name in store.storage.list("plans"):
        digest = name.removeprefix("plans/").removesuffix(".json")
        with contextlib.suppress(Corrupt, Unsafe, Mismatch):
            found.append((digest, store.plan(digest, Plan)))
    yield from sorted(found, key=lambda one: len(one[1].parents), reverse=True)


def _is_readable(store: Store, digest: str) -> bool:
    """Whether a manifest and its pages are whole, by their hashes."""
    with contextlib.suppress(Corrupt, Unsafe):
        manifest = store.manifest(digest)
        plan = store.plan(manifest.plan, Plan)
        return all(
            sha256(store.storage.read(f"pages/{page}.json", plan.page_limit(n))) == page
            for n, page in enumerate(manifest.pages)
        )
    return False


def _grown_from(plan: Plan, digest: str, store: Store, current: str | None) -> str | None:
    """The digest of the manifest that this cache was appended to, if it was.

    That which an earlier seal of this plan named, or that in force; a repair may have taken it out of force.
    """
    if not plan.parents:
        return None
    found = {name: manifest for name, manifest in manifests(store) if manifest is not None}
    again = [manifest.parent for manifest in found.values() if manifest.plan == digest and manifest.parent is not None]
    before = [name for name, manifest in found.items() if manifest.plan == plan.parents[-1]]
    if again or current in before or not before:
        return next(iter([*again, *(name for name in before if name == current)]), None)
    base = store.plan(plan.parents[-1], Plan)
    whole = (name for name in before[1:] if is_whole(store, Sealed(name, found[name], base)))
    return next(whole, before[0])


@dataclass(frozen=True)
class _Read:
    """A unit and the commit that was read for it."""

    item: WorkItem
    group: Group
    unit: str
    body: bytes


class _Sealing:
    """What the commits add up to, part by part, in the order of the units."""

    def __init__(self, plan: Plan, plan_digest: str, store: Store, parent: str | None) -> None:
        self._plan, self._digest, self._store, self._parent = plan, plan_digest, store, parent
        # The SHA-256 of each key page, 32 bytes: there may be half a million. Zeros: not seen yet.
        self._keys = {name: np.zeros(split.pages, "V32") for name, split in plan.splits.items()}
        self._sums = Sums(plan, store.root)
        self._pages: list[str] = []
        self._bodies: list[bytes] = []

    def add(self, part: list[_Read]) -> None:
        for read in part:
            commit = _said(read.body, read.unit, self._store.root)
            if commit["plan"] != self._digest and commit["plan"] not in self._plan.parents:
                raise Corrupt(f"{self._store.root}: unit {read.unit} was captured under another plan")
            self._one_page(read, bytes.fromhex(commit["keys"]))
            self._sums.add(read.item, read.group, commit)
            self._bodies.append(read.body)
            if len(self._bodies) == PAGE_UNITS:
                self._flush()

    def manifest(self) -> Manifest:
        """The manifest, whose pages are written; a damaged key page is found before it is sealed."""
        self._flush()
        for split, digests in self._keys.items():
            for page, digest in enumerate(digests):
                first, last = self._plan.splits[split].span(page)
                self._store.keys(split, page, digest.tobytes().hex(), last - first)
        return self._sums.manifest(self._digest, tuple(self._pages), self._parent)

    def _one_page(self, read: _Read, digest: bytes) -> None:
        """Units of the same samples name the same page of keys."""
        pages, page = self._keys[read.item.split], read.item.page
        if not any(held := pages[page].tobytes()):
            pages[page] = np.void(digest)
        elif held != digest:
            raise Corrupt(f"{self._store.root}: unit {read.unit} belongs to other samples than the units beside it")

    def _flush(self) -> None:
        if self._bodies:
            self._pages.append(self._store.put_page(self._bodies))
            self._bodies = []


def _commits(plan: Plan, store: Store) -> Iterator[list[_Read]]:
    """Each unit's commit, in the order of the units, by parts."""
    units = ((item, group, item.unit(group)) for item in plan.items() for group in plan.groups)

    def read(part: list[tuple[WorkItem, Group, str]]) -> list[_Read]:
        return [_Read(item, group, unit, store.commit_body(unit)) for item, group, unit in part]

    parts = iter(lambda: list(itertools.islice(units, 256)), [])
    return prefetch((partial(read, part) for part in parts), READERS)


_FIELDS = Commit.model_fields.keys()
_KINDS = (("size", int), ("provenance", dict), ("statistics", (dict, NoneType)), ("keys", str), ("content", str))


def _said(body: bytes, unit: str, root: str) -> dict[str, Any]:
    """What a commit says, in a fifth of the time of its full validation, which readers of the manifest do."""
    try:
        commit: dict[str, Any] = from_json(body, allow_inf_nan=False)
        if commit["unit"] != unit:
            raise Corrupt(f"{root}/commits/{unit}.json: it commits unit {str(commit['unit'])[:200]}")
        if commit.keys() != _FIELDS:
            raise ValueError(f"its fields are {', '.join(commit)[:200]}")
        for name, kinds in _KINDS:
            if not isinstance(commit[name], kinds):
                raise ValueError(f"its {name} is a {type(commit[name]).__name__}")
        if len(bytes.fromhex(commit["keys"])) != 32:
            raise ValueError("its keys are no SHA-256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"{root}/commits/{unit}.json: not the record that was written ({error})") from error
    return commit
