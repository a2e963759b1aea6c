"""Appending members, taps, views, samples and splits to a sealed cache: what there is stays, to the byte."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cli, flip, shard_of
from faulty import Killed
from small import a_plan, put_item
from test_resume import slow, wait_for

from ensemble_distill import Cache, EnsembleConfig, open_cache
from ensemble_distill.cache.abandon import abandon
from ensemble_distill.cache.commits import held_plan
from ensemble_distill.cache.plan import Calibration, Plan, Split
from ensemble_distill.cache.repair import repair
from ensemble_distill.cache.verify import verify
from ensemble_distill.errors import Corrupt, Mismatch
from ensemble_distill.fingerprint import sha256
from ensemble_distill.recording.seal import seal
from ensemble_distill.store import records
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.records import Commit
from ensemble_distill.store.store import Store, open_store

MEMBERS = 'codec={"name":"members"}'
ABC = '("a", "b", "c")'
APPEND = ("append", "digits.py", "--cache", "two", "--set", MEMBERS)


@pytest.fixture(scope="module")
def base(teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three sealed caches: ``all`` of everything, ``two`` of members a and b, ``small`` of one view."""
    folder = tmp_path_factory.mktemp("append") / "work"
    shutil.copytree(teachers, folder)
    run = Cli(folder)
    run("cache", "digits.py", "--out", "all", "--set", MEMBERS)
    run("cache", "digits.py", "--out", "small", "--views", "1")
    run.change(ABC, '("a", "b")', to="two.py")
    run("cache", "two.py", "--out", "two", "--set", MEMBERS)
    return folder


@pytest.fixture
def cli(base: Path, tmp_path: Path) -> Cli:
    return Cli(shutil.copytree(base, tmp_path / "work"))


def files(cache: Path) -> dict[str, bytes]:
    """All that is never rewritten."""
    kept = ("plans", "keys", "objects", "commits", "pages", "manifests")
    return {f"{d}/{p.name}": p.read_bytes() for d in kept for p in (cache / d).iterdir()}


def unseal(cli: Cli, current: str) -> None:
    """As an append to ``two`` leaves it that was killed before it was sealed."""
    (cli.folder / "two" / "manifests" / f"{open_cache(cli.folder / 'two').digest}.json").unlink()
    (cli.folder / "two" / "CURRENT").write_text(current)


def committed(cache: Path) -> dict[str, Commit]:
    store = open_store(cache)
    return {unit: store.commit(unit) for unit in store.committed()}


def said(cache: Cache, split: str = "train", view: int = 1, count: int = 150, **ensemble: object) -> torch.Tensor:
    return cache.mixed(EnsembleConfig(**ensemble)).targets_at(np.arange(count), view, split=split).logprobs


def test_a_member_is_appended_as_if_it_had_been_there(cli: Cli) -> None:
    before, digest = files(cli.folder / "two"), open_cache(cli.folder / "two").digest
    cli("append", "digits.py", "--cache", "two", "--set", MEMBERS)
    after = files(cli.folder / "two")
    assert {name: after[name] for name in before} == before
    together, whole = open_cache(cli.folder / "two"), open_cache(cli.folder / "all")
    assert together.manifest().parent == digest
    for split, view in (("train", 0), ("train", 1), ("test", 0)):
        assert torch.equal(said(together, split, view), said(whole, split, view))
        for rule in ("mean_probs", "mean_logits"):
            assert torch.equal(said(together, split, view, combine=rule), said(whole, split, view, combine=rule))
    figures = [c.targets_at(np.arange(150), 1) for c in (together, whole)]
    for name in ("entropy", "mutual_information", "label_logprob"):
        assert torch.allclose(*(getattr(f, name) for f in figures), atol=5e-3), name
    old, new = (c.manifest().statistics["test"]["predictors"] for c in (together, whole))
    assert old.keys() == new.keys() == {"a", "b", "c", "ensemble"}
    for name in new:
        assert old[name]["nll"] == pytest.approx(new[name]["nll"], abs=2e-3)
    cli("verify", "two", "--deep")
    assert "nothing to capture" in cli("append", "digits.py", "--cache", "two", "--set", MEMBERS).stdout


WEIGHTED = """


def weighted():
    return train().model_copy(update={"weight": lambda rows: 1 / (1 + rows.entropy)})
"""


def trained(cli: Cli, cache: str, *options: str) -> tuple[bytes, list[object]]:
    """A student's weights, and what its run said of every epoch."""
    out = f"run-{len(list(cli.folder.glob('run-*')))}"
    cli("train", *options, "--cache", cache, "--out", out, "--set", "epochs=1")
    lines = [json.loads(line) for line in (cli.folder / out / "metrics.jsonl").read_text().splitlines()]
    return (cli.folder / out / "student.safetensors").read_bytes(), [line | {"timing": None} for line in lines]


def test_members_captured_one_after_another_teach_what_they_teach_together(cli: Cli) -> None:
    """Each in a process of its own, and the cache carried to another place: the students are equal to the bit."""
    with (cli.folder / "two.py").open("a") as file:
        file.write(WEIGHTED)
    cli.change(ABC, '("a",)', to="one.py")
    cli("cache", "one.py", "--out", "first", "--set", MEMBERS)
    cli("copy", "first", "second")
    cli("append", "two.py", "--cache", "second", "--set", MEMBERS)
    assert trained(cli, "second", "two.py") == trained(cli, "two", "two.py")
    # Row figures of the captured ensemble are reckoned from float16 where a member came later; those of another are not
    # stored, but reckoned from the members in either cache.
    chosen = ["two.py:weighted", "--set", 'ensemble.weights={"a":0.3,"b":0.7}']
    assert trained(cli, "second", *chosen) == trained(cli, "two", *chosen)
    grown, whole = (open_cache(cli.folder / name).targets_at(np.arange(1000), 1) for name in ("second", "two"))
    for name in ("entropy", "mutual_information", "label_logprob"):
        assert torch.allclose(getattr(grown, name), getattr(whole, name), rtol=1e-2, atol=1e-3), name


def test_what_was_there_before_can_still_be_opened(cli: Cli) -> None:
    digest, before = open_cache(cli.folder / "two").digest, said(open_cache(cli.folder / "two"))
    cli("append", "digits.py", "--cache", "two", "--set", MEMBERS)
    cli("gc", "two", "--delete")
    assert torch.equal(said(open_cache(cli.folder / "two", manifest=digest)), before)
    train = ["train", "two.py", "--cache", "two", "--set", "epochs=1"]
    cli(*train, "--out", "r", "--manifest", digest)
    assert "holds no manifest" in cli(*train, "--out", "s", "--manifest", "f" * 64, code=3).stderr
    assert "holds no manifest" in cli(*train, "--out", "s", "--manifest", "../CURRENT", code=3).stderr


def test_a_student_of_what_was_there_before_is_evaluated_against_that(cli: Cli) -> None:
    two, evaluate = cli.folder / "two", ["evaluate", "two.py", "--run", "r"]
    before = open_cache(two).digest
    cli("train", "two.py", "--cache", "two", "--out", "r", "--set", "epochs=1")
    scores = json.loads(cli(*evaluate, "--json").stdout)
    assert scores["manifest"] == before and "has grown" not in cli(*evaluate).stdout
    cli(*APPEND)
    now = open_cache(two).digest
    train = ["train", "two.py", "--cache", "two", "--out", "r", "--set", "epochs=1"]
    assert "has grown" in cli(*train, code=3).stderr and "is finished" in cli(*train, "--manifest", before).stdout
    assert f"two has grown: opened as r was trained from it, manifest {before}" in cli(*evaluate).stdout
    again = json.loads(cli(*evaluate, "--json", "--expect-digest", before).stdout)
    assert {**again, "latency_ms": scores["latency_ms"]} == scores
    assert before in cli(*evaluate, "--expect-digest", now, code=3).stderr
    assert "content digest" in cli(*evaluate, "--manifest", now, code=3).stderr
    cli("train", "two.py", "--cache", "two", "--out", "s", "--manifest", before, "--set", "epochs=1")
    assert json.loads(cli("evaluate", "two.py", "--run", "s", "--json").stdout)["kl"] == scores["kl"]
    assert json.loads(cli(*evaluate, "--cache", "two", "--json").stdout)["manifest"] == now, "as its user says"
    (two / "manifests" / f"{before}.json").unlink()
    assert "content digest" in cli(*evaluate, code=3).stderr


def test_a_cache_that_was_repaired_is_not_one_that_has_grown(cli: Cli) -> None:
    """Another manifest is in force, of the same content; what the other one named may be gone."""
    before = open_cache(cli.folder / "two").digest
    cli("train", "two.py", "--cache", "two", "--out", "r", "--set", "epochs=1")
    flip(shard_of(cli.folder / "two", "test-v000000-00000001.targets"))
    cli("repair", "two", "two.py", "--set", MEMBERS)
    assert json.loads(cli("evaluate", "two.py", "--run", "r", "--json").stdout)["manifest"] != before


SPY = """


class Spy(Net):
    def forward(self, image):
        if self._who != "c" and len(image) > 4:
            raise RuntimeError("asked again")
        return super().forward(image)

    def _get_name(self):  # what a module prints is a part of who it is
        return "Net"


def spy(name):
    net = Spy(48)
    net._who = name  # words in attributes with an underscore are none
    return net
"""


def test_only_what_is_new_runs(cli: Cli) -> None:
    """The members that the cache holds are not asked again: here they would not answer."""
    cli.change("build=lambda: Net(48)", "build=lambda name=name: spy(name)")
    with (cli.folder / "digits.py").open("a") as file:
        file.write(SPY)
    cli("append", "digits.py", "--cache", "two", "--set", MEMBERS)
    assert torch.equal(said(open_cache(cli.folder / "two")), said(open_cache(cli.folder / "all")))


def test_a_tap_is_appended(cli: Cli) -> None:
    cli.change(
        'taps=(ed.Tap(member="a", module="pool"),)',
        'taps=(ed.Tap(member="a", module="pool"), ed.Tap(member="b", module="head"))',
    )
    before = files(cli.folder / "small")
    cli("append", "digits.py", "--cache", "small", "--views", "1")
    assert files(cli.folder / "small").items() >= before.items()
    cli("cache", "digits.py", "--out", "anew", "--views", "1")
    parts = [
        open_cache(cli.folder / c).targets_at(np.arange(900, 1000), taps=["tap/b.head", "tap/a.pool"]).features
        for c in ("small", "anew")
    ]
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[1])


def test_views_are_appended(cli: Cli, captured: Path) -> None:
    before = files(cli.folder / "small")
    cli("append", "digits.py", "--cache", "small", "--views", "2")
    assert files(cli.folder / "small").items() >= before.items()
    appended, anew = open_cache(cli.folder / "small"), open_cache(captured / "cache")
    assert appended.content_digest == anew.content_digest
    assert appended.manifest().statistics == anew.manifest().statistics


def test_samples_and_splits_are_appended_behind_those_there_are(cli: Cli) -> None:
    few = ["--views", "1", "--limit", "150"]
    cli("cache", "digits.py", "--out", "grown", *few)
    for limit in ("170", "530", "1000"):
        cli("append", "digits.py", "--cache", "grown", "--views", "1", "--limit", limit)
    grown, anew = open_cache(cli.folder / "grown"), open_cache(cli.folder / "small")
    assert grown.plan.splits["train"].cuts == (150, 170, 530) and grown.plan.splits["train"].rows == 1000
    assert len(grown.plan.parents) == 3
    rows = np.random.default_rng(0).permutation(1000)
    for memory in (1 << 30, 30_000):  # read whole, and by units
        again = open_cache(cli.folder / "grown", memory=memory)
        assert torch.equal(again.targets_at(rows).logprobs, anew.targets_at(rows).logprobs)
    cli("train", "digits.py", "--cache", "grown", "--out", "r", "--set", "epochs=1")
    cli("train", "digits.py", "--cache", "small", "--out", "s", "--set", "epochs=1")
    lines = [(cli.folder / r / "metrics.jsonl").read_text().splitlines()[0] for r in "rs"]
    assert json.loads(lines[0])["train"] == json.loads(lines[1])["train"]
    cli.change('"test": slice(1200, None)}', '"test": slice(1200, None), "asked_for": slice(1500, 1600)}')
    cli("append", "digits.py", "--cache", "grown", "--views", "1")
    assert len(open_cache(cli.folder / "grown").table("asked_for")) == 100
    cli("verify", "grown", "--deep")


def test_an_append_that_is_stopped_goes_on_and_readers_see_what_was_there(cli: Cli) -> None:
    before = open_cache(cli.folder / "two").digest
    append = ["append", "digits.py", "--cache", "two", "--set", MEMBERS]

    cli(*append)
    store = open_store(cli.folder / "two")
    content = open_cache(cli.folder / "two").content_digest
    # As a kill in the middle leaves it: half of the new units, and the old manifest still in force.
    new = sorted(unit for unit in store.committed() if unit.endswith(".targets.1"))
    for unit in new[::2]:
        store.storage.remove(f"commits/{unit}.json")
    unseal(cli, f"{before}\n")
    assert held_plan(store).parents
    assert open_cache(cli.folder / "two").digest == before
    beyond = len([unit for unit in store.committed() if unit.endswith(".targets.1")])
    assert f"; beyond it {beyond} units of an append that is not complete" in cli("verify", "two").stdout
    cli("train", "two.py", "--cache", "two", "--out", "r", "--set", "epochs=1")
    cli("copy", "two", "copied")
    assert open_cache(cli.folder / "copied").digest == before
    assert (
        "is not complete"
        in cli("append", "digits.py", "--cache", "two", "--set", MEMBERS, "--views", "3", code=3).stderr
    )
    cli("gc", "two", "--delete")
    cli(*append)
    assert open_cache(cli.folder / "two").content_digest == content
    assert open_cache(cli.folder / "two").manifest().parent == before


def test_a_grown_cache_is_repaired_and_copied(cli: Cli) -> None:
    parent = open_cache(cli.folder / "two").digest
    cli("copy", "two", "before")
    cli("append", "digits.py", "--cache", "two", "--set", MEMBERS)
    expected = said(open_cache(cli.folder / "two"))
    cli("copy", "two", "before")
    assert torch.equal(said(open_cache(cli.folder / "before")), expected)
    assert open_cache(cli.folder / "before", manifest=parent).digest == parent
    cli("verify", "before")
    cli("copy", "two", "copied")
    assert torch.equal(said(open_cache(cli.folder / "copied")), expected)
    cli("gc", "copied", "--delete")
    cli("verify", "copied")
    for shard in sorted((cli.folder / "two" / "objects").iterdir())[::3]:
        flip(shard)
    cli("verify", "two", code=4)
    cli("repair", "two", "digits.py", "--set", MEMBERS)
    cli("verify", "two", "--deep")
    assert torch.allclose(said(open_cache(cli.folder / "two")), expected, atol=1e-5)
    assert open_cache(cli.folder / "two").manifest().parent == parent


SHARE = "weights=HERE"


@pytest.mark.parametrize("lost", [("targets",), ("targets.1",), ("targets", "targets.1", "targets.2")])
def test_units_are_captured_again_to_the_bit_whichever_are_lost(cli: Cli, lost: tuple[str, ...]) -> None:
    """Each group of predictions keeps figures of the ensemble as it was then, whose shares were others."""
    for n, shares in enumerate(("1.0", "0.7, 0.3", "0.2, 0.5, 0.3")):
        names = "abc"[: n + 1]
        share = f'share=dict(zip("{names}", ({shares},)))[name], {SHARE}'
        cli.change(ABC, str(tuple(names)), to="step.py")
        cli.change(SHARE, share, name="step.py", to=f"{names}.py")
    cli("cache", "a.py", "--out", "grown", "--set", MEMBERS)
    parents = []
    for pipeline in ("ab.py", "abc.py"):
        parents.append(open_cache(cli.folder / "grown").digest)
        cli("append", pipeline, "--cache", "grown", "--set", MEMBERS)
    before, shards = open_cache(cli.folder / "grown"), cli.folder / "grown" / "objects"
    names = sorted(path.name for path in shards.iterdir())
    for group in lost:
        for commit in sorted((cli.folder / "grown" / "commits").glob(f"*.{group}.json"))[::2]:
            flip(shard_of(cli.folder / "grown", commit.stem))
    cli("verify", "grown", code=4)
    cli("repair", "grown", "abc.py", "--set", MEMBERS)
    cli("verify", "grown", "--deep")
    after = open_cache(cli.folder / "grown")
    assert after.content_digest == before.content_digest
    assert sorted(path.name for path in shards.iterdir()) == names
    for parent in parents:
        assert len(open_cache(cli.folder / "grown", manifest=parent).targets_at(np.arange(1000), 0)) == 1000
    cli("audit", "abc.py", "--cache", "grown", "--set", MEMBERS)


def test_samples_are_appended_behind_those_there_are(cli: Cli) -> None:
    """Also where there are no labels that would tell."""
    cli.change("labels[part])", "None)")
    cli.change("slice(0, 1000)", "slice(300, 1000)", to="later.py")
    cli("cache", "later.py", "--out", "c", "--views", "1")
    before = files(cli.folder / "c")
    stderr = cli("append", "digits.py", "--cache", "c", "--views", "1", code=3).stderr
    assert "row 0 of train is not the sample that was captured as that row" in stderr
    assert files(cli.folder / "c") == before
    cli.change("slice(0, 1000)", "np.r_[300:1000, 0:300]")
    cli("append", "digits.py", "--cache", "c", "--views", "1")
    cli("verify", "c")


def test_a_forged_plan_of_an_append_decides_nothing(cli: Cli) -> None:
    """PLAN names one that says to have grown out of what is sealed, with other temperatures."""
    cli("cache", "digits.py", "--out", "c", "--set", 'calibrate="held_out"')
    store = open_store(cli.folder / "c")
    digest, current = str(store.plan_digest()), store.current()
    true = store.plan(digest, Plan)
    record = store.calibration(str(true.capture.calibration), Calibration)
    lies = {"temperature_before": tuple(4 * t for t in record.temperature_before), "temperature_after": 3.0}
    calibration = store.put_calibration(record.model_copy(update=lies))
    split = true.splits["train"].model_copy(update={"views": 3})
    forged = true.model_copy(
        update={
            "parents": (digest,),
            "splits": true.splits | {"train": split},
            "reading": true.reading.model_copy(update=lies),
            "capture": true.capture.model_copy(update={"calibration": calibration}),
        }
    )
    store.put_plan(forged, digest)
    for command in (["cache", "digits.py", "--out", "c"], ["append", "digits.py", "--cache", "c"]):
        stderr = cli(*command, "--views", "3", "--set", 'calibrate="held_out"', code=3).stderr
        assert "capture.calibration" in stderr or "something else is being appended" in stderr
    assert store.current() == current
    cli("append", "--cache", "c", "--abandon")
    cli("append", "digits.py", "--cache", "c", "--views", "3", "--set", 'calibrate="held_out"')
    assert held_plan(store).reading == true.reading


def test_what_is_appended_is_mixed_from_what_is_sealed(cli: Cli) -> None:
    """And not from a commit that somebody forged in the middle of the append."""
    cli(*APPEND)
    whole = {unit: commit for unit, commit in committed(cli.folder / "two").items() if unit.endswith(".targets.1")}
    shutil.rmtree(cli.folder / "two")
    cli("cache", "two.py", "--out", "two", "--set", MEMBERS)
    begun(cli)
    store = open_store(cli.folder / "two")
    unit, other = (f"train-v00000{view}-00000004.targets" for view in (0, 1))
    lie = store.commit(other).model_copy(update={"unit": unit})
    store.storage.replace(f"commits/{unit}.json", records.seal(lie))
    assert "not the commit that was sealed" in cli(*APPEND, code=4).stderr
    cli("cache", "digits.py", "--out", "two", "--set", MEMBERS, code=4)
    cli("repair", "two")
    cli(*APPEND)
    found = {unit: commit for unit, commit in committed(cli.folder / "two").items() if unit.endswith(".targets.1")}
    assert {unit: c.content for unit, c in found.items()} == {unit: c.content for unit, c in whole.items()}


def test_a_parent_whose_shard_is_gone_is_told(cli: Cli) -> None:
    """A unit that comes out otherwise (as on another machine) is another shard: then what was before lacks it."""
    cli.change("image.float() / 16", 'image.float() / 16 + (HERE / "noise").exists() / 64')
    cli.change(ABC, '("a",)', to="one.py")
    cli("cache", "one.py", "--out", "grown", "--set", MEMBERS, "--views", "1")
    parent = open_cache(cli.folder / "grown").digest
    cli.change(ABC, '("a", "b")', to="two.py")
    cli("append", "two.py", "--cache", "grown", "--set", MEMBERS, "--views", "1")
    unit = "train-v000000-00000001.targets"
    shard = shard_of(cli.folder / "grown", unit)
    before = shard.read_bytes()
    flip(shard)
    (cli.folder / "noise").touch()
    cli("repair", "grown", "two.py", "--set", MEMBERS, "--views", "1")
    assert shard_of(cli.folder / "grown", unit) != shard
    text = cli("verify", "grown", code=4).stdout
    assert unit in text and parent in text
    shard.write_bytes(before)  # as from a copy
    cli("verify", "grown")
    shard.unlink()
    (cli.folder / "grown" / "manifests" / f"{parent}.json").unlink()  # or it is given up
    cli("verify", "grown")


@pytest.mark.parametrize(
    ("change", "cache", "options", "code", "message"),
    [
        ((ABC, '("a", "b")'), "all", ["--set", MEMBERS], 3, "members"),
        ((ABC, '("c", "a", "b")'), "two", ["--set", MEMBERS], 3, "members"),
        (("Crop(padding=1)", "Crop(padding=2)"), "small", [], 3, "padding"),
        (("taps=(", "taps=() and ("), "small", ["--views", "1"], 3, "holds tap.a.pool"),
        (("labels[part]", "labels[part][::-1]"), "small", ["--views", "1"], 3, "labels of the first 200 rows"),
        ((ABC, ABC), "small", ["--views", "1", "--limit", "100"], 3, "holds 200 rows of held_out"),
        ((ABC, ABC), "small", ["--set", 'codec={"name":"topk","k":3}'], 2, "another codec cannot be appended"),
        ((ABC, ABC), "small", ["--set", "temperature=2"], 3, "temperature_after"),
    ],
)  # fmt: skip
def test_what_is_not_more_is_refused_before_anything_is_written(
    cli: Cli, change: tuple[str, str], cache: str, options: list[str], code: int, message: str
) -> None:
    cli.change(*change)
    before = files(cli.folder / cache)
    assert message in cli("append", "digits.py", "--cache", cache, *options, code=code).stderr
    assert files(cli.folder / cache) == before


def test_a_member_is_appended_only_where_each_is_kept(cli: Cli) -> None:
    cli("cache", "two.py", "--out", "mixture", "--views", "1")
    stderr = cli("append", "digits.py", "--cache", "mixture", "--views", "1", code=2).stderr
    assert "keeps its predictions as dense" in stderr and "Members()" in stderr
    kept = 'codec={"name":"members","inner":{"name":"topk","k":3}}'
    cli("cache", "two.py", "--out", "kept", "--views", "1", "--set", kept)
    assert (
        "3 likeliest classes"
        in cli("append", "digits.py", "--cache", "kept", "--views", "1", "--set", kept, code=2).stderr
    )
    tuned = ["--views", "1", "--set", MEMBERS, "--set", "calibrate=held_out"]
    cli("cache", "two.py", "--out", "tuned", *tuned)
    assert "is calibrated" in cli("append", "digits.py", "--cache", "tuned", *tuned, code=2).stderr


def test_only_to_a_sealed_cache_is_appended(cli: Cli) -> None:
    cli("cache", "digits.py", "--out", "part", "--units", "0:2")
    assert "is not sealed" in cli("append", "digits.py", "--cache", "part", "--views", "3", code=3).stderr
    assert "no such directory" in cli("append", "digits.py", "--cache", "none", code=2).stderr


def test_pages_of_a_split_do_not_go_across_its_cuts() -> None:
    split = Split(rows=23, views=1, unit_rows=5, labels=None, cuts=(7, 8, 18))
    spans = [split.span(page) for page in range(split.pages)]
    assert spans == [(0, 5), (5, 7), (7, 8), (8, 13), (13, 18), (18, 23)]
    pages = split.page_of(np.arange(23))
    assert all(first <= row < last for row, page in enumerate(pages) for first, last in [spans[page]])
    for cuts in ((0,), (7, 7), (23,), (9, 8)):
        with pytest.raises(ValueError, match=r"cuts|greater"):
            Split(rows=23, views=1, unit_rows=5, labels=None, cuts=cuts)


# Giving it up -------------------------------------------------------------------------------------

ABANDON = ("append", "--cache", "two", "--abandon")


def begun(cli: Cli) -> None:
    """An append that was killed when some of its units were committed."""
    slow(cli, 0.05)
    process = cli.start(*APPEND, SLOW="1")
    wait_for(lambda: any((cli.folder / "two" / "commits").glob("*.targets.1.json")), process)
    process.kill()
    process.communicate()


def names(cache: Path) -> set[str]:
    """The files that say what is there; shards and plans that nothing leads to may lie beside them."""
    return {str(p.relative_to(cache)) for d in ("commits", "keys", "manifests") for p in (cache / d).iterdir()}


def test_an_append_is_given_up_and_the_cache_is_as_it_was_sealed(cli: Cli) -> None:
    two = cli.folder / "two"
    before, there = files(two), names(two)
    pointers = [(two / name).read_bytes() for name in ("PLAN", "CURRENT")]
    begun(cli)
    assert (two / "PLAN").read_bytes() != pointers[0] and names(two) != there
    assert "dropped: " in cli(*ABANDON).stdout
    assert [(two / name).read_bytes() for name in ("PLAN", "CURRENT")] == pointers
    assert files(two).items() >= before.items() and names(two) == there
    cli("verify", "two", "--deep")
    cli("gc", "two", "--older-than", "0", "--delete")
    assert files(two) == before and not list((two / "leases").iterdir())
    assert "nothing was appended" in cli(*ABANDON).stdout
    assert "already complete" in cli("cache", "two.py", "--out", "two", "--set", MEMBERS).stdout
    cli(*APPEND)
    assert torch.equal(said(open_cache(cli.folder / "two")), said(open_cache(cli.folder / "all")))


def test_other_samples_are_appended_after_those_that_were_given_up(cli: Cli) -> None:
    """Their pages of keys stand where the others stood."""
    two = cli.folder / "two"
    shutil.rmtree(two)
    cli("cache", "digits.py", "--out", "two", "--views", "1", "--limit", "150")
    before, current, there = files(two), (two / "CURRENT").read_bytes(), names(two)
    cli("append", "digits.py", "--cache", "two", "--views", "1", "--limit", "500")
    unseal(cli, current.decode())
    for name in set(files(two)) - set(before):
        if name.startswith("manifests/") or name == "commits/train-v000000-00000002.targets.json":
            (two / name).unlink()
    cli.change(" slice(0, 1000)", " [*range(150), *range(999, 150, -1)]")
    other = ["append", "digits.py", "--cache", "two", "--views", "1"]
    stderr = cli(*other, code=3).stderr
    assert "something else is being appended" in stderr and "append --cache two --abandon" in stderr
    cli(*ABANDON)
    assert files(two).items() >= before.items() and names(two) == there
    cli(*other)
    cli("verify", "two", "--deep")


def test_an_append_that_is_at_work_is_not_given_up(cli: Cli) -> None:
    slow(cli, 0.2)
    process = cli.start(*APPEND, SLOW="1")
    wait_for(lambda: any((cli.folder / "two" / "commits").glob("*.targets.1.json")), process)
    process.send_signal(signal.SIGSTOP)
    before = files(cli.folder / "two")
    assert "somebody is at work here" in cli(*ABANDON, code=3).stderr
    assert files(cli.folder / "two") == before
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.communicate()
    cli(*ABANDON)
    cli("verify", "two")


def test_what_is_sealed_cannot_be_given_up(cli: Cli) -> None:
    cli(*APPEND)
    before = files(cli.folder / "two")
    assert "nothing was appended" in cli(*ABANDON).stdout
    assert files(cli.folder / "two") == before
    (cli.folder / "two" / "CURRENT").unlink()
    assert "is not sealed" in cli(*ABANDON, code=3).stderr
    assert files(cli.folder / "two") == before
    assert "Missing argument 'PIPELINE'" in cli("append", "--cache", "two", code=2).stderr


def half_appended(store: Store) -> Plan:
    """Fill a store with a sealed cache of twelve rows to which eight are being appended; the plan of all."""
    base = a_plan()
    digest = store.put_plan(base)
    for item in base.items():
        put_item(store, base, digest, item)
    seal(base, digest, store)
    train = Split(rows=20, views=2, unit_rows=4, labels=None, cuts=(12,))
    plan = base.model_copy(update={"splits": {"train": train}, "parents": (digest,)})
    store.put_plan(plan, digest)
    go_on(store, plan)
    return plan


@pytest.fixture
def half(tmp_path: Path) -> tuple[Store, Plan]:
    store = Store(LocalStorage(tmp_path, sync=False))
    return store, half_appended(store)


def go_on(store: Store, plan: Plan) -> None:
    for item in plan.items():
        put_item(store, plan, str(store.put_plan(plan, plan.parents[-1])), item)


class Dying(LocalStorage):
    """Is killed when it has removed or moved so many files."""

    left = 0

    def remove(self, name: str) -> None:
        self._step()
        super().remove(name)

    def swap(self, name: str, expected: bytes | None, data: bytes) -> bool:
        self._step()
        return super().swap(name, expected, data)

    def _step(self) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1


@pytest.mark.parametrize("again", [True, False])
def test_giving_up_dies_anywhere_and_what_is_there_can_be_given_up_or_gone_on_with(tmp_path: Path, again: bool) -> None:
    """Eight commits and two pages of keys are removed and PLAN is moved: a kill before each of these."""
    for steps in range(11):
        root = tmp_path / str(steps)
        store = Store(LocalStorage(root, sync=False))
        plan = half_appended(store)
        dying = Dying(root, sync=False)
        dying.left = steps
        with pytest.raises(Killed):
            abandon(Store(dying))
        assert verify(store).ok
        if again:
            assert len(abandon(store)) == max(0, 8 - steps)
            assert store.plan_digest() == plan.parents[0] and len(names(root)) == 12 + 3 + 1
        else:
            go_on(store, plan)
            seal(plan, str(store.plan_digest()), store)
        assert verify(store).ok and len(open_cache(root).table("train")) == (12 if again else 20)


def test_an_append_to_a_bucket_is_given_up(tmp_path: Path) -> None:
    store = open_store(f"memory:/{tmp_path}", create=True)
    plan = half_appended(store)
    assert len(abandon(store)) == 8 and verify(store).ok
    assert store.plan_digest() == plan.parents[0] and len(list(store.storage.list("keys"))) == 3


class Overtaken(LocalStorage):
    def swap(self, name: str, expected: bytes | None, data: bytes) -> bool:
        super().replace(name, b"0" * 64 + b"\n")
        return super().swap(name, expected, data)


def test_giving_up_moves_no_pointer_that_somebody_else_moved(tmp_path: Path, half: tuple[Store, Plan]) -> None:
    store, _ = half
    with pytest.raises(Mismatch, match="meanwhile"):
        abandon(Store(Overtaken(tmp_path, sync=False)))
    assert store.plan_digest() == "0" * 64


def test_only_what_has_grown_out_of_what_is_sealed_is_given_up(tmp_path: Path, half: tuple[Store, Plan]) -> None:
    store, _ = half
    store.storage.remove("PLAN")
    store.put_plan(a_plan("parquet"))
    before = files(tmp_path)
    with pytest.raises(Corrupt, match="PLAN has not grown out of the plan that is sealed"):
        abandon(store)
    assert files(tmp_path) == before


def test_what_a_writer_commits_that_has_not_noticed_is_given_up_as_well(cli: Cli) -> None:
    two = cli.folder / "two"
    plan, there = (two / "PLAN").read_bytes(), names(two)
    begun(cli)
    (two / "PLAN").write_bytes(plan)
    (two / "commits" / "train-v000007-00000000.targets.json").write_text("of no unit, and of no plan")
    assert "restored: PLAN" in cli("repair", "two").stdout
    cli(*ABANDON)
    assert names(two) == there
    cli("verify", "two")


def test_only_to_what_is_whole_is_appended(cli: Cli) -> None:
    commit = cli.folder / "two" / "commits" / "train-v000000-00000001.targets.json"
    commit.unlink()
    assert f"{commit.name} is missing" in cli(*APPEND, code=4).stderr
    cli("repair", "two")
    cli(*APPEND)


# Breaking it --------------------------------------------------------------------------------------


def test_a_plan_that_was_put_back_costs_nothing_that_was_appended(cli: Cli) -> None:
    plan = (cli.folder / "two" / "PLAN").read_text()
    cli("append", "digits.py", "--cache", "two", "--set", MEMBERS)
    before = files(cli.folder / "two")
    (cli.folder / "two" / "PLAN").write_text(plan)
    cli("verify", "two", code=4)
    cli("repair", "two", "digits.py", "--set", MEMBERS)
    assert files(cli.folder / "two").items() >= before.items()
    cli("verify", "two")


def test_a_plan_that_was_put_back_in_the_middle_of_an_append_is_put_forward(cli: Cli) -> None:
    current = (cli.folder / "two" / "CURRENT").read_text()
    plan = (cli.folder / "two" / "PLAN").read_text()
    cli("append", "digits.py", "--cache", "two", "--set", MEMBERS)
    unseal(cli, current)
    (cli.folder / "two" / "PLAN").write_text(plan)
    before = files(cli.folder / "two")
    assert "restored: PLAN" in cli("repair", "two", "digits.py", "--set", MEMBERS).stdout
    after = files(cli.folder / "two")
    assert {name: after[name] for name in before} == before
    cli("verify", "two")


@pytest.mark.parametrize("sealed", [True, False])
def test_a_pointer_that_is_lost_names_the_plan_that_was_appended_under(cli: Cli, sealed: bool) -> None:
    current = (cli.folder / "two" / "CURRENT").read_text()
    append = ["append", "digits.py", "--cache", "two", "--set", MEMBERS]
    cli(*append)
    plan, content = (cli.folder / "two" / "PLAN").read_text(), open_cache(cli.folder / "two").content_digest
    if not sealed:
        unseal(cli, current)
        (cli.folder / "two" / "commits" / "train-v000000-00000002.targets.1.json").unlink()
    (cli.folder / "two" / "PLAN").unlink()
    assert "PLAN is lost" in cli(*append, code=4).stderr
    cli("repair", "two")
    assert (cli.folder / "two" / "PLAN").read_text() == plan
    cli(*append)
    cli("verify", "two")
    assert open_cache(cli.folder / "two").content_digest == content


def test_a_pointer_that_is_lost_before_anything_was_appended_names_what_is_sealed(cli: Cli) -> None:
    plan = (cli.folder / "two" / "PLAN").read_text()
    append = ["append", "digits.py", "--cache", "two", "--set", MEMBERS]
    cli(*append)
    unseal(cli, f"{open_cache(cli.folder / 'two').manifest().parent}\n")
    for commit in (cli.folder / "two" / "commits").glob("*.targets.1.json"):
        commit.unlink()
    (cli.folder / "two" / "PLAN").unlink()
    cli("repair", "two", "two.py", "--set", MEMBERS)
    assert (cli.folder / "two" / "PLAN").read_text() == plan
    cli("verify", "two")
    cli(*append)


def test_of_two_plans_beyond_what_is_sealed_none_is_guessed(half: tuple[Store, Plan]) -> None:
    store, plan = half
    other = plan.model_copy(update={"capture": plan.capture.model_copy(update={"batch_size": 5})})
    store.put_plan(other)
    unit = plan.unit_name(plan.units - 1)
    moved = store.commit(unit).model_copy(update={"plan": sha256(records.dump(other))})
    store.storage.replace(f"commits/{unit}.json", records.seal(moved))
    store.storage.remove("PLAN")
    with pytest.raises(Corrupt, match="its commits are of 2 plans of which none has grown out of the others"):
        repair(store, lambda: verify(store))
    assert store.plan_digest() is None


def test_a_forged_commit_comes_into_no_new_manifest(cli: Cli) -> None:
    store = open_store(cli.folder / "two")
    unit = next(u for u in store.committed() if u.startswith("train"))
    forged = store.commit(unit).model_copy(update={"content": "0" * 64})
    store.storage.replace(f"commits/{unit}.json", records.seal(forged))
    before = files(cli.folder / "two")
    for command in (
        ["append", "digits.py", "--cache", "two", "--set", MEMBERS],
        ["cache", "two.py", "--out", "two", "--set", MEMBERS],
        ["seal", "two"],
    ):
        assert "not the commit that was sealed" in cli(*command, code=4).stderr
    assert files(cli.folder / "two").items() >= before.items()
    cli("repair", "two", "two.py", "--set", MEMBERS)
    cli("append", "digits.py", "--cache", "two", "--set", MEMBERS)


@pytest.mark.parametrize("finished", [True, False])
def test_the_pipeline_of_before_an_append_repairs_nothing_and_drops_nothing(cli: Cli, finished: bool) -> None:
    two, current = cli.folder / "two", (cli.folder / "two" / "CURRENT").read_text()
    cli("append", "digits.py", "--cache", "two", "--set", MEMBERS)
    if not finished:
        unseal(cli, current)
    damaged = "train-v000000-00000002.targets.1" if not finished else "train-v000000-00000002.targets"
    flip(shard_of(two, damaged))
    before = files(two) | {"CURRENT": (two / "CURRENT").read_bytes()}
    stderr = cli("repair", "two", "two.py", "--set", MEMBERS, code=3).stderr
    assert "holds" in stderr or "members" in stderr
    assert files(two) | {"CURRENT": (two / "CURRENT").read_bytes()} == before
    cli("repair", "two", "digits.py", "--set", MEMBERS)
    cli("verify", "two", "--deep")


@pytest.mark.parametrize("harm", ["lost", "short"])
def test_a_shard_that_is_lost_or_cut_comes_into_no_new_manifest(cli: Cli, harm: str) -> None:
    two = cli.folder / "two"
    path = shard_of(two, "train-v000000-00000001.targets")
    data = path.read_bytes()
    path.unlink()
    if harm == "short":
        path.write_bytes(data[:-1])
    before = files(two)
    append = ["append", "digits.py", "--cache", "two", "--set", MEMBERS]
    for command in (append, ["cache", "two.py", "--out", "two", "--set", MEMBERS], ["seal", "two"]):
        stderr = cli(*command, code=4).stderr
        assert "(unit train-v000000-00000001.targets): " in stderr and "`ensemble-distill repair`" in stderr
    assert files(two) == before, "nothing was captured for it"
    cli("repair", "two", "two.py", "--set", MEMBERS)
    cli(*append)
    cli("verify", "two")


OLD = "train-v000000-00000001.targets"  # of members a and b, to which c is appended


def lied(commit: Commit) -> Commit:
    """Its statistics, of another ensemble."""
    return commit.model_copy(update={"statistics": {**(commit.statistics or {}), "names": ["a", "z", "ensemble"]}})


def test_forged_statistics_of_what_was_there_before_come_into_no_new_manifest(cli: Cli) -> None:
    store = open_store(cli.folder / "two")
    current = store.current()
    store.storage.replace(f"commits/{OLD}.json", records.seal(lied(store.commit(OLD))))
    assert f"{OLD}.json: not the commit that was sealed" in cli(*APPEND, code=4).stderr
    assert store.current() == current
    assert OLD in cli("verify", "two", code=4).stdout
    cli("repair", "two")
    cli(*APPEND)
    cli("verify", "two")


def test_forged_statistics_of_earlier_groups_are_told_by_verify(cli: Cli) -> None:
    """In a manifest that somebody made who knew the formats."""
    cli(*APPEND)
    store = open_store(cli.folder / "two")
    current = str(store.current())
    manifest = store.manifest(current)
    plan = store.plan(manifest.plan, Plan)
    commits = [lied(c) if c.unit == OLD else c for c in store.page(manifest.pages[0], plan.page_limit(0)).commits]
    page = store.put_page([records.dump(commit) for commit in commits])
    store.storage.replace(f"commits/{OLD}.json", records.seal(lied(store.commit(OLD))))
    store.put_manifest(manifest.model_copy(update={"pages": (page,)}), current)
    stdout = cli("verify", "two", code=4).stdout
    assert f"unit {OLD}: statistics that do not add up (expected predictors ['a', 'b', 'ensemble'])" in stdout


def test_a_parent_whose_figures_are_not_those_of_its_commits_is_told(cli: Cli) -> None:
    store = open_store(cli.folder / "two")
    before = str(store.current())
    figures = json.loads(json.dumps(store.manifest(before).statistics))
    figures["test"]["predictors"]["a"]["nll"] *= 2
    forged = store.put_manifest(store.manifest(before).model_copy(update={"statistics": figures}), before)
    cli(*APPEND)
    stdout = cli("verify", "two", code=4).stdout
    assert forged in stdout and "its manifest's statistics is not what its commits add up to" in stdout


def test_statistics_of_units_that_are_being_appended_are_looked_at(cli: Cli) -> None:
    current = (cli.folder / "two" / "CURRENT").read_text()
    cli(*APPEND)
    unseal(cli, current)
    store = open_store(cli.folder / "two")
    store.storage.replace(f"commits/{OLD}.1.json", records.seal(lied(store.commit(f"{OLD}.1"))))
    assert f"unit {OLD}.1: statistics that do not add up" in cli("verify", "two", code=4).stdout
    cli("repair", "two", "digits.py", "--set", MEMBERS)
    cli("verify", "two")


CUSTOM = 'transforms=(ed.Custom(name="dim", slots=0, function=lambda x, u: x // {}),)'


def test_views_look_as_they_did_before_more_was_appended(cli: Cli) -> None:
    for name, by in (("dim", 2), ("darker", 9)):
        cli.change("transforms=(ed.Crop(padding=1),)", CUSTOM.format(by), to=f"{name}.py")
    cli("cache", "dim.py", "--out", "c")
    assert "view" in cli("append", "darker.py", "--cache", "c", "--views", "3", code=3).stderr
    cli("append", "dim.py", "--cache", "c", "--views", "3")
    cli("cache", "dim.py", "--out", "one", "--views", "1")
    cli("append", "dim.py", "--cache", "one", "--views", "2")
    for cache in ("c", "one"):
        cli("train", "darker.py", "--cache", cache, "--out", "r", "--set", "epochs=2", code=3)


def test_garbage_is_not_looked_for_where_the_manifest_in_force_is_lost(cli: Cli) -> None:
    cli("append", "digits.py", "--cache", "two", "--set", MEMBERS)
    (cli.folder / "two" / "manifests" / f"{open_cache(cli.folder / 'two').digest}.json").unlink()
    before = files(cli.folder / "two")
    cli("gc", "two", "--older-than", "0", "--delete", code=4)
    assert files(cli.folder / "two") == before
    cli("repair", "two", "digits.py", "--set", MEMBERS)
    cli("verify", "two")


def test_junk_among_the_manifests_is_no_parent(cli: Cli) -> None:
    parent = open_cache(cli.folder / "two").digest
    cli("append", "digits.py", "--cache", "two", "--set", MEMBERS)
    digest = open_cache(cli.folder / "two").digest
    (cli.folder / "two" / "manifests" / "readme.txt").write_text("x")
    (cli.folder / "two" / "CURRENT").unlink()
    cli("seal", "two")
    assert open_cache(cli.folder / "two").digest == digest
    assert open_cache(cli.folder / "two").manifest().parent == parent


def test_nobody_seals_a_plan_that_has_grown_meanwhile(cli: Cli) -> None:
    from ensemble_distill.cache.commits import committed_units, held_plan

    store = open_store(cli.folder / "two")
    plan, digest = held_plan(store), str(store.plan_digest())
    done = committed_units(store, plan)
    cli("append", "digits.py", "--cache", "two", "--set", MEMBERS)
    after = store.current()
    with pytest.raises(Mismatch, match="its plan has changed meanwhile"):
        seal(plan, digest, store, done)
    assert store.current() == after


def test_views_that_mix_are_not_appended_to_a_cache_without_partners(cli: Cli) -> None:
    cli.change("transforms=(ed.Crop(padding=1),)", "mix=ed.Mixup(alpha=0.4)")
    cli("cache", "digits.py", "--out", "m", "--views", "1")
    assert "no such view can be appended" in cli("append", "digits.py", "--cache", "m", "--views", "2", code=2).stderr


def test_units_that_are_being_appended_are_verified_and_mended(cli: Cli) -> None:
    """In the middle of an append: the old manifest is in force, and one new shard and one new commit are damaged."""
    current = (cli.folder / "two" / "CURRENT").read_text()
    append = ["append", "digits.py", "--cache", "two", "--set", MEMBERS]
    cli(*append)
    expected = open_cache(cli.folder / "two").content_digest
    unseal(cli, current)
    flip(shard_of(cli.folder / "two", "train-v000000-00000001.targets.1"))
    (cli.folder / "two" / "commits" / "train-v000000-00000002.targets.1.json").write_text("{}")
    verdict = cli("verify", "two", code=4).stdout
    assert "train-v000000-00000001.targets.1" in verdict and "train-v000000-00000002.targets.1" in verdict
    assert open_cache(cli.folder / "two").digest == current.strip()
    cli("repair", "two", "digits.py", "--set", MEMBERS)
    cli("verify", "two", "--deep")
    assert open_cache(cli.folder / "two").content_digest == expected


def test_a_parent_that_is_damaged_is_told_and_left(cli: Cli) -> None:
    parent = open_cache(cli.folder / "two").digest
    cli("append", "digits.py", "--cache", "two", "--set", MEMBERS)
    digest = open_cache(cli.folder / "two").digest
    flip(cli.folder / "two" / "manifests" / f"{parent}.json")
    assert parent in cli("verify", "two", code=4).stdout
    stdout = cli("repair", "two").stdout
    assert "left: " in stdout and parent in stdout and "nothing is damaged that is in force" in stdout
    flip(shard_of(cli.folder / "two", "train-v000000-00000001.targets.1"))
    cli("repair", "two", "digits.py", "--set", MEMBERS)
    assert open_cache(cli.folder / "two").content_digest and open_cache(cli.folder / "two").digest != digest
