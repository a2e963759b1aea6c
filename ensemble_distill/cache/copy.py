"""Copy a cache from one place to another: resumable, every byte checked on the way, sealed last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ensemble_distill.cache.commits import Commits, check_layout, check_plan, committed_units, plan_in_force
from ensemble_distill.cache.plan import Calibration, Plan
from ensemble_distill.errors import Corrupt, Interrupted, Mismatch
from ensemble_distill.prefetch import prefetch
from ensemble_distill.store import records
from ensemble_distill.store.records import PAGE_UNITS
from ensemble_distill.store.store import Store


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
) -> Copied:
    """Copy the units of ``span`` (or all) that the target lacks, by the protocol that captures use.

    Raises Mismatch if the target holds another cache, Corrupt if a byte of the source is not what was committed
    (the units before it are there and stay), Interrupted when ``stop`` says so.
    """
    plan, digest = plan_in_force(source)
    if plan.capture.calibration is not None:
        target.put_calibration(source.calibration(plan.capture.calibration, Calibration))
    if target.put_plan(plan) != digest:
        raise Mismatch(
            f"{target.root} holds another cache than {source.root}: their plans differ",
            hint="copy into an empty or a new directory",
        )
    current = source.current()
    sealed = Commits(source, plan, source.manifest(current)) if current is not None else None
    if current is not None and source.manifest(current).plan != digest:
        raise Corrupt(f"{source.root}: its manifest is of another plan than PLAN")
    # Of a sealed cache all units have to be there, and more may be where some are being appended.
    here = committed_units(source, plan) if sealed is None else np.ones(plan.units, bool)
    there = committed_units(target, plan)
    wanted = [int(n) for n in (here & ~there).nonzero()[0] if span is None or int(n) in span]
    copied = Copied(units=int(there.sum()), units_total=plan.units)
    report(copied)
    for size in prefetch((partial(_unit, source, target, plan, digest, sealed, number) for number in wanted), workers):
        copied.units += 1
        copied.bytes += size
        report(copied)
        if stop() is not None:
            raise Interrupted(f"{copied.units}/{copied.units_total} units copied", hint="run the same command to go on")
    if current is not None and committed_units(target, plan).all():
        _seal(source, target, plan, current)
        copied.sealed = current
    return copied


def _unit(source: Store, target: Store, plan: Plan, digest: str, sealed: Commits | None, number: int) -> int:
    """Key page, shard, commit: in this order, as when they were captured."""
    item, group = plan.locate(plan.unit_name(number))
    unit = item.unit(group)
    commit = source.commit(unit)
    check_plan(commit, plan, digest, source.root)
    if sealed is not None and sealed.at(number) != commit:
        raise Corrupt(f"{source.root}/commits/{unit}.json: not the commit that was sealed")
    check_layout(commit, group, item, source.root)
    target.put_keys(item.split, item.page, source.keys(item.split, item.page, commit.keys, item.rows))
    target.put_copy(unit, commit, source.object(commit))
    return commit.size


def _seal(source: Store, target: Store, plan: Plan, digest: str) -> None:
    """The same manifest, so that the copy has the same digest."""
    manifest = source.manifest(digest)

    for name in manifest.pages:
        target.put_page([records.dump(commit) for commit in source.page(name, plan.page_bytes(PAGE_UNITS)).commits])
    target.put_manifest(manifest)
