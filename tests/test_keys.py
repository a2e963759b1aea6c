"""Pages of keys: what was captured as a row stays that row's sample, whoever captures it, when, and of what."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import Cli, flip, load_module
from small import a_plan, keys_of, put_item

import ensemble_distill as ed
from ensemble_distill.cache.commits import committed_units, held_plan
from ensemble_distill.cache.plan import Plan
from ensemble_distill.cache.repair import repair
from ensemble_distill.cache.verify import verify
from ensemble_distill.errors import Mismatch
from ensemble_distill.fingerprint import sha256
from ensemble_distill.recording.capture import Recorder
from ensemble_distill.recording.keys import KeyPages
from ensemble_distill.recording.planning import prepare
from ensemble_distill.recording.seal import seal
from ensemble_distill.store.leases import Leases
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.store import Store, open_store

PAGE = "keys/train-00000002"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Sealed: twelve rows in two views, three pages of keys."""
    store, plan = Store(LocalStorage(tmp_path / "c", sync=False)), a_plan()
    digest = store.put_plan(plan)
    for item in plan.items():
        put_item(store, plan, digest, item)
    seal(plan, digest, store)
    return store


def images(changed: bool = False) -> ed.ArraySource:
    array = np.arange(12 * 4, dtype=np.uint8).reshape(12, 1, 2, 2)
    array[11] += changed
    return ed.ArraySource({"image": array}, np.zeros(12, np.int64))


# A page alone -----------------------------------------------------------------------------------------


def test_a_page_that_is_lost_is_written_again_of_the_samples_that_units_were_captured_of(store: Store) -> None:
    plan, held = held_plan(store), store.storage.read(PAGE)
    pages = KeyPages(plan, store, {}, committed_units(store, plan))
    store.storage.remove(PAGE)
    item = plan.item(2)
    with pytest.raises(Mismatch, match="is lost, and the keys of these samples are not those that it held"):
        pages.put(item, keys_of(item) + 1)
    assert store.storage.size(PAGE) is None
    assert pages.put(item, keys_of(item)) == sha256(held) and store.storage.read(PAGE) == held


def test_a_damaged_page_is_replaced_by_the_first_word_of_what_it_held(store: Store) -> None:
    store.lose_keys("train", 2, "1" * 64)
    store.lose_keys("train", 2, "2" * 64)
    assert store.storage.read(PAGE) == b"lost " + b"1" * 64 + b"\n"


@pytest.mark.parametrize("before", ["nothing", "lost"])
def test_partners_of_a_page_that_is_not_there_are_proved_by_writing_it(tmp_path: Path, before: str) -> None:
    store, plan, right = Store(LocalStorage(tmp_path, sync=False)), a_plan(), images()
    keys, rows = right.load(np.arange(8, 12)).keys, np.array([9, 11])
    if before == "lost":
        store.lose_keys("train", 2, sha256(keys.tobytes()))
    else:
        KeyPages(plan, store, {"train": right}, np.zeros(plan.units, bool)).prove("train", rows, keys[rows - 8])
        assert store.storage.read(PAGE) == keys.tobytes()
    other = images(changed=True)
    pages = KeyPages(plan, store, {"train": other}, np.zeros(plan.units, bool))
    with pytest.raises(Mismatch, match="the source has changed"):
        pages.prove("train", rows, other.load(rows).keys)
    KeyPages(plan, store, {"train": right}, np.zeros(plan.units, bool)).prove("train", rows, keys[rows - 8])
    assert store.storage.read(PAGE) == keys.tobytes()


def test_an_appended_unit_of_other_samples_than_the_sealed_ones_is_told_and_dropped(tmp_path: Path) -> None:
    """A page of keys is another's, and so is what was appended by it."""
    store, base = Store(LocalStorage(tmp_path, sync=False)), a_plan(groups=1)
    digest = store.put_plan(base)
    for item in base.items():
        put_item(store, base, digest, item)
    seal(base, digest, store)
    plan = Plan.model_validate(dict(base) | {"groups": a_plan().groups, "parents": (digest,)})
    grown = store.put_plan(plan, digest)
    foreign = (keys_of(plan.item(2)) + 1).tobytes()
    store.storage.replace(PAGE, foreign)
    unit = plan.item(2).unit(plan.groups[1])
    item, group = plan.locate(unit)
    store.put_unit(
        grown, unit, np.zeros(item.rows, group.dtype), plan.format, sha256(foreign), None, {"by": "", "time": "2026"}
    )
    damaged = {damage.unit: damage for damage in verify(store).damaged}
    assert damaged[unit].kind == "appended" and "belongs to other samples" in str(damaged[unit])
    mended = repair(store, lambda: verify(store))
    assert unit in mended.dropped and plan.item(5).unit(plan.groups[0]) not in mended.dropped
    assert store.storage.read(PAGE).startswith(b"lost ")


# Captures ---------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(teachers: Path) -> ModuleType:
    return load_module(teachers / "digits.py")


def capture(data: ed.DataConfig, config: ed.CacheConfig, place: Path, span: range | None = None) -> Store:
    store = open_store(place, create=True)
    leases = Leases(store.storage)
    plan, ensemble = prepare(data, config, data.sources, store, leases, [torch.device("cpu")])
    Recorder(plan, ensemble, data.sources, store, leases).run(span=span)
    return store


def with_train(data: ed.DataConfig, images: np.ndarray, labels: np.ndarray) -> ed.DataConfig:
    return data.model_copy(update={"sources": {"train": ed.ArraySource({"image": images}, labels)}})


def test_of_writers_of_mixed_views_the_second_one_has_the_samples_of_the_first(
    pipeline: ModuleType, tmp_path: Path
) -> None:
    """The first one captures a page in a mixed view; what others of that page are mixed with is proved at once."""
    images, labels = (array[:60] for array in pipeline.arrays())
    config = pipeline.cache().model_copy(update={"unit_rows": 12, "batch_size": 12})
    views = ed.ViewsConfig(mix=ed.Mixup(alpha=1.0))
    right = with_train(pipeline.data().model_copy(update={"views": views}), images, labels)
    changed = images.copy()
    changed[-1] = 16 - changed[-1]
    first = 2 * 5  # two groups, and five pages in view 0
    store = capture(with_train(right, changed, labels), config, tmp_path / "c", range(first, first + 2))
    assert len(list(store.storage.list("keys"))) == 5 and len(list(store.committed())) == 2
    repair(store, lambda: verify(store))
    assert len(list(store.storage.list("keys"))) == 5  # of partners: they are needed, though no unit names them
    with pytest.raises(Mismatch, match="row 59 of train is not the sample that was captured"):
        capture(right, config, tmp_path / "c")


@pytest.mark.parametrize("damaged", [False, True])
def test_a_capture_goes_on_with_a_source_in_the_same_order(pipeline: ModuleType, tmp_path: Path, damaged: bool) -> None:
    """Samples of one label that changed places leave the labels as they were; a damaged page is no other order."""
    images, labels = (array[:60] for array in pipeline.arrays())
    order = np.argsort(labels, kind="stable")
    images, labels = images[order], labels[order]
    config = pipeline.cache().model_copy(update={"unit_rows": 12, "batch_size": 12, "views": 1})
    data = with_train(pipeline.data(), images, labels)
    store = capture(data, config, tmp_path / "c", range(2))
    if damaged:
        flip(tmp_path / "c" / "keys" / "train-00000000")
        prepare(data, config, data.sources, store, Leases(store.storage), [torch.device("cpu")])
        return
    swapped = np.arange(60)
    swapped[[0, 1]] = [1, 0]
    other = with_train(data, images[swapped], labels)
    with pytest.raises(Mismatch, match="row 0 of train is not the sample that was captured as that row"):
        capture(other, config, tmp_path / "c")
    capture(data, config, tmp_path / "c")
    assert verify(store).sealed


def test_nothing_is_appended_where_a_page_of_keys_is_lost(cached: Cli) -> None:
    (cached.folder / "cache" / "keys" / "train-00000003").unlink()
    before = sorted(path.name for path in (cached.folder / "cache" / "commits").iterdir())
    cached.change(
        'ed.Tap(member="a", module="pool"),', 'ed.Tap(member="a", module="pool"), ed.Tap(member="b", module="pool"),'
    )
    error = cached("append", "digits.py", "--cache", "cache", code=4).stderr
    assert "keys/train-00000003 is lost or damaged" in error and "repair" in error
    assert sorted(path.name for path in (cached.folder / "cache" / "commits").iterdir()) == before
