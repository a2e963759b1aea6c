"""Garbage: what no plan, no commit and no manifest needs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ensemble_distill.cache.commits import check_plan, held_plan
from ensemble_distill.cache.plan import Plan
from ensemble_distill.errors import Mismatch
from ensemble_distill.store.leases import Leases
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.records import PAGE_UNITS
from ensemble_distill.store.store import Store


@dataclass(frozen=True)
class Garbage:
    """A name that nothing leads to, and its bytes."""

    name: str
    bytes: int


def garbage(store: Store, leases: Leases, older_than: float = 3600) -> list[Garbage]:
    """Objects without a commit, pages and manifests that CURRENT does not lead to, other plans, dead leases,
    temporaries older than ``older_than`` seconds.

    Mismatch while somebody is at work here, since what he has written and not yet committed looks the same.
    """
    if live := leases.live():
        raise Mismatch(
            f"{store.root}: {len(live)} work items are being captured, {live[0]} for one",
            hint="wait for the capture to end, or stop it",
        )
    plan = held_plan(store)  # without a plan that can be read nothing here is known to be garbage
    keep = set(_reachable(store, plan))
    names = [
        name
        for folder in ("objects", "pages", "manifests", "plans", "calibrations", "leases")
        for name in store.storage.list(folder)
        if name not in keep
    ]
    found = [Garbage(name, store.storage.size(name) or 0) for name in sorted(names)]
    if isinstance(store.storage, LocalStorage):
        root, now = store.storage.path, time.time()
        for path in store.storage.temporaries():
            if now - path.stat().st_mtime >= older_than:
                found.append(Garbage(str(path.relative_to(root)), path.stat().st_size))
    return found


def remove(store: Store, found: list[Garbage]) -> None:
    for item in found:
        if item.name.endswith(".part") and isinstance(store.storage, LocalStorage):
            (store.storage.path / item.name).unlink(missing_ok=True)
        else:
            store.storage.remove(item.name)


def _reachable(store: Store, plan: Plan) -> Iterator[str]:
    """Every name that a reader, a resumed capture or a repair may ask for. Any damage on the way raises Corrupt."""
    digest = str(store.plan_digest())
    yield from (f"plans/{known}.json" for known in (digest, *plan.parents))
    if plan.capture.calibration is not None:
        yield f"calibrations/{plan.capture.calibration}.json"
    for unit in store.committed():
        commit = store.commit(unit)
        check_plan(commit, plan, digest, store.root)
        yield f"objects/{commit.object}"
    current = store.current()
    if current is None and next(store.storage.list("manifests"), None) is not None:
        raise Mismatch(
            f"{store.root} was sealed, and CURRENT is gone: what its manifests need looks like garbage",
            hint="seal or repair it first",
        )
    while current is not None and store.storage.size(f"manifests/{current}.json") is not None:
        manifest = store.manifest(current)
        sealed = store.plan(manifest.plan, Plan)
        yield f"manifests/{current}.json"
        yield f"plans/{manifest.plan}.json"
        for page in manifest.pages:
            yield f"pages/{page}.json"
            for commit in store.page(page, sealed.page_bytes(PAGE_UNITS)).commits:
                yield f"objects/{commit.object}"
        current = manifest.parent  # what it was appended to can still be opened; a copy may lack it
