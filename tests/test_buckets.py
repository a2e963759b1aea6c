"""Caches in buckets: a real S3 service on loopback, with replies that fail, get lost or come late."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import buckets
import pytest
from buckets import FAULTS, Proxy
from conftest import Cli
from small import a_plan, put_item

from ensemble_distill.cache.commits import committed_units
from ensemble_distill.cache.verify import verify
from ensemble_distill.errors import StorageError, UsageError
from ensemble_distill.recording.seal import seal
from ensemble_distill.store import remote
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.remote import RemoteStorage
from ensemble_distill.store.store import Store, open_storage


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with buckets.s3_server() as port:
        yield port


@pytest.fixture
def proxy(server: int) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.close()


def storage(proxy: Proxy, folder: str) -> RemoteStorage:
    return RemoteStorage(f"s3://{buckets.BUCKET}/{folder}", sleep=lambda seconds: None, **buckets.options(proxy.port))


def fill(store: Store, by: str = "") -> int:
    """Capture the small cache; how many units this writer committed."""
    plan = a_plan()
    digest = store.put_plan(plan)
    return sum(sum(put_item(store, plan, digest, item, by)) for item in plan.items())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = Store(LocalStorage(tmp_path_factory.mktemp("undisturbed") / "c"))
    fill(store)
    return store.manifest(seal(a_plan(), str(store.plan_digest()), store)).content_digest


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD"])
def test_every_kind_of_failed_reply_to_every_kind_of_request(proxy: Proxy, fault: str, method: str) -> None:
    """The first three requests of a kind fail; what was done is recognised as done."""
    place, failed = storage(proxy, f"{fault}-{method}".replace(" ", "-")), []

    def schedule(found: str, path: str, n: int) -> str:
        if found != method or len(failed) >= 3:
            return ""
        failed.append(n)
        return fault

    proxy.schedule = schedule
    assert place.create("x", b"mine") is True
    assert place.create("x", b"yours") is False
    assert place.read("x") == b"mine" and place.size("x") == 4 and place.size("y") is None
    assert len(failed) == 3


@pytest.mark.parametrize("seed", range(4))
def test_a_cache_comes_out_the_same_whatever_the_schedule(proxy: Proxy, undisturbed: str, seed: int) -> None:
    """A fifth of all requests fail, before or after they did their work; two writers at once."""
    chance = random.Random(seed)
    proxy.schedule = lambda method, path, n: chance.choice(FAULTS) if chance.random() < 0.2 else ""
    created = []
    threads = [
        threading.Thread(target=lambda by=by: created.append(fill(Store(storage(proxy, f"s{seed}")), by)))
        for by in ("a", "b")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store(storage(proxy, f"s{seed}"))
    assert len(created) == 2 and sum(created) == a_plan().units  # each unit was committed by one of the two
    assert committed_units(store, a_plan()).all()
    digest = seal(a_plan(), str(store.plan_digest()), store)
    assert store.manifest(digest).content_digest == undisturbed
    assert verify(store).ok and proxy.faults > 0


def test_of_many_racing_writers_exactly_one_creates(proxy: Proxy) -> None:
    won = []
    threads = [
        threading.Thread(target=lambda i=i: won.append(storage(proxy, "race").create("x", b"%d" % i)))
        for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 15 + [True]


def test_a_service_that_stays_away_is_a_storage_error(proxy: Proxy) -> None:
    proxy.schedule = lambda method, path, n: "503 before"
    with pytest.raises(StorageError, match="s3://bucket/gone/x") as error:
        storage(proxy, "gone").create("x", b"")
    assert error.value.exit_code == 6 and error.value.hint


def test_waits_grow_and_are_spread(proxy: Proxy) -> None:
    waits: list[float] = []
    place = RemoteStorage("s3://bucket/w", sleep=waits.append, **buckets.options(proxy.port))
    proxy.schedule = lambda method, path, n: "503 before"
    with pytest.raises(StorageError):
        place.read("x")
    assert len(waits) == remote.ATTEMPTS - 1
    for i, wait in enumerate(waits):
        longest = min(remote.LONGEST_WAIT, remote.FIRST_WAIT * 2**i)
        assert longest / 2 <= wait <= longest


def test_a_large_shard_goes_up_in_parts(proxy: Proxy) -> None:
    methods: list[str] = []
    proxy.schedule = lambda method, path, n: methods.append(method) or ""  # type: ignore[func-returns-value]
    data = bytes(101 << 20)
    place = storage(proxy, "large")
    assert place.create("x", data) and not place.create("x", b"other")
    assert methods.count("POST") >= 2 and methods.count("PUT") >= 3
    assert place.size("x") == len(data)


def test_a_protocol_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as error:
        open_storage("nosuch://bucket/x")
    assert "s3://" in error.value.hint


def test_capture_train_copy_and_verify_from_a_bucket(cached: Cli, server: int, proxy: Proxy) -> None:
    """The commands as a user types them, three requests in a hundred failing."""
    chance = random.Random(0)
    proxy.schedule = lambda method, path, n: chance.choice(FAULTS) if chance.random() < 0.03 else ""
    env = buckets.environment(proxy.port)
    url = f"s3://{buckets.BUCKET}/caches/digits"
    cached("cache", "digits.py", "--out", url, **env)
    local = json.loads(cached("inspect", "cache", "--json").stdout)
    there = json.loads(cached("inspect", url, "--json", **env).stdout)
    assert there["content_digest"] == local["content_digest"]
    copies = ("--copies", "copies", "--copies-size", 1)
    cached("train", "digits.py:other", "--cache", url, "--out", "run", *copies, **env)
    assert any((cached.folder / "copies").iterdir())
    asked: list[str] = []
    proxy.schedule = lambda method, path, n: asked.append(path) or ""  # type: ignore[func-returns-value]
    cached("train", "digits.py:other", "--cache", url, "--out", "run2", *copies, **env)
    assert not [path for path in asked if "/objects/" in path or "/pages/" in path], "they come from the disk"
    proxy.schedule = lambda method, path, n: ""
    cached("copy", url, "copied", "--expect-digest", there["manifest_digest"], **env)
    assert there["manifest_digest"] in cached("verify", "copied", "--deep").stdout
    weights = [(cached.folder / name / "student.safetensors").read_bytes() for name in ("run", "run2")]
    assert weights[0] == weights[1]


class Late(LocalStorage):
    """A listing that is behind: it leaves out every other name for ever."""

    def list(self, folder: str) -> Iterator[str]:
        return iter(sorted(super().list(folder))[::2])


def test_a_listing_that_is_behind_costs_no_unit(tmp_path: Path, undisturbed: str) -> None:
    """The plan says what must exist: what a listing leaves out is asked for by name."""
    import numpy as np

    store = Store(Late(tmp_path))
    fill(store)
    done = np.array([store.is_committed(a_plan().unit_name(n)) for n in range(a_plan().units)])
    digest = seal(a_plan(), str(store.plan_digest()), store, done)
    assert store.manifest(digest).content_digest == undisturbed
