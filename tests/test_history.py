"""What was sealed here is read from manifests and plans: pointers that are lost or put back lose nothing."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, load_module
from small import a_plan, file_of, keys_of, put_item, rows_of

from ensemble_distill.cache.abandon import abandon
from ensemble_distill.cache.collect import garbage
from ensemble_distill.cache.copy import copy
from ensemble_distill.cache.history import newest, put_back
from ensemble_distill.cache.plan import Plan, Split
from ensemble_distill.cache.repair import Mended, repair
from ensemble_distill.cache.verify import verify
from ensemble_distill.errors import Corrupt, Mismatch
from ensemble_distill.recording.capture import Recorder
from ensemble_distill.recording.planning import prepare
from ensemble_distill.recording.seal import remake, seal
from ensemble_distill.store import records
from ensemble_distill.store.leases import CAPTURING, SEALING, Leases, at_work, lease_storage
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.store import Store, open_store


def a_store(path: Path) -> Store:
    return Store(LocalStorage(path, sync=False))


def put(store: Store, plan: Plan, *, part: int | None = None) -> str:
    """Commit the items of a plan that are not there (the first ``part`` of them); its digest."""
    digest = store.put_plan(plan, plan.parents[-1] if plan.parents else None)
    lacking = (item for item in plan.items() if not store.is_committed(item.unit(plan.groups[0])))
    for item in itertools.islice(lacking, part):
        put_item(store, plan, digest, item)
    return digest


def larger(store: Store, plan: Plan, rows: int, views: int = 2) -> Plan:
    """The plan with more rows, or views, appended."""
    before = plan.splits["train"]
    cuts = (*before.cuts, before.rows) if rows > before.rows else before.cuts
    split = Split(rows=rows, views=views, unit_rows=4, labels=None, cuts=cuts)
    digest = str(store.plan_digest())
    return plan.model_copy(update={"splits": {"train": split}, "parents": (*plan.parents, digest)})


@pytest.fixture
def grown(tmp_path: Path) -> tuple[Store, list[tuple[str, str]]]:
    """A store to which was appended twice, and what PLAN and CURRENT named each time."""
    store, plan, pointers = a_store(tmp_path / "c"), a_plan(), []
    for rows in (12, 16, 20):
        plan = plan if rows == 12 else larger(store, plan, rows)
        digest = put(store, plan)
        pointers.append((digest, seal(plan, digest, store)))
    return store, pointers


def point(store: Store, **names: str | None) -> None:
    for name, digest in names.items():
        store.storage.remove(name)
        if digest is not None:
            store.storage.create(name, f"{digest}\n".encode())


def mend(store: Store) -> Mended:
    return repair(store, lambda: verify(store))


def names(store: Store) -> set[str]:
    folders = ("commits", "objects", "keys", "manifests", "pages", "plans")
    return {name for folder in folders for name in store.storage.list(folder)}


def no_leases(store: Store) -> Leases:
    return Leases(lease_storage(store.storage))


# Put back, or lost ----------------------------------------------------------------------------------


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("plan", [0, 1, 2, None])
def test_pointers_that_were_put_back_are_moved_to_what_was_sealed_last(
    grown: tuple[Store, list[tuple[str, str]]], current: int, plan: int | None
) -> None:
    store, pointers = grown
    there = names(store)
    point(store, CURRENT=pointers[current][1], PLAN=None if plan is None else pointers[plan][0])
    if plan is not None:
        assert any(f"was sealed as {pointers[2][1]}" in str(damage) for damage in verify(store).damaged)
        with pytest.raises((Mismatch, Corrupt)):
            abandon(store)
    if plan == 2:
        assert not garbage(store, no_leases(store), older_than=-60)
    mend(store)
    assert (store.plan_digest(), store.current()) == pointers[2] and names(store) == there
    assert verify(store).ok


@pytest.mark.parametrize("lost", ["train-v000000-00000001.targets", ""])
def test_commits_that_are_lost_with_current_are_put_back(grown: tuple[Store, list[tuple[str, str]]], lost: str) -> None:
    """One, or all of them."""
    store, pointers = grown
    there = names(store)
    point(store, CURRENT=None)
    for unit in [unit for unit in store.committed() if unit.startswith(lost)]:
        store.storage.remove(f"commits/{unit}.json")
    assert verify(store).waiting == pointers[2][1]
    mend(store)
    assert names(store) == there and store.current() == pointers[2][1] and verify(store).ok


@pytest.mark.parametrize("given_up", [False, True])
def test_what_was_sealed_last_and_is_not_whole_is_appended_again_or_given_up(
    grown: tuple[Store, list[tuple[str, str]]], given_up: bool
) -> None:
    """CURRENT was put back to what is whole, which stays in force."""
    store, pointers = grown
    plan = store.plan(pointers[2][0], Plan)
    unit = plan.unit_name(plan.units - 1)
    store.storage.remove(f"objects/{store.commit(unit).object}")
    point(store, CURRENT=pointers[1][1], PLAN=pointers[1][0])
    assert any("is not whole any more; append it again, or give it up" in str(d) for d in verify(store).damaged)
    mended = mend(store)
    assert len(mended.left) == 1 and store.current() == pointers[1][1]
    if given_up:
        abandon(store)
        assert (store.plan_digest(), store.current()) == pointers[1] and verify(store).ok
        return
    store.storage.remove(f"commits/{unit}.json")
    put_item(store, plan, put(store, plan), plan.locate(unit)[0])
    seal(plan, pointers[2][0], store)
    assert store.plan_digest() == pointers[2][0] and verify(store).ok


@pytest.mark.parametrize("name", ["CURRENT", "manifest"])
def test_of_two_plans_that_were_appended_under_the_one_that_has_grown_most_is_put_back(
    grown: tuple[Store, list[tuple[str, str]]], name: str
) -> None:
    """PLAN was put back to the first, and a digit of CURRENT is wrong, or the manifest that it names is lost."""
    store, pointers = grown
    point(store, PLAN=pointers[0][0], CURRENT="0" * 64 if name == "CURRENT" else pointers[2][1])
    if name == "manifest":
        store.storage.remove(f"manifests/{pointers[2][1]}.json")
        assert remake(store)  # of a plan that PLAN does not lead to
    mend(store)
    assert store.plan_digest() == pointers[2][0]
    if name == "CURRENT":
        assert store.current() is None  # it is sealed again, by `repair` of the command line
        seal(store.plan(pointers[2][0], Plan), pointers[2][0], store)
    assert store.current() == pointers[2][1] and verify(store).ok


@pytest.fixture
def twice(tmp_path: Path) -> tuple[Store, list[str], str]:
    """A store that was sealed, and again after a unit was captured anew, with other bits; both seals, and that unit."""
    store, plan = a_store(tmp_path / "c"), a_plan()
    digest = put(store, plan)
    first, unit = seal(plan, digest, store), plan.unit_name(1)
    item, group = plan.locate(unit)
    keys, rows = store.commit(unit).keys, rows_of(plan, item, group)
    rows[group.fields[0].name] += 1
    for name in (f"commits/{unit}.json", "CURRENT"):
        store.storage.remove(name)
    store.put_unit(digest, unit, rows, plan.format, keys, None, {"by": "", "time": "2027"})
    return store, [first, seal(plan, digest, store)], unit


@pytest.mark.parametrize("older_first", [False, True])
def test_of_two_seals_of_one_plan_that_of_the_commits_is_the_last(
    twice: tuple[Store, list[str], str], monkeypatch: pytest.MonkeyPatch, older_first: bool
) -> None:
    store, seals, _ = twice
    there = {name: store.storage.read(name) for name in store.storage.list("commits")}
    point(store, CURRENT=None)
    order = [f"manifests/{digest}.json" for digest in (seals if older_first else reversed(seals))]
    listed = store.storage.list
    monkeypatch.setattr(store.storage, "list", lambda name: iter(order) if name == "manifests" else listed(name))
    assert verify(store).waiting == seals[1]
    mend(store)
    assert store.current() == seals[1] and verify(store).ok
    assert {name: store.storage.read(name) for name in store.storage.list("commits")} == there


def test_of_two_seals_of_one_plan_none_is_guessed_where_the_commits_do_not_tell(
    twice: tuple[Store, list[str], str],
) -> None:
    store, _, unit = twice
    point(store, CURRENT=None)
    store.storage.remove(f"commits/{unit}.json")
    with pytest.raises(Corrupt, match="do not tell which was last"):
        mend(store)


def test_a_last_seal_that_is_not_whole_is_not_exchanged_for_the_one_before(twice: tuple[Store, list[str], str]) -> None:
    store, _, unit = twice
    point(store, CURRENT=None)
    store.storage.remove(f"objects/{store.commit(unit).object}")
    mended = mend(store)
    assert mended.dropped == [unit] and store.current() is None


class Sealing(LocalStorage):
    """Whose CURRENT moves when it was read a few times: somebody seals just now."""

    reads, to = 0, ""

    def read(self, name: str, at_most: int = 1 << 20) -> bytes:
        if name == "CURRENT":
            self.reads += 1
            if self.reads == 5:
                self.replace("CURRENT", f"{self.to}\n".encode())
        return super().read(name, at_most)


def test_one_that_seals_just_now_has_put_nothing_back(grown: tuple[Store, list[tuple[str, str]]]) -> None:
    store, pointers = grown
    point(store, CURRENT=pointers[1][1])
    storage = Sealing(store.storage.path, sync=False)  # type: ignore[attr-defined]
    storage.to = pointers[2][1]
    with at_work(store.storage, SEALING):
        assert put_back(Store(storage)) is None and storage.reads >= 5
    assert put_back(store) is None and store.current() == pointers[2][1]


def test_a_seal_that_ended_between_two_looks_has_put_nothing_back(
    grown: tuple[Store, list[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, pointers = grown
    point(store, CURRENT=pointers[1][1])

    def ended(leases: Leases) -> list[str]:
        point(store, CURRENT=pointers[2][1])
        return []

    monkeypatch.setattr(Leases, "live", ended)
    assert put_back(store) is None


def test_a_lease_that_a_dead_sealer_left_hides_nothing(grown: tuple[Store, list[tuple[str, str]]]) -> None:
    store, pointers = grown
    point(store, CURRENT=pointers[1][1])
    with at_work(store.storage, SEALING):
        later = put_back(store)
    assert later is not None and later.digest == pointers[2][1]


@pytest.mark.parametrize(
    "lie",
    [
        {"reading": {"temperature_after": 2.0}},
        {"capture": {"precision": "bf16"}},
        {"format": "parquet"},
        {},
    ],
)
def test_a_plan_that_is_no_growth_of_what_is_sealed_is_not_sealed(tmp_path: Path, lie: dict[str, Any]) -> None:
    """PLAN names one that somebody forged, of the same units, or of more, with other temperatures."""
    store, base = a_store(tmp_path), a_plan()
    digest = put(store, base)
    current = seal(base, digest, store)
    for plan in (base.model_copy(update={"parents": (digest,)}), larger(store, base, 12, views=3)):
        if not lie and plan.units > base.units:
            continue
        changed = {n: getattr(plan, n).model_copy(update=v) if isinstance(v, dict) else v for n, v in lie.items()}
        forged = plan.model_copy(update=changed)
        point(store, PLAN=digest)
        named = put(store, forged)
        assert any("is no growth of" in str(damage) for damage in verify(store).damaged)
        with pytest.raises(Corrupt, match="is no growth of"):
            seal(forged, named, store)
        assert store.current() == current
        for unit in [unit for unit in store.committed() if not base.has(unit)]:
            store.storage.remove(f"commits/{unit}.json")
        assert "PLAN" in mend(store).restored and store.plan_digest() == digest and verify(store).ok


def test_a_copy_knows_what_its_plan_has_grown_out_of(
    grown: tuple[Store, list[tuple[str, str]]], tmp_path: Path
) -> None:
    store, pointers = grown
    target = a_store(tmp_path / "t")
    copy(store, target)
    assert {f"plans/{plan}.json" for plan, _ in pointers} == set(target.storage.list("plans"))
    assert not garbage(target, no_leases(target), older_than=-60) and verify(target).ok


def test_what_was_put_back_is_not_copied(grown: tuple[Store, list[tuple[str, str]]], tmp_path: Path) -> None:
    store, pointers = grown
    point(store, CURRENT=pointers[1][1])
    with pytest.raises(Corrupt, match="was sealed since"):
        copy(store, a_store(tmp_path / "t"))
    assert copy(store, a_store(tmp_path / "t"), trusted=pointers[1][1]).sealed == pointers[1][1]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("rows", [16, 20])  # with units of the same names as those that are sealed, and with others
def test_a_plan_that_was_given_up_is_not_the_plan(tmp_path: Path, rows: int, back: bool) -> None:
    """PLAN comes from an older copy, of an append that was abandoned before another one was sealed."""
    store, base = a_store(tmp_path), a_plan()
    first = seal(base, put(store, base), store)
    given_up = put(store, larger(store, base, 12, views=3), part=1)
    abandon(store)
    plan = larger(store, base, rows)
    digest = put(store, plan)
    current, there = seal(plan, digest, store), names(store)
    point(store, PLAN=given_up, CURRENT=first if back else current)
    assert not verify(store).ok
    mend(store)
    assert (store.plan_digest(), store.current()) == (digest, current) and names(store) == there


def test_what_a_repair_took_out_of_force_waits_for_what_it_dropped(grown: tuple[Store, list[tuple[str, str]]]) -> None:
    store, pointers = grown
    shard = store.commit("train-v000000-00000001.targets").object
    whole = store.storage.read(f"objects/{shard}")
    store.storage.replace(f"objects/{shard}", whole[:-1])
    assert mend(store).dropped and store.current() is None
    assert verify(store).ok and not verify(store).waiting
    mend(store)
    assert store.current() is None
    store.storage.create(f"objects/{shard}", whole)  # from a copy
    assert verify(store).waiting == pointers[2][1]
    mend(store)
    assert (store.plan_digest(), store.current()) == pointers[2] and verify(store).ok


def test_of_a_plan_that_is_lost_nothing_is_dropped(grown: tuple[Store, list[tuple[str, str]]]) -> None:
    """PLAN and plans/ come from a copy of before the last append."""
    store, pointers = grown
    there = names(store) - {f"plans/{pointers[2][0]}.json"}
    point(store, PLAN=pointers[1][0])
    store.storage.remove(f"plans/{pointers[2][0]}.json")
    for current in (pointers[2][1], pointers[1][1]):
        point(store, CURRENT=current)
        with pytest.raises(Corrupt, match=f"plans/{pointers[2][0]}.json is lost or damaged, of which manifest"):
            mend(store)
        assert names(store) == there


def test_of_two_that_have_grown_apart_none_is_chosen(
    grown: tuple[Store, list[tuple[str, str]]], tmp_path: Path
) -> None:
    store, pointers = grown
    other, base = a_store(tmp_path / "other"), a_plan()
    assert seal(base, put(other, base), other) == pointers[0][1]
    plan = larger(other, base, 12, views=3)
    seal(plan, put(other, plan), other)
    for name in names(other) - names(store):
        if not name.startswith("commits/"):
            store.storage.create(name, other.storage.read(name))
    assert getattr(newest(store), "digest", None) == pointers[2][1], "CURRENT says which"
    point(store, CURRENT=pointers[0][1])
    with pytest.raises(Corrupt, match="neither has grown out of the other"):
        newest(store)


def test_nothing_is_known_to_come_after_a_manifest_that_cannot_be_read(
    grown: tuple[Store, list[tuple[str, str]]],
) -> None:
    """Its commits tell what it was; with one of them lost, too, what was appended to is not put in its place."""
    store, pointers = grown
    plan, current = store.plan(pointers[2][0], Plan), pointers[2][1]
    body = store.storage.read(f"manifests/{current}.json")
    store.storage.replace(f"manifests/{current}.json", body[:-1])
    unit = plan.unit_name(plan.units - 1)
    commit = store.storage.read(f"commits/{unit}.json")
    store.storage.remove(f"commits/{unit}.json")
    assert not any("was sealed as" in str(damage) for damage in verify(store).damaged)
    for _ in range(2):
        mend(store)
        assert store.current() is None and store.plan_digest() == pointers[2][0] and not verify(store).waiting
    store.storage.create(f"commits/{unit}.json", commit)
    assert seal(plan, pointers[2][0], store) == current


def test_a_manifest_is_made_again_whichever_capture_it_was_appended_to(tmp_path: Path) -> None:
    """Where what was appended to had been repaired, and sealed again, before."""
    store, base = a_store(tmp_path), a_plan()
    digest = put(store, base)
    for by in ("a", "b"):
        for item in base.items():
            for group in base.groups:
                store.storage.remove(f"commits/{item.unit(group)}.json")
            put_item(store, base, digest, item, by)
        store.storage.remove("CURRENT")
        seal(base, digest, store)
    plan = larger(store, base, 16)
    current = seal(plan, put(store, plan), store)
    name = f"manifests/{current}.json"
    whole = store.storage.read(name)
    store.storage.replace(name, b"{}")
    assert remake(store) and store.storage.read(name) == whole


class Behind(LocalStorage):
    """Whose listing lacks the newest manifest, as that of a bucket may."""

    hidden = ""

    def list(self, folder: str) -> Iterator[str]:
        yield from (name for name in super().list(folder) if self.hidden not in name or not self.hidden)


def test_a_listing_that_is_behind_puts_nothing_back(grown: tuple[Store, list[tuple[str, str]]]) -> None:
    _, pointers = grown
    storage = Behind(grown[0].storage.path, sync=False)  # type: ignore[attr-defined]
    storage.hidden = pointers[2][1]
    store = Store(storage)
    assert verify(store).ok and getattr(newest(store), "digest", None) == pointers[2][1]
    assert not mend(store).restored and store.current() == pointers[2][1]


def twin(path: Path) -> tuple[Store, str]:
    """A cache of the same plans, of other samples, to which was appended."""
    store, base = a_store(path), a_plan()
    for plan in (base, None):
        plan = plan or larger(store, base, 16)
        digest = store.put_plan(plan, plan.parents[-1] if plan.parents else None)
        for item in plan.items():
            keys = store.put_keys(item.split, item.page, 255 - keys_of(item))
            for group in plan.groups:
                rows = rows_of(plan, item, group)
                store.put_unit(digest, item.unit(group), rows, plan.format, keys, None, {})
        current = seal(plan, digest, store)
    return store, current


def test_a_forged_manifest_that_names_the_one_in_force_is_not_put_there(tmp_path: Path) -> None:
    store, base = a_store(tmp_path / "c"), a_plan()
    digest = put(store, base)
    current = seal(base, digest, store)
    colder = base.reading.model_copy(update={"temperature_after": 0.5})
    forged = records.dump(base.model_copy(update={"parents": (digest,), "reading": colder}))
    store.storage.create(f"plans/{records.sha256(forged)}.json", forged)
    lie = {"plan": records.sha256(forged), "parent": current}
    manifest = records.dump(store.manifest(current).model_copy(update=lie))
    store.storage.create(f"manifests/{records.sha256(manifest)}.json", manifest)
    assert verify(store).ok and not mend(store).restored and store.current() == current


@pytest.mark.parametrize("broken", ["", "plan", "chain"])
def test_what_was_appended_is_known_without_a_link_of_the_chain(
    grown: tuple[Store, list[tuple[str, str]]], broken: str
) -> None:
    """The manifest between is not there, as in a copy onto an older copy, or its plan; or it was of another capture."""
    store, pointers = grown
    store.storage.remove(f"manifests/{pointers[1][1]}.json")
    if broken == "plan":
        store.storage.remove(f"plans/{pointers[1][0]}.json")
    if broken == "chain":
        body = store.manifest(pointers[2][1]).model_copy(update={"parent": "0" * 64})
        store.storage.remove(f"manifests/{pointers[2][1]}.json")
        pointers[2] = (pointers[2][0], store.put_manifest(body, pointers[2][1]))
    point(store, CURRENT=pointers[0][1])
    with pytest.raises(Mismatch, match="was sealed as"):
        abandon(store)
    mend(store)
    assert (store.plan_digest(), store.current()) == pointers[2]


def test_what_was_appended_to_another_capture_is_asked_for(tmp_path: Path) -> None:
    store, base = a_store(tmp_path), a_plan()
    first = seal(base, put(store, base), store)
    unit = "train-v000000-00000001.targets"
    commit = forged(store, base, unit).model_copy(update={"content": "1" * 64})
    store.storage.replace(f"commits/{unit}.json", records.seal(commit))
    store.storage.remove("CURRENT")
    seal(base, str(store.plan_digest()), store)
    plan = larger(store, base, 16)
    seal(plan, put(store, plan), store)
    point(store, CURRENT=first)
    assert any("was appended to another capture of what is in force" in str(d) for d in verify(store).damaged)
    with pytest.raises(Corrupt, match="was appended to another capture"):
        mend(store)


def test_of_what_is_lost_with_current_the_rest_is_put_back(grown: tuple[Store, list[tuple[str, str]]]) -> None:
    """All commits, and one shard."""
    store, pointers = grown
    keys = set(store.storage.list("keys"))
    plan, unit = store.plan(pointers[2][0], Plan), "train-v000000-00000001.targets"
    store.storage.remove(f"objects/{store.commit(unit).object}")
    point(store, CURRENT=None)
    for name in list(store.storage.list("commits")):
        store.storage.remove(name)
    assert mend(store).missing == 1 and set(store.storage.list("keys")) == keys
    put_item(store, plan, pointers[2][0], plan.locate(unit)[0])
    seal(plan, pointers[2][0], store)
    assert verify(store).ok


def test_what_is_whole_is_not_given_up_for_what_the_cache_in_force_lacks(
    grown: tuple[Store, list[tuple[str, str]]],
) -> None:
    store, pointers = grown
    store.storage.remove(f"objects/{store.commit('train-v000000-00000001.targets').object}")
    point(store, CURRENT=pointers[1][1])
    with pytest.raises(Corrupt, match="what is in force is not whole itself"):
        abandon(store)


@pytest.mark.parametrize("lost", [False, True])
def test_files_of_another_cache_of_the_same_plan_are_not_put_in_force(tmp_path: Path, lost: bool) -> None:
    """All of a twin was copied beside what is there, but for what has the same name."""
    store, base = a_store(tmp_path / "c"), a_plan()
    current = seal(base, put(store, base), store)
    other, _ = twin(tmp_path / "twin")
    there = {name: store.storage.read(name, 1 << 20) for name in names(store)}
    for name in names(other) - set(there):
        if not name.startswith(("commits/", "keys/")):
            store.storage.create(name, other.storage.read(name, 1 << 20))
    if lost:
        store.storage.remove("CURRENT")
        assert verify(store).waiting == current
    else:
        assert verify(store).ok
    mend(store)
    assert store.current() == current and verify(store).ok
    assert {name: store.storage.read(name, 1 << 20) for name in there} == there


def test_a_cache_of_which_manifests_are_left_is_not_begun_anew(cached: Cli) -> None:
    """CURRENT and commits/ are lost, as from a copy that was not complete."""
    cache = cached.folder / "cache"
    current = (cache / "CURRENT").read_text()
    (cache / "CURRENT").unlink()
    shutil.rmtree(cache / "commits")
    assert "batch_size" in cached("cache", "digits.py", "--out", "cache", "--batch-size", "32", code=3).stderr
    cached("repair", "cache")
    assert (cache / "CURRENT").read_text() == current
    cached("verify", "cache")


def test_a_commit_of_a_plan_that_is_lost_is_not_removed(begun: tuple[Store, str]) -> None:
    """PLAN and plans/ come from a copy of before the append, which was not sealed yet."""
    store, current = begun
    held = str(store.plan_digest())
    point(store, PLAN=store.manifest(current).plan)
    plan = store.storage.read(f"plans/{held}.json")
    store.storage.remove(f"plans/{held}.json")
    there = names(store)
    with pytest.raises(Corrupt, match=f"plans/{held}.json, under which it was captured, is not there"):
        mend(store)
    assert names(store) == there and store.current() == current
    store.storage.create(f"plans/{held}.json", plan)
    assert mend(store).restored == ["PLAN"] and store.plan_digest() == held


def test_the_seal_is_not_given_up_for_a_pipeline_that_did_not_make_the_cache(cached: Cli) -> None:
    cache = cached.folder / "cache"
    current = (cache / "CURRENT").read_text()
    (cache / "manifests" / f"{current.strip()}.json").unlink()
    (cache / "commits" / "train-v000000-00000001.targets.json").unlink()
    cached("repair", "cache", "digits.py", "--views", "3", code=3)
    assert (cache / "CURRENT").read_text() == current
    cached("repair", "cache", "digits.py")
    cached("verify", "cache")


# In the middle of an append -------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Store, str]:
    """A sealed store to which something is being appended, and the manifest in force."""
    store, base = a_store(tmp_path / "c"), a_plan()
    current = seal(base, put(store, base), store)
    put(store, larger(store, base, 20), part=1)
    return store, current


@pytest.mark.parametrize("harm", [None, "what is no digest\n"])
def test_a_current_that_is_lost_in_the_middle_of_an_append_is_put_back(
    begun: tuple[Store, str], harm: str | None
) -> None:
    store, current = begun
    store.storage.remove("CURRENT")
    if harm is not None:
        store.storage.create("CURRENT", harm.encode())
    verdict = verify(store)
    assert verdict.waiting == current if harm is None else not verdict.ok
    mend(store)
    assert store.current() == current and verify(store).ok
    abandon(store)
    assert verify(store).sealed


@pytest.mark.parametrize("lost", ["manifests", "pages"])
def test_a_manifest_that_is_damaged_in_the_middle_of_an_append_is_made_again(
    begun: tuple[Store, str], lost: str
) -> None:
    store, current = begun
    (name,) = store.storage.list(lost)
    whole = store.storage.read(name)
    assert not remake(store), "nothing is damaged"
    store.storage.replace(name, whole[:-2])
    assert remake(store) and store.storage.read(name) == whole and store.current() == current
    store.storage.replace(name, whole[:-2])
    unit = "train-v000001-00000000.targets"
    other = store.commit(unit).model_copy(update={"provenance": {"by": "somebody else"}})
    store.storage.replace(f"commits/{unit}.json", records.seal(other))
    assert not remake(store) and store.storage.read(name) != whole, "of other commits it would be another"
    store.storage.remove(f"commits/{unit}.json")
    assert not remake(store), "of all commits"


def test_a_sealed_plan_that_is_lost_in_the_middle_of_an_append_is_named(begun: tuple[Store, str]) -> None:
    store, current = begun
    name = f"plans/{store.manifest(current).plan}.json"
    store.storage.remove(name)
    assert name in str(verify(store).damaged[0])
    with pytest.raises(Corrupt, match=name):
        mend(store)
    assert store.current() == current


def test_nothing_is_appended_to_what_was_put_back(cached: Cli) -> None:
    cache = cached.folder / "cache"
    older = {name: (cache / name).read_bytes() for name in ("CURRENT", "PLAN")}
    cached("append", "digits.py", "--cache", "cache", "--views", "3")
    for name, data in older.items():
        (cache / name).write_bytes(data)
    assert "was sealed since" in cached("append", "digits.py", "--cache", "cache", "--views", "4", code=4).stderr
    cached("repair", "cache")
    cached("append", "digits.py", "--cache", "cache", "--views", "4")


# Two captures of one thing --------------------------------------------------------------------------


def forged(store: Store, plan: Plan, unit: str) -> records.Commit:
    """A commit that says it is of the same content, and names another shard."""
    item, group = plan.locate(unit)
    data, segments = file_of(plan.format, rows_of(plan, item, group)[::-1].copy())
    blocks = records.block_hashes(data)
    name = records.root_hash(blocks) + ".h5"
    store.storage.create(f"objects/{name}", data)
    return store.commit(unit).model_copy(
        update={"object": name, "blocks": blocks, "size": len(data), "segments": segments}
    )


def test_a_commit_of_the_sealed_content_that_names_another_shard_is_not_sealed(
    grown: tuple[Store, list[tuple[str, str]]],
) -> None:
    store, pointers = grown
    plan, unit = store.plan(pointers[2][0], Plan), "train-v000000-00000001.targets"
    store.storage.replace(f"commits/{unit}.json", records.seal(forged(store, plan, unit)))
    with pytest.raises(Corrupt, match=f"{unit}.json: not the commit that was sealed"):
        seal(plan, pointers[2][0], store)
    assert mend(store).restored == [f"commits/{unit}.json"] and verify(store).ok


def test_of_two_copies_to_one_place_at_once_the_later_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, target, plan = a_store(tmp_path / "1"), a_store(tmp_path / "2"), a_store(tmp_path / "t"), a_plan()
    for store, by in ((one, "a"), (other, "b")):
        digest = store.put_plan(plan)
        for item in plan.items():
            put_item(store, plan, digest, item, by)
        seal(plan, digest, store)
    copy(one, target)
    monkeypatch.setattr("ensemble_distill.cache.copy._held", lambda *_: np.zeros(plan.units, bool))  # as it was before
    with pytest.raises(Mismatch, match="holds another capture of the same plan"):
        copy(other, target)
    assert copy(one, target).sealed == one.current()


def test_a_copy_that_was_killed_before_there_was_a_plan_goes_on(tmp_path: Path) -> None:
    for folder in ("leases", "plans"):
        (tmp_path / "c" / folder).mkdir(parents=True)
    (tmp_path / "c" / "leases" / "copy-0123456789abcdef").write_text("{}")
    open_store(tmp_path / "c", create=True)


# Several at once ------------------------------------------------------------------------------------


def test_whether_a_lease_is_forgotten_is_told_by_the_clock_of_the_folder(
    begun: tuple[Store, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = begun
    with at_work(store.storage, CAPTURING):
        now = time.time
        monkeypatch.setattr("time.time", lambda: now() + 7200)
        with pytest.raises(Mismatch, match="somebody is at work here"):
            garbage(store, no_leases(store))


Planned = tuple[Plan, Any]


@pytest.fixture
def pipeline(teachers: Path) -> ModuleType:
    return load_module(teachers / "digits.py")


@pytest.fixture
def planned(pipeline: ModuleType, tmp_path: Path) -> Callable[..., Planned]:
    def plan(store: Store, **changed: object) -> Planned:
        data, config = pipeline.data(), pipeline.cache().model_copy(update=changed)
        return prepare(data, config, data.sources, store, Leases(store.storage), [torch.device("cpu")])

    return plan


def test_a_plan_under_which_somebody_captures_is_not_dropped(planned: Callable[..., Planned], tmp_path: Path) -> None:
    store = open_store(tmp_path / "c", create=True)
    plan, _ = planned(store)
    digest = store.put_plan(plan)
    with at_work(store.storage, CAPTURING), pytest.raises(Mismatch, match="batch_size"):
        planned(store, batch_size=32)
    assert store.plan_digest() == digest
    planned(store, batch_size=32)
    assert store.plan_digest() is None


@pytest.mark.parametrize("other", [False, True])
def test_a_plan_that_is_dropped_as_a_capture_begins_is_made_again(
    planned: Callable[..., Planned],
    pipeline: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: bool,
) -> None:
    """Unless another one was made in its place."""
    store = open_store(tmp_path / "c", create=True)
    plan, ensemble = planned(store)
    leases = Leases(store.storage)
    seen = iter([["plan-0123456789abcdef"]])

    def live() -> list[str]:
        """Another looks at the plan, and drops it."""
        if found := next(seen, []):
            store.drop_plan(str(store.plan_digest()))
            if other:
                store.put_plan(planned(store, batch_size=32)[0])
        return found

    monkeypatch.setattr(leases, "live", live)
    recorder = Recorder(plan, ensemble, pipeline.data().sources, store, leases)
    if other:
        with pytest.raises(Mismatch, match="its plan has changed meanwhile"):
            recorder.run()
        assert not list(store.committed())
    else:
        assert recorder.run() == store.current() and verify(store).ok
