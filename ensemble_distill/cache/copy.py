"""Copy a cache from one place to another: resumable, every byte checked on the way, sealed last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ensemble_distill.cache.commits import Commits, check_layout, check_plan, committed_units, plan_in_force
from ensemble_distill.cache.history import put_back
from ensemble_distill.cache.plan import Calibration
from ensemble_distill.errors import Corrupt, Interrupted, Mismatch, Unsafe
from ensemble_distill.fingerprint import KEY_BYTES, sha256
from ensemble_distill.prefetch import prefetch
from ensemble_distill.store import records
from ensemble_distill.store.leases import COPYING, at_work
from ensemble_distill.store.records import Commit, Manifest
from ensemble_distill.store.store import MEND, Store


@dataclass
class Copied:
    """How far a copy is. sealed: the manifest's digest, once the whole cache is there."""

    units: int = 0
    units_total: int = 0
    bytes: int = 0
    sealed: str | None = None


def copy(
    source: Store,
    target: Store,
    report: Callable[[Copied], None] = lambda copied: None,
    stop: Callable[[], float | None] = lambda: None,
    workers: int = 4,
    span: range | None = None,
    trusted: str | None = None,
) -> Copied:
    """Copy the units of ``span`` (or all) that the target lacks, by the protocol that captures use.

    trusted: the manifest to copy (None: that in force). Raises Mismatch if the target holds another cache, or other
    commits of the same plan; Corrupt if a byte of the source is not what was committed (the units before it are there
    and stay); Interrupted when ``stop`` says so.
    """
    origin = _Origin(source, trusted)
    parent = target.current()  # first: whatever is sealed from here on may know more than this
    there = _held(origin, target, workers)
    with at_work(target.storage, COPYING):
        if (calibration := origin.plan.capture.calibration) is not None:
            target.put_calibration(source.calibration(calibration, Calibration))
        for earlier in origin.plan.parents:  # by which a plan is known to have grown out of another
            _plan_of_before(source, target, earlier)
        held = target.plan_digest()  # a copy from before something was appended becomes one with it
        if target.put_plan(origin.plan, held if held in origin.plan.parents else None) != origin.digest:
            raise _other_plan(source, target)
        wanted = [int(n) for n in (origin.units() & ~there).nonzero()[0] if span is None or int(n) in span]
        copied = Copied(units=int(there.sum()), units_total=origin.plan.units)
        report(copied)
        for size in prefetch((partial(_unit, origin, target, number) for number in wanted), workers):
            copied.units += 1
            copied.bytes += size
            report(copied)
            if stop() is not None:
                done = f"{copied.units}/{copied.units_total} units copied"
                raise Interrupted(done, hint="run the same command to go on")
        if origin.manifest is not None and committed_units(target, origin.plan).all():
            copied.sealed = _seal(origin, origin.manifest, target, parent)
    return copied


def _plan_of_before(source: Store, target: Store, digest: str) -> None:
    """Copy a plan that the one in force has grown out of, if it is there and whole."""
    with contextlib.suppress(Corrupt, Unsafe):
        data = source.storage.read(f"plans/{digest}.json", records.MAX_PLAN)
        if sha256(data) == digest:
            target.storage.create(f"plans/{digest}.json", data)


class _Origin:
    """What is copied: the plan, and the commits, which have to be the sealed ones where there is a seal."""

    def __init__(self, store: Store, trusted: str | None) -> None:
        self.store = store
        current = trusted or store.current()
        self.plan, self.digest = plan_in_force(store, current)
        if trusted is None and (later := put_back(store)) is not None and later.whole and current is not None:
            raise Corrupt(f"{store.root}: CURRENT names {current}, and {later.digest} was sealed since", hint=MEND)
        self.manifest = store.manifest(current) if current is not None else None
        if self.manifest is not None and self.manifest.plan != self.digest:
            raise Corrupt(f"{store.root}: its manifest is of another plan than PLAN")
        self._sealed = Commits(store, self.plan, self.manifest) if self.manifest is not None else None

    def units(self) -> np.ndarray:
        """Which units there are, bool [units]; of a sealed cache all have to be there."""
        # More may be there where something is being appended.
        return committed_units(self.store, self.plan) if self._sealed is None else np.ones(self.plan.units, bool)

    def commit(self, number: int) -> Commit:
        """The commit of a unit; Corrupt if it is of another plan or not the sealed one."""
        unit = self.plan.unit_name(number)
        commit = self.store.commit(unit)
        check_plan(commit, self.plan, self.digest, self.store.root)
        if self._sealed is not None and self._sealed.at(number) != commit:
            raise Corrupt(f"{self.store.root}/commits/{unit}.json: not the commit that was sealed")
        return commit


def _other_capture(source: Store, target: Store, unit: str) -> Mismatch:
    return Mismatch(
        f"{target.root} holds another capture of the same plan than {source.root}: unit {unit} differs",
        hint="copy into an empty or a new directory",
    )


def _other_plan(source: Store, target: Store) -> Mismatch:
    return Mismatch(
        f"{target.root} holds another cache than {source.root}: their plans differ",
        hint="copy into an empty or a new directory",
    )


def _held(origin: _Origin, target: Store, workers: int) -> np.ndarray:
    """The units that the target has already, whole as far as sizes tell, bool [units]; nothing is written.

    Mismatch if one of them is another than the source's.
    """
    plan = origin.plan
    if (digest := target.plan_digest()) is None:
        return np.zeros(plan.units, bool)
    if digest != origin.digest and digest not in plan.parents:
        raise _other_plan(origin.store, target)
    held = committed_units(target, plan)
    both = [int(n) for n in (held & origin.units()).nonzero()[0]]
    held[both] = list(prefetch((partial(_is_whole, origin, target, number) for number in both), workers))
    return held


def _is_whole(origin: _Origin, target: Store, number: int) -> bool:
    """Whether a unit's shard and page of keys are there, by their sizes; Mismatch unless its commit is the source's."""
    unit = origin.plan.unit_name(number)
    commit = target.commit(unit)
    if commit != origin.commit(number):
        raise _other_capture(origin.store, target, unit)
    item, _ = origin.plan.locate(unit)
    keys = target.storage.size(f"keys/{item.split}-{item.page:08d}") == item.rows * KEY_BYTES
    return keys and target.storage.size(f"objects/{commit.object}") == commit.size


def _unit(origin: _Origin, target: Store, number: int) -> int:
    """Key page, shard, commit: in this order, as when they were captured."""
    item, group = origin.plan.locate(origin.plan.unit_name(number))
    source, commit = origin.store, origin.commit(number)
    check_layout(commit, group, item, source.root)
    target.put_keys(item.split, item.page, source.keys(item.split, item.page, commit.keys, item.rows))
    unit = item.unit(group)
    if not target.put_copy(unit, commit, source.object(commit)) and target.commit(unit) != commit:
        raise _other_capture(source, target, unit)  # of somebody else who copies to the same place
    return commit.size


def _seal(origin: _Origin, manifest: Manifest, target: Store, parent: str | None) -> str:
    """The same manifest, so that the copy has the same digest, which it returns."""
    for n, name in enumerate(manifest.pages):
        page = origin.store.page(name, origin.plan.page_limit(n))
        target.put_page([records.dump(commit) for commit in page.commits])
    return target.put_manifest(manifest, parent)
