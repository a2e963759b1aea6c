"""The library: what is read from a cache is what the teachers said about exactly these samples."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Cli, load_module
from torch import nn

import ensemble_distill as ed
from ensemble_distill.cache.commits import held_plan
from ensemble_distill.cache.samples import render_inputs
from ensemble_distill.config import CacheConfig, DataConfig, OptimizerConfig, ScheduleConfig, override
from ensemble_distill.ensemble.ensemble import Ensemble
from ensemble_distill.ensemble.members import load_member, structure_digest
from ensemble_distill.errors import Interrupted, Mismatch, UsageError
from ensemble_distill.fingerprint import sample_keys
from ensemble_distill.prefetch import prefetch
from ensemble_distill.recording.capture import Recorder
from ensemble_distill.recording.planning import prepare
from ensemble_distill.recording.progress import Progress
from ensemble_distill.sources.arrays import Limited
from ensemble_distill.sources.views import render
from ensemble_distill.store.leases import Leases
from ensemble_distill.store.store import open_store
from ensemble_distill.training import checkpoint
from ensemble_distill.training.objective import Objective
from ensemble_distill.training.optim import Ema, learning_rate, make_optimizer
from ensemble_distill.transforms import ViewsConfig


@pytest.fixture(scope="module")
def pipeline(captured: Path) -> ModuleType:
    return load_module(captured / "digits.py")


@pytest.fixture
def cache(captured: Path) -> ed.Cache:
    return ed.open_cache(captured / "cache")


def said_live(pipeline: ModuleType, images: torch.Tensor) -> ed.Targets:
    """What the ensemble says when it is run here and now."""
    config = pipeline.cache()
    members = [load_member(m) for m in config.members]
    out = Ensemble(members, config, 10, [torch.device("cpu")])({"image": images})
    return ed.Targets(out.logprobs, out.features)


@pytest.mark.parametrize(("split", "view"), [("train", 0), ("train", 1), ("test", 0)])
def test_cached_targets_are_what_the_ensemble_says_live(
    cache: ed.Cache, pipeline: ModuleType, split: str, view: int
) -> None:
    source = pipeline.data().sources[split]
    loaded = source.load(np.arange(0, len(source), 7))
    images = torch.from_numpy(loaded.inputs["image"])
    if view > 0:  # view 0 is the sample as it is
        images = render(images, loaded.keys, pipeline.data().views, view)
    live = said_live(pipeline, images)
    cached = cache.targets(loaded.keys, view, split=split, taps=["tap/a.pool"])
    torch.testing.assert_close(cached.logprobs, live.logprobs, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(cached.features["tap/a.pool"], live.features["tap/a.pool"], atol=1e-3, rtol=1e-3)


def test_a_loader_joins_inputs_labels_targets_and_view(cache: ed.Cache, pipeline: ModuleType) -> None:
    source = pipeline.data().sources["train"]
    seen = []
    for batch in cache.loader(source, 64, epoch=3, seed=5, taps=["tap/a.pool"]):
        loaded = source.load(batch.index)
        assert batch.view == 1  # epoch 3 of two views
        expected = render(torch.from_numpy(loaded.inputs["image"]), loaded.keys, pipeline.data().views, 1)
        assert torch.equal(batch.inputs["image"], expected)
        np.testing.assert_array_equal(batch.keys, loaded.keys)
        np.testing.assert_array_equal(batch.labels.numpy(), source.labels[batch.index])
        again = cache.targets(batch.keys, 1)
        torch.testing.assert_close(batch.targets.logprobs, again.logprobs)
        seen.append(batch.index)
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(1000))


def test_order_depends_on_seed_and_epoch_alone_and_resumes_by_offset(cache: ed.Cache, pipeline: ModuleType) -> None:
    source = pipeline.data().sources["train"]

    def order(**options: int) -> list[list[int]]:
        return [batch.index.tolist() for batch in cache.loader(source, 100, **options)]

    whole = order(seed=1, epoch=2)
    assert order(seed=1, epoch=2, workers=3) == whole and order(seed=1, epoch=2, start=4) == whole[4:]
    assert order(seed=2, epoch=2) != whole and order(seed=1, epoch=3) != whole


def test_a_cache_larger_than_its_memory_reads_the_same(captured: Path, pipeline: ModuleType) -> None:
    rows = np.random.default_rng(0).integers(0, 1000, 300)
    roomy, tight = ed.open_cache(captured / "cache"), ed.open_cache(captured / "cache", memory=9000)
    for view in (0, 1, 0):
        a, b = (c.targets_at(rows, view, taps=["tap/a.pool"]) for c in (roomy, tight))
        assert torch.equal(a.logprobs, b.logprobs)
        assert torch.equal(a.features["tap/a.pool"], b.features["tap/a.pool"])
    assert sum(table.nbytes for table in tight._rows._held.values()) <= 20_000


def test_a_reordered_and_smaller_source_is_served_by_key(
    cache: ed.Cache, pipeline: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    images, labels = pipeline.arrays()
    chosen = np.random.default_rng(1).permutation(1000)[:400]
    source = ed.ArraySource({"image": images[chosen]}, labels[chosen])
    with caplog.at_level(logging.WARNING):
        for batch in cache.loader(source, 100):
            expected = cache.targets_at(chosen[batch.index])
            assert torch.equal(batch.targets.logprobs, expected.logprobs)
    assert caplog.text.count("found by key") == 1


def test_a_changed_sample_never_reaches_the_student(cache: ed.Cache, pipeline: ModuleType) -> None:
    images, labels = pipeline.arrays()
    images = images[:1000].copy()
    images[700, 0, 3, 3] += 1
    source, seen = ed.ArraySource({"image": images}, labels[:1000]), []
    with pytest.raises(Mismatch, match="sample 700 of train"):
        for batch in cache.loader(source, 50, workers=4):
            seen += batch.index.tolist()
    assert 700 not in seen


def test_labels_changed_under_the_same_samples_are_refused_but_not_a_reordering(
    cache: ed.Cache, pipeline: ModuleType
) -> None:
    images, labels = pipeline.arrays()
    changed = labels[:1000].copy()
    changed[5] = (changed[5] + 1) % 10
    with pytest.raises(Mismatch, match="labels of train"):
        cache.check_labels(ed.ArraySource({"image": images[:1000]}, changed), "train")
    order = np.random.default_rng(0).permutation(1000)
    cache.check_labels(ed.ArraySource({"image": images[order]}, labels[order]), "train")


def test_what_a_cache_does_not_hold_is_refused_by_name(cache: ed.Cache) -> None:
    keys = cache.table("train").keys[:2]
    with pytest.raises(UsageError, match=r"did you mean 'tap/a\.pool'"):
        cache.targets(keys, taps=["tap/a.pol"])
    with pytest.raises(Mismatch, match=r"holds 2 view\(s\) of train, there is no view 2"):
        cache.targets(keys, 2)
    with pytest.raises(Mismatch, match="no split 'tset'; did you mean 'test'"):
        cache.targets(keys, split="tset")
    with pytest.raises(Mismatch, match="does not hold"):
        cache.targets(sample_keys({"image": np.zeros((1, 3), np.uint8)}))


def test_targets_can_be_tempered(cache: ed.Cache) -> None:
    targets = cache.targets_at(np.arange(20))
    p = targets.logprobs.double().exp() ** 0.25
    torch.testing.assert_close(
        targets.at(4.0).logprobs.double().exp(), p / p.sum(1, keepdim=True), atol=1e-6, rtol=1e-5
    )
    assert targets.at(1.0) is targets and len(targets) == 20


def test_limited_sources_and_bad_arrays() -> None:
    source = ed.ArraySource({"x": np.arange(10)}, np.arange(10))
    assert len(Limited(source, 3)) == 3 and len(Limited(source, 99)) == 10
    assert Limited(source, 3).labels.tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="one length"):
        ed.ArraySource({"x": np.arange(10)}, np.arange(9))


def test_prefetch_keeps_the_order_and_raises_in_turn() -> None:
    assert list(prefetch((lambda i=i: i for i in range(50)), 4)) == list(range(50))

    def fail() -> int:
        raise ValueError("third")

    results = prefetch([lambda: 1, lambda: 2, fail, lambda: 4], 2)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(results)


# Training's pieces ----------------------------------------------------------------------------------


def test_schedules_follow_their_formulas() -> None:
    def rates(**fields: object) -> list[float]:
        return [learning_rate(ScheduleConfig(**fields), 2.0, step, 100) for step in range(100)]

    assert set(rates(kind="constant", warmup=0)) == {2.0}
    cosine = rates(kind="cosine", warmup=0.1)
    assert cosine[0] == pytest.approx(2 * 0.005 / 0.1) and max(cosine) <= 2 and cosine[9] < cosine[10]
    assert cosine[54] == pytest.approx(1 + math.cos(math.pi * (0.545 - 0.1) / 0.9))
    linear = rates(kind="linear", warmup=0)
    assert linear[24] == pytest.approx(2 * (1 - 0.245)) and linear[99] == pytest.approx(0.01)


def test_weight_decay_spares_biases_and_norms() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    decayed, spared = make_optimizer(OptimizerConfig(weight_decay=0.3), model.parameters()).param_groups
    assert [p.ndim for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.3
    assert len(spared["params"]) == 3 and spared["weight_decay"] == 0


def test_the_average_is_exponential_and_its_buffers_are_the_last() -> None:
    model = nn.BatchNorm1d(2)
    ema = Ema(model, 0.75)
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.running_mean.fill_(3.0)
    ema.update(model)
    assert ema.module.weight.tolist() == [2.0, 2.0] and ema.module.running_mean.tolist() == [3.0, 3.0]


def test_an_objective_is_the_weighted_sum_of_its_terms(cache: ed.Cache, pipeline: ModuleType) -> None:
    config = pipeline.train()
    torch.manual_seed(0)
    student = config.student()
    objective = Objective(config, student, cache, True)
    batch = next(iter(cache.loader(pipeline.data().sources["train"], 32, taps=objective.taps)))
    objective.build_adapters(student, batch, torch.device("cpu"))
    assert {name: a.weight.shape for name, a in objective.adapters.items()} == {"feature": (48, 16)}
    total, parts = objective(student, batch, torch.device("cpu"), "fp32")
    expected = 0.7 * parts["soft"] + 0.3 * parts["hard"] + 0.1 * parts["feature"]
    torch.testing.assert_close(total.detach(), expected)
    total.backward()
    assert objective.adapters["feature"].weight.grad.abs().sum() > 0 and student.head.weight.grad.abs().sum() > 0
    none = override(config, ["objective.soft.weight=0", "objective.hard.weight=0", "objective.feature.weight=0"])
    with pytest.raises(UsageError, match="no term of positive weight"):
        Objective(none, student, cache, True)


def test_overrides_reach_every_depth_and_are_checked() -> None:
    config = ed.TrainConfig(student=nn.Identity, objective={"soft": ed.SoftTargets()})
    changed = override(config, ["optimizer.lr=0.5", "objective.soft.temperature=3", "ema=0.9", "optimizer.kind=sgd"])
    assert (changed.optimizer.lr, changed.optimizer.kind, changed.ema) == (0.5, "sgd", 0.9)
    assert changed.objective["soft"].temperature == 3 and config.objective["soft"].temperature == 1
    for setting, reason in [
        ("optimizer.lrr=1", "did you mean 'lr'"),
        ("optimizer.lr=-1", "greater than 0"),
        ("epochs", "expected a.b=value"),
        ("objective.soft.temperature=hot", "number"),
    ]:
        with pytest.raises(UsageError, match=reason):
            override(config, [setting])


def test_two_captures_that_begin_at_once_with_different_plans_do_not_mix(pipeline: ModuleType, tmp_path: Path) -> None:
    data, config = pipeline.data(), pipeline.cache()
    store = open_store(tmp_path / "cache", create=True)
    leases = Leases(store.storage)
    plan, ensemble = prepare(data, config, data.sources, store, leases, [torch.device("cpu")])
    store.put_plan(plan.model_copy(update={"format": "parquet"}))  # the other one was a little faster
    with pytest.raises(Mismatch, match="was begun with format = 'parquet'"):
        Recorder(plan, ensemble, data.sources, store, leases).run()
    assert not list(store.committed())


def test_a_plan_under_which_nothing_was_committed_is_no_obstacle(pipeline: ModuleType, tmp_path: Path) -> None:
    data, config = pipeline.data(), pipeline.cache()
    store = open_store(tmp_path / "cache", create=True)
    leases = Leases(store.storage)
    plan, _ = prepare(data, config, data.sources, store, leases, [torch.device("cpu")])
    store.put_plan(plan)
    smaller = config.model_copy(update={"batch_size": 32})
    plan, ensemble = prepare(data, smaller, data.sources, store, leases, [torch.device("cpu")])
    Recorder(plan, ensemble, data.sources, store, leases).run()
    assert held_plan(store).capture.batch_size == 32


def large_units(data: DataConfig, config: CacheConfig) -> tuple[DataConfig, CacheConfig]:
    return data, config.model_copy(update={"unit_rows": 1 << 22})


def views_that_are_all_the_same(data: DataConfig, config: CacheConfig) -> tuple[DataConfig, CacheConfig]:
    return data.model_copy(update={"views": ViewsConfig()}), config


def an_empty_source(data: DataConfig, config: CacheConfig) -> tuple[DataConfig, CacheConfig]:
    return data.model_copy(update={"sources": {**data.sources, "none": Limited(data.sources["test"], 0)}}), config


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (large_units, "unit_rows=4194304 makes units of 403 MB"),
        (views_that_are_all_the_same, r"2 views were asked for, but data\(\) has no transforms"),
        (an_empty_source, "source 'none' is empty"),
    ],
)
def test_what_cannot_be_captured_is_refused_before_anything_is_written(
    pipeline: ModuleType, tmp_path: Path, edit: Callable[..., tuple[DataConfig, CacheConfig]], reason: str
) -> None:
    data, config = edit(pipeline.data(), pipeline.cache())
    store = open_store(tmp_path / "cache", create=True)
    with pytest.raises(UsageError, match=reason):
        prepare(data, config, data.sources, store, Leases(store.storage), [torch.device("cpu")])
    assert not (tmp_path / "cache").exists()


def never_waits(progress: Progress) -> None:
    assert not progress.seconds["others"], "it has waited for others"


def test_a_worker_that_waits_for_others_stops_when_it_is_asked_to(pipeline: ModuleType, tmp_path: Path) -> None:
    data, config = pipeline.data(), pipeline.cache()
    store = open_store(tmp_path / "cache", create=True)
    leases, others = Leases(store.storage), Leases(store.storage)
    plan, ensemble = prepare(data, config, data.sources, store, leases, [torch.device("cpu")])
    assert all(others.claim(item.name) for item in plan.items())
    with pytest.raises(Interrupted, match="0/28 units committed"):
        Recorder(plan, ensemble, data.sources, store, leases).run(never_waits, stop=lambda: 0.0)


def test_an_interrupt_ends_a_capture_which_says_how_far_it_is(
    pipeline: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, config = pipeline.data(), pipeline.cache()
    store = open_store(tmp_path / "cache", create=True)
    leases = Leases(store.storage)
    plan, ensemble = prepare(data, config, data.sources, store, leases, [torch.device("cpu")])
    forward, calls = Recorder._batch, itertools.count(1)

    def interrupted(self: Recorder, *args: object) -> object:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return forward(self, *args)

    monkeypatch.setattr(Recorder, "_batch", interrupted)
    with pytest.raises(Interrupted, match="2/28 units committed"):
        Recorder(plan, ensemble, data.sources, store, leases).run(never_waits)
    assert len(list(store.committed())) == 2 and not leases.live()


def test_identity_covers_the_plain_attributes_of_a_member() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    one.scale, two.scale = 1.0, 2.0
    assert structure_digest(one) != structure_digest(two) and structure_digest(one) == structure_digest(one)


def test_resumed_optimisers_keep_the_memory_format_of_their_parameters() -> None:
    """Else the arithmetic takes another path to other last bits."""
    conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(conv.parameters())
    conv(torch.randn(1, 4, 5, 5)).sum().backward()
    optimizer.step()
    held = safetensors.torch.load(checkpoint.to_bytes(checkpoint.optimizer_tensors(optimizer)))
    checkpoint.restore_optimizer(optimizer, held)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()
    torch.testing.assert_close(optimizer.state[conv.weight]["exp_avg"], held["optimizer/0/exp_avg"])


def test_tied_weights_can_be_saved() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert len(safetensors.torch.load(checkpoint.to_bytes(model.state_dict()))) == 2


def test_batches_of_an_epoch_are_of_nearly_one_size(cache: ed.Cache, pipeline: ModuleType) -> None:
    """1000 rows in batches of at most 333 would leave one alone, which no batch norm can take."""
    sizes = [len(batch) for batch in (b.index for b in cache.loader(pipeline.data().sources["train"], 333))]
    assert sizes == [250, 250, 250, 250]


@pytest.mark.parametrize(
    "codec",
    ["Dense(bits=8)", "TopK(k=4)", "TopK(k=10, values=16)", "VarOpt(k=5)", "Sampled(n=8)", "Members()",
     "Members(inner=ed.TopK(k=4))"],
)  # fmt: skip
def test_every_codec_goes_from_capture_to_student(cli: Cli, codec: str) -> None:
    """The targets that come back are about those of the reference, and a student learns from them."""
    cli("cache", "digits.py", "--out", "dense")
    cli.change("        views=2,\n", f"        views=2,\n        codec=ed.{codec},\n")
    cli("cache", "digits.py", "--out", "cache")
    cli("verify", "cache", "--deep")
    cli.change("temperature=2", "temperature=1")
    cli("train", "digits.py", "--cache", "cache", "--out", "run")
    test = json.loads((cli.folder / "run/metrics.jsonl").read_text().splitlines()[-1])["test"]
    assert test["accuracy"] > 0.8 and test["agreement"] > (0.7 if "Sampled" in codec else 0.8) and test["kl"] < 0.6
    rows = np.arange(1000)
    exact = ed.open_cache(cli.folder / "dense").targets_at(rows, 1)
    found = ed.open_cache(cli.folder / "cache").targets_at(rows, 1)
    torch.testing.assert_close(found.entropy, exact.entropy)
    p = exact.logprobs.exp()
    if found.ids is not None:
        p = p.gather(1, found.ids)
    if found.kind == "unbiased":
        assert float((found.logprobs.exp().sum(1) - 1).abs().max()) < 1e-5
    else:
        assert float((found.logprobs.exp() - p).abs().max()) < 0.02
    assert float((found.top1() == exact.top1()).float().mean()) > (0.8 if "Sampled" in codec else 0.99)


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        ("codec=ed.TopK(k=11)", "k=11 of 10 classes"),
        ("codec=ed.VarOpt(k=0)", "greater than or equal to 1"),
        ("codec=ed.Members(inner=ed.TopK(k=3)), combine='mean_logits'", "needs all classes"),
    ],
)
def test_a_codec_that_cannot_be_is_refused_before_anything_is_written(cli: Cli, codec: str, words: str) -> None:
    cli.change("        views=2,\n", f"        views=2,\n        {codec},\n")
    assert words in cli("cache", "digits.py", "--out", "cache", code=2).stderr
    assert not (cli.folder / "cache").exists()


def test_a_sample_of_classes_at_another_temperature_is_refused_before_step_one(cli: Cli) -> None:
    cli.change("        views=2,\n", "        views=2,\n        codec=ed.VarOpt(k=4),\n")
    cli("cache", "digits.py", "--out", "cache")
    error = cli("train", "digits.py", "--cache", "cache", "--out", "run", code=2).stderr
    assert "cannot be tempered" in error and not (cli.folder / "run/checkpoint.json").exists()


def test_keys_beyond_the_memory_are_not_read(captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemble_distill.cache.cache.MIN_KEYS", 1)
    cache = ed.open_cache(captured / "cache", memory=15_999)
    with pytest.raises(UsageError, match="the keys of train take 0 MB") as error:
        cache.table("train")
    assert "--memory" in error.value.hint
    assert len(ed.open_cache(captured / "cache", memory=16_000).table("train")) == 1000


def test_views_of_an_input_that_is_not_there_are_refused() -> None:
    views = ed.ViewsConfig(transforms=(ed.Flip(),), input="picture")
    inputs, keys = {"image": torch.zeros(2, 1, 4, 4)}, np.zeros((2, 16), np.uint8)
    assert render_inputs(inputs, keys, views, 0) is inputs
    with pytest.raises(UsageError, match="views act on the input 'picture'; there is 'image'"):
        render_inputs(inputs, keys, views, 1)
