"""Codecs, formats, records and the commit protocol: bytes on disk, and what a flipped one leads to."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import flip
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from small import a_plan, file_of, keys_of, put_item

from ensemble_distill.cache.commits import check_layout, held_plan
from ensemble_distill.cache.groups import Group
from ensemble_distill.cache.partial import whole
from ensemble_distill.cache.plan import Plan, Split, WorkItem, unit_rows
from ensemble_distill.cache.rows import Rows
from ensemble_distill.cache.verify import verify
from ensemble_distill.codec import Dense, Features, Members
from ensemble_distill.errors import Corrupt, Error, Mismatch, StorageError, Unsafe, UsageError
from ensemble_distill.fingerprint import canonical_json, sha256
from ensemble_distill.formats.layout import Segment, read_segments
from ensemble_distill.recording.seal import seal
from ensemble_distill.store import records
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.records import Commit, Manifest
from ensemble_distill.store.store import Store, open_store

GOLDEN = Path(__file__).parent / "golden"

# Formats --------------------------------------------------------------------------------------------

DTYPE = np.dtype([("main/logprobs", "<f2", (10,)), ("main/flag", "u1", ()), ("ids", "<u4", (3,))], align=True)


def some_records(rows: int) -> np.ndarray:
    rng = np.random.default_rng(rows)
    table = np.zeros(rows, DTYPE)
    table["main/logprobs"] = rng.normal(size=(rows, 10))
    table["main/flag"] = rng.integers(0, 2, rows)
    table["ids"] = rng.integers(0, 2**31, (rows, 3))
    return table


def test_a_plan_is_read_each_time_and_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, parsed, load = Store(LocalStorage(tmp_path, sync=False)), [], records.load
    digest = store.put_plan(a_plan())

    def counted(kind: type, *rest: Any) -> Any:
        parsed.append(kind)
        return load(kind, *rest)

    monkeypatch.setattr(records, "load", counted)
    assert store.plan(digest, Plan) is store.plan(digest, Plan) and parsed == [Plan]
    flip(tmp_path / "plans" / f"{digest}.json")
    with pytest.raises(Corrupt, match="is damaged"):
        store.plan(digest, Plan)


@pytest.mark.parametrize("format", ["hdf5", "parquet"])
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 3000))
def test_rows_are_read_back_by_offset_without_the_library(format: str, rows: int) -> None:
    table = some_records(rows)
    data, segments = file_of(format, table)
    found = read_segments(np.frombuffer(data, np.uint8), rows, DTYPE, segments)
    assert found.tobytes() == table.tobytes()
    assert file_of(format, table)[0] == data  # the same content gives the same bytes, hence the same name


def test_other_peoples_tools_read_the_shards(tmp_path: Path) -> None:
    table = some_records(50)
    for format in ("hdf5", "parquet"):
        (tmp_path / format).write_bytes(file_of(format, table)[0])
    with h5py.File(tmp_path / "hdf5") as file:
        assert file["rows"].chunks is None and file["rows"].compression is None
        assert file["rows"][:].tobytes() == table.tobytes()
    column = pq.read_table(tmp_path / "parquet")["ids"]
    assert b"".join(column.to_pylist()) == table["ids"].tobytes()
    assert column.type.byte_width == 12


def test_parquet_units_beyond_the_writers_usual_page_have_one_page_too() -> None:
    table = np.zeros(20_001, [("x", "<f2", (2,))])
    table["x"][-1] = 1
    data, segments = file_of("parquet", table)
    assert read_segments(np.frombuffer(data, np.uint8), 20_001, table.dtype, segments).tobytes() == table.tobytes()


@pytest.mark.parametrize("format", ["hdf5", "parquet"])
def test_a_golden_shard_of_an_earlier_release_is_still_read(format: str) -> None:
    """The file was written by release 0.1.0; the test fails if what is read from it changes."""
    data = (GOLDEN / f"shard.{format}").read_bytes()
    commit = records.load(Commit, (GOLDEN / f"commit.{format}.json").read_bytes(), "golden")
    assert records.block_hashes(data) == commit.blocks
    found = read_segments(np.frombuffer(data, np.uint8), commit.rows, DTYPE, commit.segments)
    assert found.tobytes() == some_records(40).tobytes()
    assert records.content_hash(found) == commit.content


def test_logical_content_is_the_same_in_both_formats_and_follows_every_bit() -> None:
    table = some_records(30)
    changed = table.copy()
    changed["ids"][29, 2] ^= 1
    assert records.content_hash(table) == records.content_hash(table.copy())
    assert records.content_hash(table) != records.content_hash(changed)
    assert records.content_hash(table) != records.content_hash(table[:29])


# Records --------------------------------------------------------------------------------------------


def a_commit() -> Commit:
    segment = Segment(fields=("x",), offset=3, stride=2)
    digest = "0" * 64
    return Commit(
        plan="p", unit="u", object=f"{digest}.h5", size=9, rows=3, segments=(segment,), blocks=(digest,), content="c",
        keys=digest,
    )  # fmt: skip


def test_any_flipped_bit_of_a_sealed_record_is_found() -> None:
    data = records.seal(a_commit())
    assert records.unseal(Commit, data, "here") == a_commit()
    for i in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        with pytest.raises((Corrupt, Mismatch)):
            records.unseal(Commit, bytes(flipped), "here")
    for cut in range(0, len(data), 7):
        with pytest.raises(Corrupt):
            records.unseal(Commit, data[:cut], "here")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"commits":[],"commits":[]}', "not those that were written"),
        ('{"commits":NaN}', "commits"),
        ('{"commits":[],"more":1}', "no such field"),
        ('{"commits": []}', "not those that were written"),
        ("[" * 100_000, "recursion limit"),
        ("[]", "Page"),
    ],
)
def test_json_is_read_strictly(text: str, reason: str) -> None:
    with pytest.raises(Corrupt, match=reason):
        records.load(records.Page, text.encode(), "here")


def test_another_schema_version_is_a_mismatch() -> None:
    with pytest.raises(Mismatch, match="schema version 2, this release reads 1"):
        records.load(records.Manifest, b'{"schema_version":2}', "here")


def test_a_record_with_very_many_mistakes_is_told_by_their_number() -> None:
    """One sentence, without an object for each of them."""
    body = records.dump(a_plan()).replace(b'"splits":{', b'"splits":{' + b"".join(b'"s%d":{},' % i for i in range(99)))
    with pytest.raises(Corrupt, match="here: 396 of its values are not what they should be"):
        records.load(Plan, body, "here")


@pytest.fixture
def short_numbers() -> Iterator[None]:
    """An interpreter that refuses to write numbers of more than 640 digits, as PYTHONINTMAXSTRDIGITS can ask for."""
    usual = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    yield
    sys.set_int_max_str_digits(usual)


@pytest.mark.usefixtures("short_numbers")
def test_a_number_that_this_interpreter_would_not_write_is_refused() -> None:
    body = records.dump(a_commit()).replace(b'"provenance":{}', b'"provenance":{"a":' + b"9" * 1000 + b"}")
    with pytest.raises(Corrupt, match="here: not the JSON that was written"):
        records.load(Commit, body, "here")


# The store ------------------------------------------------------------------------------------------

FIRST, SECOND = "train-v000000-00000000.targets", "train-v000000-00000000.tap.a.x"


@pytest.fixture
def complete(tmp_path: Path) -> tuple[Plan, str, Store]:
    """A small cache whose units are all there, not sealed."""
    plan, store = a_plan(), Store(LocalStorage(tmp_path / "cache", sync=False))
    digest = store.put_plan(plan)
    for item in plan.items():
        put_item(store, plan, digest, item)
    return plan, digest, store


def put(store: Store, unit: str = "u-0", rows: int = 40, format: str = "hdf5") -> Commit:
    return store.put_unit("p", unit, some_records(rows), format, "0" * 64, None, {})[0]


def test_the_first_commit_wins(tmp_path: Path) -> None:
    store = Store(LocalStorage(tmp_path))
    first = put(store, rows=40)
    put(store, rows=41)
    assert store.commit("u-0") == first and list(store.committed()) == ["u-0"]


def test_of_two_that_seal_at_once_one_is_told_to_look_again(tmp_path: Path) -> None:
    """CURRENT moves from the manifest that was in force when the reading began, or not at all."""
    store = Store(LocalStorage(tmp_path))
    manifests = [
        Manifest(plan="0" * 64, pages=(), content_digest=c * 64, units=0, rows=0, bytes=0, statistics={}, provenance={})
        for c in "abc"
    ]
    began = store.current()
    first = store.put_manifest(manifests[0], began)
    with pytest.raises(Mismatch, match="sealed by somebody else meanwhile") as error:
        store.put_manifest(manifests[1], began)
    assert store.current() == first and "run the same command again" in error.value.hint
    assert store.put_manifest(manifests[0], began) == first  # the same seal is no quarrel
    second = store.put_manifest(manifests[1])  # as it is now
    assert store.put_manifest(manifests[2], second) == store.current()
    with pytest.raises(Mismatch):
        store.put_manifest(manifests[0], None)


def test_a_seal_reads_the_pointer_before_the_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is sealed while it reads commits, it does not overwrite."""
    store, plan = Store(LocalStorage(tmp_path)), a_plan()
    digest = store.put_plan(plan)
    for item in plan.items():
        put_item(store, plan, digest, item)
    read = Store.commit_body

    def overtaken(self: Store, unit: str) -> bytes:
        (tmp_path / "CURRENT").write_text("a" * 64 + "\n")
        return read(self, unit)

    monkeypatch.setattr(Store, "commit_body", overtaken)
    with pytest.raises(Mismatch, match="meanwhile"):
        seal(plan, digest, store)
    assert store.current() == "a" * 64
    monkeypatch.undo()
    assert seal(plan, digest, store) == store.current()


def test_an_object_is_durable_before_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    create = LocalStorage.create
    monkeypatch.setattr(
        LocalStorage, "create", lambda self, name, data: (create(self, name, data), order.append(name.split("/")[0]))[0]
    )
    put(Store(LocalStorage(tmp_path)))
    assert order == ["objects", "commits"]


@pytest.mark.parametrize("format", ["hdf5", "parquet"])
def test_any_flipped_byte_and_any_truncation_of_a_shard_is_found(tmp_path: Path, format: str) -> None:
    store = Store(LocalStorage(tmp_path))
    commit = put(store, format=format)
    path = tmp_path / "objects" / commit.object
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.choice(len(data) * 8, 300, replace=False):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(Corrupt, match="not those that were committed"):
            store.object(commit)
    for size in (0, 1, len(data) // 2, len(data) - 1, len(data) + 1):
        path.write_bytes((data + b"\0")[:size])
        with pytest.raises(Corrupt, match=f"{size} bytes, expected {len(data)}"):
            store.object(commit)


def test_a_shard_has_the_name_and_the_number_of_blocks_that_follow_from_its_bytes(tmp_path: Path) -> None:
    """What a commit says of a shard must agree with itself, even where each hash is that of the bytes."""
    store = Store(LocalStorage(tmp_path))
    commit = put(store)
    data = store.object(commit)
    for lies, reason in (
        ({"object": f"{'a' * 64}.h5"}, "its name is not the root of its block hashes"),
        ({"blocks": (), "object": f"{records.root_hash(())}.h5"}, f"0 block hashes for {len(data)} bytes"),
        ({"blocks": commit.blocks * 2, "object": f"{records.root_hash(commit.blocks * 2)}.h5"}, "2 block hashes for"),
    ):
        lying = commit.model_copy(update=lies)
        store.storage.create(f"objects/{lying.object}", data)
        with pytest.raises(Corrupt, match=reason):
            store.object(lying)


def test_large_shards_are_hashed_in_blocks(tmp_path: Path) -> None:
    data = os.urandom(2 * records.BLOCK + 5)
    blocks = records.block_hashes(data)
    assert len(blocks) == 3 and blocks[2] == sha256(data[-5:])
    assert records.root_hash(blocks) != records.root_hash(blocks[:2])


def test_a_directory_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Mismatch, match="no cache"):
        open_store(tmp_path, create=True)
    (tmp_path / "killed" / "plans").mkdir(parents=True)
    assert open_store(tmp_path / "killed", create=True).plan_digest() is None


def test_a_folder_that_cannot_be_listed_is_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)  # for root no folder is closed
    with pytest.raises(StorageError, match="Permission denied") as error:
        open_store(tmp_path)
    assert error.value.hint


def test_an_empty_bucket_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no cache: there is no PLAN"):
        open_store(f"memory:/{tmp_path}")


def test_a_commit_under_another_name_is_refused(tmp_path: Path) -> None:
    store = Store(LocalStorage(tmp_path))
    put(store, "u-0")
    (tmp_path / "commits/u-0.json").rename(tmp_path / "commits/u-1.json")
    with pytest.raises(Corrupt, match=r"commits/u-1\.json: it commits unit u-0"):
        store.commit("u-1")


def test_other_keys_beside_a_commit_of_no_unit_are_no_changed_source(tmp_path: Path) -> None:
    """Which pages a stray commit vouches for cannot be told: damage, before anything is said of the source."""
    store = Store(LocalStorage(tmp_path))
    item = next(a_plan().items())
    store.put_keys(item.split, item.page, keys_of(item))
    put(store, "stray")
    with pytest.raises(Corrupt, match="'stray' is no name of a unit"):
        store.put_keys(item.split, item.page, keys_of(item) + 1)


def test_a_unit_larger_than_the_memory_is_not_read(tmp_path: Path) -> None:
    """150 MB: more than is read whatever the memory, and less than a plan may ask for."""
    plan, commit = a_plan(), a_commit().model_copy(update={"size": 150_000_000})

    class Commits:
        def get(self, item: WorkItem, group: Group) -> Commit:
            return commit

    reader = Rows(Store(LocalStorage(tmp_path)), plan, Commits(), whole(plan), memory=10)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"unit u takes 150\.0 MB, more than the 0\.0 MB") as error:
        reader.gather(plan.groups[0], "train", 0, np.arange(3))
    assert "--memory" in error.value.hint


def test_a_cache_without_a_plan_says_so(tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="PLAN is missing"):
        held_plan(Store(LocalStorage(tmp_path)))


@pytest.mark.parametrize(
    ("lies", "error", "reason"),
    [
        ({"unit": SECOND}, Corrupt, f"the commit of unit {SECOND} stands where {FIRST}'s should"),
        ({"rows": 5}, Corrupt, "has 5 rows, expected 4"),
        ({"segments": ()}, Corrupt, r"holds \[\], expected \['main/logprobs'\]"),
        ({"size": 24 + (1 << 16) + (1 << 12) + 1}, Unsafe, "would be a file of 69657 bytes"),
        ({"segments": ({"stride": 5},)}, Unsafe, "stride 5, expected 6"),
        ({"segments": ({"offset": 1 << 20},)}, Unsafe, "rows beyond the end of its file"),
    ],
)
def test_a_commit_that_does_not_follow_from_the_plan_is_refused_before_anything_is_read(
    complete: tuple[Plan, str, Store], lies: dict[str, Any], error: type[Error], reason: str
) -> None:
    plan, _, store = complete
    item, group = plan.locate(FIRST)
    commit = store.commit(FIRST)
    check_layout(commit.model_copy(update={"size": 24 + (1 << 16) + (1 << 12)}), group, item, "here")
    if "segments" in lies:
        lies = {"segments": tuple(commit.segments[0].model_copy(update=edit) for edit in lies["segments"])}
    with pytest.raises(error, match=reason):
        check_layout(commit.model_copy(update=lies), group, item, "here")


# Sealing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "lies", "reason"),
    [
        (FIRST, {"plan": "0" * 64}, "was captured under another plan"),
        (FIRST, {"statistics": {}}, "statistics that do not add up"),
        (FIRST, {"unit": SECOND}, f"it commits unit {SECOND}"),
        (FIRST, {"surprise": 1}, "its fields are .*surprise"),
        (FIRST, {"size": "1"}, "its size is a str"),
        (FIRST, {"keys": "00"}, "its keys are no SHA-256"),
        (SECOND, {"keys": "0" * 64}, "belongs to other samples than the units beside it"),
    ],
)
def test_a_commit_that_says_something_else_is_not_sealed(
    complete: tuple[Plan, str, Store], unit: str, lies: dict[str, Any], reason: str
) -> None:
    """Under a right hash, as a writer of another release or a stranger could leave it."""
    plan, digest, store = complete
    body = json.loads(store.commit_body(unit)) | lies
    store.storage.replace(f"commits/{unit}.json", records.sealed(canonical_json(body)))
    with pytest.raises(Corrupt, match=reason):
        seal(plan, digest, store)
    assert store.current() is None


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{}", b"{", b"[" * 10_000])
def test_a_commit_that_is_no_record_is_not_sealed(complete: tuple[Plan, str, Store], body: bytes) -> None:
    plan, digest, store = complete
    store.storage.replace(f"commits/{FIRST}.json", records.sealed(body))
    with pytest.raises(Corrupt, match=f"{FIRST}.json: not the record that was written"):
        seal(plan, digest, store)


def test_a_commit_that_was_changed_after_it_was_sealed_is_reported(complete: tuple[Plan, str, Store]) -> None:
    plan, digest, store = complete
    seal(plan, digest, store)
    commit = store.commit(FIRST)
    store.storage.replace(f"commits/{FIRST}.json", records.seal(commit.model_copy(update={"provenance": {"by": "x"}})))
    (damage,) = verify(store).damaged
    assert (damage.kind, damage.unit) == ("commit copy", FIRST)
    assert str(damage).endswith(f"commits/{FIRST}.json: not the commit that was sealed")


def a_group(name: str = "targets") -> Group:
    return Group.of(name, {"x": Features(width=2)})


# The plan -------------------------------------------------------------------------------------------


def test_unit_sizes_follow_the_formula() -> None:
    assert unit_rows(55_000, 20) == 1024
    assert unit_rows(1_281_167, 2000) == 20_019
    assert unit_rows(10**9, 2000) == (64 << 20) // 2000
    assert unit_rows(10, 1 << 30) == 1


def test_rows_and_units_that_no_memory_could_hold_are_no_plan() -> None:
    width = 1 << 27
    wide = {f"tap/{n}": Features(width=width) for n in "wxyz"}
    with pytest.raises(ValidationError, match=r"a row of group 'wide' would take 4294967296 bytes"):
        Group.of("wide", wide)
    with pytest.raises(ValidationError, match=r"a unit of 16777217 rows would take more than 256 MiB"):
        a_plan(rows=1 << 30, unit_rows=(1 << 24) + 1)
    with pytest.raises(ValidationError, match="268435460 units are more than 268435456"):
        a_plan(rows=(1 << 26) + 1, unit_rows=1)


def test_names_that_stand_twice_are_no_plan() -> None:
    plan = a_plan()
    with pytest.raises(ValidationError, match="two fields have the same name"):
        Group.of("twice", {"main": Members(inner=Dense(classes=3), members=("a",)), "main/a": Dense(classes=3)})
    with pytest.raises(ValidationError, match="are not the arrays of its codecs"):
        Group(name="twice", codecs=plan.groups[0].codecs, fields=plan.groups[0].fields * 2)
    with pytest.raises(ValidationError, match="two groups have the same name"):
        Plan(**dict(plan) | {"groups": plan.groups * 2})


@given(st.integers(1, 5000), st.integers(1, 3), st.integers(1, 700))
def test_work_items_cover_every_row_of_every_view_once(rows: int, views: int, per_unit: int) -> None:
    spec = {"rows": rows, "views": views, "unit_rows": per_unit, "labels": None}
    group = a_group()
    plan = Plan.model_construct(splits={"train": Split(**spec)}, groups=(group,))
    items = list(plan.items())
    covered = [(i.view, row) for i in items for row in range(i.first, i.last)]
    assert covered == [(view, row) for view in range(views) for row in range(rows)]
    assert len({i.unit(group) for i in items}) == len(items) == plan.item_count
    assert [plan.unit_name(n) for n in range(plan.units)] == [i.unit(group) for i in items]
    assert [plan.unit_number(i.unit(group)) for i in items] == list(range(plan.units))
    assert [plan.locate(i.unit(group)) for i in items] == [(i, group) for i in items]
    assert plan.item_rows().tolist() == [i.rows for i in items]


@pytest.mark.parametrize(
    "unit",
    [
        "train-v000000-00000001.targets",
        "train-v000001-00000000.targets",
        "x",
        "test-v000000-00000000.targets",
        "train-v0-0.targets",
        "train-v000000-00000000.taps",
        "train-v000000-00000000.targets\n",
        "train-v0000000-00000000.targets",
    ],
)
def test_a_name_of_no_unit_is_refused(unit: str) -> None:
    spec = Split(rows=5, views=1, unit_rows=5, labels=None)
    plan = Plan.model_construct(splits={"train": spec}, groups=(a_group(),))
    with pytest.raises(Corrupt, match="no unit"):
        plan.unit_number(unit)


def test_unit_names_are_what_they_have_always_been() -> None:
    item = WorkItem(split="train", view=3, page=12, first=0, last=1)
    assert item.unit(a_group("tap.a.pool")) == "train-v000003-00000012.tap.a.pool"
