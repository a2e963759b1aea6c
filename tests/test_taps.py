"""Taps: each reduction is what an oracle says, of a teacher as of a student; what is no feature is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Cli, load_module
from pydantic import ValidationError
from torch import Tensor, nn

import ensemble_distill as ed
from ensemble_distill.errors import Mismatch, UsageError
from ensemble_distill.projection import matrix
from ensemble_distill.reduction import Random, Take
from ensemble_distill.reductions import pool, reduce
from ensemble_distill.taps import Taps
from ensemble_distill.terms import FeatureTerm

CPU = torch.device("cpu")


# Reductions: float64 oracles, element by element ----------------------------------------------------


def each(x: Tensor, function: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack([function(row) for row in x.double().numpy()]))


def gram(row: np.ndarray) -> np.ndarray:
    flat = row.reshape(len(row), -1)
    return np.array([[a @ b for b in flat] for a in flat]) / flat.size


MAP, TOKENS = (4, 3, 2, 5), (4, 6, 3)
ORACLES = [
    ("none", MAP, lambda r: r), ("none", TOKENS, lambda r: r), ("none", (4, 3), lambda r: r),
    ("flatten", MAP, np.ravel), ("flatten", (4, 3), lambda r: r),
    ("pool", MAP, lambda r: np.array([c.mean() for c in r])), ("pool", (4, 3), lambda r: r),
    (ed.Attention(p=2), MAP, lambda r: sum(c**2 for c in r)), ("attention", MAP, lambda r: sum(c**2 for c in r)),
    (ed.Attention(p=1), MAP, lambda r: sum(abs(c) for c in r)),
    (ed.Attention(p=3), MAP, lambda r: sum(abs(c) ** 3 for c in r)),
    ("gram", MAP, gram), ("gram", (4, 3, 7), gram),
    ("cls", TOKENS, lambda r: r[0]), ("tokens", TOKENS, lambda r: r),
    ("token_mean", TOKENS, lambda r: sum(r) / len(r)),
]  # fmt: skip


@pytest.mark.parametrize(("reduction", "shape", "oracle"), ORACLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reduction_is_what_its_oracle_says(
    reduction: object, shape: tuple[int, ...], oracle: Callable[[np.ndarray], np.ndarray], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept, take = x.clone(), Take(module="x", reduction=reduction)
    with torch.autocast("cpu", torch.bfloat16):  # which must not round what is computed here
        found = reduce(take.reduction, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), each(kept, oracle), atol=1e-5, rtol=1e-5)
    x.zero_()  # as a module that works in place would
    torch.testing.assert_close(found.double(), each(kept, oracle), atol=1e-5, rtol=1e-5)


def test_attention_probabilities_are_kept_or_averaged_over_the_heads() -> None:
    probs = torch.randn(2, 3, 4, 4).softmax(3)
    for heads, expected in (("keep", probs), ("mean", sum(probs.unbind(1)) / 3)):
        torch.testing.assert_close(reduce(ed.AttentionProbs(heads=heads), probs), expected)
    torch.testing.assert_close(reduce(ed.AttentionProbs(), probs[:, 0]), probs[:, 0])


@pytest.mark.parametrize(
    ("reduction", "value", "message"),
    [
        ("pool", torch.zeros(4), r"pool needs \[B, C, \.\.\.\], found \[4\]"),
        ("none", torch.zeros(4), "none needs"),
        ("attention", torch.zeros(4, 3), r"attention\(p=2\) needs \[B, C, H, W\], found \[4, 3\]"),
        ("gram", torch.zeros(4, 3), "gram needs"),
        ("cls", torch.zeros(4, 3), r"cls needs \[B, T, D\]"),
        ("tokens", torch.zeros(4, 3, 2, 2), r"tokens needs \[B, T, D\]"),
        ("token_mean", torch.zeros(4, 3), "token_mean needs"),
        (ed.AttentionProbs(heads="keep"), torch.zeros(4, 3, 3), "attention_probs"),
        ("pool", torch.zeros(4, 3, dtype=torch.int64), "found int64"),
        ("attention_probs", torch.zeros(4, 3, 3, dtype=torch.bool), "found bool"),
    ],
)
def test_a_shape_that_a_reduction_does_not_take_is_named(reduction: object, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reduce(Take(module="x", reduction=reduction).reduction, value)


@pytest.mark.parametrize(
    "fields",
    [{"reduction": "sum"}, {"reduction": {"name": "attention", "p": 0}}, {"output": 0, "input": 0}, {"output": -1},
     {"call": -1}, {"reduction": ed.AttentionProbs, "heads": "max"}, {"project": {"name": "random", "dim": 0}}],
)  # fmt: skip
def test_a_tap_is_checked_when_it_is_written(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ed.Tap(member="a", module="x", **fields)
    if "project" not in fields:
        with pytest.raises(ValidationError):
            FeatureTerm(tap="tap/a.x", module="x", **fields)


# Taps -----------------------------------------------------------------------------------------------


class Several(nn.Module):
    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        return x + 1, {"a": x * 2}, [x * 3]


class Net(nn.Module):
    """Uses one module under two names, one of them twice, and works in place on what was tapped."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.act = nn.ReLU(inplace=True)
        self.several = Several()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.second(self.first(x)))
        return self.several(y, scale=x * 5)[0]


def watched(model: nn.Module, inputs: Tensor, /, **takes: Take) -> dict[str, Tensor]:
    taps = Taps(model, takes, "the student")
    with taps.watch() as values:
        model(inputs)
    return values


def test_taps_take_outputs_and_inputs_by_number_and_passes_by_call() -> None:
    net, x = Net(), torch.randn(5, 4)
    one = net.first(x)
    two = net.first(one)
    found = watched(
        net, x,
        first=Take(module="first", call=0), second=Take(module="second", call=1), act_in=Take(module="act", input=0),
        act=Take(module="act"), out=Take(module="several", output=0), keyword=Take(module="several", input=1),
    )  # fmt: skip
    expected = {"first": one, "second": two, "act_in": two, "act": two.relu(), "out": two.relu() + 1, "keyword": x * 5}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert found["first"].requires_grad


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (Take(module="firs"), "no module 'firs'; did you mean 'first'"),
        (Take(module="first"), "ran 2 times in one pass"),
        (Take(module="second"), "module 'second' ran 2 times"),
        (Take(module="first", call=2), r"ran 2 time\(s\) in one pass: there is no call 2"),
        (Take(module="several"), "gives a tuple of 3: say which"),
        (Take(module="several", output=3), "there are 3, counted from 0"),
        (Take(module="several", output=1), "found a dict"),
        (Take(module="several", output=2), "found a list"),
        (Take(module="act", output=0), "it is one Tensor and not several"),
        (Take(module="act", input=1), "input 1 of module 'act': there are 1, counted from 0"),
        (Take(module="act", reduction="cls"), r"cls needs \[B, T, D\], found \[5, 4\]"),
        (Take(module="several", output=0, reduction="attention"), "output 0 of module 'several': attention"),
    ],
)
def test_what_cannot_be_tapped_is_one_sentence(take: Take, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        watched(Net(), torch.randn(5, 4), x=take)


def test_attention_that_is_no_probability_is_refused() -> None:
    model = nn.Sequential(nn.Identity())
    take = Take(module="0", reduction="attention_probs")
    probs = torch.randn(2, 3, 4, 4).softmax(3)
    torch.testing.assert_close(watched(model, probs, x=take)["x"], probs.mean(1))
    for bad in (probs.log(), probs * 2, probs * torch.nan, torch.tensor([1.5, -0.5]).expand(2, 1, 2, 2)):
        with pytest.raises(UsageError, match="module '0': attention_probs needs probabilities"):
            watched(model, bad, x=take)


def test_only_passes_under_watch_are_recorded_and_a_module_must_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    taps = Taps(model, {"x": Take(module="1")}, "member 'a'")
    for _ in range(2):
        x = torch.randn(2, 4)
        with taps.watch() as values:
            model(x)
        torch.testing.assert_close(values["x"], model(x))
        assert not taps._values and taps._calls == {"x": 1}  # what is outside is neither kept nor counted
    with pytest.raises(UsageError, match="module '1' did not run"), taps.watch():
        model[0](torch.randn(2, 4))
    with pytest.raises(ZeroDivisionError), taps.watch():
        raise ZeroDivisionError
    with taps.watch() as values:
        model(x)
    assert values["x"].shape == (2, 4)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_taps_live_through_compilation(fullgraph: bool) -> None:
    """As hooks on the compiled model itself, and on its parts before it was compiled; without endless recompiling."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of other tests in this process
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten())
    takes = {"map": Take(module="0", reduction="attention"), "raw": Take(module="0", reduction="none")}
    before = Taps(net, takes, "the student")
    compiled = torch.compile(net, backend="eager", fullgraph=fullgraph)
    after = Taps(compiled, takes, "the student")  # named without _orig_mod
    for _ in range(12):
        x = torch.randn(4, 1, 6, 6)
        with before.watch() as one, after.watch() as two:
            compiled(x)
        raw = net[0](x)
        for found in (one, two):
            torch.testing.assert_close(found["raw"], raw)
            torch.testing.assert_close(found["map"], raw.square().sum(1))
        (gradient,) = torch.autograd.grad(two["map"].sum(), net[0].weight)
        assert gradient.abs().sum() > 0
        compiled(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


class Wrapper(nn.Module):
    """As DistributedDataParallel does it, without a network: the model is its child ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_taps_find_modules_in_what_wraps_them() -> None:
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(5, 4)
    wrapped = Wrapper(net)
    found = watched(wrapped, x, x=Take(module="0"))["x"]
    torch.testing.assert_close(found, net[0](x))
    found.sum().backward()
    assert net[0].weight.grad is not None
    with pytest.raises(UsageError, match="no module '7'; there is '0', '1'"):
        Taps(wrapped, {"x": Take(module="7")}, "the student")
    own = nn.ModuleDict({"module": nn.Sequential(nn.Linear(4, 3))})  # a name of the user's goes first
    assert Taps(own, {"x": Take(module="module.0")}, "x") and Taps(own, {"x": Take(module="0")}, "x")


# Capture --------------------------------------------------------------------------------------------


def expected(pipeline: ModuleType, image: Tensor) -> dict[str, Tensor]:
    """All features of the pipeline, float64, written out without a hook."""
    c, v = (pipeline.seeded(make).double() for make in (pipeline.Conv, pipeline.ViT))
    x = image.double() / 16
    stem = c.stem(x)
    body = c.body(stem.relu())
    one = c.twice(body)
    two = c.twice(one)
    tokens = v.embed(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([v.first.expand(len(x), -1, -1), tokens], dim=1)
    mixed, probs = v.attention(tokens)
    norm = v.norm(tokens + mixed)
    r = torch.from_numpy(matrix(Random(dim=50, seed=4), 6 * 36)).double()
    return {
        "c.stem": stem, "c.body": body.mean((2, 3)), "c.map": body.square().sum(1), "c.map1": body.abs().sum(1),
        "c.gram": torch.einsum("bchw,bdhw->bcd", body, body) / (6 * 36), "c.random": body.flatten(1) @ r,
        "c.body8": body, "c.twice": two.mean((2, 3)), "c.head": two.mean((2, 3)), "v.attention": mixed,
        "v.mean": probs.mean(1), "v.heads": probs, "v.norm": norm[:, 0], "v.tokens8": norm, "v.average": norm.mean(1),
    }  # fmt: skip


@pytest.mark.parametrize("format", ["hdf5", "parquet"])
def test_each_tap_is_captured_in_each_view_as_its_oracle_says(captured_taps: Path, format: str) -> None:
    pipeline = load_module(captured_taps / "tapped.py")
    cache = ed.open_cache(captured_taps / format)
    taps, source = [tap.field for tap in pipeline.TAPS], pipeline.data().sources["train"]
    assert sorted(cache.taps) == sorted(taps)
    views = set()
    for epoch in range(2):
        for batch in cache.loader(source, 16, epoch=epoch, taps=taps):
            views.add(batch.view)
            with torch.no_grad():
                wanted = expected(pipeline, batch.inputs["image"])
            for tap in pipeline.TAPS:
                found, right = batch.targets.features[tap.field].double(), wanted[tap.field.removeprefix("tap/")]
                largest = right.abs().amax(tuple(range(1, right.ndim)), keepdim=True)
                allowed = {
                    "fp16": right.abs() * 2**-11 + largest * 1e-5,
                    "bf16": right.abs() * 2**-8 + largest * 1e-5,
                    "int8": largest / 127 / 2 * 1.01,
                }[tap.values]
                assert found.shape == right.shape and ((found - right).abs() <= allowed).all(), tap.field
    assert views == {0, 1}


def test_codecs_say_shapes_axes_and_how_a_tap_was_taken(tapped: Cli) -> None:
    plan = json.loads(tapped("inspect", "hdf5", "--json").stdout)["plan"]
    codecs = {tap: codec for group in plan["groups"] for tap, codec in group["codecs"].items()}
    assert codecs["tap/c.body"] == {"name": "features", "width": 6}
    assert codecs["tap/c.body8"]["shape"] == [6, 6, 6] and "axis" not in codecs["tap/c.body8"]
    assert codecs["tap/v.tokens8"]["axis"] == 1  # channels of tokens stand last
    fields = {f["name"]: f for group in plan["groups"] for f in group["fields"]}
    assert fields["tap/c.body8/scale"]["shape"] == [6] and fields["tap/v.tokens8/scale"]["shape"] == [8]
    assert fields["tap/c.head/scale"]["shape"] == [] and fields["tap/v.attention"]["dtype"] == "<u2"
    assert codecs["tap/c.random"]["project"]["dim"] == 50
    text = tapped("inspect", "hdf5").stdout
    change = plan["capture"]["distortions"]["tap/c.random"]
    for part in (
        f"squared distances change by {change:.1%} on average",
        "attention(p=1) of module 'body'", "attention_probs(heads=keep) of output 1 of module 'attention', fp16",
        "projected to 50 (sparse, seed 4)",
    ):  # fmt: skip
        assert part in text, part
    assert 0.05 < change < 0.4  # √(2/50) · √(2/π) is .16 where all rows are alike


def test_the_plan_prices_each_tap_as_the_capture_then_takes_it(tapped: Cli) -> None:
    found = json.loads(tapped("plan", "tapped.py", "--batches", 1, "--json").stdout)
    taps = {tap["tap"]: tap for tap in found["taps"]}
    assert {t: taps[t]["bytes_per_row"] for t in ("tap/c.body", "tap/c.stem", "tap/v.heads")} == {
        "tap/c.body": 12, "tap/c.stem": 2 * 4 * 36, "tap/v.heads": 2 * 2 * 17 * 17,
    }  # fmt: skip
    assert taps["tap/c.body8"]["bytes_per_row"] == 6 * 36 + 2 * 6 and taps["tap/c.body8"]["values"] == "int8"
    assert taps["tap/c.random"]["distortion"] > 0 and taps["tap/c.body"]["distortion"] is None
    held = json.loads(tapped("inspect", "hdf5", "--json").stdout)
    sizes: dict[str, int] = {}
    for path in (tapped.folder / "hdf5" / "commits").iterdir():
        commit = json.loads(path.read_bytes().partition(b"\n")[2])
        group = commit["unit"].partition(".")[2]
        sizes[group] = sizes.get(group, 0) + commit["size"]
    for tap, price in taps.items():
        assert sizes[tap.replace("/", ".")] == pytest.approx(price["bytes"], rel=0.02)
    assert held["bytes"] == pytest.approx(found["bytes"], rel=0.02)
    text = tapped("plan", "tapped.py", "--batches", 1).stdout
    assert "4×6×6" in text and max(map(len, text.splitlines())) <= 100


def test_the_capture_can_be_verified_audited_and_continued(tapped: Cli) -> None:
    tapped("verify", "hdf5", "--deep")
    text = tapped("audit", "tapped.py", "--cache", "hdf5", "--rows", "8").stdout
    assert "tap/c.body8 (decoded)" in text and "tap/v.attention (decoded)" in text
    assert "already complete" in tapped("cache", "tapped.py", "--out", "hdf5").stdout
    for old, new in (
        ("ed.Attention(p=1)", "ed.Attention(p=4)"),
        ('module="twice", call=1', 'module="twice", call=0'),
        ('reduction="none", values="int8"', 'reduction="none"'),
        ("seed=4", "seed=5"),
    ):
        tapped.change(old, new, "tapped.py", to="other.py")
        assert "was begun with groups" in tapped("cache", "other.py", "--out", "hdf5", code=3).stderr
        assert "taken in another way" in tapped("audit", "other.py", "--cache", "hdf5", code=3).stderr


BAD = [
    ('module="stem"', 'module="stm"', 2, ("no module 'stm'", "'stem'")),
    ('module="twice", call=1', 'module="twice"', 2, ("'twice' ran 2 times", "call=0")),
    ('module="twice", call=1', 'module="twice", call=2', 2, ("no call 2",)),
    ('name="heads", output=1', 'name="heads"', 2, ("tuple of 2", "output=0")),
    ('name="heads", output=1', 'name="heads", output=0', 2, ("attention_probs", "[2, 17, 8]")),
    ('name="average", reduction="token_mean"', 'name="average", reduction="gramm"', 2, ("reduction", "gramm")),
    ('module="norm", reduction="cls"', 'module="norm", reduction="attention"', 2, ("attention(p=2) needs", "norm")),
    ('name="map1"', 'name="Map"', 2, ("two taps", "differ by case only")),
    ("ed.Random(dim=50, seed=4)", "ed.Random(dim=65537)", 2, ("dim", "65536")),
    ("x = torch.cat([self.first", "x = torch.cat([x[:, : len(x)], self.first", 3, ("features of shape", "planned")),
    ("x = self.twice(self.twice(self.body(x)))", "x = self.twice(self.twice(self.body(x[:1].expand_as(x))))"
     "\n        self.body(x[:1, :4])", 2, ("'body' ran 2 times",)),
    ("self.body(x)", "self.body(x.repeat(2, 1, 1, 1))[: len(x)]", 2, ("rows for a batch of 2", "must be the batch")),
    ("self.act(self.stem(image.float() / 16))", "self.act(self.stem(image.float() * 1e5))", 7,
     ("tap/c.", "not finite in float16", "bf16")),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "code", "parts"), BAD)
def test_a_tap_that_cannot_be_kept_is_one_sentence_and_nothing_is_committed(
    tapped: Cli, old: str, new: str, code: int, parts: tuple[str, ...]
) -> None:
    tapped.change(old, new, "tapped.py")
    error = tapped("cache", "tapped.py", "--out", "new", code=code).stderr
    assert all(part in error for part in parts), error
    assert not list((tapped.folder / "new").glob("commits/*"))


# Training -------------------------------------------------------------------------------------------


def weights(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def test_students_learn_from_every_reduction_and_leave_their_adapters_behind(tapped: Cli) -> None:
    pipeline = load_module(tapped.folder / "tapped.py")
    tapped("train", "tapped.py", "--cache", "hdf5", "--out", "one")
    tapped("train", "tapped.py:small", "--cache", "parquet", "--out", "two")
    shapes = {n: tuple(t.shape) for n, t in weights(tapped.folder / "one" / "adapters.safetensors").items()}
    assert {n: s for n, s in shapes.items() if n.endswith("weight")} == {
        "stem.weight": (4, 2, 1, 1), "body.weight": (6, 4), "body8.weight": (6, 4, 1, 1), "random.weight": (50, 144),
        "twice.weight": (6, 4), "head.weight": (6, 4), "both.weight": (12, 4), "mean.weight": (6, 4),
    }  # fmt: skip
    shapes = {n: tuple(t.shape) for n, t in weights(tapped.folder / "two" / "adapters.safetensors").items()}
    assert shapes == {
        "tokens.weight": (8, 4), "tokens.bias": (8,), "cls.weight": (8, 4), "cls.bias": (8,), "wide.weight": (16, 4),
        "wide.bias": (16,),
    }  # fmt: skip
    for run, make in (("one", lambda: pipeline.Conv(2)), ("two", lambda: pipeline.ViT(4))):
        student = make()
        student.load_state_dict(weights(tapped.folder / run / "student.safetensors"), strict=True)
        lines = [json.loads(line) for line in (tapped.folder / run / "metrics.jsonl").read_text().splitlines()]
        assert lines[1]["train"]["loss"] < lines[0]["train"]["loss"]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["objective.body.adapter=identity"], ("objective.body", "[4]", "[6]", "equal shapes")),
        (["objective.stem.adapter=linear"], ("objective.stem", "last axis")),
        (["objective.body.adapter=conv1x1"], ("objective.body", "maps [C, H, W]")),
        (["objective.map.reduction=pool"], ("objective.map", "[4]", "[6, 6]", "reduction")),
        (["objective.stem.module=head", "objective.stem.reduction=none"], ("objective.stem", "[3]", "[4, 6, 6]")),
        (["objective.both.combine=mean", 'objective.both.tap=["tap/c.body","tap/c.map"]'], ("cannot be combined",)),
        (['objective.both.tap=["tap/c.body","tap/c.maps"]'], ("holds no 'tap/c.maps'", "'tap/c.map'")),
        (["objective.twice.call=null"], ("'twice' ran 2 times", "call=0")),
        (["objective.body.module=bodi"], ("the student has no module 'bodi'", "'body'")),
        (["objective.body.adapter=mlp"], ("adapter", "mlp")),
    ],
)
def test_features_that_do_not_fit_are_refused_before_the_first_step(
    tapped: Cli, settings: list[str], parts: tuple[str, ...]
) -> None:
    flags = [flag for setting in settings for flag in ("--set", setting)]
    error = tapped("train", "tapped.py", "--cache", "hdf5", "--out", "run", *flags, code=2).stderr
    assert all(part in error for part in parts), error
    assert not list((tapped.folder / "run").glob("checkpoint*"))


def test_a_term_gets_both_features_in_one_shape(captured_taps: Path) -> None:
    """And in their own units: what the adapter makes of the student's, the mean or the row of what was cached."""
    from ensemble_distill.training.features import FeaturePairs

    pipeline, cache = load_module(captured_taps / "tapped.py"), ed.open_cache(captured_taps / "hdf5")
    terms = {n: t for n, t in pipeline.train().objective.items() if isinstance(t, FeatureTerm)}
    torch.manual_seed(0)
    student = pipeline.Conv(2)
    pairs = FeaturePairs(terms, student, cache)
    batch = next(iter(cache.loader(pipeline.data().sources["train"], 10, taps=pairs.taps)))
    pairs.build(student, batch, CPU)
    with pairs.watch() as features:
        student(batch.inputs["image"])
    held = batch.targets.features
    body = student.body(student.stem(batch.inputs["image"].float() / 16).relu())

    def adapted(name: str) -> tuple[Tensor, Tensor]:
        mine, cached = pairs.pair(name, features, batch.targets)
        learned = pairs.learned(name)
        return (mine if learned is None else learned(mine)), cached

    for name in terms:
        mine, cached = adapted(name)
        assert mine.shape == cached.shape and mine.requires_grad and mine.dtype == cached.dtype == torch.float32
    mine, cached = adapted("mean")
    torch.testing.assert_close(cached, (held["tap/c.body"] + held["tap/c.twice"]) / 2)
    torch.testing.assert_close(mine, pairs.adapters["mean"](pool(body)))
    _, cached = pairs.pair("both", features, batch.targets)
    torch.testing.assert_close(cached, torch.cat([held["tap/c.body"], held["tap/c.twice"]], 1))
    mine, cached = adapted("map")
    torch.testing.assert_close(mine, body.square().sum(1))  # reduced as the cached tap was
    assert "map" not in pairs.adapters and torch.equal(cached, held["tap/c.map"])


def test_features_side_by_side_have_their_channels_side_by_side() -> None:
    from ensemble_distill.training.adapters import shape_together, together

    a, b = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    torch.testing.assert_close(together([a, b], "concat", 1), torch.cat([a, b], dim=2))
    assert shape_together("x", [(5, 3), (5, 4)], "concat", 1) == [5, 7]
    assert shape_together("x", [(3, 5), (4, 5)], "concat", 0) == [7, 5]
    torch.testing.assert_close(together([a, 3 * a], "mean", 1), 2 * a)
    assert shape_together("x", [(5, 3), (5, 3)], "mean", 1) == [5, 3]
    for shapes, combine, axis in (([(5, 3), (4, 3)], "concat", 1), ([(5,), (5, 3)], "concat", 0)):
        with pytest.raises(UsageError, match=f"but for axis {axis}"):
            shape_together("x", shapes, combine, axis)
    with pytest.raises(UsageError, match=r"they must be equal$"):
        shape_together("x", [(5, 3), (5, 4)], "mean", 1)


@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_an_audit_allows_the_next_code_and_no_more(values: str) -> None:
    from ensemble_distill.codec import Features
    from ensemble_distill.codecs.features import encode
    from ensemble_distill.recording.audit import Difference, _add_features

    codec, x = Features.of((3, 4), values), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) * 100
    old = encode(codec, x)
    for by, allowed in ((1, True), (4, False)):
        name = "codes" if values == "int8" else ""
        signed = old[name].view(torch.int16) if values == "bf16" else old[name]
        place, new = Difference(), old | {name: (signed - by * signed.sign()).view(old[name].dtype)}
        _add_features(place, codec, old, new, 1e-3, ["one", "two"])
        assert (place.worst <= 1) == allowed and place.values == 24


def test_a_capture_holds_to_the_shapes_that_it_was_planned_with() -> None:
    class Sometimes(nn.Module):
        wide = False

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Identity(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.body(torch.cat([x, x], 1) if self.wide else x)
            return self.head(x)

    from ensemble_distill.ensemble.ensemble import Ensemble
    from ensemble_distill.ensemble.members import load_member

    member = ed.Member(name="a", build=Sometimes)
    config = ed.CacheConfig(members=(member,), taps=(ed.Tap(member="a", module="body"),))
    ensemble = Ensemble([load_member(member)], config, 3, [CPU])
    ensemble.look({"x": torch.zeros(2, 4)})
    assert ensemble({"x": torch.zeros(5, 4)}).features["tap/a.body"].shape == (5, 4)
    ensemble.modules[0].wide = True
    with pytest.raises(Mismatch, match=r"member 'a': module 'body' gives features of shape \[8\].*\[4\] when"):
        ensemble({"x": torch.zeros(5, 4)})


def test_a_feature_or_a_name_that_is_too_large_is_refused_when_it_is_planned() -> None:
    from ensemble_distill.recording.taps import feature_codec

    tap = ed.Tap(member="a", module="body", reduction="none")
    for shape in ((1 << 14, 1 << 14), (1 << 28,)):
        with pytest.raises(UsageError, match=r"tap/a\.body of shape") as error:
            feature_codec(tap, shape)
        assert "project=Random" in error.value.hint
    assert feature_codec(tap, (1 << 27,)).width == 1 << 27
    long = {"member": "a" * 99, "module": "b" * 99}
    with pytest.raises(ValidationError, match="longer than 180 characters: give it a name"):
        ed.Tap(**long)
    assert ed.Tap(**long, name="b").field == f"tap/{'a' * 99}.b"
    projected = ed.Tap(member="a", module="body", reduction="flatten", project=Random(dim=1 << 16))
    from ensemble_distill.ensemble.tapped import Tapped

    with pytest.raises(UsageError, match=r"tap/a\.body: a projection of 4097 to 65536 values takes 1\.1 GB"):
        Tapped([projected]).kept({"tap/a.body": torch.zeros(2, 4097)}, 2)
