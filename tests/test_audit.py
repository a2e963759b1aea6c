"""The renderings in a plan: a view that changed under its old name is found in both stages, a last bit is not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, load_module
from pydantic import ValidationError

import ensemble_distill as ed
from ensemble_distill.cache import alignment
from ensemble_distill.cache.plan import Capture, Plan
from ensemble_distill.cache.renderings import Rendering
from ensemble_distill.cache.samples import renderings
from ensemble_distill.errors import Mismatch
from ensemble_distill.fingerprint import canonical_json
from ensemble_distill.recording.capture import Recorder
from ensemble_distill.recording.planning import prepare
from ensemble_distill.sources import views
from ensemble_distill.sources.arrays import ArraySource, Limited
from ensemble_distill.store.leases import Leases
from ensemble_distill.store.store import Store, open_store
from ensemble_distill.transforms import Mixup


def lift(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return images + (u[:, 0, None, None, None] * 100).to(images.dtype)


def sink(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return lift(images, 1 - u)


def custom(pipeline: ModuleType, function: Any, **changes: Any) -> ed.DataConfig:
    views = ed.ViewsConfig(transforms=(ed.Flip(), ed.Custom(name="shade", slots=1, function=function)), **changes)
    return pipeline.data().model_copy(update={"views": views})


class Place:
    """A pipeline and a folder to capture in."""

    def __init__(self, pipeline: ModuleType, path: Path) -> None:
        self.pipeline, self.path = pipeline, path
        self.store = open_store(path, create=True)
        self.leases = Leases(self.store.storage)

    def plan(self, data: ed.DataConfig, **changes: Any) -> Recorder:
        config = self.pipeline.cache().model_copy(update=changes)
        plan, ensemble = prepare(data, config, data.sources, self.store, self.leases, [torch.device("cpu")])
        return Recorder(plan, ensemble, data.sources, self.store, self.leases)


@pytest.fixture
def place(teachers: Path, tmp_path: Path) -> Place:
    return Place(load_module(teachers / "digits.py"), tmp_path / "cache")


Levels = Callable[[int], None]


@pytest.fixture
def lighter(monkeypatch: pytest.MonkeyPatch) -> Levels:
    """Another machine, whose cells are so many levels lighter."""
    pooled = views._pooled

    def change(levels: int) -> None:
        monkeypatch.setattr(views, "_pooled", lambda images: pooled(images) + levels / 255)

    return change


def held_plan(store: Store) -> Plan:
    return store.plan(str(store.plan_digest()), Plan)


# Stage 1 ----------------------------------------------------------------------------------------------


def test_a_plan_of_several_views_holds_the_first_samples_in_the_first_views(place: Place) -> None:
    data = custom(place.pipeline, lift)
    for count in (2, 3, 5):
        plan = place.plan(data, views=count).plan
        numbers = range(min(count, 3))
        assert [(r.sample, r.view) for r in plan.capture.audit] == [(s, v) for s in range(4) for v in numbers]
    first = data.sources["train"].load(np.arange(4))
    made = views.audit(torch.from_numpy(first.inputs["image"]), first.keys, data.views, (0, 1, 2))
    assert [r.model_dump(mode="json") for r in plan.capture.audit] == made
    one = place.plan(data, views=1).plan
    assert one.capture.audit == ()
    place.store.put_plan(one)  # under which nothing is captured, so that it may go
    assert place.plan(data, views=5).plan == plan
    again = Plan.model_validate_json(canonical_json(plan.model_dump(mode="json")))
    assert again == plan and "audit" not in json.dumps(plan.reading.model_dump(mode="json"))
    assert b"cells" not in plan.content_header()


def test_mixed_views_are_kept_as_they_are_shown(place: Place) -> None:
    train = place.pipeline.data().sources["train"]
    mixing = custom(place.pipeline, lift, mix=Mixup(alpha=5)).views
    kept = place.plan(custom(place.pipeline, lift, mix=Mixup(alpha=5))).plan.capture.audit
    assert kept == renderings(train, mixing, (0, 1), 1000)
    plain = renderings(train, custom(place.pipeline, lift).views, (0, 1), 1000)
    assert [a.cells == b.cells for a, b in zip(kept, plain, strict=True)] == [True, False] * 4


def test_a_plan_without_renderings_is_written_as_before_there_were_any() -> None:
    fields = {"members": [], "precision": "fp32", "batch_size": 4}
    assert Capture(**fields).model_dump(mode="json") == fields


def test_another_machines_last_bit_does_not_stop_a_capture(place: Place, lighter: Levels) -> None:
    data = custom(place.pipeline, lift)
    place.plan(data).run(span=range(2))
    held = held_plan(place.store)
    lighter(1)
    recorder = place.plan(data)
    assert recorder.plan == held
    assert recorder.run() is not None and held_plan(place.store) == held


def test_of_two_that_plan_at_once_the_first_ones_renderings_are_kept(place: Place, lighter: Levels) -> None:
    data = custom(place.pipeline, lift)
    first = place.plan(data)
    lighter(1)
    second = place.plan(data)
    assert first.plan != second.plan
    first.run(span=range(1))
    second.run()
    assert second.plan == first.plan == held_plan(place.store)


def test_the_content_of_a_capture_does_not_depend_on_the_renderings(
    place: Place, lighter: Levels, tmp_path: Path
) -> None:
    place.plan(place.pipeline.data()).run()
    lighter(1)
    other = Place(place.pipeline, tmp_path / "other")
    other.plan(place.pipeline.data()).run()
    one, two = ed.open_cache(place.path), ed.open_cache(other.path)
    assert one.plan != two.plan and one.content_digest == two.content_digest


def test_a_capture_does_not_go_on_with_a_transform_that_was_changed(place: Place) -> None:
    place.plan(custom(place.pipeline, sink))  # nothing is captured under it
    place.plan(custom(place.pipeline, lift)).run(span=range(2))
    with pytest.raises(Mismatch, match=r"not what this pipeline renders: sample 0 in view 1 differs by \d+ levels"):
        place.plan(custom(place.pipeline, sink))
    changed = place.pipeline.data()  # a difference that the configuration tells is told as such
    with pytest.raises(Mismatch, match=r"begun with reading\.views\."):
        place.plan(changed)


def test_of_two_that_plan_at_once_with_other_pixels_the_second_is_refused(place: Place) -> None:
    first, second = (place.plan(custom(place.pipeline, function)) for function in (lift, sink))
    first.run(span=range(1))
    with pytest.raises(Mismatch, match="sample 0 in view 1 differs"):
        second.run()


def test_a_capture_from_before_there_were_renderings_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    data = custom(place.pipeline, lift)
    with monkeypatch.context() as patch:
        patch.setattr("ensemble_distill.recording.planning._audit", lambda *_: ())
        place.plan(data).run(span=range(1))
    held = held_plan(place.store)
    place.plan(data).run()
    assert held_plan(place.store) == held and not held.capture.audit
    cache = ed.open_cache(place.path)
    cache.check(custom(place.pipeline, sink))
    cache.check_views(data.sources["train"])


# Stage 2 ----------------------------------------------------------------------------------------------


def test_a_loader_refuses_a_transform_that_was_changed(
    place: Place, lighter: Levels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = custom(place.pipeline, lift)
    place.plan(data).run()
    cache, source = ed.open_cache(place.path), data.sources["train"]
    cache.check(custom(place.pipeline, sink))  # which the configuration cannot tell
    next(cache.loader(source, 100, epoch=0))
    with pytest.raises(Mismatch, match=r"sample 0 in view 1 differs by \d+ levels of 255"):
        cache.loader(source, 100, epoch=1)
    cache.check(data)
    lighter(2)
    next(cache.loader(source, 100, epoch=1))
    with monkeypatch.context() as patch:
        patch.setattr(alignment, "renderings", None)  # it looks once
        next(cache.loader(source, 100, epoch=3))
    lighter(3)
    next(cache.loader(source, 100, epoch=1))
    cache.check(data)
    with pytest.raises(Mismatch, match=r"sample 0 in view 0 differs by 3 levels of 255"):
        cache.loader(source, 100, epoch=1)
    cache.check_views(data.sources["test"], "test")  # shown in view 0 only
    cache.check_views(data.sources["test"], "nothing of that name")
    assert not caplog.records


def test_what_stands_elsewhere_in_the_source_is_not_compared_and_that_is_said(
    place: Place, lighter: Levels, caplog: pytest.LogCaptureFixture
) -> None:
    data = custom(place.pipeline, lift)
    place.plan(data).run()
    cache, source = ed.open_cache(place.path), data.sources["train"]
    images, labels = source.load(np.arange(1000)).inputs["image"], source.labels
    cache.check(data)
    with caplog.at_level(logging.WARNING):
        cache.check_views(Limited(source, 4))
        assert not caplog.records
        cache.check_views(ArraySource({"image": images[::-1]}, labels[::-1]))
        assert "its views were not compared by pixels" in caplog.text
        caplog.clear()
        cache.check_views(Limited(source, 2))
        assert "its views were not compared by pixels" in caplog.text
    cache.check(custom(place.pipeline, sink))
    two = images.copy()
    two[:2] = images[2:4]
    with pytest.raises(Mismatch, match="sample 2 in view 1 differs"):
        cache.check_views(ArraySource({"image": two}, labels))


def test_a_changed_transform_on_the_command_line(cli: Cli) -> None:
    cli.change("(ed.Crop(padding=1),)", "(ed.Custom(name='dim', slots=1, function=dim),)")
    cli.change(
        "def data():", "def dim(x, u):\n    return x // (1 + 3 * (u < 0.5).byte()[:, :, None, None])\n\n\ndef data():"
    )
    cli("cache", "digits.py", "--out", "cache", "--limit", 250, "--units", "0:2")
    cli.change("u < 0.5", "u > 0.5", to="other.py")
    process = cli("cache", "other.py", "--out", "cache", "--limit", 250, code=3)
    assert "sample 0 in view 1 differs by" in process.stderr and "give it another name" in process.stderr
    cli("cache", "digits.py", "--out", "cache", "--limit", 250)
    process = cli("train", "other.py", "--cache", "cache", "--out", "run", "--limit", 250, code=3)
    assert "sample 0 in view 1 differs by" in process.stderr
    assert not list((cli.folder / "run").glob("metrics*"))


def test_chance_on_the_command_line_is_refused_before_anything_is_written(cli: Cli) -> None:
    cli.change("(ed.Crop(padding=1),)", "(ed.Custom(name='noise', slots=0, function=noise),)")
    cli.change("def data():", "def noise(x, u):\n    return x + torch.randint_like(x, 3)\n\n\ndef data():")
    process = cli("cache", "digits.py", "--out", "cache", code=2)
    assert "the transform custom 'noise' draws from a generator of the whole process, or seeds it" in process.stderr
    assert "no random numbers of its own" in process.stderr
    assert not [path for path in (cli.folder / "cache").rglob("*") if path.is_file()]


# Bounds -----------------------------------------------------------------------------------------------

ENTRY: dict[str, Any] = {"sample": 0, "key": "0" * 32, "view": 1, "shape": [1, 2, 2], "cells": "00" * 4}


@pytest.mark.parametrize(
    "change",
    [
        {"sample": 64}, {"sample": -1}, {"key": "0" * 31}, {"key": "g" * 32}, {"view": 2**24}, {"view": -1},
        {"shape": [1, 2]}, {"shape": [65, 1, 1], "cells": "00" * 65}, {"shape": [1, 9, 1], "cells": "00" * 9},
        {"shape": [-1, 2, -2]}, {"cells": "00" * 3}, {"cells": "zz" * 4}, {"cells": "00" * 5000}, {"more": 1},
    ],
)  # fmt: skip
def test_a_rendering_has_bounds(change: dict[str, Any]) -> None:
    Rendering.model_validate(ENTRY)
    with pytest.raises(ValidationError):
        Rendering.model_validate(ENTRY | change)


def test_a_plan_holds_few_renderings() -> None:
    fields = {"members": [], "precision": "fp32", "batch_size": 4}
    Capture(**fields, audit=[ENTRY] * 64)
    with pytest.raises(ValidationError):
        Capture(**fields, audit=[ENTRY] * 65)


def test_images_of_many_channels_are_kept_in_part() -> None:
    source = ArraySource({"image": np.ones((5, 200, 3, 30), np.uint8)})
    made = renderings(source, ed.ViewsConfig(transforms=(ed.Flip(),)), (0, 1), 5)
    assert {r.shape for r in made} == {(64, 3, 8)} and len(made) == 8
