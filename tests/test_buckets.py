"""Caches in buckets: services of S3 and of Google Cloud Storage on loopback, with replies that fail or get lost."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import buckets
import pytest
from buckets import FAULTS, Raw, Service
from conftest import Cli
from small import a_plan, put_item

from ensemble_distill.cache.commits import committed_units
from ensemble_distill.cache.copy import copy
from ensemble_distill.cache.verify import verify
from ensemble_distill.errors import StorageError, UsageError
from ensemble_distill.recording.seal import seal
from ensemble_distill.store import remote
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.remote import RemoteStorage
from ensemble_distill.store.store import Store, open_storage


@pytest.fixture(scope="module", params=buckets.SCHEMES)
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    with buckets.SERVERS[request.param]() as port:
        yield request.param, port


@pytest.fixture
def service(server: tuple[str, int]) -> Iterator[Service]:
    service = Service(*server)
    yield service
    service.close()


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


WRITES = {"s3": "PUT", "gs": "POST"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", ["write", "GET", "HEAD", "DELETE"])
def test_every_kind_of_failed_reply_to_every_kind_of_request(service: Service, fault: str, method: str) -> None:
    """The first three requests of a kind fail; what was done is recognised as done."""
    place, failed = service.storage(f"{fault}-{method}".replace(" ", "-")), []
    wanted = WRITES[service.scheme] if method == "write" else method

    def schedule(found: str, path: str, n: int) -> str:
        if found != wanted or len(failed) >= 3:
            return ""
        failed.append(n)
        return fault

    service.proxy.schedule = schedule
    assert place.create("x", b"mine") is True
    assert place.create("x", b"yours") is False
    assert place.read("x") == b"mine" and place.size("x") == 4 and place.size("y") is None
    assert place.swap("x", b"mine", b"again") is True
    assert place.swap("x", b"mine", b"never") is False
    place.replace("x", b"at last")
    assert place.read("x") == b"at last"
    place.remove("x")
    assert place.size("x") is None
    assert len(failed) == (0 if (service.scheme, method) == ("gs", "HEAD") else 3)


@pytest.mark.parametrize("seed", range(4))
def test_a_cache_comes_out_the_same_whatever_the_schedule(service: Service, undisturbed: str, seed: int) -> None:
    """A fifth of all requests fail, before or after they did their work; two writers at once."""
    chance = random.Random(seed)
    service.proxy.schedule = lambda method, path, n: chance.choice(FAULTS) if chance.random() < 0.2 else ""
    created = []
    threads = [
        threading.Thread(target=lambda by=by: created.append(fill(Store(service.storage(f"s{seed}")), by)))
        for by in ("a", "b")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store(service.storage(f"s{seed}"))
    assert len(created) == 2 and sum(created) == a_plan().units  # each unit was committed by one of the two
    assert committed_units(store, a_plan()).all()
    digest = seal(a_plan(), str(store.plan_digest()), store)
    assert store.manifest(digest).content_digest == undisturbed
    assert verify(store).ok and service.proxy.faults > 0


def test_a_cache_is_captured_sealed_verified_and_copied(service: Service, undisturbed: str, tmp_path: Path) -> None:
    store, there = Store(service.storage("whole")), Store(service.storage("copied"))
    assert fill(store, "one") == a_plan().units and fill(store, "other") == 0
    digest = seal(a_plan(), str(store.plan_digest()), store)
    assert store.manifest(digest).content_digest == undisturbed and verify(store).ok
    local = Store(LocalStorage(tmp_path / "copied"))
    for source, target in ((store, there), (there, local)):
        assert copy(source, target).sealed == target.current() == digest
        assert verify(target).ok


def test_of_many_racing_writers_exactly_one_creates(service: Service) -> None:
    won = []
    threads = [
        threading.Thread(target=lambda i=i: won.append(service.storage("race").create("x", b"%d" % i)))
        for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 15 + [True]


def test_a_service_that_stays_away_is_a_storage_error(service: Service) -> None:
    service.proxy.schedule = lambda method, path, n: "503 before"
    with pytest.raises(StorageError, match=f"{service.scheme}://bucket/gone/x") as error:
        service.storage("gone").create("x", b"")
    assert error.value.exit_code == 6 and error.value.hint
    assert service.proxy.requests == remote.ATTEMPTS, "nobody else tries again"


@pytest.mark.parametrize("fault", ["500 after", "cut after"])
@pytest.mark.parametrize("expected", [None, b"old"])
def test_a_swap_whose_reply_is_lost_is_done(service: Service, fault: str, expected: bytes | None) -> None:
    place = service.storage(f"swap-{fault}-{expected is None}".replace(" ", "-"))
    if expected is not None:
        place.replace("x", expected)
    failed: list[str] = []

    def schedule(method: str, path: str, n: int) -> str:
        if method != WRITES[service.scheme] or failed:
            return ""
        failed.append(path)
        return fault

    service.proxy.schedule = schedule
    assert place.swap("x", expected, b"new") is True
    assert failed and place.read("x") == b"new"
    assert place.swap("x", expected, b"newer") is False


def test_a_swap_that_is_overtaken_between_its_look_and_its_put_is_refused(service: Service) -> None:
    place = service.storage("overtaken")
    raw = Raw(service.scheme, service.direct)
    for expected in (None, b"old"):
        if expected is not None:
            raw.write("overtaken/x", expected)

        def schedule(method: str, path: str, n: int) -> str:
            if method == WRITES[service.scheme]:
                raw.write("overtaken/x", b"theirs")
            return ""

        service.proxy.schedule = schedule
        assert place.swap("x", expected, b"ours") is False
        assert raw.read("overtaken/x") == b"theirs"


def test_a_service_that_does_not_say_which_condition_failed(service: Service) -> None:
    """Not every service of S3 does; s3fs then takes it for an invalid request."""
    place = service.storage("bare")
    place.create("x", b"theirs")
    service.proxy.schedule = lambda method, path, n: "412 before" if method == WRITES[service.scheme] else ""
    assert place.create("x", b"ours") is False
    assert place.read("x") == b"theirs"


def test_a_bucket_that_is_not_there_is_a_storage_error(service: Service) -> None:
    url = f"{service.scheme}://nosuch/x"
    place = RemoteStorage(url, sleep=lambda seconds: None, **buckets.options(service.scheme, service.proxy.port))
    for write in (place.create, place.replace, lambda name, data: place.swap(name, None, data)):
        with pytest.raises(StorageError, match="nosuch/x/y") as caught:
            write("y", b"1")
        assert "changes all the time" not in str(caught.value)


def test_what_is_forbidden_is_not_asked_for_again(service: Service) -> None:
    service.proxy.schedule = lambda method, path, n: "403 before"
    place = service.storage("forbidden")
    for call in (lambda: place.create("x", b"1"), lambda: place.read("x"), lambda: place.remove("x")):
        with pytest.raises(StorageError, match="forbidden/x"):
            call()
    assert service.proxy.requests == 3


def test_a_slash_at_the_end_of_a_place_does_not_matter(service: Service) -> None:
    service.storage("slash").create("x", b"1")
    assert service.storage("slash/").read("x") == b"1"


def test_waits_grow_and_are_spread(service: Service) -> None:
    waits: list[float] = []
    place = service.storage("w", sleep=waits.append)
    service.proxy.schedule = lambda method, path, n: "503 before"
    with pytest.raises(StorageError):
        place.read("x")
    assert len(waits) == remote.ATTEMPTS - 1
    for i, wait in enumerate(waits):
        longest = min(remote.LONGEST_WAIT, remote.FIRST_WAIT * 2**i)
        assert longest / 2 <= wait <= longest


def test_a_large_shard_is_created_once(service: Service) -> None:
    """In parts in S3, in one request in Google Cloud Storage."""
    methods: list[str] = []
    service.proxy.schedule = lambda method, path, n: methods.append(method) or ""  # type: ignore[func-returns-value]
    data = bytes(101 << 20)
    place = service.storage("large")
    assert place.create("x", data) and not place.create("x", b"other")
    if service.scheme == "s3":
        assert methods.count("POST") >= 2 and methods.count("PUT") >= 3
    assert place.size("x") == len(data)
    assert not place.create("x", data), "what is as large is named by its content, and nobody asks whose it is"
    assert place.read("x", 1 << 10 << 20) == data


def test_a_protocol_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as error:
        open_storage("nosuch://bucket/x")
    assert "s3://" in error.value.hint


def test_capture_train_copy_and_verify_from_a_bucket(cached: Cli, service: Service) -> None:
    """The commands as a user types them, three requests in a hundred failing."""
    chance = random.Random(0)
    service.proxy.schedule = lambda method, path, n: chance.choice(FAULTS) if chance.random() < 0.03 else ""
    env = buckets.environment(service.scheme, service.proxy.port)
    url = service.url("caches/digits")
    cached("cache", "digits.py", "--out", url, **env)
    local = json.loads(cached("inspect", "cache", "--json").stdout)
    there = json.loads(cached("inspect", url, "--json", **env).stdout)
    assert there["content_digest"] == local["content_digest"]
    copies = ("--copies", "copies", "--copies-size", 1)
    cached("train", "digits.py:other", "--cache", url, "--out", "run", *copies, **env)
    assert any((cached.folder / "copies").iterdir())
    asked: list[str] = []
    service.proxy.schedule = lambda method, path, n: asked.append(path) or ""  # type: ignore[func-returns-value]
    cached("train", "digits.py:other", "--cache", url, "--out", "run2", *copies, **env)
    asked = [path.replace("%2F", "/") for path in asked]
    assert asked and not [p for p in asked if "/objects/" in p or "/pages/" in p], "they come from the disk"
    service.proxy.schedule = lambda method, path, n: ""
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
