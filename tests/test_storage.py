"""What every storage promises, whichever it is; what a local one refuses; leases; the bounded copy of a bucket."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import buckets
import numpy as np
import pytest
from buckets import Raw, Service
from faulty import FaultySystem

from ensemble_distill.errors import Corrupt, StorageError, Unsafe
from ensemble_distill.fingerprint import sha256
from ensemble_distill.store import leases, records
from ensemble_distill.store.caching import CachedStorage
from ensemble_distill.store.leases import Lease, Leases
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.remote import RemoteStorage
from ensemble_distill.store.storage import Storage
from ensemble_distill.store.store import Store

OUTSIDE = (
    "../x", "/etc/passwd", "a//b", "a/../../b", "a/..", ".", "..", "a\0b", "a\n", ".hidden", "a/.hidden", "a\\b",
    "s3://b", "", "/", "a/", "~/x", "a b", "ä", "x" * 513,
)  # fmt: skip


class StorageContract:
    """The eight operations. ``raw_write`` and ``raw_read`` go round the code under test.

    racing: whether of many swaps at once one succeeds.
    """

    racing: ClassVar[bool] = True

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        raise NotImplementedError

    def raw_write(self, name: str, data: bytes) -> None:
        raise NotImplementedError

    def raw_read(self, name: str) -> bytes | None:
        raise NotImplementedError

    def test_create_writes_once(self, storage: Storage) -> None:
        assert storage.create("a/b", b"first") is True
        assert self.raw_read("a/b") == b"first"
        assert storage.create("a/b", b"second") is False
        assert self.raw_read("a/b") == b"first"

    def test_create_leaves_alone_what_another_wrote(self, storage: Storage) -> None:
        self.raw_write("a/b", b"theirs")
        assert storage.create("a/b", b"ours") is False
        assert self.raw_read("a/b") == b"theirs"

    def test_a_name_that_was_removed_can_be_created_again(self, storage: Storage) -> None:
        storage.create("a/b", b"first")
        storage.remove("a/b")
        assert storage.create("a/b", b"second") is True
        assert self.raw_read("a/b") == b"second"

    def test_replace_writes_whole_over_what_was_there(self, storage: Storage) -> None:
        storage.replace("a/b", b"a long text")
        assert self.raw_read("a/b") == b"a long text"
        storage.replace("a/b", b"short")
        assert self.raw_read("a/b") == b"short"
        assert list(storage.list("a")) == ["a/b"]

    def test_swap_writes_over_what_is_expected_only(self, storage: Storage) -> None:
        assert storage.swap("a/b", b"none", b"first") is False and self.raw_read("a/b") is None
        assert storage.swap("a/b", None, b"first") is True
        assert self.raw_read("a/b") == b"first"
        for expected in (None, b"", b"firs", b"first.", b"other"):
            assert storage.swap("a/b", expected, b"second") is False
            assert self.raw_read("a/b") == b"first"
        assert storage.swap("a/b", b"first", b"a longer second") is True
        assert self.raw_read("a/b") == b"a longer second"
        assert storage.swap("a/b", b"a longer second", b"") is True
        assert self.raw_read("a/b") == b""
        assert storage.swap("a/b", b"", b"third") is True
        assert self.raw_read("a/b") == b"third" and list(storage.list("a")) == ["a/b"]

    def test_swap_sees_what_others_wrote(self, storage: Storage) -> None:
        self.raw_write("a/b", b"theirs")
        assert storage.swap("a/b", None, b"ours") is False
        assert storage.swap("a/b", b"theirs", b"ours") is True
        self.raw_write("a/b", b"theirs again, and much longer")
        assert storage.swap("a/b", b"ours", b"new") is False
        assert self.raw_read("a/b") == b"theirs again, and much longer"
        storage.remove("a/b")
        assert storage.swap("a/b", b"ours", b"new") is False and self.raw_read("a/b") is None

    def test_to_swap_in_what_stands_there_is_done_already(self, storage: Storage) -> None:
        self.raw_write("a/b", b"new")
        for expected in (None, b"old", b"new"):
            assert storage.swap("a/b", expected, b"new") is True
            assert self.raw_read("a/b") == b"new"

    def test_of_many_swaps_at_once_one_succeeds(self, storage: Storage) -> None:
        if not self.racing:
            pytest.skip("it does not tell two writers at once apart")
        held: bytes | None = None
        for turn in range(3):
            won, start = [], threading.Barrier(6)

            def swap(data: bytes, expected: bytes | None, won: list[bytes], start: threading.Barrier) -> None:
                start.wait()
                if storage.swap("a/b", expected, data):
                    won.append(data)

            threads = [threading.Thread(target=swap, args=(b"%d %d" % (turn, i), held, won, start)) for i in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            held = self.raw_read("a/b")
            assert won == [held]

    @pytest.mark.parametrize("size", [0, 1, 4096, 3_000_001])
    def test_what_is_written_is_read_whole(self, storage: Storage, size: int) -> None:
        data = np.random.default_rng(size).bytes(size)
        storage.create("one", data)
        storage.replace("deep/er/two", data)
        assert self.raw_read("one") == storage.read("one") == data
        assert storage.read("deep/er/two") == data
        assert storage.size("one") == storage.size("deep/er/two") == size

    def test_what_another_wrote_is_read(self, storage: Storage) -> None:
        storage.create("a/b", b"old")
        assert storage.read("a/b") == b"old"
        self.raw_write("a/b", b"newer")
        self.raw_write("a/c", b"new")
        assert storage.read("a/b") == b"newer" and storage.size("a/b") == 5
        assert sorted(storage.list("a")) == ["a/b", "a/c"]

    def test_more_than_there_may_be_is_refused(self, storage: Storage) -> None:
        self.raw_write("a/b", b"12345")
        assert storage.read("a/b", 5) == b"12345"
        for at_most in (0, 1, 4):
            with pytest.raises(Unsafe, match=r"at most|more than"):
                storage.read("a/b", at_most)
        self.raw_write("a/empty", b"")
        assert storage.read("a/empty", 0) == b""

    def test_what_is_missing_is_named(self, storage: Storage) -> None:
        storage.create("a/b", b"")
        for name in ("a/c", "c", "c/d"):
            with pytest.raises(Corrupt, match=f"{name} is missing"):
                storage.read(name)
            assert storage.size(name) is None

    def test_a_folder_has_no_size(self, storage: Storage) -> None:
        storage.create("a/b", b"1")
        assert storage.size("a") is None

    def test_listing_gives_direct_plain_names_only(self, storage: Storage) -> None:
        for name in ("a/one", "a/two.json", "a/.hidden", "a/deeper/three", "ab/four", "five"):
            self.raw_write(name, b"x")
        assert {"a/one", "a/two.json"} <= set(storage.list("a")) <= {"a/one", "a/two.json", "a/deeper"}
        assert list(storage.list("nothing")) == []

    def test_removing_twice_is_as_removing_once(self, storage: Storage) -> None:
        storage.remove("a/b")
        storage.create("a/b", b"1")
        storage.create("a/c", b"2")
        for _ in range(2):
            storage.remove("a/b")
            assert self.raw_read("a/b") is None and list(storage.list("a")) == ["a/c"]

    @pytest.mark.parametrize("name", OUTSIDE)
    def test_names_cannot_lead_outside(self, storage: Storage, name: str) -> None:
        calls = (
            storage.read, storage.size, storage.remove, lambda n: list(storage.list(n)),
            lambda n: storage.create(n, b""), lambda n: storage.replace(n, b""),
            lambda n: storage.swap(n, None, b""),
        )  # fmt: skip
        for call in calls:
            with pytest.raises(Unsafe, match="no name"):
                call(name)

    def test_free_space_is_a_number_or_unknown(self, storage: Storage) -> None:
        free = storage.free()
        assert free is None or free > 0

    def test_it_says_where_it_is(self, storage: Storage) -> None:
        with pytest.raises(Corrupt) as error:
            storage.read("a/b")
        assert str(error.value).startswith(storage.root)


class TestLocal(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        self.folder = tmp_path / "new" / "place"
        return LocalStorage(self.folder)

    def raw_write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def raw_read(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.exists() else None

    def test_no_temporary_is_left(self, storage: Storage) -> None:
        storage.create("a/b", b"1")
        storage.create("a/b", b"2")
        storage.replace("a/b", b"3")
        assert [p.name for p in (self.folder / "a").iterdir()] == ["b"]

    def test_of_many_writers_one_creates(self, storage: Storage) -> None:
        won: list[bytes] = []
        start = threading.Barrier(8)

        def write(data: bytes) -> None:
            start.wait()
            if storage.create("a/b", data):
                won.append(data)

        threads = [threading.Thread(target=write, args=(b"%d" % i * 5000,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [self.raw_read("a/b")]
        assert [p.name for p in (self.folder / "a").iterdir()] == ["b"]


class TestMemory(StorageContract):
    racing = False

    @pytest.fixture
    def storage(self) -> Storage:
        self.at = f"/{uuid.uuid4().hex}"
        storage = RemoteStorage(f"memory:/{self.at}", sleep=lambda seconds: None)
        self.fs = storage.fs
        return storage

    def raw_write(self, name: str, data: bytes) -> None:
        from fsspec.implementations.memory import MemoryFile

        path = f"{self.at}/{name}"
        file = MemoryFile(self.fs, path, data)
        file.seek(0)
        self.fs.store[path] = file

    def raw_read(self, name: str) -> bytes | None:
        file = self.fs.store.get(f"{self.at}/{name}")
        return None if file is None else file.getvalue()


class InBucket(StorageContract):
    """A service on loopback."""

    scheme: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def port(cls) -> Iterator[int]:
        with buckets.SERVERS[cls.scheme]() as port:
            yield port

    @pytest.fixture
    def storage(self, port: int) -> Iterator[Storage]:
        self.raw, self.folder = Raw(self.scheme, port), uuid.uuid4().hex
        service = Service(self.scheme, port)
        yield service.storage(self.folder)
        service.close()

    def raw_write(self, name: str, data: bytes) -> None:
        self.raw.write(f"{self.folder}/{name}", data)

    def raw_read(self, name: str) -> bytes | None:
        return self.raw.read(f"{self.folder}/{name}")


class TestS3(InBucket):
    scheme = "s3"


class TestGoogle(InBucket):
    scheme = "gs"


class TestCached(TestLocal):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        self.folder = tmp_path / "new" / "place"
        return CachedStorage(LocalStorage(self.folder), tmp_path / "copies", 10_000)


# Local ----------------------------------------------------------------------------------------------


def test_durable_means_file_then_name_then_directory(tmp_path: Path) -> None:
    """The order of calls of a create: losing any of them would lose acknowledged data."""
    system = FaultySystem()
    storage = LocalStorage(tmp_path, system)
    storage.create("x", b"1")
    # first the directory itself, which somebody may have made and died before it was durable
    assert system.calls == ["sync_directory", "open_new", "write", "sync", "close", "link", "unlink", "sync_directory"]
    system.calls.clear()
    storage.create("x", b"1")
    assert system.calls == ["sync_directory"]  # somebody else's link may not be durable yet
    system.calls.clear()
    storage.replace("x", b"2")
    assert [c for c in system.calls if c in ("sync", "rename", "sync_directory")] == [
        "sync",
        "rename",
        "sync_directory",
    ]
    system.calls.clear()
    storage.remove("x")
    assert system.calls == ["unlink", "sync_directory"]
    system.calls.clear()
    storage.create("a/b/c", b"1")
    assert system.calls[:4] == ["mkdir", "sync_directory"] * 2


def test_a_swap_is_as_durable_as_a_replace(tmp_path: Path) -> None:
    system = FaultySystem()
    storage = LocalStorage(tmp_path, system)
    storage.create("x", b"1")
    system.calls.clear()
    assert storage.swap("x", b"1", b"2")
    assert system.calls[-7:] == ["open_new", "write", "sync", "close", "rename", "sync_directory", "unlink"]
    system.calls.clear()
    assert storage.swap("x", b"1", b"2")
    assert system.calls[-1] == "sync_directory"  # somebody else's rename may not be durable yet
    assert "write" not in system.calls
    system.calls.clear()
    assert not storage.swap("x", b"1", b"3")
    assert not {"write", "rename"} & set(system.calls)


def test_a_swap_waits_for_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that both saw what they expected would both write."""
    storage, inside, held = LocalStorage(tmp_path), [], LocalStorage._held
    storage.create("x", b"0")

    def slow(self: LocalStorage, name: str, at_most: int) -> bytes | None:
        inside.append(name)
        assert len(inside) == 1, "two at once"
        time.sleep(0.05)
        found = held(self, name, at_most)
        inside.pop()
        return found

    monkeypatch.setattr(LocalStorage, "_held", slow)
    won: list[bool] = []
    threads = [threading.Thread(target=lambda i=i: won.append(storage.swap("x", b"0", b"%d" % i))) for i in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False, False, True]


def test_a_folder_that_cannot_be_locked_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    storage = LocalStorage(tmp_path)
    assert storage.swap("x", None, b"1") and storage.swap("x", b"1", b"2") and storage.read("x") == b"2"


def test_a_system_syncs_files_and_directories_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())), fsync(fd)))
    LocalStorage(tmp_path).create("x", b"1")
    assert len(synced) == 3 and synced[1].endswith(".part")
    assert (synced[0], synced[2]) == (str(tmp_path.parent), str(tmp_path))


def test_without_sync_there_is_none(tmp_path: Path) -> None:
    system = FaultySystem()
    storage = LocalStorage(tmp_path, system, sync=False)
    storage.create("a/x", b"1")
    storage.replace("a/x", b"2")
    storage.remove("a/x")
    assert not {"sync", "sync_directory"} & set(system.calls)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", range(1, 6))
def test_errors_of_the_disk_are_one_sentence_and_leave_nothing(tmp_path: Path, number: int, call: int) -> None:
    system = FaultySystem(number, call)
    with pytest.raises(StorageError, match=os.strerror(number)) as error:
        LocalStorage(tmp_path, system).create("x", b"data")
    assert error.value.exit_code == 6 and error.value.hint
    assert "\n" not in str(error.value) and str(tmp_path / "x") in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A folder outside of the storage, with files that nobody may read, change or delete."""
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    for name in ("b", "deep/b"):
        (outside / name).write_bytes(b"canary")
    yield outside
    assert sorted(str(p.relative_to(outside)) for p in outside.rglob("*")) == ["b", "deep", "deep/b"]
    assert (outside / "b").read_bytes() == (outside / "deep" / "b").read_bytes() == b"canary"


@pytest.fixture
def local(tmp_path: Path, canary: Path) -> LocalStorage:
    """A storage in which a stranger left a link to a file, one to a folder, a pipe and a folder."""
    storage = LocalStorage(tmp_path / "cache")
    storage.create("a/plain", b"1")
    folder = storage.path
    (folder / "a" / "link").symlink_to(canary / "b")
    (folder / "a" / "dangling").symlink_to(canary / "none")
    (folder / "folder").symlink_to(canary)
    os.mkfifo(folder / "a" / "pipe")
    (folder / "a" / "directory").mkdir()
    return storage


@pytest.mark.parametrize("name", ["a/link", "a/dangling", "folder/b", "folder/deep/b", "a/pipe", "a/directory"])
def test_what_is_no_plain_file_is_not_read(local: LocalStorage, name: str) -> None:
    with pytest.raises(Unsafe, match=r"no plain file|is a link"):
        local.read(name)


def test_a_file_where_a_folder_should_be_is_refused(local: LocalStorage) -> None:
    with pytest.raises(Unsafe, match="no plain file"):
        local.read("a/plain/b")
    assert local.size("a/plain/b") is None and list(local.list("a/plain")) == []


@pytest.mark.parametrize("name", ["a/link", "a/dangling", "a/pipe", "a/directory"])
def test_what_is_no_plain_file_has_no_size_and_is_not_written(local: LocalStorage, name: str) -> None:
    assert local.size(name) is None
    assert local.create(name, b"ours") is False


@pytest.mark.parametrize("name", ["a/link", "a/dangling", "a/pipe", "a/directory", "folder/b"])
def test_what_is_no_plain_file_is_not_swapped(local: LocalStorage, name: str) -> None:
    for expected in (None, b"canary"):
        with pytest.raises(Unsafe):
            local.swap(name, expected, b"ours")


@pytest.mark.parametrize("name", ["a/link", "a/dangling", "a/pipe"])
def test_replace_and_remove_act_on_the_link_itself(local: LocalStorage, name: str) -> None:
    local.replace(name, b"ours")
    assert local.read(name) == b"ours"
    local.remove(name)
    assert not os.path.lexists(local.path / name)


def test_a_socket_is_refused(local: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.chdir(local.path / "a")  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        with pytest.raises(Unsafe):
            local.read("a/socket")


@pytest.mark.parametrize("name", ["folder/new", "folder/deep/new", "folder/new/new", "folder/b"])
def test_nothing_is_written_through_a_linked_folder(local: LocalStorage, name: str) -> None:
    with contextlib.suppress(Unsafe):
        assert local.create(name, b"ours") is False
    with pytest.raises(Unsafe):
        local.replace(name, b"ours")


@pytest.mark.parametrize("name", ["folder/b", "folder/deep/b"])
def test_nothing_is_removed_through_a_linked_folder(local: LocalStorage, name: str) -> None:
    with contextlib.suppress(Unsafe):
        local.remove(name)
    assert (local.path / name).exists()


def test_a_linked_folder_is_not_listed(local: LocalStorage) -> None:
    found: list[str] = []
    with contextlib.suppress(Unsafe):
        found += local.list("folder")
    assert found == []


def test_the_root_may_be_a_link(tmp_path: Path, local: LocalStorage) -> None:
    (tmp_path / "short").symlink_to(local.path)
    linked = LocalStorage(tmp_path / "short")
    assert linked.read("a/plain") == b"1"
    assert linked.create("top", b"2") and linked.create("new/one", b"3")
    assert local.read("new/one") == b"3"


def test_temporaries_of_killed_writers_are_found_and_never_listed(local: LocalStorage) -> None:
    left = local.path / "a" / ".x.0123456789ab.part"
    left.write_bytes(b"torn")
    (local.path / "a" / ".y.0123456789ab.part").symlink_to("nowhere")
    (local.path / "a" / ".z.part").mkdir()
    assert list(local.temporaries("a")) == ["a/.x.0123456789ab.part"] and not list(local.temporaries("b"))
    assert "a/plain" in set(local.list("a")) and not any("part" in name for name in local.list("a"))


# Leases ---------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "cache", sync=False)


def elsewhere(storage: Storage, clock: Clock, monkeypatch: pytest.MonkeyPatch, name: str = "elsewhere") -> Leases:
    """A worker of another machine."""
    with monkeypatch.context() as patch:
        patch.setattr(leases, "_machine", lambda: name)
        return Leases(storage, ttl=60, clock=clock)


def test_one_worker_claims_and_others_are_refused(storage: LocalStorage, clock: Clock) -> None:
    one, other = Leases(storage, clock=clock), Leases(storage, clock=clock)
    assert one.claim("item") and not other.claim("item") and other.claim("another")
    assert sorted(one.live()) == sorted(other.live()) == ["another", "item"]
    one.release("item")
    assert other.claim("item") and not one.claim("item")


def test_leases_are_given_back_on_leaving(storage: LocalStorage, clock: Clock) -> None:
    one = Leases(storage, ttl=1e6, clock=clock)
    with one.renewing():
        assert one.claim("a") and one.claim("b")
    assert list(storage.list("leases")) == []


@pytest.mark.parametrize("here", [True, False])
def test_a_lease_that_does_not_change_for_its_time_expires(
    storage: LocalStorage, clock: Clock, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    """Also one of a process of this machine that lives: it may hang."""
    silent = Leases(storage, ttl=60, clock=clock) if here else elsewhere(storage, clock, monkeypatch)
    watcher = Leases(storage, ttl=60, clock=clock)
    assert silent.claim("item")
    assert not watcher.claim("item")  # seen for the first time now, however long it may have stood
    clock.now += 59.9
    assert not watcher.claim("item") and watcher.live() == ["item"]
    clock.now += 0.1
    assert watcher.live() == []
    assert watcher.claim("item") and not silent.claim("item")


def test_a_lease_that_is_renewed_does_not_expire(
    storage: LocalStorage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, watcher = elsewhere(storage, clock, monkeypatch), Leases(storage, ttl=60, clock=clock)
    assert busy.claim("item")
    for _ in range(10):
        assert not watcher.claim("item")
        clock.now += 40
        before = storage.read("leases/item")
        busy.renew()
        assert storage.read("leases/item") != before


def test_another_clock_does_not_matter(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    early, late = Clock(), Clock()
    late.now = 1e9
    one, two = elsewhere(storage, early, monkeypatch), Leases(storage, ttl=60, clock=late)
    assert one.claim("item") and not two.claim("item")


def test_the_lease_of_a_process_that_is_gone_is_taken_at_once(storage: LocalStorage, clock: Clock) -> None:
    code = (
        "import sys; from ensemble_distill.store.leases import Leases\n"
        "from ensemble_distill.store.local import LocalStorage\n"
        "assert Leases(LocalStorage(sys.argv[1], sync=False)).claim('item')"
    )
    subprocess.run([sys.executable, "-c", code, storage.root], check=True)
    assert list(storage.list("leases")) == ["leases/item"]
    assert Leases(storage, clock=clock).claim("item")


def test_a_process_number_that_is_used_again_is_another_process(storage: LocalStorage, clock: Clock) -> None:
    mine = leases._process(os.getpid())
    assert mine.startswith(f"{os.getpid()}:")
    old = Lease(owner="0" * 16, machine=leases._machine(), process=f"{os.getpid()}:1")
    storage.create("leases/item", records.dump(old))
    assert Leases(storage, clock=clock).claim("item")


@pytest.mark.parametrize("data", [b"", b"garbage", b"{}", b"\xff" * 100, b'{"owner":"x"}'])
def test_a_lease_of_garbage_expires_as_any_other(storage: LocalStorage, clock: Clock, data: bytes) -> None:
    storage.create("leases/item", data)
    one = Leases(storage, ttl=60, clock=clock)
    assert not one.claim("item")
    clock.now += 60
    assert one.claim("item")


def test_what_is_no_lease_at_all_is_taken_at_once(storage: LocalStorage, clock: Clock, tmp_path: Path) -> None:
    storage.create("leases/large", b"x" * 5000)
    (tmp_path / "canary").write_bytes(b"canary")
    (storage.path / "leases" / "link").symlink_to(tmp_path / "canary")
    os.mkfifo(storage.path / "leases" / "pipe")
    one = Leases(storage, clock=clock)
    assert one.live() == []
    assert one.claim("large") and one.claim("link") and one.claim("pipe")
    assert (tmp_path / "canary").read_bytes() == b"canary"


def test_a_lease_that_cannot_be_renewed_stops_nobody(tmp_path: Path, clock: Clock) -> None:
    system = FaultySystem(errno.ENOSPC)
    one = Leases(LocalStorage(tmp_path, system, sync=False), clock=clock)
    assert one.claim("item")
    system.at = len(system.calls)
    one.renew()
    assert one.live() == ["item"]


def test_a_worker_that_wakes_late_does_no_harm(
    storage: LocalStorage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both do the item; the first commit wins, and the second is told so."""
    store = Store(storage)
    late, watcher = elsewhere(storage, clock, monkeypatch), Leases(storage, ttl=60, clock=clock)
    assert late.claim("item") and not watcher.claim("item")
    clock.now += 61
    assert watcher.claim("item")
    rows = np.zeros(4, [("x", "<f2", (2,))])
    first, won = store.put_unit("p", "u-0", rows, "hdf5", "0" * 64, None, {"by": "watcher"})
    assert won
    late.renew()
    rows["x"] += 1
    assert not store.put_unit("p", "u-0", rows, "hdf5", "0" * 64, None, {"by": "late"})[1]
    late.release("item")
    watcher.renew()
    watcher.release("item")
    assert store.commit("u-0") == first and store.object(first)
    assert list(storage.list("leases")) == []


def test_leases_work_in_a_bucket_too(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = RemoteStorage(f"memory://{uuid.uuid4().hex}", sleep=lambda seconds: None)
    one, watcher = elsewhere(bucket, clock, monkeypatch), Leases(bucket, ttl=60, clock=clock)
    assert one.claim("item") and not watcher.claim("item")
    clock.now += 61
    assert watcher.claim("item") and not one.claim("item")


def test_a_pointer_that_others_change_all_the_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = RemoteStorage(f"memory://{uuid.uuid4().hex}", sleep=lambda seconds: None)
    bucket.create("CURRENT", b"before")
    tried = []

    def overtaken(path: str, version: str, data: bytes) -> None:
        tried.append(path)
        raise FileExistsError

    monkeypatch.setattr(bucket, "_put_over", overtaken)
    with pytest.raises(StorageError, match="CURRENT: it changes all the time"):
        bucket.swap("CURRENT", b"before", b"after")
    assert len(tried) == 8 and bucket.read("CURRENT") == b"before"


# Copies of a bucket ---------------------------------------------------------------------------------


class Counting(LocalStorage):
    """Counts the reads of each name."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: list[str] = []

    def read(self, name: str, at_most: int = 1 << 30) -> bytes:
        self.reads.append(name)
        return super().read(name, at_most)


def shard(storage: Storage, seed: int, size: int = 1000) -> tuple[str, bytes]:
    data = np.random.default_rng(seed).bytes(size)
    name = f"objects/{records.root_hash(records.block_hashes(data))}.h5"
    storage.create(name, data)
    return name, data


@pytest.fixture
def bucket(tmp_path: Path) -> Counting:
    return Counting(tmp_path / "bucket")


def test_shards_and_pages_are_fetched_once(bucket: Counting, tmp_path: Path) -> None:
    cached = CachedStorage(bucket, tmp_path / "copies", 10_000)
    name, data = shard(bucket, 0)
    page = f"pages/{sha256(b'page')}.json"
    bucket.create(page, b"page")
    bucket.create("CURRENT", b"x")
    for _ in range(3):
        assert cached.read(name) == data and cached.read(page) == b"page" and cached.read("CURRENT") == b"x"
    assert sorted(bucket.reads) == sorted([name, page] + ["CURRENT"] * 3)
    other = CachedStorage(bucket, tmp_path / "copies", 10_000)  # another process
    assert other.read(name) == data and len(bucket.reads) == 5
    with pytest.raises(Unsafe):
        cached.read(name, 999)


def test_copies_stay_within_their_bound_and_the_least_recently_used_go_first(bucket: Counting, tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    cached = CachedStorage(bucket, folder, 3500)
    names = [shard(bucket, seed)[0] for seed in range(4)]
    for age, name in enumerate(names[:3]):
        cached.read(name)
        os.utime(folder / name.replace("/", "-"), (age, age))  # long ago, in this order: the clock is coarse
    cached.read(names[0])  # used now
    cached.read(names[3])
    held = {name for name in names if (folder / name.replace("/", "-")).exists()}
    assert held == {names[0], names[2], names[3]}
    for seed in range(20):
        cached.read(shard(bucket, seed, 700)[0])
        assert sum(p.stat().st_size for p in folder.iterdir()) <= 3500


@pytest.mark.parametrize("damage", [b"", b"x", b"x" * 1000, b"x" * 20_000])
def test_a_damaged_copy_is_fetched_again(bucket: Counting, tmp_path: Path, damage: bytes) -> None:
    cached = CachedStorage(bucket, tmp_path / "copies", 10_000)
    name, data = shard(bucket, 0)
    cached.read(name)
    (tmp_path / "copies" / name.replace("/", "-")).write_bytes(damage)
    assert cached.read(name) == data and len(bucket.reads) == 2
    assert cached.read(name) == data and len(bucket.reads) == 2


def test_what_is_damaged_in_the_bucket_is_not_kept(bucket: Counting, tmp_path: Path) -> None:
    cached = CachedStorage(bucket, tmp_path / "copies", 10_000)
    name, data = shard(bucket, 0)
    (bucket.path / name).write_bytes(b"bad")
    assert cached.read(name) == b"bad"
    (bucket.path / name).write_bytes(data)
    assert cached.read(name) == data


def test_what_is_larger_than_the_bound_passes_through(bucket: Counting, tmp_path: Path) -> None:
    cached = CachedStorage(bucket, tmp_path / "copies", 999)
    name, data = shard(bucket, 0)
    assert cached.read(name) == cached.read(name) == data and len(bucket.reads) == 2
    assert not (tmp_path / "copies").exists() or not list((tmp_path / "copies").iterdir())


def test_a_full_disk_costs_only_the_copy(bucket: Counting, tmp_path: Path) -> None:
    cached = CachedStorage(bucket, tmp_path / "copies", 10_000)
    (tmp_path / "copies").write_bytes(b"a file where the folder should be")
    name, data = shard(bucket, 0)
    assert cached.read(name) == cached.read(name) == data
