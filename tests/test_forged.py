"""What somebody tried who knew the formats: forged commits, manifests, statistics and rows, under right hashes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import flip
from faulty import Killed
from pydantic import ValidationError
from small import a_plan, keys_of, put_item, rows_of

from ensemble_distill.cache.collect import garbage, remove
from ensemble_distill.cache.copy import Copied, copy
from ensemble_distill.cache.decoded import Decoder
from ensemble_distill.cache.groups import Group
from ensemble_distill.cache.join import KeyTable
from ensemble_distill.cache.opening import open_cache
from ensemble_distill.cache.plan import Plan
from ensemble_distill.cache.repair import repair
from ensemble_distill.cache.sums import Sums
from ensemble_distill.cache.verify import verify
from ensemble_distill.codec import Dense, Members, PartnerKey, RowFigures, TopK
from ensemble_distill.errors import Corrupt, InvalidOutput, Mismatch, StorageError, Unsafe, UsageError
from ensemble_distill.evaluation.evaluate import evaluate
from ensemble_distill.fingerprint import canonical_json
from ensemble_distill.provenance import MAX_PROVENANCE, provenance
from ensemble_distill.recording.seal import seal
from ensemble_distill.sources.arrays import ArraySource
from ensemble_distill.store import records
from ensemble_distill.store.caching import CachedStorage
from ensemble_distill.store.leases import Leases, lease_storage
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.store import Store, trust
from ensemble_distill.tally import BINS, Tally

FIRST = "train-v000000-00000000.targets"
SECOND = "train-v000000-00000001.targets"
THIRD = "train-v000000-00000002.targets"


def complete(root: Path, plan: Plan | None = None, by: str = "") -> tuple[Plan, str, Store]:
    """A small cache whose units are all there, not sealed."""
    plan, store = plan or a_plan(), Store(LocalStorage(root, sync=False))
    digest = store.put_plan(plan)
    for item in plan.items():
        put_item(store, plan, digest, item, by)
    return plan, digest, store


def sealed(root: Path, plan: Plan | None = None, by: str = "") -> Store:
    plan, digest, store = complete(root, plan, by)
    seal(plan, digest, store)
    return store


def forge(store: Store, unit: str, **lies: Any) -> None:
    """Another commit of a unit, under a right hash."""
    body = json.loads(store.commit_body(unit)) | lies
    store.storage.replace(f"commits/{unit}.json", records.sealed(canonical_json(body)))


def mend(store: Store, most: int = 1000) -> Any:
    return repair(store, lambda: verify(store, most=most))


# Repair ---------------------------------------------------------------------------------------------


def test_a_forged_commit_is_not_taken_for_the_sealed_one_by_a_repair_that_failed_before(tmp_path: Path) -> None:
    store = sealed(tmp_path)
    current, true = store.current(), store.commit(SECOND)
    forge(store, SECOND, provenance={"by": "a stranger"})
    (tmp_path / f"commits/{FIRST}.json").unlink()
    (tmp_path / f"commits/{FIRST}.json").mkdir()
    flip(tmp_path / "objects" / store.commit(THIRD).object)
    for _ in range(2):
        with pytest.raises(StorageError, match=f"1 files could not be mended; .*{FIRST}"):
            mend(store)
        assert store.commit(SECOND) == true, "the others are mended"
        assert store.current() == current, "the seal stays while a commit is not what was sealed"
    (tmp_path / f"commits/{FIRST}.json").rmdir()
    assert mend(store).dropped == [THIRD]


def test_a_forged_commit_of_a_unit_that_is_dropped_is_never_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shard is damaged as well, and the repair dies before it drops the unit."""
    store = sealed(tmp_path)
    true = store.commit(FIRST)
    flip(tmp_path / "objects" / true.object)
    forge(store, FIRST, object=store.commit(SECOND).object, blocks=list(store.commit(SECOND).blocks))

    def killed(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("ensemble_distill.cache.repair._drop_damaged", killed)
        with pytest.raises(Killed):
            mend(store)
    assert store.current() is None and store.commit(FIRST) == true
    assert mend(store).dropped == [FIRST]


def test_commits_of_a_manifest_of_another_plan_are_not_restored(tmp_path: Path) -> None:
    plan, digest, store = complete(tmp_path)
    current = seal(plan, digest, store)
    commits = [json.loads(store.commit_body(plan.unit_name(n))) | {"plan": "0" * 64} for n in range(plan.units)]
    page = store.put_page([canonical_json(commit) for commit in commits])
    store.put_manifest(store.manifest(current).model_copy(update={"plan": "0" * 64, "pages": (page,)}), current)
    before = {name: data for name, data in files(tmp_path).items() if name.startswith("commits/")}
    with pytest.raises(Corrupt, match=r"plans/0{64}\.json is lost or damaged, of which manifest"):
        mend(store)
    assert {name: data for name, data in files(tmp_path).items() if name.startswith("commits/")} == before


def test_a_list_of_damage_that_was_given_up_hides_no_forged_commit(tmp_path: Path) -> None:
    store = sealed(tmp_path)
    units = [a_plan().unit_name(n) for n in range(12)]
    true = {unit: store.commit(unit) for unit in units}
    for unit in units:
        forge(store, unit, provenance={"by": "a stranger"})
    assert len(mend(store, most=2).restored) == 12
    assert {unit: store.commit(unit) for unit in units} == true and store.current() is not None


def test_what_cannot_be_removed_does_not_keep_the_rest_from_being_mended(tmp_path: Path) -> None:
    _, _, store = complete(tmp_path)
    (tmp_path / f"commits/{FIRST}.json").unlink()
    (tmp_path / f"commits/{FIRST}.json").mkdir()
    flip(tmp_path / "objects" / store.commit(SECOND).object)
    with pytest.raises(StorageError, match="1 files could not be mended"):
        mend(store)
    assert not store.is_committed(SECOND)


@pytest.mark.parametrize("name", ["elsewhere-v000000-00000000.targets.json", "notes", f"{FIRST}.json.json"])
def test_strays_among_sealed_commits_are_told_and_removed_and_the_seal_stays(tmp_path: Path, name: str) -> None:
    store = sealed(tmp_path)
    current = store.current()
    (tmp_path / "commits" / name).write_text("x")
    (damage,) = verify(store).damaged
    assert (damage.kind, damage.name) == ("stray", f"commits/{name}")
    assert mend(store).removed == [f"commits/{name}"]
    assert verify(store).ok and store.current() == current


def test_what_is_no_commit_counts_as_none_and_a_repair_of_it_ends(tmp_path: Path) -> None:
    _, _, store = complete(tmp_path)
    (tmp_path / f"commits/{FIRST}.json").rename(tmp_path / f"commits/{FIRST}")
    assert FIRST not in set(store.committed()) and len(list(store.committed())) == 11
    assert mend(store, most=1).removed == [f"commits/{FIRST}"]
    (tmp_path / "commits/folder").mkdir()
    with pytest.raises(StorageError):
        mend(store, most=1)


def test_one_commit_of_another_plan_is_dropped_and_most_of_them_say_that_plan_was_exchanged(tmp_path: Path) -> None:
    plan, _, store = complete(tmp_path)
    forge(store, FIRST, plan="0" * 64)
    (damage,) = verify(store).damaged
    assert (damage.kind, damage.unit) == ("commit", FIRST)
    assert mend(store).dropped == [FIRST] and verify(store).ok
    for n in range(plan.units):
        if n % 2 and store.is_committed(plan.unit_name(n)):
            forge(store, plan.unit_name(n), plan="0" * 64)
    held = set(store.committed())
    with pytest.raises(Corrupt, match=r"another plan .*cannot be mended"):
        mend(store)
    assert set(store.committed()) == held


@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_a_page_of_keys_that_was_damaged_is_written_again_of_the_same_keys_only(tmp_path: Path, harm: Any) -> None:
    """Also where no other unit is left that knows its hash."""
    plan = a_plan(views=1, groups=1)
    store = sealed(tmp_path, plan)
    harm(tmp_path / "keys/train-00000001")
    assert mend(store).dropped == [SECOND]
    item = plan.item(1)
    with pytest.raises(Mismatch, match="the source has changed"):
        store.put_keys("train", 1, keys_of(item) + 1)
    assert mend(store).dropped == []
    with pytest.raises(Corrupt, match="not the keys"):
        store.keys("train", 1, "0" * 64, item.rows)
    put_item(store, plan, str(store.plan_digest()), item)
    seal(plan, str(store.plan_digest()), store)
    assert verify(store).ok


# Copy -----------------------------------------------------------------------------------------------


def other(root: Path) -> Store:
    return Store(LocalStorage(root, sync=False))


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seal_target", [True, False])
def test_a_copy_over_another_capture_of_the_same_plan_is_refused_before_anything_is_written(
    tmp_path: Path, seal_target: bool
) -> None:
    source = sealed(tmp_path / "a", by="one")
    target = sealed(tmp_path / "b", by="another")
    if not seal_target:
        (tmp_path / "b/CURRENT").unlink()
    before = files(tmp_path / "b")
    with pytest.raises(Mismatch, match="holds another capture of the same plan"):
        copy(source, target)
    assert files(tmp_path / "b") == before


def test_a_copy_over_another_plan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, target = sealed(tmp_path / "a"), sealed(tmp_path / "b", a_plan("parquet"))
    before = files(tmp_path / "b")
    with pytest.raises(Mismatch, match="holds another cache"):
        copy(source, target)
    assert files(tmp_path / "b") == before


def test_a_copy_replaces_a_shard_that_its_target_has_lost(tmp_path: Path) -> None:
    source, target = sealed(tmp_path / "a"), other(tmp_path / "b")
    copy(source, target)
    for unit, data in ((FIRST, None), (SECOND, b"short")):
        path = tmp_path / "b/objects" / target.commit(unit).object
        path.unlink()
        if data is not None:
            path.write_bytes(data)
    again = copy(source, target)
    assert again.units == again.units_total == 12 and again.bytes > 0
    assert verify(target).ok and again.sealed == source.current()


def test_a_copy_does_not_overwrite_what_was_sealed_in_its_target_meanwhile(tmp_path: Path) -> None:
    source, target = sealed(tmp_path / "a"), other(tmp_path / "b")

    def overtaken(copied: Copied) -> None:
        (tmp_path / "b/CURRENT").write_text("a" * 64 + "\n")

    with pytest.raises(Mismatch, match="meanwhile"):
        copy(source, target, overtaken)
    assert target.current() == "a" * 64


def test_a_manifest_of_another_plan_is_not_copied(tmp_path: Path) -> None:
    source = sealed(tmp_path / "a")
    current = source.current()
    source.put_manifest(source.manifest(str(current)).model_copy(update={"plan": "0" * 64}), current)
    with pytest.raises(Corrupt, match="is lost or damaged, of which manifest"):
        copy(source, other(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


# Garbage --------------------------------------------------------------------------------------------


def gc(store: Store, older_than: float = 0) -> list[str]:
    """What ``gc --delete`` does."""
    found = garbage(store, Leases(lease_storage(store.storage)), older_than)
    remove(store, found)
    return [item.name for item in found]


class Watched(LocalStorage):
    """Calls ``look`` before it creates a name that begins with ``at``."""

    at, look = "", staticmethod(lambda: None)

    def create(self, name: str, *data: bytes | memoryview) -> bool:
        if name.startswith(self.at):
            self.look()
        return super().create(name, *data)


@pytest.mark.parametrize("kind", ["copy", "seal"])
def test_what_a_copy_or_a_seal_is_about_to_commit_is_no_garbage(tmp_path: Path, kind: str) -> None:
    source = sealed(tmp_path / "a")
    if kind == "seal":
        for path in ("CURRENT", *("/".join(p.parts[-2:]) for p in (tmp_path / "a").glob("[pm]a*s/*"))):
            (tmp_path / "a" / path).unlink()
    storage = Watched(tmp_path / ("b" if kind == "copy" else "a"), sync=False)
    storage.at = "commits/" if kind == "copy" else "manifests/"
    seen: list[str] = []

    def look() -> None:
        with pytest.raises(Mismatch, match=f"somebody is at work here, on 1 items, {kind}-"):
            gc(Store(LocalStorage(storage.path)))
        seen.append("refused")

    storage.look = look  # type: ignore[method-assign]
    if kind == "copy":
        copy(source, Store(storage), workers=1)
    else:
        seal(a_plan(), str(source.plan_digest()), Store(storage))
    assert seen and verify(Store(storage)).ok
    assert not list((storage.path / "leases").iterdir()) and not gc(Store(storage))


def test_a_lease_of_a_machine_that_is_gone_does_not_keep_garbage_for_ever(tmp_path: Path) -> None:
    store = sealed(tmp_path)
    other = {"owner": "x", "machine": "elsewhere", "process": "1:1", "beat": 3}
    store.storage.create("leases/copy-0", canonical_json(other))
    with pytest.raises(Mismatch, match="copy-0"):
        gc(store)
    os.utime(tmp_path / "leases/copy-0", (0, 0))
    assert gc(store) == ["leases/copy-0"]
    Leases(lease_storage(store.storage)).claim("copy-1")
    held = json.loads((tmp_path / "leases/copy-1").read_bytes()) | {"owner": "x", "process": "999999999:1"}
    (tmp_path / "leases/copy-1").write_bytes(canonical_json(held))
    assert gc(store, 3600) == ["leases/copy-1"], "a process of this machine that is gone: at once"


def test_what_was_written_just_now_is_no_garbage_yet(tmp_path: Path) -> None:
    """Its writer's lease may be one that cannot be seen."""
    store = sealed(tmp_path)
    names = [f"objects/{'a' * 64}.h5", f"pages/{'b' * 64}.json", f"manifests/{'c' * 64}.json", "keys/.x.0123.part"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert gc(store, 3600) == []
    for name in names:
        os.utime(tmp_path / name, (0, 0))
    assert sorted(gc(store, 3600)) == sorted(names) and not any((tmp_path / name).exists() for name in names)


def test_links_folders_and_other_caches_are_no_temporaries_of_ours(tmp_path: Path) -> None:
    store = sealed(tmp_path)
    (tmp_path / ".x.part").symlink_to("/nonexistent")
    (tmp_path / "objects/.y.part").mkdir()
    (tmp_path / "nested/objects").mkdir(parents=True)
    (tmp_path / "nested/objects/.z.part").write_bytes(b"x")
    (tmp_path / ".mine.part").write_bytes(b"x")
    assert gc(store) == [".mine.part"]


# Copies of what is read from a bucket -----------------------------------------------------------------


def test_copies_evict_no_file_of_their_user_and_are_not_kept_in_a_cache(tmp_path: Path) -> None:
    store, mine = sealed(tmp_path / "a"), tmp_path / "mine"
    (mine / "folder").mkdir(parents=True)
    (mine / "thesis.tex").write_bytes(bytes(100_000))
    (mine / f"pages-{'0' * 64}.json").symlink_to("thesis.tex")
    os.utime(mine / "thesis.tex", (0, 0))
    size = max(path.stat().st_size for path in (tmp_path / "a/objects").iterdir())
    cached = Store(CachedStorage(store.storage, mine, 2 * size))
    for unit in store.committed():
        cached.object(store.commit(unit))
    held = list(mine.glob("objects-*"))
    assert (mine / "thesis.tex").stat().st_size == 100_000 and len(list(mine.iterdir())) == 3 + len(held)
    assert 0 < sum(path.stat().st_size for path in held) <= 2 * size
    with pytest.raises(UsageError, match="is a cache, and no folder for copies"):
        CachedStorage(store.storage, tmp_path / "a", 10)


# The digest that is trusted ---------------------------------------------------------------------------


def test_the_digest_that_was_compared_is_the_one_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CURRENT names another manifest each second time that it is read."""
    store = sealed(tmp_path)
    good = str(store.current())
    bad = store.put_manifest(store.manifest(good).model_copy(update={"provenance": {"by": "a stranger"}}), good)
    reads, target = [], sealed(tmp_path / "b")

    def flipping(self: Store) -> str:
        reads.append(good if len(reads) % 2 == 0 else bad)
        return reads[-1]

    monkeypatch.setattr(Store, "current", flipping)
    assert trust(store, good) == good and len(reads) == 1
    reads.clear()
    assert open_cache(tmp_path, expect_digest=good).digest == good
    reads[:] = [good]  # what comes next is another
    assert verify(store, trusted=good).manifest_digest == good
    reads[:] = [good]
    assert copy(store, target, trusted=good).sealed == good


# What commits add up to -------------------------------------------------------------------------------


def state(**lies: Any) -> dict[str, Any]:
    """The statistics of a unit of four rows, of the ensemble alone."""
    sums = Tally.empty(a_plan().predictors, 3).state()
    bins = [0] * BINS
    sums |= {"rows": [4], "labelled": [4], "correct": [3], "nll": [1.5], "brier": [0.5], "oracle": [0]}
    sums |= {"bin_rows": [4, *bins[1:]], "bin_correct": [3, *bins[1:]], "bin_confidence": [0.1, *bins[1:]]}
    return sums | lies


def test_statistics_that_add_up_are_sealed(tmp_path: Path) -> None:
    plan, digest, store = complete(tmp_path)
    for unit in (FIRST, SECOND):
        forge(store, unit, statistics=state())
    manifest = store.manifest(seal(plan, digest, store))
    assert manifest.statistics["train"]["predictors"]["ensemble"]["accuracy"] == 0.75
    assert manifest.statistics["train"]["rows"] == 8 and verify(store).ok


def nested(depth: int) -> Any:
    return json.loads("[" * depth + "]" * depth)


@pytest.mark.parametrize(
    "statistics",
    [
        state(names=["another"]),
        state(names=[""] * 18_000),
        state(names=[["a"]]),
        state(names=[]),
        state(names=5),
        state(more=[1]),
        {"names": ["ensemble"]},
        state(rows=[5]),
        state(rows=[10**400]),
        state(rows=4),
        state(rows=[True]),
        state(rows=["4"]),
        state(rows=[4.5]),
        state(labelled=[-1]),
        state(labelled=[5]),
        state(labelled=[10**18]),
        state(correct=[9]),
        state(correct=nested(60)),
        state(nll=[1e308]),
        state(nll=[None]),
        state(nll=[[1.0], [2.0]]),
        state(bin_rows=[0] * BINS),
        state(bin_rows=[4] * BINS),
        state(bin_rows=[]),
        state(fidelity=[1e-308, *[1.0] * 8]),
        state(fidelity=[-1.0, *[0.0] * 8]),
    ],
)
def test_statistics_that_no_capture_writes_are_told_and_never_sealed(tmp_path: Path, statistics: Any) -> None:
    plan, digest, store = complete(tmp_path)
    forge(store, SECOND, statistics=state())
    forge(store, FIRST, statistics=statistics)
    with pytest.raises(Corrupt, match=f"unit {FIRST}: statistics that do not add up"):
        seal(plan, digest, store)
    assert store.current() is None
    (damage,) = verify(store).damaged
    assert (damage.kind, damage.unit) == ("commit", FIRST)
    assert mend(store).dropped == [FIRST]


def test_no_more_rows_have_labels_than_there_are() -> None:
    tally = Tally.empty(["a", "b", "ensemble"], 2)
    bins = [3, *[0] * (BINS - 1)] * 3
    with pytest.raises(ValueError, match="labelled rows"):
        tally.merge([tally.state() | {"rows": [2], "labelled": [3], "bin_rows": bins}])


@pytest.mark.parametrize("value", ["NaN", "1e999"])
def test_numbers_that_are_none_are_not_sealed(tmp_path: Path, value: str) -> None:
    plan, digest, store = complete(tmp_path)
    body = canonical_json(json.loads(store.commit_body(FIRST)) | {"statistics": state(nll=[12345.5])})
    store.storage.replace(f"commits/{FIRST}.json", records.sealed(body.replace(b"12345.5", value.encode())))
    with pytest.raises(Corrupt, match=FIRST):
        seal(plan, digest, store)


def test_statistics_belong_to_units_of_targets(tmp_path: Path) -> None:
    plan, digest, store = complete(tmp_path)
    forge(store, FIRST.replace("targets", "tap.a.x"), statistics=state())
    with pytest.raises(Corrupt, match="they belong to 'targets'"):
        seal(plan, digest, store)


@pytest.mark.parametrize(
    "provenance", [{"time": [1, {}]}, {"time": 5}, {"time": "x" * 100}, {"x": [[]] * 10_000}, {"x": nested(100)}]
)
def test_a_provenance_that_no_capture_writes_is_told_and_never_sealed(tmp_path: Path, provenance: Any) -> None:
    plan, digest, store = complete(tmp_path)
    forge(store, FIRST, provenance=provenance)
    if provenance == {"x": nested(100)}:  # deep, but small
        assert seal(plan, digest, store)
        return
    with pytest.raises(Corrupt, match=f"unit {FIRST}: a provenance that no capture writes"):
        seal(plan, digest, store)
    assert [damage.unit for damage in verify(store).damaged] == [FIRST]


def test_a_manifest_lists_so_many_values_of_its_provenance_and_no_more(tmp_path: Path) -> None:
    plan = a_plan(rows=1200, unit_rows=1, views=1, groups=1)
    sums = Sums(plan, "here")
    for number, item in enumerate(plan.items()):
        provenance = {"by": number, "time": f"{number:04}"}
        commit = {"content": "", "keys": "", "size": 1, "statistics": None, "provenance": provenance}
        sums.add(item, plan.groups[0], commit)
    report = sums.manifest("0" * 64, ()).provenance
    assert report["by"] == list(range(1000)) and report["time"] == ["0000", "1199"]


def test_a_manifest_lists_so_many_bytes_of_its_provenance_and_no_more(tmp_path: Path) -> None:
    plan = a_plan(rows=200, unit_rows=1, views=1, groups=1)
    sums = Sums(plan, "here")
    for number, item in enumerate(plan.items()):
        provenance = {"command": f"{number:04}" * 3000, "time": f"{number:04}"}
        commit = {"content": "", "keys": "", "size": 1, "statistics": None, "provenance": provenance}
        sums.add(item, plan.groups[0], commit)
    listed = sums.manifest("0" * 64, ()).provenance["command"]
    assert len(listed) == (1 << 20) // 12002 < 200


@pytest.mark.parametrize("words", [["--out", b"caf\xe9".decode(errors="surrogateescape")], ["--set", "x" * 100_000]])
def test_a_command_is_recorded_as_text_that_a_commit_can_hold(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["ensemble-distill", "cache", "digits.py", *words])
    found = provenance()
    assert found["command"].startswith("ensemble-distill cache digits.py --")
    assert len(canonical_json(found)) < MAX_PROVENANCE and ("caf\\xe9" in found["command"]) == (words[0] == "--out")


@pytest.mark.parametrize(
    "lie",
    [
        {"content_digest": "0" * 64},
        {"rows": 7},
        {"bytes": 1},
        {"statistics": {}},
        {"statistics": {"train": {"rows": 1}}},
        {"provenance": {"by": ["a stranger"], "time": ["2026", "2026"]}},
    ],
)
def test_a_manifest_that_contradicts_its_commits_is_told_and_sealed_anew(tmp_path: Path, lie: dict[str, Any]) -> None:
    plan, digest, store = complete(tmp_path)
    forge(store, FIRST, statistics=state())
    current = seal(plan, digest, store)
    store.put_manifest(store.manifest(current).model_copy(update=lie), current)
    (damage,) = verify(store).damaged
    assert damage.kind == "manifest" and f"its manifest's {next(iter(lie))} is not what its commits" in str(damage)
    assert mend(store).dropped == []
    assert seal(plan, digest, store) == current and verify(store).ok


def test_figures_that_another_machine_rounds_otherwise_are_the_same(tmp_path: Path) -> None:
    plan, digest, store = complete(tmp_path)
    forge(store, FIRST, statistics=state())
    current = seal(plan, digest, store)
    figures = json.loads(json.dumps(store.manifest(current).statistics))
    figures["train"]["predictors"]["ensemble"]["nll"] *= 1 + 1e-15
    changed = store.manifest(current).model_copy(update={"statistics": figures})
    assert store.put_manifest(changed, current) != current and verify(store).ok
    figures["train"]["predictors"]["ensemble"]["nll"] *= 1.001
    store.put_manifest(changed.model_copy(update={"statistics": figures}))
    assert not verify(store).ok


def test_a_page_may_take_what_its_units_need_and_no_more(tmp_path: Path) -> None:
    """A page of 2 MB is what some hundred units may take, not twelve."""
    plan, digest, store = complete(tmp_path)
    current = seal(plan, digest, store)
    commits = [json.loads(store.commit_body(plan.unit_name(n))) for n in range(plan.units)]
    commits[0]["provenance"] = {"x": [[]] * 700_000}
    page = store.put_page([canonical_json(commit) for commit in commits])
    store.put_manifest(store.manifest(current).model_copy(update={"pages": (page,)}), current)
    assert "it can hold at most" in str(verify(store).damaged[0])
    for look in (
        lambda: open_cache(tmp_path).targets_at(np.arange(2)),
        lambda: copy(store, other(tmp_path / "copy")),
        lambda: gc(store),
    ):
        with pytest.raises(Unsafe, match="it can hold at most"):
            look()


# Rows that are not there --------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [None, 64])
def test_rows_that_a_cache_does_not_hold_are_refused(tmp_path: Path, memory: int | None) -> None:
    """Rows 4 to 7 are missing; what stands in memory in their place is nobody's target."""
    _, _, store = complete(tmp_path)
    store.storage.remove(f"commits/{SECOND}.json")
    cache = open_cache(tmp_path, allow_partial=True, memory=memory)
    whole = open_cache(sealed(tmp_path / "whole").root, memory=memory)
    held = np.array([0, 3, 8, 11])
    assert np.array_equal(cache.targets_at(held).logprobs, whole.targets_at(held).logprobs)
    for rows in ([4], [7, 0], [-1], [12], [0, 5000], [1 << 40]):
        for one in (cache, whole) if rows[0] not in (4, 7) else (cache,):
            for look in (one.targets_at, lambda rows, one=one: one.arrays_at(one.plan.groups[0], rows, 0, "train")):
                with pytest.raises(Mismatch, match="does not hold row"):
                    look(np.array(rows))
    assert not len(cache.targets_at(np.empty(0, np.int64)))


def test_the_zeros_in_place_of_missing_keys_are_no_keys(tmp_path: Path) -> None:
    plan, _, store = complete(tmp_path)
    store.storage.remove(f"commits/{SECOND}.json")
    table = open_cache(tmp_path, allow_partial=True).table("train")
    zero = np.zeros((1, 16), np.uint8)
    assert np.array_equal(table.rows(keys_of(plan.item(0))), np.arange(4)), "of which the first key is zeros as well"
    assert table.rows(zero, np.array([5])) == [0]
    with pytest.raises(Mismatch, match="does not hold"):
        table.rows(keys_of(plan.item(1)))
    gone = KeyTable("train", np.zeros((3, 16), np.uint8), np.array([], np.int64))
    for positions in (None, np.array([1])):
        with pytest.raises(Mismatch, match="does not hold"):
            gone.rows(zero, positions)


# Plans --------------------------------------------------------------------------------------------------


def plan_of_members(inner: Dense | TopK, **changes: Any) -> Plan:
    """A plan as JSON could have it, whose codec keeps members a and b; changes by place, as ``reading.combine``."""
    codec = Members(inner=inner, members=("a", "b"))
    plan = a_plan().model_dump(mode="json") | {"groups": [Group.of("targets", {"main": codec}).model_dump(mode="json")]}
    plan["capture"]["members"] = [{"name": n, "weights": "w", "structure": "s", "share": 0.5} for n in "ab"]
    plan["reading"]["temperature_before"] = [1.0, 1.0]
    for place, value in changes.items():
        part, field = place.split("__")
        plan[part][field] = value
    return Plan.model_validate_json(canonical_json(plan))


def named(*names: str, share: float = 0.5) -> list[dict[str, Any]]:
    return [{"name": n, "weights": "w", "structure": "s", "share": share} for n in names]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capture__members": named("a", "z")}, "the codec keeps the members"),
        ({"capture__members": named("b", "a")}, "the codec keeps the members"),
        ({"capture__members": []}, "the codec keeps the members"),
        ({"capture__members": named("a", "b", share=0.0)}, "greater than 0"),
        ({"capture__members": named("a", "b", share=-0.5)}, "greater than 0"),
        ({"capture__members": named("a", "b", share=1e308)}, "less than or equal to 1"),
        ({"reading__temperature_before": [1.0]}, "1 temperatures for 2 members"),
        ({"reading__temperature_before": [1.0, 0.0]}, "greater than 0"),
        ({"reading__combine": "mean_logits"}, "by mean_probs only"),
        ({"reading__temperature_after": 50.0}, "by mean_probs only"),
    ],
)
def test_members_that_cannot_be_mixed_are_no_plan(changes: dict[str, Any], reason: str) -> None:
    inner = TopK(classes=3, k=2)
    assert plan_of_members(inner).units and plan_of_members(Dense(classes=3), reading__combine="mean_logits").units
    with pytest.raises(ValidationError, match=reason):
        plan_of_members(inner, **changes)


def test_a_temperature_that_stands_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="a temperature stands twice"):
        TopK(k=2, temperatures=(2.0, 3.0, 2.0))


# Rows that no codec writes --------------------------------------------------------------------------------


def refill(store: Store, plan: Plan, unit: str, change: Any) -> None:
    """Other records of a unit, under right hashes."""
    item, group = plan.locate(unit)
    records_ = rows_of(plan, item, group)
    change(records_)
    old = store.commit(unit)
    store.storage.remove(f"commits/{unit}.json")
    store.put_unit(old.plan, unit, records_, plan.format, old.keys, None, old.provenance)


def test_forged_rows_are_refused_where_they_are_read_and_by_a_deep_look(tmp_path: Path) -> None:
    plan, digest, store = complete(tmp_path)
    refill(store, plan, SECOND, lambda rows: rows["main/logprobs"].__setitem__(2, np.nan))
    refill(store, plan, THIRD.replace("targets", "tap.a.x"), lambda rows: rows["tap/a.x"].__setitem__(1, np.inf))
    seal(plan, digest, store)
    cache = open_cache(tmp_path)
    assert len(cache.targets_at(np.array([4, 5, 7]), taps=["tap/a.x"])) == 3
    with pytest.raises(Corrupt, match="row 6 of train in view 0: no distribution"):
        cache.targets_at(np.array([4, 6]))
    with pytest.raises(Corrupt, match="row 9 of train in view 0: a feature that is not finite"):
        cache.targets_at(np.array([8, 9]), taps=["tap/a.x"])
    assert verify(store).ok
    found = {damage.unit: str(damage) for damage in verify(store, deep=[Decoder(plan)]).damaged}
    assert "its row 2: no distribution" in found[SECOND] and len(found) == 2


def test_figures_and_partners_are_looked_at_as_well(tmp_path: Path) -> None:
    codecs = {"main": Dense(classes=3), "row": RowFigures(), "partner": PartnerKey()}
    plan = a_plan().model_copy(update={"groups": (Group.of("targets", codecs),)})
    _, digest, store = complete(tmp_path, plan)

    def honest(rows: np.ndarray) -> None:
        for name in ("row/entropy", "row/mutual_information"):
            rows[name] = 0.5

    def forged(rows: np.ndarray) -> None:
        honest(rows)
        rows["row/mutual_information"][3] = 7

    for number in range(plan.units):
        refill(store, plan, plan.unit_name(number), honest if number else forged)
    seal(plan, digest, store)
    assert len(open_cache(tmp_path).targets_at(np.arange(3)))
    with pytest.raises(Corrupt, match="row 3 of train in view 0: mutual_information out of its range"):
        open_cache(tmp_path).targets_at(np.array([3]))
    assert [damage.unit for damage in verify(store, deep=[Decoder(plan)]).damaged] == [FIRST]


def test_a_student_whose_scores_are_no_numbers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"accuracy": 0.1, "nll": float("nan"), "kl": float("inf")}
    monkeypatch.setattr("ensemble_distill.evaluation.evaluate.score", lambda *args: scores)
    source = ArraySource({"x": np.zeros((2, 1), np.uint8)}, np.zeros(2, np.int64))
    with pytest.raises(InvalidOutput, match="nll, kl of the student on test is no finite number"):
        evaluate(torch.nn.Identity(), source, None, "test", torch.device("cpu"))
