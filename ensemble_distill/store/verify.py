"""Every byte of a cache against its hash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from ensemble_distill.errors import Corrupt, Error
from ensemble_distill.fingerprint import sha256
from ensemble_distill.store.records import Commit
from ensemble_distill.store.store import Store, page_of


@dataclass
class Verdict:
    """What was looked at, and what is wrong: one sentence for each damaged or missing file."""

    files: int = 0
    bytes: int = 0
    sealed: bool = False
    manifest_digest: str = ""
    damaged: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.damaged


def verify(
    store: Store,
    report: Callable[[Verdict], None] = lambda verdict: None,
    workers: int = 4,
    within: Callable[[str], bool] = lambda unit: True,
) -> Verdict:
    """Check plan, manifest, pages, key pages and shards; of an unsealed cache, what is committed so far.

    ``within`` says of a unit whether its shard is to be checked.
    """
    verdict = Verdict()
    checks = _checks(store, verdict, within)
    with ThreadPoolExecutor(workers) as pool:  # hashing releases the interpreter's lock
        for size, problem in pool.map(_run, checks):
            verdict.files += 1
            verdict.bytes += size
            if problem:
                verdict.damaged.append(problem)
            report(verdict)
    return verdict


Check = Callable[[], int]


def _run(check: Check) -> tuple[int, str]:
    try:
        return check(), ""
    except Error as error:
        return 0, str(error)


def _checks(store: Store, verdict: Verdict, within: Callable[[str], bool]) -> Iterator[Check]:
    for digest in store.plans():
        yield partial(_plan, store, digest)
    try:
        current = store.current()
        manifest = store.manifest(current) if current else None
    except Error as error:
        verdict.damaged.append(str(error))
        current, manifest = None, None
    if current is None or manifest is None:
        for unit in sorted(store.committed()):
            yield partial(_unit, store, unit, within)
        return
    verdict.sealed, verdict.manifest_digest = True, current
    for split, digests in manifest.keys.items():
        for page, digest in enumerate(digests):
            yield partial(_keys, store, split, page, digest)
    for i in range(len(manifest.pages)):
        try:
            commits = store.page(current, manifest, i).commits
        except Error as error:
            verdict.damaged.append(str(error))
            continue
        for commit in commits:
            if within(commit.unit):
                yield partial(_object, store, commit)
            yield partial(_commit, store, commit)


def _plan(store: Store, digest: str) -> int:
    data = store.storage.read(f"plans/{digest}.json")
    if sha256(data) != digest:
        raise Corrupt(f"{store.root}/plans/{digest}.json: not the plan that was written")
    return len(data)


def _keys(store: Store, split: str, page: int, digest: str) -> int:
    return store.keys(split, page, digest).nbytes


def _object(store: Store, commit: Commit) -> int:
    return len(store.object(commit))


def _commit(store: Store, sealed: Commit) -> int:
    if store.commit(sealed.unit) != sealed:
        raise Corrupt(f"{store.root}/commits/{sealed.unit}.json: not the commit that was sealed")
    return 0


def _unit(store: Store, unit: str, within: Callable[[str], bool]) -> int:
    commit = store.commit(unit)
    store.keys(*page_of(unit), commit.keys)
    if not within(unit):
        return 0
    return len(store.object(commit))
