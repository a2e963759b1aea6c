"""Abandon: give up what is being appended to a sealed cache, so that it is as it was sealed, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ensemble_distill.cache.collect import refuse_others
from ensemble_distill.cache.commits import held_plan
from ensemble_distill.cache.history import Sealed, is_whole, put_back
from ensemble_distill.cache.plan import Plan
from ensemble_distill.cache.verify import of_a_larger_plan
from ensemble_distill.errors import Corrupt, Mismatch
from ensemble_distill.store.leases import Leases, at_work, lease_storage
from ensemble_distill.store.store import MEND, Store

_KEYS = re.compile(r"keys/(\w+)-([0-9]{8,15})", re.ASCII)


def abandon(store: Store) -> list[str]:
    """Drop the units that are no units of the sealed plan, and make that the plan again; the names of these units.

    Commits go first, then pages of keys, then PLAN is moved: whenever this dies, what is there is an append that has
    begun, and can be gone on with or abandoned. Shards and the plan are left to ``gc``. Raises Mismatch where nothing
    is sealed, or others are at work; Corrupt where PLAN is not of what is sealed.
    """
    with at_work(store.storage, "abandon") as lease:
        leases = Leases(lease_storage(store.storage))
        current, digest, sealed = _sealed(store)
        if (later := put_back(store)) and later.whole:
            raise Mismatch(
                f"{store.root}: what was appended is complete, and was sealed as {later.digest}",
                hint=f"put that in force: ensemble-distill repair {store.root}",
            )
        if later and not is_whole(store, Sealed(current, store.manifest(current), sealed)):
            raise Corrupt(f"{store.root}: what is in force is not whole itself", hint=MEND)
        held = str(store.plan_digest())
        units = list(_beyond(store, digest, sealed))
        refuse_others(store, leases, lease)
        if store.current() != current:
            raise _moved(store)
        for unit in units:
            store.storage.remove(f"commits/{unit}.json")
        for name in list(_keys_beyond(store, sealed)):
            store.storage.remove(name)
        refuse_others(store, leases, lease)
        if store.current() != current or not store.storage.swap("PLAN", f"{held}\n".encode(), f"{digest}\n".encode()):
            raise _moved(store)
        while (later := put_back(store)) is not None and not later.whole:
            store.storage.remove(f"manifests/{later.digest}.json")  # what it lists is not there any more
    return units


def _moved(store: Store) -> Mismatch:
    return Mismatch(f"{store.root} was changed by somebody else meanwhile", hint="run the same command again")


def _sealed(store: Store) -> tuple[str, str, Plan]:
    """The manifest in force, its plan's digest, and the plan, of which PLAN's is one or has grown out of it."""
    current = store.current()
    if current is None:
        raise Mismatch(
            f"{store.root} is not sealed: there is nothing to go back to",
            hint="finish it with `ensemble-distill cache` or `append`, or remove the directory",
        )
    digest = store.manifest(current).plan
    sealed, held = store.plan(digest, Plan), held_plan(store)
    if store.plan_digest() != digest and digest not in held.parents:
        raise Corrupt(f"{store.root}: PLAN has not grown out of the plan that is sealed", hint=MEND)
    return current, digest, sealed


def _beyond(store: Store, digest: str, sealed: Plan) -> Iterator[str]:
    """The committed units of the plan that is being appended under, as far as they are none of the sealed one.

    Where PLAN is the sealed one, those of any plan that has grown out of it: of a writer that had not noticed.
    """
    held = held_plan(store)
    for unit in store.committed():
        if not sealed.has(unit) and (held.has(unit) or of_a_larger_plan(store, digest, unit)):
            yield unit


def _keys_beyond(store: Store, sealed: Plan) -> Iterator[str]:
    """The pages of keys that the sealed plan has not: other samples may be appended in their place."""
    for name in store.storage.list("keys"):
        if (match := _KEYS.fullmatch(name)) is None:
            continue
        split = sealed.splits.get(match[1])
        if split is None or int(match[2]) >= split.pages:
            yield name
