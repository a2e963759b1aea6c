"""Terms in an objective and in the command: weighted, scheduled, learned; what cannot be is refused before step 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Cli, load_module
from torch import Tensor

import ensemble_distill as ed
from ensemble_distill import losses
from ensemble_distill.config import override
from ensemble_distill.errors import UsageError
from ensemble_distill.training.objective import Objective
from ensemble_distill.weights import printed_digest

CPU = torch.device("cpu")


@pytest.fixture
def parts(captured_taps: Path) -> tuple[Any, ed.Cache]:
    return load_module(captured_taps / "tapped.py"), ed.open_cache(captured_taps / "hdf5")


def objective(parts: tuple[Any, ed.Cache], config: ed.TrainConfig) -> tuple[Objective, torch.nn.Module, ed.Batch]:
    pipeline, cache = parts
    torch.manual_seed(0)
    student = config.student()
    made = Objective(config, student, cache, True)
    batch = next(iter(cache.loader(pipeline.data().sources["train"], 10, taps=made.taps)))
    made.build_adapters(student, batch, CPU)
    return made, student, batch


def test_weights_and_temperatures_follow_the_training(parts: tuple[Any, ed.Cache]) -> None:
    config = parts[0].config(
        lambda: parts[0].Conv(2),
        late=ed.HardLabels(weight=ed.WarmUp(value=2, until=1)),
        early=ed.ReverseKL(weight=ed.SwitchOff(value=3, after=0.5), temperature=ed.Ramp(start=1, end=5)),
    )
    made, student, batch = objective(parts, config)
    for progress, late, early in ((0.0, 0, 3), (0.25, 0.5, 3), (0.5, 1, 0), (1.0, 2, 0)):
        total, value = made(student, batch, CPU, "fp32", progress)
        torch.testing.assert_close(total, value["soft"] + late * value["late"] + early * value["early"])
        expected = losses.reverse_kl(student(**batch.inputs), batch.targets, 1 + 4 * progress)
        torch.testing.assert_close(value["early"], expected.detach())


def test_a_term_may_take_some_rows_only(parts: tuple[Any, ed.Cache]) -> None:
    """Where the ensemble is right, for one term; a weight of all terms is multiplied with it."""

    def right(targets: ed.Targets) -> Tensor:
        return (targets.top1() == targets.labels).float()

    config = parts[0].config(lambda: parts[0].Conv(2), hard=ed.HardLabels())
    config = config.model_copy(update={"objective": config.objective | {"soft": ed.SoftTargets(rows=right)}})
    made, student, batch = objective(parts, config)
    assert torch.equal(batch.targets.labels, batch.labels)
    kept = batch.targets.top1() == batch.labels
    assert 0 < kept.sum() < len(kept)
    _, value = made(student, batch, CPU, "fp32")
    logits = student(**batch.inputs)
    rows = losses.forward_kl(logits, batch.targets).detach()
    torch.testing.assert_close(value["soft"], rows[kept].mean())
    torch.testing.assert_close(value["hard"], losses.hard_labels(logits, batch.labels).detach())
    graded = torch.arange(10.0)
    made, student, batch = objective(parts, config.model_copy(update={"weight": lambda targets: graded}))
    _, value = made(student, batch, CPU, "fp32")
    torch.testing.assert_close(value["soft"], (rows * kept * graded).sum() / (kept * graded).sum())
    torch.testing.assert_close(value["hard"], losses.hard_labels(logits, batch.labels, 0, graded).detach())


def test_an_objective_moves_no_statistics_before_the_first_step(parts: tuple[Any, ed.Cache]) -> None:
    config = parts[0].every()
    student = torch.nn.Sequential(*[parts[0].Conv(2)])  # a student of another structure is named as it is
    with pytest.raises(UsageError, match="has no module 'body'"):
        Objective(config, student, parts[1], True)
    norm = parts[0].Conv(2)
    norm.body = torch.nn.Sequential(norm.body, torch.nn.BatchNorm2d(4))
    norm.train()
    made = Objective(config, norm, parts[1], True)
    batch = next(iter(parts[1].loader(parts[0].data().sources["train"], 10, taps=made.taps)))
    made.build_adapters(norm, batch, CPU)
    assert norm.training and norm.body[1].running_mean.abs().sum() == 0


# The commands ---------------------------------------------------------------------------------------


def test_students_learn_from_every_term_and_leave_what_terms_learn_behind(tapped: Cli) -> None:
    tapped("train", "tapped.py:every", "--cache", "hdf5", "--out", "one")
    lines = [json.loads(line) for line in (tapped.folder / "one" / "metrics.jsonl").read_text().splitlines()]
    pipeline = load_module(tapped.folder / "tapped.py")
    assert set(lines[0]["train"]) == {"loss", *pipeline.every().objective}
    assert lines[1]["train"]["loss"] < lines[0]["train"]["loss"]
    learned = safetensors.torch.load_file(tapped.folder / "one" / "adapters.safetensors")
    assert {name.partition(".")[0] for name in learned} == {"hint", "factor", "gaussian", "contrast"}
    student = pipeline.Conv(2)
    student.load_state_dict(safetensors.torch.load_file(tapped.folder / "one" / "student.safetensors"), strict=True)
    tapped("train", "tapped.py:looks", "--cache", "parquet", "--out", "two")


@pytest.mark.parametrize(
    ("variant", "settings", "parts"),
    [
        ("every", ["batch_size=19"], ("objective.relations compares at least 3 rows", "40 rows", "the last has 2")),
        ("every", ["batch_size=39"], ("objective.dist compares at least 2 rows", "the last has 1", "batch_size")),
        ("every", ['objective.similarity.tap="tap/c.bodi"'], ("holds no 'tap/c.bodi'", "'tap/c.body'", "append")),
        ("every", ["objective.patterns.module=head", "objective.patterns.reduction=none"],
         ("objective.patterns", "nst", "[10, 3]")),
        ("every", ["objective.patterns.module=twice"], ("'twice' ran 2 times", "call=0")),
        ("every", ["objective.gaussian.reduction=pool"], ("objective.gaussian", "[4]", "[6, 6, 6]")),
        ("every", ["objective.attention.module=head", "objective.attention.reduction=none"],
         ("objective.attention", "attention_transfer", "[10, 3]", "[10, 36]")),
        ("looks", ["objective.heads.module=norm", "objective.heads.output=null", "objective.heads.reduction=tokens"],
         ("objective.heads", "[10, 1, 17, 4]")),
        ("every", ["objective.js.beta=1.5"], ("objective", "beta", "less than 1")),
        ("every", ['objective.js.weight={"kind":"ramp","start":1}'], ("weight: ramp.end: Field required",)),
        ("every", ["objective.hint.distance=l3"], ("objective.hint.distance: Input should be 'cosine' or 'l2'",)),
        ("every", ["objective.js.weight=much"], ("weight: expected a number, or a schedule", "'much'")),
    ],
)  # fmt: skip
def test_what_a_term_cannot_have_is_one_sentence_before_the_first_step(
    tapped: Cli, variant: str, settings: list[str], parts: tuple[str, ...]
) -> None:
    flags = [flag for setting in settings for flag in ("--set", setting)]
    error = tapped("train", f"tapped.py:{variant}", "--cache", "hdf5", "--out", "run", *flags, code=2).stderr
    assert all(part in error for part in parts), error
    assert not list((tapped.folder / "run").glob("checkpoint*"))


def test_a_second_stage_begins_with_the_weights_of_the_first(tapped: Cli) -> None:
    train = ("train", "tapped.py", "--cache", "hdf5")
    tapped(*train, "--out", "first", "--set", "epochs=1")
    last = safetensors.torch.load_file(tapped.folder / "first" / "last.safetensors")
    still = ("--set", "optimizer.lr=1e-30", "--set", "optimizer.weight_decay=0", "--set", "epochs=1", "--set", "seed=5")
    for start, out in (("first", "second"), ("first/last.safetensors", "again")):
        tapped(*train, "--out", out, *still, "--set", f"start={start}")
        begun = safetensors.torch.load_file(tapped.folder / out / "last.safetensors")
        for name, tensor in last.items():
            torch.testing.assert_close(begun[name], tensor)
    config = json.loads((tapped.folder / "second" / "config.json").read_text())
    assert config["train"]["start"] == "first" and len(config["start"]) == 64

    missing = tapped(*train, "--out", "x", "--set", "start=nowhere", code=2).stderr
    assert "start: nowhere: no such file" in missing
    (tapped.folder / "empty").mkdir()
    assert "holds no last.safetensors" in tapped(*train, "--out", "x", "--set", "start=empty", code=2).stderr
    other = tapped("train", "tapped.py:looks", "--cache", "hdf5", "--out", "x", "--set", "start=first", code=3).stderr
    assert "does not fit the module that student() made" in other
    (tapped.folder / "weights.pt").write_bytes(b"x")
    assert "pickle" in tapped(*train, "--out", "x", "--set", "start=weights.pt", code=5).stderr


def test_weights_that_fit_another_student_are_not_taken_for_its_own(tapped: Cli) -> None:
    tapped("train", "tapped.py", "--cache", "hdf5", "--out", "run", "--set", "epochs=1")
    tapped.change("nn.ReLU(inplace=True)", "nn.Tanh()", name="tapped.py", to="tanh.py")
    refused = tapped("evaluate", "tanh.py", "--run", "run", code=3).stderr
    assert "run trained another student than the pipeline's" in refused
    second = ("train", "tanh.py", "--cache", "hdf5", "--out", "second", "--set", "epochs=1", "--set")
    assert "start: run trained another student" in tapped(*second, "start=run", code=3).stderr
    assert not (tapped.folder / "second").exists()
    tapped(*second, "start=run/last.safetensors")
    (tapped.folder / "run/config.json").write_text("{}")
    assert "which student" in tapped(*second, "start=run", code=4).stderr


def test_a_student_of_other_classes_is_not_scored_without_its_cache_either(tapped: Cli) -> None:
    tapped("train", "tapped.py", "--cache", "hdf5", "--out", "run", "--set", "epochs=1")
    (tapped.folder / "hdf5").rename(tapped.folder / "gone")
    tapped("evaluate", "tapped.py", "--run", "run")
    tapped.change('classes=("a", "b", "c")', 'classes=("b", "a", "c")', name="tapped.py")
    refused = tapped("evaluate", "tapped.py", "--run", "run", code=3).stderr
    assert "run was trained with classes[0] = 'a', this pipeline says 'b'" in refused


def test_what_a_student_prints_of_memory_tells_no_students_apart() -> None:
    class Named(torch.nn.Module):
        def extra_repr(self) -> str:
            return f"made by {object()}"

    assert printed_digest(Named()) == printed_digest(Named()) != printed_digest(torch.nn.Identity())


def test_a_run_goes_on_only_from_the_weights_that_it_began_with(tapped: Cli) -> None:
    train = ("train", "tapped.py", "--cache", "hdf5", "--set", "epochs=1")
    tapped(*train, "--out", "first")
    tapped(*train, "--out", "second", "--set", "start=first")
    tapped(*train, "--out", "other", "--set", "seed=1")
    last = tapped.folder / "first" / "last.safetensors"
    last.write_bytes((tapped.folder / "other" / "last.safetensors").read_bytes())
    damaged = tapped(*train, "--out", "second", "--set", "start=first", code=4).stderr
    assert "not the weights that the run wrote" in damaged
    (tapped.folder / "first").rename(tapped.folder / "gone")
    (tapped.folder / "other").rename(tapped.folder / "first")
    error = tapped(*train, "--out", "second", "--set", "start=first", code=3).stderr
    assert "holds another run: its start" in error
    (tapped.folder / "first" / "metrics.jsonl").write_text("")
    assert "does not say" in tapped(*train, "--out", "new", "--set", "start=first", code=4).stderr


def test_a_label_that_is_mixed_is_not_decoupled(parts: tuple[Any, ed.Cache], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, cache = parts
    views = cache.plan.reading.views.model_copy(update={"mix": ed.Mixup()})
    reading = cache.plan.reading.model_copy(update={"views": views})
    monkeypatch.setattr(cache, "plan", cache.plan.model_copy(update={"reading": reading}))
    with pytest.raises(UsageError, match=r"objective\.decoupled needs one label a row"):
        Objective(pipeline.every(), pipeline.Conv(2), cache, True)


def test_a_weight_of_rows_leaves_relations_alone_and_says_so(
    parts: tuple[Any, ed.Cache], caplog: pytest.LogCaptureFixture
) -> None:
    config = parts[0].every().model_copy(update={"weight": lambda targets: torch.ones(len(targets))})
    made, _, batch = objective(parts, config)
    made.check(batch.targets, 40, 10)
    said = [r.getMessage() for r in caplog.records if "weight() does not act" in r.getMessage()]
    assert len(said) == 5 and any("objective.dist" in line for line in said)


def test_a_term_of_weight_zero_asks_for_nothing(parts: tuple[Any, ed.Cache]) -> None:
    config = override(parts[0].every(), ["objective.hint.weight=0", 'objective.js.weight={"kind":"warm_up","value":0}'])
    made, *_ = objective(parts, config)
    assert not {"hint", "js"} & set(made.terms) and "hint" not in made.adapters


def _student(s: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
    return (s.relu_() - t).pow(2).mean()


def _cached(s: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
    return (s - t.sub_(t.mean(0))).pow(2).mean()


def _weights(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return ((s - t).pow(2).flatten(1).mean(1) * w.detach().div_(w.sum())).sum()


@pytest.mark.parametrize("distance", [_student, _cached, _weights])
def test_a_distance_that_works_in_place_is_refused(parts: tuple[Any, ed.Cache], distance: Any) -> None:
    """Else the terms after it would be given what it made of their features."""
    match = ed.FeatureMatch(tap="tap/c.body", module="body", distance=distance, rows=lambda targets: targets.entropy)
    with pytest.raises(UsageError, match=r"objective\.own: its distance writes into a tensor that it was given"):
        objective(parts, parts[0].config(lambda: parts[0].Conv(2), own=match))


def test_weights_of_rows_that_write_into_features_are_refused(parts: tuple[Any, ed.Cache]) -> None:
    match = ed.FeatureMatch(tap="tap/c.body", module="body")
    soft = ed.SoftTargets(rows=lambda targets: targets.features["tap/c.body"].flatten(1).abs_().mean(1))
    with pytest.raises(UsageError, match=r"objective\.soft: rows\(\) writes into a tensor that it was given"):
        objective(parts, parts[0].config(lambda: parts[0].Conv(2), soft=soft, own=match))
