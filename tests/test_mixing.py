"""Mixed views: partners, shares and pixels against oracles; that both stages see the same; and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import Cli, load_module
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import ensemble_distill as ed
from ensemble_distill.cache.groups import PARTNER, TARGETS, Group
from ensemble_distill.cache.plan import Plan
from ensemble_distill.codec import PartnerKey
from ensemble_distill.config import describe
from ensemble_distill.errors import Mismatch, UsageError
from ensemble_distill.losses import hard_labels, mixed_labels
from ensemble_distill.recording.audit import audit
from ensemble_distill.recording.capture import Recorder
from ensemble_distill.recording.planning import prepare
from ensemble_distill.sources.arrays import ArraySource, Limited, Loaded, Source
from ensemble_distill.sources.mixing import GRID, Partners, beta, cutmix, mixed, partner_rows
from ensemble_distill.sources.pixels import mixup
from ensemble_distill.sources.views import draw, render
from ensemble_distill.store.leases import Leases
from ensemble_distill.store.store import open_store
from ensemble_distill.training.objective import Objective

MIXES: dict[str, Any] = {"mixup": ed.Mixup(alpha=0.7), "cutmix": ed.CutMix(alpha=1.0)}
CROP = (ed.Flip(), ed.Crop(padding=2))


def a_source(n: int = 40, shape: tuple[int, ...] = (3, 12, 10), dtype: str = "u1", seed: int = 0) -> ArraySource:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return ArraySource({"image": images if dtype == "u1" else (images / 255).astype(dtype)}, rng.integers(0, 5, n))


def shown(
    source: Source, index: np.ndarray, views: ed.ViewsConfig, view: int = 1, rows: int | None = None
) -> tuple[torch.Tensor, Partners]:
    loaded = source.load(index)
    inputs = {"image": render(torch.from_numpy(loaded.inputs["image"]), loaded.keys, views, view)}
    inputs, partners = mixed(inputs, loaded.keys, source, views, view, rows or len(source))
    assert partners is not None
    return inputs["image"], partners


# Draws ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 2.0, 30.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    u, v = np.random.default_rng(1).random((2, 20_000))
    lam = beta(u, v, alpha)
    assert lam.min() >= 0 and lam.max() <= 1 and np.array_equal(lam * GRID, np.round(lam * GRID))
    grid = np.linspace(0.01, 0.99, 99)
    found = np.searchsorted(np.sort(lam), grid) / len(lam)
    assert np.abs(found - scipy.stats.beta.cdf(grid, alpha, alpha)).max() < 0.012  # 1.7 / √n is one in 200
    assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


@pytest.mark.parametrize("alpha", [1e-6, 0.2, 1.0, 1000.0])
def test_the_ends_of_the_uniforms_are_numbers(alpha: float) -> None:
    ends = np.array([0.0, 2.0**-32, 0.25, 0.5, 0.75, 1 - 2.0**-32])
    u, v = (x.ravel() for x in np.meshgrid(ends, ends))
    lam = beta(u, v, alpha)
    assert np.isfinite(lam).all() and lam.min() >= 0 and lam.max() <= 1


def test_shares_and_partners_are_what_they_have_always_been() -> None:
    u, v = np.array([0.1, 0.6, 0.999]), np.array([0.2, 0.7, 0.45])
    assert (beta(u, v, 0.4) * GRID).tolist() == [38248, 10570, 0]
    assert partner_rows(u, v, 1000).tolist() == [100, 600, 999]


@given(st.integers(1, 2**48), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_a_partner_is_a_row(rows: int, u: float, v: float) -> None:
    words = np.floor(np.array([u, v]) * 2.0**32) / 2.0**32
    (row,) = partner_rows(words[:1], words[1:], rows)
    assert 0 <= row < rows
    assert abs(int(row) - int(words[0] * rows)) <= rows / 2**32 + 1
    assert partner_rows(np.array([1 - 2.0**-32]), np.array([1 - 2.0**-32]), rows).tolist() == [rows - 1]


def test_partners_are_uniform_and_leave_the_other_draws_alone() -> None:
    source = a_source(4000, (3, 2, 2))
    _, partners = shown(source, np.arange(4000), ed.ViewsConfig(mix=ed.Mixup()))
    assert scipy.stats.kstest(partners.rows / 4000, "uniform").pvalue > 0.01
    assert 2400 < len(np.unique(partners.rows)) < 2650  # 4000 · (1 − 1/e)
    loaded = source.load(np.arange(4000))
    own = draw(loaded.keys, 0, 1, 6)
    for slot in range(6):
        assert abs(np.corrcoef(own[:, slot], partners.rows)[0, 1]) < 0.05
    with_flip = shown(source, np.arange(4000), ed.ViewsConfig(transforms=(ed.Flip(),), mix=ed.Mixup()))[1]
    assert np.array_equal(with_flip.rows, partners.rows) and torch.equal(with_flip.lam, partners.lam)
    for other in ({"seed": 1}, {}):
        views = ed.ViewsConfig(mix=ed.Mixup(), **other)
        _, others = shown(source, np.arange(4000), views, view=1 if other else 2)
        assert (others.rows == partners.rows).mean() < 0.01


# Pixels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "f4", "f8", "f2"])
@pytest.mark.parametrize("kind", MIXES)
def test_mixed_pixels_are_those_of_the_formula(kind: str, dtype: str) -> None:
    source, index = a_source(dtype=dtype), np.arange(40)
    views = ed.ViewsConfig(transforms=CROP, mix=MIXES[kind], seed=4)
    images, partners = shown(source, index, views, view=3)

    def alone(rows: np.ndarray) -> np.ndarray:
        loaded = source.load(rows)
        return render(torch.from_numpy(loaded.inputs["image"]), loaded.keys, views, 3).double().numpy()

    own, others, lam = alone(index), alone(partners.rows), partners.lam.numpy()
    assert np.array_equal(partners.keys, source.load(partners.rows).keys)
    assert np.array_equal(partners.labels, source.labels[partners.rows])
    if kind == "mixup":
        expected = lam[:, None, None, None] * own + (1 - lam[:, None, None, None]) * others
        assert np.abs(images.double().numpy() - expected).max() < {"u1": 0.5001, "f2": 1e-3}.get(dtype, 1e-6)
        return
    drawn = draw(source.load(index).keys, 4 + 0x3C6EF372, 3, 6)
    for i in range(40):
        side = np.sqrt(1 - beta(drawn[i : i + 1, 2], drawn[i : i + 1, 3], 1.0)[0])
        mask = np.zeros((12, 10), bool)
        h, w, y, x = int(12 * side), int(10 * side), int(12 * drawn[i, 4]), int(10 * drawn[i, 5])
        for row in range(y - h // 2, y - h // 2 + h):
            for column in range(x - w // 2, x - w // 2 + w):
                if 0 <= row < 12 and 0 <= column < 10:
                    mask[row, column] = True
        assert np.array_equal(images[i].double().numpy(), np.where(mask, others[i], own[i]))
        assert lam[i] == 1 - mask.sum() / 120


def test_the_whole_and_nothing() -> None:
    a, b = (torch.from_numpy(a_source(4, seed=seed).load(np.arange(4)).inputs["image"]) for seed in (0, 1))
    for lam, expected in ((0.0, b), (1.0, a)):
        assert torch.equal(mixup(a, b, torch.full((4,), lam, dtype=torch.float64)), expected)
        assert torch.equal(mixup(a / 255, b / 255, torch.full((4,), lam, dtype=torch.float64)), expected / 255)
    middle = np.full(4, 0.5)
    images, lam = cutmix(a, b, np.zeros(4), middle, middle)
    assert torch.equal(images, b) and lam.tolist() == [0] * 4
    images, lam = cutmix(a, b, np.ones(4), middle, middle)
    assert torch.equal(images, a) and lam.tolist() == [1] * 4


@pytest.mark.parametrize("kind", MIXES)
@settings(max_examples=25)
@given(
    n=st.integers(1, 9),
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from(["u1", "f4", "f8", "f2"]),
    view=st.integers(1, 1000),
    seed=st.integers(0, 2**32 - 1),
    order=st.randoms(),
)
def test_a_mixed_sample_is_the_same_in_any_batch(
    kind: str, n: int, shape: tuple[int, ...], dtype: str, view: int, seed: int, order: Any
) -> None:
    source = a_source(n, shape, dtype, seed)
    views = ed.ViewsConfig(transforms=CROP, mix=MIXES[kind], seed=seed)
    whole, partners = shown(source, np.arange(n), views, view)
    index = np.array([order.randrange(n) for _ in range(5)])
    again, theirs = shown(source, index, views, view)
    assert torch.equal(again, whole[index]) and again.dtype == whole.dtype
    assert np.array_equal(theirs.rows, partners.rows[index]) and torch.equal(theirs.lam, partners.lam[index])
    for i in range(n):
        alone, _ = shown(source, np.array([i]), views, view)
        assert alone.numpy().tobytes() == whole[i : i + 1].numpy().tobytes()


GOLDEN = {"mixup": "b2f959dd2f99ca74", "cutmix": "ade51832112b590d"}


@pytest.mark.parametrize("kind", MIXES)
def test_mixed_views_are_what_they_have_always_been(kind: str) -> None:
    """A cache holds what the ensemble said about these pixels: another digest here makes every such cache void."""
    images, _ = shown(a_source(), np.arange(40), ed.ViewsConfig(transforms=CROP, mix=MIXES[kind], seed=9), 7)
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16] == GOLDEN[kind]


def test_view_0_and_views_without_mix_mix_nothing() -> None:
    source = a_source(5)
    loaded = source.load(np.arange(5))
    inputs = {"image": torch.from_numpy(loaded.inputs["image"])}
    assert mixed(inputs, loaded.keys, source, ed.ViewsConfig(mix=ed.Mixup()), 0, 5) == (inputs, None)
    assert mixed(inputs, loaded.keys, source, ed.ViewsConfig(transforms=CROP), 1, 5) == (inputs, None)


def test_what_cannot_be_mixed_is_said() -> None:
    source = a_source(5)
    with pytest.raises(Mismatch, match="it has 5 samples, 9 were captured"):
        shown(source, np.arange(5), ed.ViewsConfig(mix=ed.Mixup()), rows=9)
    with pytest.raises(UsageError, match=r"Mixup needs uint8 or floating images, not torch\.int32"):
        shown(a_source(dtype="i4"), np.arange(5), ed.ViewsConfig(mix=ed.Mixup()))
    flat = ArraySource({"image": np.zeros((5, 7), np.uint8)})
    with pytest.raises(UsageError, match=r"mixing needs images \[B, C, H, W\] of one shape"):
        shown(flat, np.arange(5), ed.ViewsConfig(mix=ed.CutMix()))
    for kind in (ed.Mixup, ed.CutMix):
        for alpha in (0, -1, 1001, float("nan")):
            with pytest.raises(ValidationError):
                kind(alpha=alpha)


# The loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_labels_are_the_cross_entropy_with_the_mixed_target(smoothing: float) -> None:
    rng = np.random.default_rng(0)
    logits, a, b, lam = rng.normal(0, 3, (6, 10)), rng.integers(0, 10, 6), rng.integers(0, 10, 6), rng.random(6)
    target = np.full((6, 10), smoothing / 10)
    target[np.arange(6), a] += (1 - smoothing) * lam
    target[np.arange(6), b] += (1 - smoothing) * (1 - lam)
    q = np.exp(logits - logits.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    rows = -(target * np.log(q)).sum(1)
    x = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    arguments = (torch.tensor(a), torch.tensor(b), torch.tensor(lam), smoothing)
    value = mixed_labels(x, *arguments)
    value.backward()
    assert float(value.detach()) == pytest.approx(rows.mean(), rel=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), (q - target) / 6, atol=1e-6)
    weights = torch.tensor([0.0, 1, 2, 3, 0, 1])
    weighted = float(mixed_labels(x, *arguments, weights=weights).detach())
    assert weighted == pytest.approx(float((rows * weights.numpy()).sum() / 7), rel=1e-5)
    ones = torch.ones(6)
    assert torch.equal(
        mixed_labels(x, arguments[0], arguments[1], ones, smoothing), hard_labels(x, arguments[0], smoothing)
    )


# Both stages ------------------------------------------------------------------------------------------


def with_mix(pipeline: ModuleType, kind: str) -> ed.DataConfig:
    views = ed.ViewsConfig(transforms=(ed.Crop(padding=1),), seed=3, mix=MIXES[kind])
    return pipeline.data().model_copy(update={"views": views})


def capture(pipeline: ModuleType, data: ed.DataConfig, place: Path, **changes: Any) -> Any:
    store = open_store(place, create=True)
    config, leases = pipeline.cache().model_copy(update=changes), Leases(store.storage)
    plan, ensemble = prepare(data, config, data.sources, store, leases, [torch.device("cpu")])
    Recorder(plan, ensemble, data.sources, store, leases).run()
    return ensemble


@pytest.mark.parametrize("kind", MIXES)
def test_both_stages_see_the_same_pixels(kind: str, teachers: Path, tmp_path: Path) -> None:
    pipeline = load_module(teachers / "digits.py")
    data = with_mix(pipeline, kind)
    ensemble = capture(pipeline, data, tmp_path / "cache")
    capture(pipeline, data, tmp_path / "other", batch_size=37)
    cache, other, source = ed.open_cache(tmp_path / "cache"), ed.open_cache(tmp_path / "other"), data.sources["train"]
    cache.check(data)
    for batch in cache.loader(source, 300, epoch=1):
        expected, partners = shown(source, batch.index, data.views)
        assert torch.equal(batch.inputs["image"], expected)
        assert np.array_equal(batch.partners.rows, partners.rows) and torch.equal(batch.partners.lam, partners.lam)
        assert torch.equal(batch.partners.labels, torch.from_numpy(source.labels[partners.rows]))
        said = ensemble({"image": batch.inputs["image"]}).logprobs
        torch.testing.assert_close(batch.targets.logprobs, said, atol=2e-3, rtol=1e-3)
        assert batch.targets.label_logprob.isnan().all()
        found = other.targets(batch.keys, 1)  # captured in other batches
        torch.testing.assert_close(found.logprobs, batch.targets.logprobs, atol=2e-3, rtol=1e-3)
    batch = next(cache.loader(source, 300, epoch=0))
    assert batch.partners is None and not batch.targets.label_logprob.isnan().any()

    def epoch(**how: Any) -> dict[int, bytes]:
        batches = cache.loader(source, epoch=1, **how)
        return {int(i): x.numpy().tobytes() for b in batches for i, x in zip(b.index, b.inputs["image"], strict=True)}

    assert epoch(batch_size=300) == epoch(batch_size=77, workers=3, shuffle=False, seed=5)
    late = epoch(batch_size=300, start=2)
    assert len(late) < 1000 and late.items() <= epoch(batch_size=500).items()


def test_the_objective_takes_both_labels_of_mixed_samples(teachers: Path, tmp_path: Path) -> None:
    pipeline = load_module(teachers / "digits.py")
    data = with_mix(pipeline, "mixup")
    capture(pipeline, data, tmp_path / "cache")
    cache, source, student = ed.open_cache(tmp_path / "cache"), data.sources["train"], pipeline.student().eval()
    config = ed.TrainConfig(student=lambda: student, objective={"hard": ed.HardLabels(label_smoothing=0.1)})
    objective = Objective(config, student, cache, has_labels=True)
    for epoch in (0, 1):
        batch = next(cache.loader(source, 200, epoch=epoch))
        _, parts = objective(student, batch, torch.device("cpu"), "fp32")
        logits = student(batch.inputs["image"])
        expected = hard_labels(logits, batch.labels, 0.1)
        if batch.partners is not None:
            lam = batch.partners.lam
            own, others = (
                F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none")
                for labels in (batch.labels, batch.partners.labels)
            )
            expected = (lam * own + (1 - lam) * others).mean()
        assert float(parts["hard"]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_statistics_know_no_labels_of_mixed_samples(teachers: Path, tmp_path: Path) -> None:
    pipeline = load_module(teachers / "digits.py")
    capture(pipeline, with_mix(pipeline, "mixup"), tmp_path / "mixed")
    capture(pipeline, pipeline.data(), tmp_path / "plain", views=1)
    mixed, plain = (ed.open_cache(tmp_path / name).manifest().statistics["train"] for name in ("mixed", "plain"))
    assert mixed["rows"] == 2000 and plain["rows"] == 1000
    for name in plain["predictors"]:
        for figure in ("accuracy", "nll", "ece"):
            assert mixed["predictors"][name][figure] == pytest.approx(plain["predictors"][name][figure], rel=1e-9)


class Changed:
    """A source whose sample at one position is another."""

    def __init__(self, source: Source, at: int) -> None:
        self.source, self.at, self.labels = source, at, source.labels

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: np.ndarray) -> Loaded:
        return self.source.load(np.where(index == self.at, (self.at + 1) % len(self), index))


def test_a_partner_that_is_another_is_refused(teachers: Path, tmp_path: Path) -> None:
    pipeline = load_module(teachers / "digits.py")
    data = with_mix(pipeline, "cutmix")
    capture(pipeline, data, tmp_path / "cache")
    cache, source = ed.open_cache(tmp_path / "cache"), data.sources["train"]
    _, partners = shown(source, np.arange(1000), data.views)
    at = int(partners.rows[17])
    changed = Changed(source, at)
    with pytest.raises(
        Mismatch, match=rf"train must be in the captured order: sample \d+ was mixed .* row {at}, of key"
    ):
        list(cache.loader(changed, 100, epoch=1, shuffle=False))
    with pytest.raises(Mismatch, match=rf"sample {at} of train has another label"):
        list(cache.loader(changed, 100, epoch=0))  # view 0 mixes nothing, and rows are found by key
    rng = np.random.default_rng(0).permutation(1000)
    images, labels = pipeline.arrays()
    reordered = ArraySource({"image": images[:1000][rng]}, labels[:1000][rng])
    with pytest.raises(Mismatch, match="train must be in the captured order"):
        list(cache.loader(reordered, 100, epoch=1))
    with pytest.raises(Mismatch, match="it has 500 samples, 1000 were captured"):
        list(cache.loader(Limited(source, 500), 100, epoch=1))
    longer = ArraySource({"image": images}, labels)  # whose first thousand are those that were captured
    assert len(next(cache.loader(longer, 100, epoch=0, shuffle=False)).index) > 90


def test_an_audit_looks_at_partners_and_at_the_view_that_mixes_nothing(teachers: Path, tmp_path: Path) -> None:
    pipeline = load_module(teachers / "digits.py")
    data = with_mix(pipeline, "mixup")
    data = data.model_copy(update={"sources": {"train": Limited(data.sources["train"], 60)}})
    ensemble = capture(pipeline, data, tmp_path / "cache", taps=())
    cache, source = ed.open_cache(tmp_path / "cache"), data.sources["train"]
    result = audit(cache, ensemble, data, data.sources, 60, 0)
    assert not result.unexplained and result.fields["train"]["partner"].equal == 60 * 16
    changed = {"train": Changed(source, int(shown(source, np.arange(60), data.views)[1].rows[17]))}
    with pytest.raises(Mismatch, match=r"must be in the captured order: sample \d+ was mixed in view 1"):
        audit(cache, ensemble, data, changed, 60, 0)


def test_views_that_mix_are_not_appended_to_a_cache_of_view_0(cli: Cli) -> None:
    cli.change("transforms=(ed.Crop(padding=1),)", "mix=ed.Mixup(alpha=1.0)")
    cli("cache", "digits.py", "--out", "cache", "--limit", 60, "--views", 1)
    error = cli("append", "digits.py", "--cache", "cache", "--limit", 60, code=2).stderr
    assert "cache holds no view that mixes samples" in error and "no such view can be appended" in error
    assert len(error) < 300


def test_a_unit_is_not_captured_again_with_other_partners(cli: Cli) -> None:
    """Its own samples are the same, and those they are mixed with are not."""
    cli.change("seed=VIEW_SEED)", "seed=VIEW_SEED, mix=ed.Mixup(alpha=1))")
    cli("cache", "digits.py", "--out", "cache")
    commit = json.loads(
        (cli.folder / "cache/commits/train-v000001-00000000.tap.a.pool.json").read_text().split("\n")[1]
    )
    (cli.folder / "cache/objects" / commit["object"]).unlink()
    shutil.copy(cli.folder / "digits.py", cli.folder / "right.py")
    cli.change("images, labels = arrays()", "images, labels = arrays()\n    images[603:618] = 16 - images[603:618]")
    error = cli("repair", "cache", "digits.py", code=3).stderr
    assert "which others are mixed with" in error or "look otherwise" in error, error
    cli("repair", "cache", "right.py")
    cli("verify", "cache")


def test_what_there_is_of_a_mixed_cache_is_proved_as_well(teachers: Path, tmp_path: Path) -> None:
    pipeline = load_module(teachers / "digits.py")
    data, root = with_mix(pipeline, "mixup"), tmp_path / "cache"
    capture(pipeline, data, root, views=3)
    (root / "CURRENT").unlink()
    for commit in root.glob("commits/train-v000002-00000003.*"):
        commit.unlink()
    cache, source = ed.open_cache(root, allow_partial=True), data.sources["train"]
    batches = list(cache.loader(source, 100, epoch=1))
    assert cache.parts["train"].views == 2 and sum(len(batch.index) for batch in batches) == 1000
    changed = Changed(source, int(batches[0].partners.rows[0]))
    with pytest.raises(Mismatch, match="must be in the captured order"):
        list(cache.loader(changed, 100, epoch=1))


def test_the_command_line_with_mixed_views(cli: Cli) -> None:
    """Mixing alone makes views: there are no transforms."""
    cli.change("transforms=(ed.Crop(padding=1),)", "mix=ed.Mixup(alpha=1.0)")
    cli("cache", "digits.py", "--out", "cache", "--limit", 300)
    assert "transforms: none; mixup (alpha 1)" in cli("inspect", "cache").stdout
    cli("verify", "cache", "--deep")
    cli("train", "digits.py", "--cache", "cache", "--out", "run", "--limit", 300, "--set", "epochs=2")
    cli.change("alpha=1.0", "alpha=0.5", to="other.py")
    process = cli("train", "other.py", "--cache", "cache", "--out", "other", "--limit", 300, code=3)
    assert "views.mix.alpha = 1.0" in process.stderr
    process = cli("train", "digits.py", "--cache", "cache", "--out", "part", "--limit", 200, code=3)
    assert "it has 200 samples, 300 were captured" in process.stderr and "--limit" in process.stderr


# The plan ---------------------------------------------------------------------------------------------


def test_views_that_mix_nothing_are_written_as_before_there_was_mix() -> None:
    assert ed.ViewsConfig().model_dump(mode="json") == {"transforms": [], "seed": 0, "input": "image"}
    views = ed.ViewsConfig(mix=ed.Mixup(alpha=0.4))
    assert views.model_dump(mode="json")["mix"] == {"kind": "mixup", "alpha": 0.4} == describe(views)["mix"]
    assert ed.ViewsConfig.model_validate_json(views.model_dump_json()) == views != ed.ViewsConfig(mix=ed.CutMix())


def test_a_plan_that_mixes_must_hold_the_keys_of_partners(teachers: Path, tmp_path: Path) -> None:
    pipeline = load_module(teachers / "digits.py")
    capture(pipeline, with_mix(pipeline, "mixup"), tmp_path / "cache")
    plan = ed.open_cache(tmp_path / "cache").plan
    codecs = plan.group(TARGETS).codecs
    assert isinstance(codecs[PARTNER], PartnerKey)
    without = Group.of(TARGETS, {name: codec for name, codec in codecs.items() if name != PARTNER})
    fields = dict(plan) | {"groups": (without, *plan.groups[1:])}
    with pytest.raises(ValidationError, match="its views mix samples, and group 'targets' holds no keys of partners"):
        Plan(**fields)
    one = {name: split.model_copy(update={"views": 1}) for name, split in plan.splits.items()}
    Plan(**fields | {"splits": one})
