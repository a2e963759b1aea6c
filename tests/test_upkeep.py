"""What keeps a cache: many writers, spans of units, repair, copy, gc, a look inside shards, and signals."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Cli, environment, flip, load_module, shard_of
from small import a_plan, file_of, put_item, rows_of
from test_faults import CACHE, TRAIN, VERIFY, content, only, refused
from test_resume import slow, wait_for

import ensemble_distill as ed
from ensemble_distill.cache.collect import garbage
from ensemble_distill.cache.copy import copy
from ensemble_distill.cache.deep import Parser
from ensemble_distill.cache.repair import repair
from ensemble_distill.cache.verify import Verdict, verify
from ensemble_distill.errors import Corrupt, Interrupted, Mismatch, Unsafe
from ensemble_distill.formats.layout import Segment
from ensemble_distill.recording.seal import seal
from ensemble_distill.store import records
from ensemble_distill.store.leases import Leases, lease_storage
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.records import Commit
from ensemble_distill.store.store import Store, open_store

# Many writers ---------------------------------------------------------------------------------------


def test_writers_started_at_once_share_the_work(cached: Cli) -> None:
    slow(cached, 0.01)
    command = ("cache", "digits.py", "--out", "shared")
    processes = [cached.start(*command, SLOW="1") for _ in range(3)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert content(cached.folder / "shared") == content(cached.folder / "cache")
    rows = [int(text.split("captured ")[1].split(" ")[0].replace(",", "")) for text in outputs if "captured" in text]
    assert sum(rows) == 2797, "each row was captured once"
    assert not list((cached.folder / "shared/leases").iterdir())
    cached("verify", "shared")


def test_a_killed_writer_leaves_its_work_to_the_others_at_once(cached: Cli) -> None:
    slow(cached, 0.05)
    command = ("cache", "digits.py", "--out", "shared")
    first = cached.start(*command, SLOW="1")
    commits = cached.folder / "shared/commits"
    wait_for(lambda: commits.is_dir() and any(commits.iterdir()), first)
    second = cached.start(*command)
    first.kill()
    first.communicate()
    output = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert content(cached.folder / "shared") == content(cached.folder / "cache")


def test_spans_of_units_are_captured_apart_and_sealed(cached: Cli) -> None:
    def part(span: str) -> str:
        return cached("cache", "digits.py", "--out", "parts", "--units", span).stdout

    assert "10/28 units committed" in part("0:10") and "ensemble-distill seal parts" in part("0:10")
    refused(cached("seal", "parts", code=3), "10/28 units committed", "missing: ")
    refused(cached("train", "digits.py", "--cache", "parts", "--out", "run", code=3), "not complete")
    part("10:21")
    assert content_digest(part("21:")) == content(cached.folder / "cache")
    assert content_digest(cached("seal", "parts").stdout) == content(cached.folder / "cache")
    for wrong in ("5", "a:b", "7:7", "-1:3"):
        assert "A:B" in cached("cache", "digits.py", "--out", "parts", "--units", wrong, code=2).stderr


def content_digest(text: str) -> str:
    return text.split("content digest")[1].split()[0]


# Repair ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "find", ["object", "keys/train-00000002", "commits/*", "CURRENT", "PLAN", "pages/*", "manifests/*"]
)
def test_what_is_damaged_is_captured_again_and_nothing_else(cached: Cli, find: str) -> None:
    root = cached.folder / "cache"
    before = {path: path.stat().st_ino for path in root.rglob("*") if path.is_file()}
    expected = (root / "CURRENT").read_text().strip(), content(root)
    path = shard_of(root, "test-v000000-00000001.targets") if find == "object" else only(root, find)
    flip(path)
    cached(*VERIFY, code=4)
    cached("repair", "cache", "digits.py")
    cached(*VERIFY, "--deep")
    assert content(root) == expected[1]
    if find not in ("object", "keys/train-00000002"):  # nothing had to be captured, so all is as it was
        assert (root / "CURRENT").read_text().strip() == expected[0]
    shards = {p for p in before if p.parent.name == "objects" and p != path}
    assert all(p.stat().st_ino == before[p] for p in shards)


def test_a_repair_goes_on_where_a_list_of_damage_was_given_up(tmp_path: Path) -> None:
    store, plan = Store(LocalStorage(tmp_path)), a_plan()
    digest = store.put_plan(plan)
    for item in plan.items():
        put_item(store, plan, digest, item)
    seal(plan, digest, store)
    for path in (tmp_path / "objects").iterdir():
        flip(path)
    mended = repair(store, lambda: verify(store, most=3))
    assert len(mended.dropped) == mended.missing == plan.units and not list((tmp_path / "objects").iterdir())


def test_repair_without_a_pipeline_says_what_is_left_to_do(cached: Cli) -> None:
    shard_of(cached.folder / "cache", "test-v000000-00000001.targets").unlink()
    text = cached("repair", "cache").stdout
    assert "dropped: test-v000000-00000001.targets" in text and "27/28 units are whole" in text
    refused(cached(*TRAIN, code=3), "27/28 units committed")
    cached(*CACHE)
    cached(*VERIFY)
    assert "nothing is damaged" in cached("repair", "cache").stdout


@pytest.mark.parametrize("pipeline", [(), ("digits.py",)])
def test_a_pointer_to_the_plan_that_is_lost_is_put_back(cached: Cli, pipeline: tuple[str, ...]) -> None:
    root = cached.folder / "cache"
    plan, current = (root / "PLAN").read_text(), (root / "CURRENT").read_text()
    (root / "plans" / f"{'0' * 64}.json").write_text("{}")  # so that it is not the only one
    (root / "PLAN").unlink()
    for command in (VERIFY, TRAIN, CACHE, ("gc", "cache"), ("seal", "cache"), ("copy", "cache", "there")):
        process = cached(*command, code=4)
        refused(process, "cache/PLAN is lost")
        assert "`ensemble-distill repair cache` puts it back" in process.stderr
    assert "restored: PLAN" in cached("repair", "cache", *pipeline).stdout
    assert ((root / "PLAN").read_text(), (root / "CURRENT").read_text()) == (plan, current)
    cached(*VERIFY)


@pytest.mark.parametrize(
    ("name", "message"), [("manifests/*", "PLAN is damaged, and there are 2 plans"), ("plans/*", "lost or damaged")]
)
def test_a_pointer_to_the_plan_is_not_guessed(cached: Cli, name: str, message: str) -> None:
    """Two plans, and what would tell which of them is sealed is damaged as well; nothing is committed."""
    root = cached.folder / "cache"
    flip(only(root, name))
    shutil.rmtree(root / "commits")
    (root / "plans" / f"{'0' * 64}.json").write_text("{}")
    (root / "PLAN").unlink()
    refused(cached("repair", "cache", "digits.py", code=4), message)
    assert not (root / "PLAN").exists()


def test_a_pointer_to_the_plan_is_put_back_by_what_was_committed_under_it(cached: Cli) -> None:
    root = cached.folder / "cache"
    plan = (root / "PLAN").read_text()
    flip(only(root, "manifests/*"))
    (root / "plans" / f"{'0' * 64}.json").write_text("{}")
    (root / "PLAN").unlink()
    cached("repair", "cache", "digits.py")
    assert (root / "PLAN").read_text() == plan
    cached(*VERIFY)


@pytest.mark.parametrize("harm", ["lost", "damaged"])
def test_both_pointers_are_put_back_by_what_was_sealed(cached: Cli, harm: str) -> None:
    root = cached.folder / "cache"
    pointers = {name: (root / name).read_bytes() for name in ("PLAN", "CURRENT")}
    (root / "plans" / f"{'0' * 64}.json").write_text("{}")
    for name in pointers:
        (root / name).unlink()
        if harm == "damaged":
            (root / name).write_text("what is no digest")
    stdout = cached("repair", "cache").stdout
    assert "restored: CURRENT" in stdout and "restored: PLAN" in stdout
    assert pointers == {name: (root / name).read_bytes() for name in pointers}
    cached(*VERIFY)


def test_what_is_no_cache_is_not_repaired(cached: Cli) -> None:
    refused(cached("repair", ".", code=3), "is no cache")
    refused(cached("repair", "nowhere", code=2), "no such directory")


def test_a_bucket_whose_plan_is_lost_is_no_new_one(tmp_path: Path) -> None:
    place = f"memory:/{tmp_path}"
    store, plan = open_store(place, create=True), a_plan()
    digest = store.put_plan(plan)
    put_item(store, plan, digest, next(plan.items()))
    store.storage.remove("PLAN")
    for create in (False, True):
        with pytest.raises(Corrupt, match="PLAN is lost"):
            open_store(place, create=create)
    assert repair(open_store(place, mend=True), lambda: verify(store)).restored == ["PLAN"]
    assert open_store(place).plan_digest() == digest


def test_a_pipeline_that_did_not_make_the_cache_is_refused_before_anything_is_dropped(cached: Cli) -> None:
    root = cached.folder / "cache"
    flip(shard_of(root, "test-v000000-00000001.targets"))
    cached.change('("a", "b", "c")', '("a", "b")', to="two.py")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    refused(cached("repair", "cache", "two.py", code=3), "members")
    refused(cached("repair", "cache", "digits.py", "--views", 3, code=3), "views")
    refused(cached("repair", "cache", "nothing.py", code=2), "nothing.py")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    cached("repair", "cache", "digits.py")
    cached(*VERIFY)


def never() -> Verdict:
    raise AssertionError("nothing can be checked without a plan")


def test_of_two_plans_none_is_taken_for_the_one_that_was_in_force(tmp_path: Path) -> None:
    store = Store(LocalStorage(tmp_path, sync=False))
    for rows in (8, 12):
        store.put_plan(a_plan(rows=rows))
    store.storage.remove("PLAN")
    with pytest.raises(Corrupt, match="PLAN is damaged, and there are 2 plans to choose from"):
        repair(store, never)
    assert store.plan_digest() is None


def test_a_plan_that_is_lost_cannot_be_repaired(cached: Cli) -> None:
    flip(only(cached.folder / "cache", "plans/*"))
    refused(cached("repair", "cache", "digits.py", code=4), "plans/")


# Copy and garbage -----------------------------------------------------------------------------------


def test_a_copy_is_the_same_cache_and_goes_on_where_it_stopped(cached: Cli) -> None:
    digest = (cached.folder / "cache/CURRENT").read_text().strip()
    assert "10/28 units" in cached("copy", "cache", "there", "--units", "0:10").stdout
    refused(cached("train", "digits.py", "--cache", "there", "--out", "run", code=3), "10/28 units")
    assert digest in cached("copy", "cache", "there", "--expect-digest", digest).stdout
    digests = (json.loads(cached("verify", at, "--json").stdout)["manifest_digest"] for at in ("cache", "there"))
    assert list(digests) == [digest, digest]
    assert "0 B copied now" in cached("copy", "cache", "there").stdout
    refused(cached("copy", "cache", "other", "--expect-digest", "0" * 64, code=3), digest)


def test_a_copy_that_is_asked_to_stop_keeps_what_it_has(tmp_path: Path) -> None:
    plan, source, target = a_plan(), *(Store(LocalStorage(tmp_path / name, sync=False)) for name in ("a", "b"))
    digest = source.put_plan(plan)
    for item in plan.items():
        put_item(source, plan, digest, item)
    with pytest.raises(Interrupted, match="1/12 units copied") as error:
        copy(source, target, stop=lambda: 0.0)
    assert "to go on" in error.value.hint and next(target.committed())
    assert copy(source, target).units == 12 and set(target.committed()) == set(source.committed())


def test_a_damaged_unit_is_not_copied_and_another_cache_is_not_mixed_in(cached: Cli) -> None:
    cached("cache", "digits.py", "--out", "parquet", "--format", "parquet")
    refused(cached("copy", "cache", "parquet", code=3), "another cache")
    flip(shard_of(cached.folder / "cache", "train-v000001-00000002.targets"))
    refused(cached("copy", "cache", "there", code=4), "train-v000001-00000002.targets")
    assert not (cached.folder / "there/CURRENT").exists()
    assert "whole" in cached("verify", "there").stdout


def test_garbage_is_listed_then_removed_and_what_is_needed_stays(cached: Cli) -> None:
    root = cached.folder / "cache"
    (root / "objects" / f"{'a' * 64}.h5").write_bytes(b"orphan")
    (root / "objects/.x.0123.part").write_bytes(b"left by a kill")
    (root / "pages" / f"{'b' * 64}.json").write_bytes(b"{}")
    (root / "leases").mkdir(exist_ok=True)
    (root / "leases/train-v000000-00000000").write_text("no lease at all")
    for path in ("objects/.x.0123.part", f"objects/{'a' * 64}.h5", f"pages/{'b' * 64}.json"):
        os.utime(root / path, (0, 0))
    refused(
        cached("gc", "cache", code=3), "somebody is at work here, on 1 items, train-v0"
    )  # until it is seen to be dead
    (root / "leases/train-v000000-00000000").unlink()
    listed = cached("gc", "cache").stdout
    assert "3 files" in listed and "--delete" in listed
    assert (root / "objects" / f"{'a' * 64}.h5").exists()
    assert json.loads(cached("gc", "cache", "--delete", "--json").stdout)["deleted"] is True
    assert "nothing to remove" in cached("gc", "cache", "--older-than", 0).stdout
    cached(*VERIFY, "--deep")


def test_garbage_is_not_touched_where_a_record_is_damaged(cached: Cli) -> None:
    flip(only(cached.folder / "cache", "commits/*"))
    refused(cached("gc", "cache", "--delete", code=4), "commits/")


# A look inside shards -------------------------------------------------------------------------------


def deep(data: bytes, format: str, segments: tuple[Segment, ...], **limits: float) -> None:
    plan = a_plan(format)
    commit = Commit(
        plan="", unit="u", object="0" * 64 + ".h5", size=len(data), rows=4, segments=segments, blocks=(), content="",
        keys="0" * 64,
    )  # fmt: skip
    parser = Parser(format, **limits)  # type: ignore[arg-type]
    try:
        parser(data, commit, plan.groups[0], "here")
    finally:
        parser.close()


def hdf5(make) -> bytes:  # type: ignore[no-untyped-def]
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="latest") as file:
        make(file)
    return buffer.getvalue()


def table() -> np.ndarray:
    plan = a_plan()
    return rows_of(plan, next(plan.items()), plan.groups[0])


CANARY = "/etc/hostname"
STRANGE = {
    "external link": lambda f: f.__setitem__("rows", h5py.ExternalLink(CANARY, "/rows")),
    "soft link": lambda f: (f.create_dataset("x", data=table()), f.__setitem__("rows", h5py.SoftLink("/x"))),
    "external storage": lambda f: f.create_dataset("rows", (4,), table().dtype, external=[(CANARY, 0, 24)]),
    "virtual dataset": lambda f: f.create_virtual_dataset("rows", virtual_layout()),
    "gzip": lambda f: f.create_dataset("rows", data=table(), chunks=(4,), compression="gzip"),
    "chunks": lambda f: f.create_dataset("rows", data=table(), chunks=(4,)),
    "a second dataset": lambda f: (f.create_dataset("rows", data=table()), f.create_dataset("x", data=1)),
    "an attribute": lambda f: f.create_dataset("rows", data=table()).attrs.__setitem__("x", 1),
    "a group": lambda f: f.create_group("rows"),
    "a cycle": lambda f: f.create_group("rows").__setitem__("rows", f["/"]),
    "another type": lambda f: f.create_dataset("rows", data=np.zeros(4, "<f4")),
    "another shape": lambda f: f.create_dataset("rows", (1 << 40,), table().dtype),
    "object references": lambda f: f.create_dataset("rows", (4,), h5py.ref_dtype),
}


def virtual_layout() -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout(shape=(4,), dtype=table().dtype)
    layout[:] = h5py.VirtualSource(CANARY, "rows", shape=(4,))
    return layout


@pytest.mark.parametrize("name", STRANGE)
def test_strange_hdf5_files_are_told_by_the_child(name: str) -> None:
    data = hdf5(STRANGE[name])
    with pytest.raises(Unsafe, match="here: "):
        deep(data, "hdf5", (Segment(fields=("main/logprobs",), offset=100, stride=6),))


@pytest.mark.parametrize("format", ["hdf5", "parquet"])
def test_our_own_shards_pass_and_bytes_moved_or_mangled_do_not(format: str) -> None:
    data, segments = file_of(format, table())
    deep(data, format, segments)
    moved = tuple(segment.model_copy(update={"offset": segment.offset - 1}) for segment in segments)
    for bad, where in ((data, moved), (data[:-9], segments), (b"", segments), (b"\0" * 500, segments)):
        with pytest.raises(Unsafe):
            deep(bad, format, where)


def test_a_child_that_hangs_or_dies_costs_nothing_but_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    data, segments = file_of("hdf5", table())
    start = subprocess.Popen

    def replaced(program: str):  # type: ignore[no-untyped-def]
        return lambda args, **more: start([sys.executable, "-c", program], **more)

    monkeypatch.setattr(subprocess, "Popen", replaced("import os; os.abort()"))
    with pytest.raises(Unsafe, match="crashed"):
        deep(data, "hdf5", segments)
    monkeypatch.setattr(subprocess, "Popen", replaced("import sys; sys.stdin.read()"))
    with pytest.raises(Unsafe, match="still at work"):
        deep(data, "hdf5", segments, seconds=0.1)


# Signals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_student_asked_to_stop_saves_and_goes_on(cached: Cli, number: signal.Signals) -> None:
    slow(cached, 0.02)
    process = cached.start(*TRAIN, SLOW="1")
    run = cached.folder / "run"
    wait_for(lambda: (run / "checkpoint.json").exists(), process)
    process.send_signal(number)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and "saved" in errors and "run the same command" in errors, errors
    cached(*TRAIN)


def test_a_time_that_is_up_ends_a_batch_that_does_not(cached: Cli) -> None:
    """A teacher that hangs: SIGTERM, and after the grace the process is gone, with nothing lost."""
    hang = "        import time\n\n        (HERE / 'hangs').touch()\n        time.sleep(600)\n"
    cached.change("    def forward(self, image):\n", "    def forward(self, image):\n" + hang)
    process = cached.start("cache", "digits.py", "--out", "hung", "--grace", 0.2)
    wait_for(lambda: (cached.folder / "hangs").exists(), process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and "run the same command to go on" in errors


def test_it_stops_in_order_as_process_one_of_a_container(cached: Cli) -> None:
    if shutil.which("unshare") is None or os.geteuid():
        pytest.skip("needs unshare and the right to use it")
    slow(cached, 0.05)
    inner = [sys.executable, "-m", "ensemble_distill", "cache", "digits.py", "--out", "pid1"]
    process = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", *inner], cwd=cached.folder, env=environment(SLOW="1"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    commits = cached.folder / "pid1/commits"
    wait_for(lambda: commits.is_dir() and any(commits.iterdir()), process)
    if process.poll() is not None:
        pytest.skip(f"unshare is not allowed here: {process.communicate()[1]}")
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    os.kill(child, signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and "units committed" in errors
    cached("cache", "digits.py", "--out", "pid1")
    assert content(cached.folder / "pid1") == content(cached.folder / "cache")


def test_a_requeued_job_ends_with_the_same_digest(cached: Cli) -> None:
    """What a batch system does: ask to stop, requeue on 75, until it is 0."""
    slow(cached, 0.01)
    for _ in range(60):
        process = cached.start("cache", "digits.py", "--out", "job", "--grace", 0, SLOW="1")
        commits, held = cached.folder / "job/commits", 0
        held = len(list(commits.iterdir())) if commits.is_dir() else 0
        wait_for(lambda: commits.is_dir() and len(list(commits.iterdir())) > held + 5, process)  # noqa: B023
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == 75
    assert content(cached.folder / "job") == content(cached.folder / "cache")


# A part of a cache ----------------------------------------------------------------------------------


def drop(cache: Path, *units: str) -> None:
    (cache / "CURRENT").unlink(missing_ok=True)
    for unit in units:
        (cache / "commits" / f"{unit}.json").unlink()


def test_a_part_of_a_cache_teaches_only_where_that_is_asked_for_and_is_recorded(cached: Cli) -> None:
    drop(cached.folder / "cache", "train-v000000-00000002.targets", "train-v000001-00000000.tap.a.pool")
    (cached.folder / "cache/keys/train-00000002").unlink()
    refused(cached(*TRAIN, code=3), "26/28 units committed", "rows 400–599")
    error = cached(*TRAIN, "--allow-partial", "--verify-source").stderr
    assert "not complete" in error and "800 of 1000 samples" in error
    config = json.loads((cached.folder / "run/config.json").read_text())
    assert config["manifest"] == ""
    assert config["partial"]["train"] == {"rows": 800, "rows_planned": 1000, "views": 1, "views_planned": 2}
    used = ed.open_cache(cached.folder / "cache", allow_partial=True)
    source = load_module(cached.folder / "digits.py").data().sources["train"]
    seen = np.concatenate([b.index for epoch in (0, 1) for b in used.loader(source, 64, epoch=epoch)])
    assert np.array_equal(np.unique(seen, return_counts=True)[1], np.full(800, 2))
    assert not set(seen) & set(range(400, 600))
    with pytest.raises(Mismatch, match="no view 1"):
        used.targets_at(np.arange(3), 1)
    cached("evaluate", "digits.py", "--run", "run", "--allow-partial")
    cached(*CACHE)
    grown = cached(*TRAIN, code=3)
    assert "has grown" in refused(grown, "cache_content") + grown.stderr
    refused(cached("evaluate", "digits.py", "--run", "run", code=3), "content digest")
    cached(*TRAIN[:-1], "whole", "--allow-partial")
    assert json.loads((cached.folder / "whole/config.json").read_text())["partial"] == {}


def test_whole_views_are_used_before_parts_of_one(cached: Cli) -> None:
    drop(cached.folder / "cache", "train-v000001-00000003.targets")
    assert "1000 of 1000 samples" in cached(*TRAIN, "--allow-partial").stderr


def test_a_part_without_a_training_sample_teaches_nothing(cached: Cli) -> None:
    cache = cached.folder / "cache"
    drop(cache, *[path.stem for path in (cache / "commits").glob("train-v000000-*.targets.json")])
    refused(cached(*TRAIN, "--allow-partial", code=3), "none of the samples of 'train'")
    shutil.rmtree(cache / "commits")
    refused(cached(*TRAIN, "--allow-partial", code=3), "0/28 units committed")


def test_a_part_is_checked_as_a_whole_is(cached: Cli) -> None:
    cache = cached.folder / "cache"
    drop(cache, "train-v000001-00000003.targets")
    flip(shard_of(cache, "train-v000000-00000001.targets"))
    refused(cached(*TRAIN, "--allow-partial", code=4), "train-v000000-00000001.targets")
    digest = ("--expect-digest", "0" * 64)
    refused(cached(*TRAIN, "--allow-partial", *digest, code=3), "0" * 64)


def test_evaluate_reads_a_cache_as_train_does(cached: Cli) -> None:
    cached(*TRAIN)
    digest = (cached.folder / "cache/CURRENT").read_text().strip()
    run = ("evaluate", "digits.py", "--run", "run")
    cached(*run, "--expect-digest", digest, "--memory", 1, "--copies", "copies")
    refused(cached(*run, "--expect-digest", "0" * 64, code=3), digest)
    shutil.rmtree(cached.folder / "cache")
    refused(cached(*run, "--expect-digest", digest, code=2), "no cache to compare with")


# What somebody tried who was told to break a cache without being noticed -----------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small sealed cache."""
    store, plan = Store(LocalStorage(tmp_path / "small")), a_plan()
    digest = store.put_plan(plan)
    for item in plan.items():
        put_item(store, plan, digest, item)
    seal(plan, digest, store)
    return tmp_path / "small"


def falsify_plan(root: Path) -> None:
    """Another plan in force and in the manifest, over commits that name the true one."""
    store = Store(LocalStorage(root))
    current = store.current()
    plan = a_plan()
    other = plan.model_copy(update={"reading": plan.reading.model_copy(update={"temperature_after": 3.0})})
    (root / "PLAN").unlink()
    digest = store.put_plan(other)
    store.put_manifest(store.manifest(str(current)).model_copy(update={"plan": digest}), parent=current)


def test_a_plan_that_was_put_under_other_commits_is_noticed_and_nothing_is_dropped(small: Path) -> None:
    falsify_plan(small)
    store = Store(LocalStorage(small))
    files = sorted(path.name for path in small.rglob("*") if path.is_file())
    assert "another plan" in str(verify(store).damaged[0])
    with pytest.raises(Corrupt, match="another plan"):
        garbage(store, Leases(lease_storage(store.storage)))
    with pytest.raises(Corrupt, match="another plan"):
        repair(store, lambda: verify(store))
    with pytest.raises(Corrupt, match="another plan"):
        copy(store, Store(LocalStorage(small.parent / "copy")))
    with pytest.raises(Corrupt, match="another plan"):
        cache = ed.open_cache(small, allow_partial=True)
        cache.targets_at(np.arange(3), 0)
    assert sorted(path.name for path in small.rglob("*") if path.is_file()) == files


def test_a_commit_that_is_not_the_sealed_one_is_not_copied(small: Path) -> None:
    store = Store(LocalStorage(small))
    unit = a_plan().unit_name(0)
    store.storage.replace(
        f"commits/{unit}.json", records.seal(store.commit(unit).model_copy(update={"provenance": {"by": "x"}}))
    )
    with pytest.raises(Corrupt, match="not the commit that was sealed"):
        copy(store, Store(LocalStorage(small.parent / "copy")))
    (small / f"commits/{unit}.json").unlink()
    with pytest.raises(Corrupt, match="missing"):
        copy(store, Store(LocalStorage(small.parent / "other")))


def test_nothing_is_garbage_where_current_was_lost(small: Path) -> None:
    store = Store(LocalStorage(small))
    (small / "CURRENT").unlink()
    with pytest.raises(Mismatch, match="CURRENT is gone"):
        garbage(store, Leases(lease_storage(store.storage)))
    (small / "CURRENT").mkdir()
    with pytest.raises(Unsafe, match="CURRENT is no plain file"):
        store.current()


def test_content_that_is_not_what_a_commit_says_is_found_by_a_deep_look(small: Path) -> None:
    store, plan = Store(LocalStorage(small)), a_plan()
    (small / "CURRENT").unlink()
    unit = plan.unit_name(0)
    lie = store.commit(unit).model_copy(update={"content": "zz"})
    store.storage.replace(f"commits/{unit}.json", records.seal(lie))
    assert verify(store).ok
    found = verify(store, deep=[lambda *args: None]).damaged
    assert len(found) == 1 and "its content is not what its commit says" in str(found[0])


@pytest.mark.parametrize(
    "lie", [{"provenance": {}}, {"statistics": {"train": {"rows": 1}}}, {"provenance": {"time": [1]}}]
)
def test_a_manifest_that_no_capture_writes_is_shown_as_that(cached: Cli, lie: dict[str, object]) -> None:
    store = Store(LocalStorage(cached.folder / "cache"))
    current = store.current()
    store.put_manifest(store.manifest(str(current)).model_copy(update=lie), parent=current)
    refused(cached("inspect", "cache", code=4), "what no capture writes")
