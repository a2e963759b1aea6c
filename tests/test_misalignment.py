"""Targets of other samples: whatever moves inside a cache is refused before a batch that holds it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small import a_plan, keys_of, put_item, rows_of

from ensemble_distill.cache.opening import open_cache
from ensemble_distill.cache.plan import WorkItem
from ensemble_distill.errors import Corrupt, Error, Mismatch
from ensemble_distill.recording.seal import seal
from ensemble_distill.sources.arrays import Loaded
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.store import Store

ROWS, UNIT, CLASSES = 24, 8, 3


class Numbers:
    """Samples 0 to 23, whose keys are those that the small cache was made with."""

    labels = None

    def __init__(self, order: np.ndarray) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def load(self, index: np.ndarray) -> Loaded:
        numbers = self.order[index]
        keys = np.concatenate([keys_of(WorkItem("train", 0, 0, n, n + 1)) for n in numbers])
        return Loaded({"image": numbers.astype(np.float32)}, keys)


@pytest.fixture(params=["hdf5", "parquet"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    plan = a_plan(request.param, rows=ROWS, unit_rows=UNIT)
    store = Store(LocalStorage(tmp_path / "cache"))
    digest = store.put_plan(plan)
    for item in plan.items():
        put_item(store, plan, digest, item)
    seal(plan, digest, store)
    return tmp_path / "cache"


Move = Callable[[np.ndarray], np.ndarray]


def within_a_class(rows: np.ndarray) -> np.ndarray:
    """Rows of one class change places: what no accuracy could show."""
    of_class = np.arange(0, len(rows), CLASSES)
    moved = rows.copy()
    moved[of_class] = rows[np.roll(of_class, 1)]
    return moved


MOVES: dict[str, Move] = {
    "shifted by one": lambda rows: np.roll(rows, 1, axis=0),
    "shifted, the last one lost": lambda rows: np.concatenate([rows[:1], rows[:-1]]),
    "two swapped": lambda rows: rows[[1, 0, *range(2, len(rows))]],
    "one deleted": lambda rows: rows[1:],
    "one twice": lambda rows: np.concatenate([rows, rows[-1:]]),
    "in the reverse order": lambda rows: rows[::-1],
    "shuffled within a class": within_a_class,
}


def consume(root: Path, memory: int | None = None, order: np.ndarray | None = None) -> list[int]:
    """The samples of all batches of two epochs, as far as they come; their targets are what the teachers said."""
    used: list[int] = []
    plan = a_plan(rows=ROWS, unit_rows=UNIT)
    source = Numbers(np.arange(ROWS) if order is None else order)
    try:
        cache = open_cache(root, memory=memory)
        for epoch in (0, 1):
            for batch in cache.loader(source, 4, epoch=epoch, taps=["tap/a.x"]):  # type: ignore[arg-type]
                item = WorkItem("train", batch.view, 0, 0, ROWS)
                numbers = batch.inputs["image"].numpy().astype(int)
                said = rows_of(plan, item, plan.groups[1])["tap/a.x"][numbers]
                assert np.array_equal(batch.targets.features["tap/a.x"].numpy(), said)
                used += numbers.tolist()
    except Error:
        return [*used, -1]
    return used


def rewrite(root: Path, unit: str, move: Move) -> None:
    """Move the rows of a unit's shard, wherever in the file they lie, and leave the rest as it is."""
    store = Store(LocalStorage(root))
    commit = store.commit(unit)
    path, data = root / "objects" / commit.object, store.object(commit)
    for segment in commit.segments:
        first, last = segment.offset, segment.offset + commit.rows * segment.stride
        rows = np.frombuffer(data[first:last], np.uint8).reshape(commit.rows, segment.stride)
        data = data[:first] + move(rows).tobytes() + data[last:]
    path.write_bytes(data)


def test_what_did_not_move_is_used_whole(root: Path) -> None:
    for memory in (None, 200):
        assert sorted(consume(root, memory)) == sorted([*range(ROWS)] * 2)


@pytest.mark.parametrize("memory", [None, 200])
@pytest.mark.parametrize("group", ["targets", "tap.a.x"])
@pytest.mark.parametrize("how", MOVES)
def test_targets_that_moved_inside_a_shard_are_never_used(root: Path, how: str, group: str, memory: int | None) -> None:
    rewrite(root, f"train-v000000-00000001.{group}", MOVES[how])
    used = consume(root, memory)
    assert used[-1] == -1 and not set(used) & set(range(UNIT, 2 * UNIT))


@pytest.mark.parametrize("how", MOVES)
def test_keys_that_moved_are_never_used(root: Path, how: str) -> None:
    path = root / "keys/train-00000001"
    path.write_bytes(MOVES[how](np.frombuffer(path.read_bytes(), np.uint8).reshape(UNIT, 16)).tobytes())
    assert consume(root) == [-1]
    with pytest.raises(Error):
        open_cache(root).verify_source(Numbers(np.arange(ROWS)), "train")


@pytest.mark.parametrize("folder", ["objects", "keys", "commits"])
def test_files_that_changed_places_are_never_used(root: Path, folder: str) -> None:
    paths = sorted((root / folder).iterdir())
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    if folder == "commits":  # a reader goes by the manifest, and `verify` by both
        assert sorted(consume(root)) == sorted([*range(ROWS)] * 2)
        (root / "CURRENT").unlink()
        store = Store(LocalStorage(root))
        with pytest.raises(Corrupt):
            seal(a_plan(rows=ROWS, unit_rows=UNIT), str(store.plan_digest()), store)
    else:
        assert consume(root) == [-1]


def test_another_order_and_a_part_of_the_source_are_served_right(root: Path) -> None:
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(ROWS)[: ROWS - seed]
        assert sorted(consume(root, order=order)) == sorted([*order, *order])


@pytest.mark.parametrize("position", range(ROWS))
def test_a_sample_that_changed_is_refused_before_its_batch_and_before_step_one(root: Path, position: int) -> None:
    order = np.arange(ROWS)
    order[position] = 99  # re-encoded, say: it looks the same, and is not what the teachers saw
    used = consume(root, order=order)
    assert used[-1] == -1 and 99 not in used
    with pytest.raises(Mismatch, match=f"sample {position} of train"):
        open_cache(root).verify_source(Numbers(order), "train")
