"""Guards that nothing else reaches: states that several files of a cache have to agree to lie about."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli
from small import a_plan, put_item

import ensemble_distill as ed
from ensemble_distill.cache.commits import committed_units
from ensemble_distill.cache.copy import copy
from ensemble_distill.cache.groups import Group, head_of
from ensemble_distill.cache.plan import Plan
from ensemble_distill.cache.verify import verify
from ensemble_distill.codec import Dense, Members, RowFigures
from ensemble_distill.errors import Corrupt, Mismatch, UsageError
from ensemble_distill.recording.seal import seal
from ensemble_distill.recording.taps import feature_codec
from ensemble_distill.store import records
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.store import Store


def sealed(path: Path, plan: Plan) -> Store:
    store = Store(LocalStorage(path, sync=False))
    digest = store.put_plan(plan)
    for item in plan.items():
        put_item(store, plan, digest, item)
    seal(plan, digest, store)
    return store


def test_a_commit_of_no_unit_is_told_by_those_who_count_units(tmp_path: Path) -> None:
    store = sealed(tmp_path, a_plan())
    store.storage.create("commits/train-v000009-00000000.targets.json", b"{}")
    with pytest.raises(Corrupt, match=f"{tmp_path}/commits: 'train-v000009-00000000.targets' is no unit"):
        committed_units(store, a_plan())


def test_a_place_that_gets_another_plan_as_a_copy_begins_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, target = sealed(tmp_path / "a", a_plan()), Store(LocalStorage(tmp_path / "b", sync=False))
    target.put_plan(a_plan(rows=20))
    monkeypatch.setattr("ensemble_distill.cache.copy._held", lambda *_: np.zeros(a_plan().units, bool))  # as it was
    with pytest.raises(Mismatch, match="holds another cache"):
        copy(store, target)
    assert not list(target.committed())


def test_a_plan_that_was_exchanged_for_another_is_not_copied(tmp_path: Path) -> None:
    store = sealed(tmp_path / "a", a_plan())
    store.storage.remove("PLAN")
    store.put_plan(a_plan(rows=20))
    with pytest.raises(Corrupt, match="its manifest is of another plan than PLAN"):
        copy(store, Store(LocalStorage(tmp_path / "b", sync=False)))


def test_groups_of_predictions_fit_together() -> None:
    def members(*names: str, bits: int = 16) -> Group:
        codec = Members(inner=Dense(classes=3, bits=bits), members=names)  # type: ignore[arg-type]
        return Group.of("targets", {"main": codec})

    assert head_of([members("a"), members("b")]) == members("a", "b").codecs["main"]
    for groups, problem in (
        ([Group.of("targets", {"main": RowFigures()})], "is kept as row"),
        ([members("a"), members("b", bits=8)], "in different ways"),
        ([members("a"), members("a")], "in two groups"),
    ):
        with pytest.raises(ValueError, match=problem):
            head_of(groups)


def test_what_was_put_back_and_is_whole_says_that_repair_mends_it(tmp_path: Path) -> None:
    store, base = sealed(tmp_path, a_plan()), a_plan()
    first, digest = store.current(), str(store.plan_digest())
    views = base.splits["train"].model_copy(update={"views": 3})
    plan = base.model_copy(update={"splits": {"train": views}, "parents": (digest,)})
    grown = store.put_plan(plan, digest)
    for item in itertools.islice(plan.items(), base.item_count, None):
        put_item(store, plan, grown, item)
    seal(plan, grown, store)
    store.storage.replace("CURRENT", f"{first}\n".encode())
    assert any(str(damage).endswith("puts it in force") for damage in verify(store).damaged)


def test_an_audit_is_of_the_same_calibration(cached: Cli) -> None:
    calibrated = cached("audit", "digits.py", "--cache", "cache", "--set", 'calibrate="held_out"', code=3)
    assert "the cache was captured without calibrate" in calibrated.stderr


def test_no_samples_are_appended_to_views_that_mix(cli: Cli) -> None:
    cli.change("transforms=(ed.Crop(padding=1),)", "mix=ed.Mixup(alpha=0.4)")
    cli.change("slice(0, 1000)", "slice(0, 700)", to="fewer.py")
    cli("cache", "fewer.py", "--out", "c")
    assert "no samples can be appended" in cli("append", "digits.py", "--cache", "c", code=2).stderr


MANY = """
import torch
import ensemble_distill as ed
from digits import CLASSES, Net, arrays

def data():
    images, labels = arrays()
    source = ed.ArraySource({{"image": images[:8]}}, labels[:8])
    return ed.DataConfig(sources={{f"c{{i}}": source for i in range({splits})}}, classes=CLASSES)

def net():
    torch.manual_seed(0)
    return Net(4)

def cache():
    members = tuple(ed.Member(name=f"m{{i}}", build=net, version="1") for i in range({members}))
    return ed.CacheConfig(members=members, precision="fp32")
"""


@pytest.mark.parametrize(
    ("splits", "members", "message"),
    [
        (97, 60, "60 member(s), 97 split(s) and 10 classes: the manifest, with the statistics of each split,"),
        (1025, 1, "this cannot be captured into one cache (splits: "),
    ],
)
def test_a_capture_that_nobody_could_read_is_refused_before_it_begins(
    cli: Cli, splits: int, members: int, message: str
) -> None:
    (cli.folder / "many.py").write_text(MANY.format(splits=splits, members=members))
    assert message in cli("cache", "many.py", "--out", "c", code=2).stderr
    assert not list((cli.folder / "c").glob("[Ppc]*"))


def test_records_that_nobody_would_read_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = sealed(tmp_path, a_plan())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    manifest = store.manifest(str(store.current())).model_copy(update={"rows": 13})
    monkeypatch.setattr(records, "MAX_MANIFEST", 100)
    with pytest.raises(UsageError, match=r"its manifest would take [0-9]+ bytes, at most 100 are read"):
        store.put_manifest(manifest)
    monkeypatch.setattr(records, "MAX_PLAN", 100)
    with pytest.raises(UsageError, match="its plan would take"):
        store.put_plan(a_plan(rows=16), str(store.plan_digest()))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shape", [(0,), ((1 << 27) + 1,), (1 << 14, 1 << 14)])
def test_features_that_no_unit_can_hold_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="of shape"):
        feature_codec(ed.Tap(member="a", module="pool"), shape)


def test_a_tap_that_a_plan_keeps_as_something_else_is_no_feature(tmp_path: Path) -> None:
    plan = a_plan()
    groups = (plan.groups[0], Group.of("tap.a.x", {"tap/a.x": RowFigures()}))
    sealed(tmp_path, plan.model_copy(update={"groups": groups}))
    with pytest.raises(Corrupt, match=r"its plan keeps 'tap/a\.x' as row, expected features"):
        ed.open_cache(tmp_path).tap_codec("tap/a.x")
