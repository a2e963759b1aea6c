"""A capture that dies anywhere, on a disk that fails anywhere: nothing acknowledged is lost, and it goes on.

The driver does what a capture does with a store, without teachers: plan, key pages, units, seal.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small
from faulty import (
    CHANGES,
    DIRECTORY,
    Disk,
    Event,
    FaultySystem,
    Image,
    Killed,
    Recorder,
    WithoutDirectorySync,
    WithoutSync,
    disk_images,
)

from ensemble_distill.cache.groups import Group
from ensemble_distill.cache.plan import Plan, WorkItem
from ensemble_distill.cache.verify import Verdict, verify
from ensemble_distill.errors import Error, StorageError
from ensemble_distill.formats.layout import read_segments
from ensemble_distill.recording.seal import seal
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.records import Manifest
from ensemble_distill.store.store import Store

FORMATS = ("hdf5", "parquet")
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINTR)
FAULTS = (*ERRNOS, "short")

Ack = Callable[[str, str], None]


def silence(kind: str, what: str) -> None:
    """Nobody to tell."""


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where that can be: thousands of small files are made here, and none needs a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


# The driver -----------------------------------------------------------------------------------------


def a_plan(format: str, rows: int = 7, unit_rows: int = 4, views: int = 2, groups: int = 1) -> Plan:
    """A plan of 2 × 2 units as a rule, the last page shorter than the others."""
    return small.a_plan(format, rows, unit_rows, views, groups)


def rows_of(item: WorkItem, group: Group) -> np.ndarray:
    """What the teachers would have said."""
    rows = np.zeros(item.rows, group.dtype)
    for number, field in enumerate(group.fields):
        seed = (item.view, item.page, number, len(group.name))
        rows[field.name] = np.random.default_rng(seed).normal(size=rows[field.name].shape)
    return rows


def keys_of(item: WorkItem) -> np.ndarray:
    return np.random.default_rng(item.page).integers(0, 256, (item.rows, 16), np.uint8)


def capture(storage: LocalStorage, plan: Plan, ack: Ack = silence) -> str:
    """Do what is not done yet, and seal; the digest of the manifest. ``ack`` hears what a user would rely on."""
    store = Store(storage)
    digest = store.put_plan(plan)
    ack("plan", digest)
    done = set(store.committed())
    for item in plan.items():
        if all(item.unit(group) in done for group in plan.groups):
            continue
        keys = store.put_keys(item.split, item.page, keys_of(item))
        for group in plan.groups:
            if (unit := item.unit(group)) not in done:
                store.put_unit(digest, unit, rows_of(item, group), plan.format, keys, None, {})
                ack("unit", unit)
    manifest = seal(plan, digest, store)
    ack("sealed", manifest)
    return manifest


def content(root: Path) -> str:
    store = Store(LocalStorage(root))
    return store.manifest(store.current()).content_digest


def undisturbed(plan: Plan, folder: Path) -> str:
    """The content digest of a capture that nothing befell."""
    root = folder / "undisturbed"
    capture(LocalStorage(root, FaultySystem()), plan)
    assert verify(Store(LocalStorage(root))).ok
    return content(root)


# What must hold afterwards --------------------------------------------------------------------------


def losses(root: Path, plan: Plan, acknowledged: list[tuple[str, str]]) -> list[str]:
    """What was acknowledged and is not there, or not what it was; and what ``verify`` says."""
    store = Store(LocalStorage(root))
    found: list[str] = []
    for kind, what in acknowledged:
        try:
            if kind == "plan":
                assert store.plan_digest() == what and store.plan(what, Plan) == plan
            elif kind == "unit":
                assert store.is_committed(what) and what in set(store.committed())
                commit, (item, group) = store.commit(what), plan.locate(what)
                data = np.frombuffer(store.object(commit), np.uint8)
                rows = read_segments(data, commit.rows, group.dtype, commit.segments)
                assert rows.tobytes() == rows_of(item, group).tobytes()
                assert (store.keys(item.split, item.page, commit.keys, item.rows) == keys_of(item)).all()
            else:
                assert store.current() == what and isinstance(store.manifest(what), Manifest)
        except (Error, AssertionError) as error:
            found.append(f"lost: {kind} {what}: {error}")
    if store.storage.size("PLAN") is not None or acknowledged or next(store.committed(), None) is not None:
        found += [str(damage) for damage in verify(store, workers=1).damaged]
    return found


def resumed(root: Path, plan: Plan) -> str:
    """The content digest after the same command was run again to its end."""
    capture(LocalStorage(root, FaultySystem()), plan)
    assert verify(Store(LocalStorage(root)), workers=1).ok
    return content(root)


# Kills ----------------------------------------------------------------------------------------------


def killed(root: Path, plan: Plan, call: int, counted: tuple[str, ...] = CHANGES) -> list[tuple[str, str]] | None:
    """Capture in a child that is killed before a call; what it had acknowledged, or None if it came to its end."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            system = FaultySystem("kill", call, counted)
            capture(LocalStorage(root, system), plan, lambda kind, what: os.write(write, f"{kind} {what}\n".encode()))
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        lines = pipe.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return None if status == 0 else [tuple(line.split(" ", 1)) for line in lines]


def kills(plan: Plan, folder: Path, counted: tuple[str, ...]) -> Iterator[list[str]]:
    """For each call, what was lost by a kill before it (and by going on afterwards)."""
    expected = undisturbed(plan, folder)
    for call in itertools.count():
        root = folder / "killed"
        if (acknowledged := killed(root, plan, call, counted)) is None:
            return
        found = losses(root, plan, acknowledged)
        if resumed(root, plan) != expected:
            found.append("other content after going on")
        yield [f"killed before call {call}: {text}" for text in found]
        shutil.rmtree(root)


@pytest.mark.parametrize("format", FORMATS)
def test_a_kill_before_any_call_loses_nothing(tmp_path: Path, format: str) -> None:
    """Before every call that changes the disk: what a kill before one that reads leaves is the same."""
    results = list(kills(a_plan(format), tmp_path, CHANGES))
    assert len(results) > 90
    assert [text for found in results for text in found] == []


# A disk that fails ----------------------------------------------------------------------------------


Faults = Callable[[str, int], tuple[str | int, ...]]


def failures(plan: Plan, folder: Path, faults: Faults) -> Iterator[tuple[str, list[str]]]:
    """For each call and each of its faults: (how the capture ended, what was wrong with that)."""
    expected = undisturbed(plan, folder)
    root, counting = folder / "failed", FaultySystem()
    capture(LocalStorage(folder / "counted", counting), plan)
    for call, name in enumerate(counting.calls):
        for fault in faults(name, call):
            system = FaultySystem(fault, call)
            acknowledged: list[tuple[str, str]] = []
            found: list[str] = []
            try:
                capture(LocalStorage(root, system), plan, lambda kind, what, to=acknowledged: to.append((kind, what)))
                ended = "success"
            except StorageError as error:
                ended = "refused"
                if error.exit_code != 6 or not error.hint or "\n" in str(error) or fault == "short":
                    found.append(f"said {error!r}")
            if (number := len(list(root.rglob(".*.part")))) and name != "unlink":
                found.append(f"{number} temporary files are left")
            found += losses(root, plan, acknowledged)
            if resumed(root, plan) != expected:
                found.append("other content after going on")
            yield ended, [f"{fault} at call {call} ({name}): {text}" for text in found]
            shutil.rmtree(root)


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_fails_at_any_call_is_one_sentence_and_loses_nothing(tmp_path: Path, format: str) -> None:
    """Each call fails in one way here, in all of them in benchmarks/crash_runs.py."""
    results = list(failures(a_plan(format), tmp_path, lambda name, call: (FAULTS[call % len(FAULTS)],)))
    assert {ended for ended, _ in results} == {"success", "refused"} and len(results) > 100
    assert [text for _, found in results for text in found] == []


def test_short_writes_are_completed(tmp_path: Path) -> None:
    plan = a_plan("hdf5")
    results = list(failures(plan, tmp_path, lambda name, call: ("short",) if name == "write" else ()))
    assert len(results) > 10 and all(result == ("success", []) for result in results)


# Power loss -----------------------------------------------------------------------------------------


def recorded(plan: Plan, folder: Path, kind: type[Recorder] = Recorder, stops: tuple[int, ...] = ()) -> list[Event]:
    """The log of a capture; killed before each of the ``stops`` (calls of its process), and gone on with."""
    base = folder / "recorded"
    base.mkdir()
    log: list[Event] = []
    for stop in (*stops, -1):
        system = kind(base, log, fault="stop", at=stop, counted=CHANGES)
        try:
            capture(LocalStorage(base / "cache", system), plan, system.ack)
        except Killed:
            continue
        break
    shutil.rmtree(base)
    return log


def after_power_loss(image: Image, plan: Plan, folder: Path, expected: str | None = None) -> list[str]:
    """What an image has lost; also resumes where the content to expect is given."""
    base = folder / "image"
    base.mkdir()
    image.write(base)
    try:
        found = losses(base / "cache", plan, image.acknowledged)
        if expected is not None and not found and resumed(base / "cache", plan) != expected:
            found.append("other content after going on")
        return [f"power lost after {image.events} events: {text}" for text in found]
    finally:
        shutil.rmtree(base)


def images_with_losses(log: list[Event], plan: Plan, folder: Path, count: int, resume: int = 0) -> dict[int, list[str]]:
    """Of ``count`` images, those that lost something: number to what. Every ``resume``-th is gone on with."""
    expected = undisturbed(plan, folder) if resume else None
    result = {}
    for number, image in enumerate(disk_images(log, np.random.default_rng(0), count)):
        found = after_power_loss(image, plan, folder, expected if resume and number % resume == 0 else None)
        if found:
            result[number] = found
    return result


def kills_and_power_losses(plan: Plan, folder: Path) -> Iterator[list[str]]:
    """Killed before a call, gone on with, power lost right after something was acknowledged: what each lost.

    Only the worst disk of each such moment: all is lost that is not synced.
    """
    system = FaultySystem(counted=CHANGES)
    capture(LocalStorage(folder / "count", system), plan)
    for stop, name in enumerate(system.calls):
        disk = Disk()
        for event in recorded(plan, folder, stops=(stop,)):
            disk.apply(event)
            if event.call == "ack":
                tree = disk.image(np.random.default_rng(0), 0.0, "lost")
                image = Image(tree, list(disk.acknowledged), disk.events)
                found = after_power_loss(image, plan, folder)
                yield [f"killed before call {stop} ({name}), {text}" for text in found]


@pytest.mark.parametrize("format", FORMATS)
def test_a_power_loss_loses_nothing_that_was_acknowledged(tmp_path: Path, format: str) -> None:
    plan = a_plan(format)
    assert images_with_losses(recorded(plan, tmp_path), plan, tmp_path, 500, resume=7) == {}


def test_a_kill_and_then_a_power_loss_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """A process dies between a change and its sync; the next one finds the change, and must not take it for durable."""
    results = list(kills_and_power_losses(a_plan("hdf5", rows=4), tmp_path))
    assert len(results) > 200
    assert [text for found in results for text in found] == []


@pytest.mark.parametrize("kind", [WithoutSync, WithoutDirectorySync])
def test_a_system_that_does_not_sync_is_found_out(tmp_path: Path, kind: type[Recorder]) -> None:
    """The control: were the syncs left out, the same check would see units lost."""
    plan = a_plan("hdf5")
    found = images_with_losses(recorded(plan, tmp_path, kind), plan, tmp_path, 150)
    assert len(found) > 30
    assert any("lost: unit" in text for texts in found.values() for text in texts)


def test_the_model_of_a_disk_keeps_what_was_synced_and_may_lose_the_rest() -> None:
    log = [
        Event("mkdir", "d"), Event("open_new", "d/a", 1), Event("write", "", (1, b"12")), Event("sync", "", 1),
        Event("write", "", (1, b"34")), Event("link", "d/a", "d/b"),
    ]  # fmt: skip
    rng = np.random.default_rng(0)

    def possible(*more: Event) -> set[tuple]:
        disk = Disk()
        for event in (*log, *more):
            disk.apply(event)
        return {tuple(sorted(disk.image(rng, 0.5, "any").items())) for _ in range(2000)}

    contents = (b"12", b"123", b"1234", b"12\0\0")
    d = ("d", None)
    loose = {(), (d,)} | {(d, ("d/a", c)) for c in contents} | {(d, ("d/b", c)) for c in contents}
    loose |= {(d, ("d/a", c), ("d/b", c)) for c in contents}
    assert possible() == loose
    base, folder, file = Event("sync_directory", "."), Event("sync_directory", "d"), Event("sync", "", 1)
    assert possible(base, folder, file) == {(d, ("d/a", b"1234"), ("d/b", b"1234"))}
    assert possible(folder, file) == {(), (d, ("d/a", b"1234"), ("d/b", b"1234"))}
    # A rename survives or not; its two names go together.
    moved = possible(base, folder, file, Event("unlink", "d/b"), base, folder, Event("rename", "d/a", "d/c"))
    assert moved == {(d, ("d/a", b"1234")), (d, ("d/c", b"1234"))}
    assert DIRECTORY not in (1, 2)


# Damage ---------------------------------------------------------------------------------------------


def files_by_kind(root: Path) -> dict[str, list[Path]]:
    """plans, keys, objects, commits, pages, manifests, PLAN and CURRENT (where there is one): their files."""
    result: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            result.setdefault(path.relative_to(root).parts[0], []).append(path)
    return result


def seen(root: Path) -> Verdict:
    return verify(Store(LocalStorage(root)), workers=1)


def with_bytes(path: Path, data: bytes, root: Path) -> bool:
    """Whether ``verify`` reports that a file has other bytes; puts the old ones back."""
    held = path.read_bytes()
    assert data != held
    path.write_bytes(data)
    try:
        return not seen(root).ok
    finally:
        path.write_bytes(held)


def flips(data: bytes, rng: np.random.Generator, count: int) -> Iterator[tuple[str, bytes]]:
    """``data`` with one bit flipped, at ``count`` places (all there are, if there are fewer)."""
    for bit in rng.permutation(len(data) * 8)[:count]:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(flipped)


def cuts(data: bytes) -> Iterator[tuple[str, bytes]]:
    """``data`` shorter (to nothing, by a byte, at each fortieth) and longer (by a byte, by a block of zeros)."""
    for size in sorted({len(data) * i // 40 for i in range(40)} | {len(data) - 1}):
        yield f"{size} of {len(data)} bytes", data[:size]
    for more in (b"\0", b"\n", bytes(4096)):
        yield f"{len(more)} bytes more", data + more


def unseen(root: Path, kind: str, changes: Callable[[bytes], Iterator[tuple[str, bytes]]]) -> tuple[int, list[str]]:
    """How many changes of a kind of file were tried, and those that ``verify`` did not report."""
    tried, missed = 0, []
    for path in files_by_kind(root)[kind]:
        for what, data in changes(path.read_bytes()):
            tried += 1
            if not with_bytes(path, data, root):
                missed.append(f"{path.relative_to(root)}: {what}")
    return tried, missed


KINDS = {"PLAN", "plans", "keys", "objects", "commits"}
SEALED = KINDS | {"pages", "manifests", "CURRENT"}


@pytest.fixture(params=["sealed hdf5", "unsealed parquet"])
def finished(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A complete cache, with or without its manifest."""
    sealed, format = request.param.split()
    root = tmp_path / "finished"
    capture(LocalStorage(root, FaultySystem()), a_plan(format, groups=2))
    if sealed == "unsealed":
        (root / "CURRENT").unlink()
        for folder in ("pages", "manifests"):
            shutil.rmtree(root / folder)
    assert seen(root).ok and files_by_kind(root).keys() == (SEALED if sealed == "sealed" else KINDS)
    return root


def test_every_flipped_bit_is_reported(finished: Path) -> None:
    rng = np.random.default_rng(0)
    for kind, files in files_by_kind(finished).items():
        places = max(1, 40 // len(files))
        assert unseen(finished, kind, partial(flips, rng=rng, count=places))[1] == []


def test_every_truncation_is_reported(finished: Path) -> None:
    for kind in files_by_kind(finished):
        assert unseen(finished, kind, cuts)[1] == []


def test_every_missing_file_is_reported(finished: Path) -> None:
    for path in finished.rglob("*"):
        if path.is_file() and path.name != "CURRENT" and (finished / "CURRENT").exists():
            path.rename(finished / ".away")
            assert not seen(finished).ok, path
            (finished / ".away").rename(path)
    assert seen(finished).ok


@pytest.mark.parametrize("kind", ["objects", "commits", "keys"])
def test_files_that_are_swapped_or_stand_under_another_name_are_reported(finished: Path, kind: str) -> None:
    files = files_by_kind(finished)[kind]
    for one, two in itertools.combinations(files, 2):
        a, b = one.read_bytes(), two.read_bytes()
        assert a != b and with_bytes(one, b, finished) and with_bytes(two, a, finished)
        one.write_bytes(b)
        assert with_bytes(two, a, finished), f"{one.name} and {two.name} swapped"
        one.write_bytes(a)
    assert seen(finished).ok


def test_a_commit_beside_those_of_the_plan_is_reported_before_sealing(finished: Path) -> None:
    commit = files_by_kind(finished)["commits"][0]
    unit = commit.name.replace("train-v000000", "train-v000009")
    (commit.parent / unit).write_bytes(commit.read_bytes())
    assert [damage.kind for damage in seen(finished).damaged] == ["stray"]
