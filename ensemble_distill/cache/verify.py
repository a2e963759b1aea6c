"""Every byte of a cache against its hash, and every size against the plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np

from ensemble_distill.cache.commits import Commits, check_layout, check_plan, check_size, held_plan, plan_in_force
from ensemble_distill.cache.groups import Group
from ensemble_distill.cache.growth import check_grown
from ensemble_distill.cache.history import put_back
from ensemble_distill.cache.plan import Calibration, Plan, WorkItem
from ensemble_distill.cache.sums import Sums, contradiction
from ensemble_distill.errors import Corrupt, Error, Unsafe
from ensemble_distill.formats.layout import read_segments, read_tokens
from ensemble_distill.prefetch import prefetch
from ensemble_distill.store import records
from ensemble_distill.store.records import PAGE_UNITS, Commit, Manifest
from ensemble_distill.store.store import Store, unit_of

# What a shard is held against beyond its hashes: its bytes, the commit, the group.
DeepCheck = Callable[[bytes, Commit, Group, str], None]


MOST_DAMAGE = 1000
ABANDON = "ensemble-distill append --cache {root} --abandon"


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong: the sentence, which kind of file, and the unit that it belongs to, if any.

    kind: plan, calibration (that the plan names), manifest (also CURRENT and pages), parent (of the manifest), later
    (what was appended to it), keys,
    commit (gone or wrong), commit copy (it differs from the sealed one), shard, appended (any of a unit that is not
    sealed yet), stray (it lies among the commits and is of no unit), orphan (the same, of a plan that is lost). name:
    of these or a calibration, the file. keys: of a page of keys, the SHA-256 that it was committed with.
    """

    problem: str
    kind: str
    unit: str | None = None
    unsafe: bool = False
    name: str = ""
    keys: str = ""

    def __str__(self) -> str:
        return self.problem


@dataclass
class Verdict:
    """What was looked at, and what is wrong; ``more`` says that the list is full and the search was given up.

    waiting: a manifest that is whole, where CURRENT names none: it is lost, or its writer died before it. appended: how
    many units are committed beyond what is sealed.
    """

    files: int = 0
    bytes: int = 0
    sealed: bool = False
    manifest_digest: str = ""
    waiting: str = ""
    appended: int = 0
    damaged: list[Damage] = field(default_factory=list)
    more: bool = False

    @property
    def ok(self) -> bool:
        return not self.damaged


def verify(
    store: Store,
    report: Callable[[Verdict], None] = lambda verdict: None,
    workers: int = 4,
    limit: int | None = None,
    deep: Sequence[DeepCheck] = (),
    most: int = MOST_DAMAGE,
    trusted: str | None = None,
) -> Verdict:
    """Check plan, manifest, pages, key pages, commits and shards; of an unsealed cache, what is committed so far.

    ``limit`` leaves out the shards of work items beyond the first ``limit`` samples of their split; what is in
    ``deep`` looks inside each shard as well. The search is given up at ``most`` damages. ``trusted`` is the manifest
    that is meant (None: that in force).
    """
    verdict = Verdict()
    for size, damage in prefetch(_checks(store, verdict, limit, deep, trusted), workers):  # hashing releases the lock
        verdict.files += 1
        verdict.bytes += size
        if damage is not None:
            verdict.damaged.append(damage)
        report(verdict)
        if len(verdict.damaged) >= most:
            break
    verdict.more = len(verdict.damaged) >= most
    return verdict


Check = Callable[[], tuple[int, Damage | None]]


def _check(
    kind: str, unit: str | None, look: Callable[[], int], keys: str = "", name: str = ""
) -> tuple[int, Damage | None]:
    try:
        return look(), None
    except Error as error:
        return 0, Damage(str(error), kind, unit, isinstance(error, Unsafe), name, keys)


def _checks(
    store: Store, verdict: Verdict, limit: int | None, deep: Sequence[DeepCheck], trusted: str | None
) -> Iterator[Check]:
    current = trusted
    with contextlib.suppress(Error):  # told by _commits
        current = trusted or store.current()  # once: it may move
    try:
        plan, digest = plan_in_force(store, current)
    except Error as error:
        verdict.damaged.append(Damage(str(error), "plan", None, isinstance(error, Unsafe)))
        return  # nothing else means anything without it
    if (fitted := plan.capture.calibration) is not None:
        look = partial(_calibration, store, fitted)
        yield partial(_check, "calibration", None, look, name=f"calibrations/{fitted}.json")
    keys: dict[tuple[str, int], str] = {}
    own, foreign, sums = 0, [], Sums(plan, store.root)
    for number, commit, problem in _commits(store, verdict, plan, digest, current):
        if commit is None:
            yield partial(lambda problem: (0, problem), problem)
            continue
        try:
            check_plan(commit, plan, digest, store.root)
        except Error as error:
            foreign.append(Damage(str(error), "commit", plan.unit_name(number)))
            continue  # under another plan nothing else means what it says
        own += 1
        item, group = plan.item(number // len(plan.groups)), plan.groups[number % len(plan.groups)]
        unit = item.unit(group)
        try:
            sums.check(item, group, vars(commit))
            sums.add(item, group, vars(commit))
        except Error as error:
            verdict.damaged.append(Damage(str(error), "commit", unit))
            continue
        page = (item.split, item.page)
        first_seen = page not in keys
        if keys.setdefault(page, commit.keys) != commit.keys:
            text = f"{store.root}: unit {unit} belongs to other samples than the units beside it"
            verdict.damaged.append(Damage(text, "commit", unit))
        elif first_seen:
            look = partial(_keys, store, item, commit.keys)
            yield partial(_check, "keys", item.unit(plan.groups[0]), look, commit.keys)
        if verdict.sealed:
            yield partial(_check, "commit copy", unit, partial(_same_commit, store, unit, commit))
        if limit is None or item.first < limit:
            yield partial(_check, "shard", unit, partial(_object, store, commit, group, item, deep))
    if verdict.sealed and sums.units == plan.units:
        yield partial(_check, "manifest", None, partial(_same_sums, store, verdict.manifest_digest, sums))
    if verdict.sealed:
        yield partial(_check, "parent", None, partial(_parents, store, verdict.manifest_digest))
    if trusted is None:
        yield partial(_check, "later", None, partial(_newest, store, verdict))
    yield from _appended(store, plan, keys, deep, verdict)
    # Where most commits are of another plan it is PLAN that was exchanged, and none of them may be dropped.
    verdict.damaged += [replace(one, kind="plan") for one in foreign] if len(foreign) > own else foreign
    verdict.damaged += islice(_strays(store, held_plan(store)), MOST_DAMAGE)


def _commits(
    store: Store, verdict: Verdict, plan: Plan, plan_digest: str, current: str | None
) -> Iterator[tuple[int, Commit | None, Damage | None]]:
    """(number of the unit, its commit or None, what is wrong with it); of a sealed cache from its manifest."""
    try:
        current = current or store.current()
        manifest = store.manifest(current) if current else None
        if manifest is not None and (manifest.units, len(manifest.pages)) != (
            plan.units,
            -(-plan.units // PAGE_UNITS),
        ):
            raise Corrupt(f"{store.root}: its manifest lists {manifest.units} units, its plan {plan.units}")
    except Error as error:
        verdict.damaged.append(Damage(str(error), "manifest", None, isinstance(error, Unsafe)))
        current, manifest = None, None
    if current is not None and manifest is not None:
        verdict.sealed, verdict.manifest_digest = True, current
        if manifest.plan != plan_digest:
            verdict.damaged.append(Damage(f"{store.root}: its manifest is of another plan than PLAN", "manifest"))
        for n, digest in enumerate(manifest.pages):
            first = n * PAGE_UNITS
            try:
                commits = store.page(digest, plan.page_limit(n)).commits
                if len(commits) != min(PAGE_UNITS, plan.units - first):
                    raise Corrupt(f"{store.root}: page {n} of its manifest holds {len(commits)} commits")
            except Error as error:
                verdict.damaged.append(Damage(str(error), "manifest", None, isinstance(error, Unsafe)))
                yield from _own_commits(store, range(first, min(first + PAGE_UNITS, plan.units)), plan)
            else:
                yield from ((first + i, commit, None) for i, commit in enumerate(commits))
        return
    numbers = []
    for unit in store.committed():
        with contextlib.suppress(Error):  # see _strays
            numbers.append(plan.unit_number(unit))
    yield from _own_commits(store, sorted(numbers), plan)


def _strays(store: Store, plan: Plan) -> Iterator[Damage]:
    """What lies among the commits and is of no unit of the plan."""
    for name in store.storage.list("commits"):
        try:
            plan.unit_number(unit_of(name))
        except Error as error:
            kind, problem = "stray", f"{store.root}/{name}: {error}"
            if of_a_larger_plan(store, str(store.plan_digest()), unit_of(name)):
                kind = "plan"
            elif (lost := _plan_that_is_lost(store, unit_of(name))) is not None:
                kind, problem = "orphan", f"{problem}, and plans/{lost}.json, under which it was captured, is not there"
            yield Damage(problem, kind, name=name)


def _plan_that_is_lost(store: Store, unit: str) -> str | None:
    """The plan that a commit names, where that is not there."""
    with contextlib.suppress(Error):
        plan = store.commit(unit).plan
        return plan if store.storage.size(f"plans/{plan}.json") is None else None
    return None


def of_a_larger_plan(store: Store, digest: str, unit: str) -> bool:
    """Whether a unit was committed under a plan that has grown out of this one: then it is PLAN that was put back."""
    with contextlib.suppress(Error):
        return digest in store.plan(store.commit(unit).plan, Plan).parents
    return False


def _own_commits(
    store: Store, numbers: range | list[int], plan: Plan
) -> Iterator[tuple[int, Commit | None, Damage | None]]:
    for number in numbers:
        unit = plan.unit_name(number)
        try:
            yield number, store.commit(unit), None
        except Error as error:
            yield number, None, Damage(str(error), "commit", unit, isinstance(error, Unsafe))


def _same_sums(store: Store, digest: str, sums: Sums) -> int:
    manifest = store.manifest(digest)
    if problem := contradiction(manifest, sums.manifest(manifest.plan, manifest.pages, manifest.parent)):
        raise Corrupt(f"{store.root}: {problem}")
    return 0


def _parents(store: Store, digest: str) -> int:
    """The manifests that this one was appended to, as far as they are there (a copy has none): with their plans and
    pages, what the commits on these add up to, and whether their shards are there, by their sizes."""
    size, parent = 0, store.manifest(digest).parent
    while parent is not None and store.storage.size(f"manifests/{parent}.json") is not None:
        try:
            manifest = store.manifest(parent)
            _sums_of_parent(store, manifest)
        except (Corrupt, Unsafe) as error:
            raise type(error)(
                f"{error}: so the cache cannot be opened as it was before an append (manifests/{parent}.json): restore "
                "this from a copy, or remove that file, and it is given up"
            ) from error
        size += sum(store.storage.size(f"pages/{page}.json") or 0 for page in manifest.pages)
        parent = manifest.parent
    return size


def _sums_of_parent(store: Store, manifest: Manifest) -> None:
    """Corrupt unless its shards are there and its commits add up to what it says."""
    plan = store.plan(manifest.plan, Plan)
    commits, sums = Commits(store, plan, manifest), Sums(plan, store.root)
    for number in range(plan.units):
        (item, group), commit = divmod(number, len(plan.groups)), commits.at(number)
        check_size(store, commit)
        sums.add(plan.item(item), plan.groups[group], vars(commit))
    if problem := contradiction(manifest, sums.manifest(manifest.plan, manifest.pages, manifest.parent)):
        raise Corrupt(f"{store.root}: {problem}")


def _newest(store: Store, verdict: Verdict) -> int:
    """Corrupt where CURRENT was put back, and something else was sealed after what it names."""
    if (later := put_back(store)) is None:
        return 0
    if (current := store.current()) is None:
        verdict.waiting = later.digest
        return 0
    problem = f"CURRENT names {current}, to which something was appended that was sealed as {later.digest}"
    if later.whole:
        raise Corrupt(f"{store.root}: {problem}; `ensemble-distill repair {store.root}` puts it in force")
    way = "append it again, or give it up: " + ABANDON.format(root=store.root)
    raise Corrupt(f"{store.root}: {problem}, and is not whole any more; {way}")


def _appended(
    store: Store, sealed: Plan, keys: Mapping[tuple[str, int], str], deep: Sequence[DeepCheck], verdict: Verdict
) -> Iterator[Check]:
    """What is committed beyond the plan that is sealed, where an append is not finished.

    keys: of the pages that are sealed, the SHA-256.
    """
    held, digest = held_plan(store), str(store.plan_digest())
    if held.parents == sealed.parents:
        return
    yield partial(_check, "plan", None, partial(_grown, store, digest))
    sums = Sums(held, store.root)
    for unit in store.committed():
        with contextlib.suppress(Corrupt):
            held.unit_number(unit)
            if not sealed.has(unit):
                verdict.appended += 1
                yield partial(_check, "appended", unit, partial(_whole, store, held, digest, keys, sums, unit, deep))


def _grown(store: Store, digest: str) -> int:
    """PLAN, where more is being appended: it must have grown out of what is sealed."""
    current = store.current()
    if current is not None:
        check_grown(store, store.manifest(current).plan, digest)
    return 0


def _whole(
    store: Store,
    plan: Plan,
    digest: str,
    keys: Mapping[tuple[str, int], str],
    sums: Sums,
    unit: str,
    deep: Sequence[DeepCheck],
) -> int:
    """A unit's commit, its page of keys and its shard."""
    item, group = plan.locate(unit)
    commit = store.commit(unit)
    check_plan(commit, plan, digest, store.root)
    sums.check(item, group, vars(commit))
    if keys.get((item.split, item.page), commit.keys) != commit.keys:
        raise Corrupt(f"{store.root}: unit {unit} belongs to other samples than the sealed units beside it")
    return _keys(store, item, commit.keys) + _object(store, commit, group, item, deep)


def _calibration(store: Store, digest: str) -> int:
    return len(records.dump(store.calibration(digest, Calibration)))


def _keys(store: Store, item: WorkItem, digest: str) -> int:
    return store.keys(item.split, item.page, digest, item.rows).nbytes


def _same_commit(store: Store, unit: str, sealed: Commit) -> int:
    if store.commit(unit) != sealed:
        raise Corrupt(f"{store.root}/commits/{unit}.json: not the commit that was sealed")
    return 0


def _object(store: Store, commit: Commit, group: Group, item: WorkItem, deep: Sequence[DeepCheck]) -> int:
    check_layout(commit, group, item, store.root)
    data = store.object(commit)
    if deep:
        held = np.frombuffer(data, np.uint8)
        rows = read_segments(held, commit.rows, group.dtype, commit.segments)
        tokens = None if group.token is None else read_tokens(held, group.token, commit.segments)
        if records.content_hash(rows, tokens) != commit.content:
            raise Corrupt(f"{store.root}: unit {commit.unit}: its content is not what its commit says")
        for look in deep:
            look(data, commit, group, f"{store.root}/objects/{commit.object} (unit {commit.unit})")
    return len(data)
