"""Garbage: what no plan, no commit and no manifest needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from ensemble_distill.cache.commits import check_plan, held_plan
from ensemble_distill.cache.history import newest
from ensemble_distill.cache.plan import Plan
from ensemble_distill.errors import Mismatch
from ensemble_distill.store.leases import Leases
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.records import Manifest
from ensemble_distill.store.storage import Storage
from ensemble_distill.store.store import Store

FORGOTTEN = 3600
# Where what is named by its content lies.
FOLDERS = ("objects", "pages", "manifests", "plans", "calibrations")


@dataclass(frozen=True)
class Garbage:
    """A name that nothing leads to, and its bytes."""

    name: str
    bytes: int

    @property
    def temporary(self) -> bool:
        """Whether a writer that was killed left it: no other name begins with a dot."""
        return self.name.rpartition("/")[2].startswith(".")


def garbage(store: Store, leases: Leases, older_than: float = 3600) -> list[Garbage]:
    """Objects without a commit, pages and manifests that CURRENT does not lead to, other plans, dead leases, and
    temporaries; in a directory those that are older than ``older_than`` seconds, leases of any age.

    Mismatch while somebody is at work here, since what he has written and not yet committed looks the same.
    """
    refuse_others(store, leases)
    plan = held_plan(store)  # without a plan that can be read nothing here is known to be garbage
    keep = set(_reachable(store, plan))
    names = [name for folder in (*FOLDERS, "leases") for name in store.storage.list(folder) if name not in keep]
    if not isinstance(store.storage, LocalStorage):
        return [Garbage(name, store.storage.size(name) or 0) for name in sorted(names)]
    for folder in ("", "keys", "commits", *FOLDERS, "leases"):
        names += store.storage.temporaries(folder)
    return list(_old(store.storage, sorted(names), store.storage.now() - older_than))


def refuse_others(store: Store, leases: Leases, own: str = "") -> None:
    """Mismatch while somebody is at work here, as leases say; ``own`` is that of the caller."""
    if live := [item for item in leases.live() if item != own and not _is_forgotten(store.storage, f"leases/{item}")]:
        raise Mismatch(
            f"{store.root}: somebody is at work here, on {len(live)} items, {live[0]} for one",
            hint="wait for the capture, the copy or the seal to end, or stop it",
        )


def _is_forgotten(storage: Storage, name: str) -> bool:
    """Whether a lease in a directory was not renewed for an hour, which is done each quarter of a minute.

    It is that of a machine that is gone, and nobody may ever take it over.
    """
    with contextlib.suppress(FileNotFoundError):
        # Either way: where a clock was wrong, it may say that it is renewed in years.
        return (
            isinstance(storage, LocalStorage)
            and abs((storage.path / name).lstat().st_mtime - storage.now()) > FORGOTTEN
        )
    return True


def _old(storage: LocalStorage, names: list[str], before: float) -> Iterator[Garbage]:
    """What was written before a time (seconds since 1970), and leases; what is gone meanwhile is left out."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            found = (storage.path / name).lstat()
            if found.st_mtime <= before or name.startswith("leases/"):
                yield Garbage(name, found.st_size)


def remove(store: Store, found: list[Garbage]) -> None:
    for item in found:
        if item.temporary and isinstance(store.storage, LocalStorage):
            store.storage.remove_temporary(item.name)
        else:
            store.storage.remove(item.name)


def _reachable(store: Store, plan: Plan) -> Iterator[str]:
    """Every name that a reader, a resumed capture or a repair may ask for. Any damage on the way raises Corrupt."""
    held = str(store.plan_digest())
    yield from (f"plans/{known}.json" for known in (held, *plan.parents))
    if plan.capture.calibration is not None:
        yield f"calibrations/{plan.capture.calibration}.json"
    for unit in store.committed():
        commit = store.commit(unit)
        check_plan(commit, plan, held, store.root)
        yield f"objects/{commit.object}"
    current = store.current()
    if current is None and next(store.storage.list("manifests"), None) is not None:
        raise Mismatch(
            f"{store.root} was sealed, and CURRENT is gone: what its manifests need looks like garbage",
            hint="seal or repair it first",
        )
    last = newest(store)
    for digest in {current, None if last is None else last.digest}:  # CURRENT may have been put back
        yield from _of_line(store, digest)


def _of_line(store: Store, digest: str | None) -> Iterator[str]:
    """All that a manifest leads to, and those that it was appended to: these can still be opened; a copy lacks them."""
    while digest is not None:
        manifest = store.manifest(digest)
        yield from _of_manifest(store, digest, manifest)
        there = manifest.parent is not None and store.storage.size(f"manifests/{manifest.parent}.json") is not None
        digest = manifest.parent if there else None


def _of_manifest(store: Store, digest: str, manifest: Manifest) -> Iterator[str]:
    """All that a manifest leads to."""
    sealed = store.plan(manifest.plan, Plan)
    yield f"manifests/{digest}.json"
    yield f"plans/{manifest.plan}.json"
    for n, page in enumerate(manifest.pages):
        yield f"pages/{page}.json"
        for commit in store.page(page, sealed.page_limit(n)).commits:
            yield f"objects/{commit.object}"
