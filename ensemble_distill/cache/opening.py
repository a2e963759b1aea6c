"""Opening a cache for reading: what is sealed, or what there is."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ensemble_distill.cache.cache import Cache
from ensemble_distill.cache.commits import Commits, committed_units, held_plan, missing
from ensemble_distill.cache.partial import LooseCommits, part_digest, usable, whole
from ensemble_distill.cache.plan import Plan
from ensemble_distill.errors import Mismatch
from ensemble_distill.store.caching import CachedStorage
from ensemble_distill.store.store import Store, open_store, trust

COPIES_SIZE = 10_000_000_000


def open_cache(
    path: str | Path,
    *,
    memory: int | None = None,
    expect_digest: str | None = None,
    copies: str | Path | None = None,
    copies_size: int = COPIES_SIZE,
    allow_partial: bool = False,
    manifest: str | None = None,
) -> Cache:
    """Open a cache for reading: a directory, or a bucket (s3://…, gs://…).

    ``memory``: bytes of rows to keep at most (default: a quarter of the machine's). ``expect_digest``: the
    manifest digest that you trust; Mismatch if the cache has another one. ``copies``: a folder for copies of what
    is read from a bucket, at most ``copies_size`` bytes, which processes may share. ``allow_partial``: open what is
    committed of a cache that is not complete. ``manifest``: the digest of one that was in force before, such as that of
    a cache before something was appended to it. Raises UsageError (no directory), Mismatch (no cache, or not complete),
    Corrupt (bytes that are not what was committed).
    """
    store = open_store(path)
    if copies is not None:
        store = Store(CachedStorage(store.storage, copies, copies_size))
    memory = memory or _quarter_of_memory()
    digest = trust(store, expect_digest) if manifest is None else _earlier(store, manifest, expect_digest)
    if digest is None:
        return _open_part(store, memory, allow_partial)
    sealed = store.manifest(digest)
    plan = store.plan(sealed.plan, Plan)
    commits = Commits(store, plan, sealed)
    return Cache(store, plan, commits, whole(plan), memory, digest=digest, content_digest=sealed.content_digest)


def _earlier(store: Store, manifest: str, expected: str | None) -> str:
    """The digest of a manifest that the caller names, which need not be in force."""
    if not re.fullmatch("[0-9a-f]{64}", manifest) or store.storage.size(f"manifests/{manifest}.json") is None:
        raise Mismatch(f"{store.root} holds no manifest {manifest[:64]!r}", hint="`inspect` shows the digest in force")
    if expected not in (None, manifest):
        raise Mismatch(
            f"{store.root}: manifest {manifest} is opened, and {expected} is expected",
            hint="expect the digest that --manifest names, or that the run was trained from",
        )
    return manifest


def _open_part(store: Store, memory: int, allowed: bool) -> Cache:
    """What is committed of a cache that is not sealed; Mismatch unless that is ``allowed`` and there is something."""
    plan = held_plan(store)
    done = committed_units(store, plan)
    parts = usable(plan, done)
    if not allowed or not parts:
        raise Mismatch(
            f"{store.root} is not complete: {done.sum()}/{plan.units} units committed{missing(plan, done)}",
            hint="run the same `ensemble-distill cache` command again: it goes on where it stopped",
        )
    commits = LooseCommits(store, plan, str(store.plan_digest()))
    return Cache(store, plan, commits, parts, memory, digest="", content_digest=part_digest(plan, parts, commits))


def _quarter_of_memory() -> int:
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES")) // 4
