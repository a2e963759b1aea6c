"""Terms: each is the loss that it names, weighted and scheduled as it says; what cannot be is refused before step 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Cli, load_module
from pydantic import ValidationError
from torch import Tensor

import ensemble_distill as ed
from ensemble_distill import losses, terms
from ensemble_distill.config import override
from ensemble_distill.errors import UsageError
from ensemble_distill.losses import Gaussian
from ensemble_distill.schedules import at, ends
from ensemble_distill.training.adapters import Projections, learn
from ensemble_distill.training.objective import Objective
from ensemble_distill.training.terms import of_features, of_logits

CPU = torch.device("cpu")
B, C = 6, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LOGITS, LABELS = drawn(B, C, seed=1), torch.arange(B) % C
TARGETS = ed.Targets(torch.log_softmax(2 * drawn(B, C, seed=2), 1), classes=C, labels=LABELS)
BATCH = ed.Batch({}, LABELS, TARGETS, np.zeros((B, 16), np.uint8), np.arange(B), 0)
WEIGHTS = torch.rand(B, generator=torch.Generator().manual_seed(3))


# Each term is its loss ------------------------------------------------------------------------------

OF_LOGITS: list[tuple[terms.AnyTerm, Callable[[Tensor, Tensor | None], Tensor]]] = [
    (ed.HardLabels(label_smoothing=0.1), lambda x, w: losses.hard_labels(x, LABELS, 0.1, w)),
    (ed.SoftTargets(temperature=4), lambda x, w: losses.soft_targets(x, TARGETS, 4, w)),
    (ed.ReverseKL(temperature=3), lambda x, w: losses.reverse_kl(x, TARGETS, 3, w)),
    (ed.JensenShannon(beta=0.2, temperature=2), lambda x, w: losses.jensen_shannon(x, TARGETS, 0.2, 2, w)),
    (ed.Decoupled(alpha=2, beta=3), lambda x, w: losses.decoupled(x, TARGETS, LABELS, 2, 3, 4, w)),
    (ed.Standardised(), lambda x, w: losses.standardised(x, TARGETS, 2, w)),
    (ed.Dist(beta=2, gamma=3, temperature=4), lambda x, w: losses.dist(x, TARGETS, 2, 3, 4)),
]


@pytest.mark.parametrize(("term", "loss"), OF_LOGITS, ids=lambda x: getattr(x, "kind", ""))
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weighted"])
def test_a_term_of_logits_is_its_loss(term: terms.AnyTerm, loss: Callable[..., Tensor], weights: Tensor | None) -> None:
    found = of_logits(term, LOGITS, TARGETS, BATCH, weights, 0.5)
    torch.testing.assert_close(found, loss(LOGITS, weights))
    other = of_logits(term, drawn(B, C, seed=9), TARGETS, BATCH, weights, 0.5)
    assert not torch.allclose(found, other)


MAPS, MORE = drawn(B, 3, 4, 2, seed=4), drawn(B, 3, 4, 2, seed=5)
VECTORS, WIDE = drawn(B, 3, seed=6), drawn(B, 7, seed=7)
PROBS, OTHERS = drawn(B, 2, 4, 4, seed=8).softmax(3), drawn(B, 2, 4, 4, seed=9).softmax(3)
GAUSSIAN, PROJECTIONS, LINEAR = Gaussian(3, 3, positions=True), Projections(3, 7, 5), torch.nn.Linear(3, 7)
OWN, REST = torch.arange(B), torch.tensor([[j for j in range(B) if j != i] for i in range(B)])


def field(term: type[terms.FeatureTerm], **fields: Any) -> terms.FeatureTerm:
    return term(tap="tap/a.x", module="x", **fields)


def huber(student: Tensor, cached: Tensor, weights: Tensor | None) -> Tensor:
    rows = torch.nn.functional.huber_loss(student, cached, reduction="none").sum(1)
    return rows.mean() if weights is None else (rows * weights).sum() / weights.sum()


Pair = tuple[terms.FeatureTerm, Any, Tensor, Tensor, Callable[[Tensor | None], Tensor]]
OF_FEATURES: dict[str, Pair] = {
    "l2": (field(ed.FeatureMatch, distance="l2"), None, MAPS, MORE, lambda w: losses.feature_l2(MAPS, MORE, w)),
    "cosine": (field(ed.FeatureMatch), None, MAPS, MORE,
               lambda w: losses.feature_cosine(MAPS.flatten(1), MORE.flatten(1), w)),
    "adapted": (field(ed.FeatureMatch, distance="l2"), LINEAR, VECTORS, WIDE,
                lambda w: losses.feature_l2(LINEAR(VECTORS), WIDE, w)),
    "own": (field(ed.FeatureMatch, distance=huber), LINEAR, VECTORS, WIDE, lambda w: huber(LINEAR(VECTORS), WIDE, w)),
    "factor": (field(ed.FactorTransfer), LINEAR, VECTORS, WIDE,
               lambda w: losses.factor_transfer(LINEAR(VECTORS), WIDE, w)),
    "maps": (field(ed.AttentionTransfer, p=3), None, MAPS, MORE, lambda w: losses.attention_transfer(
        losses.attention_map(MAPS, 3), losses.attention_map(MORE, 3), weights=w)),
    "kept maps": (field(ed.AttentionTransfer, squared=False), None, MAPS[:, 0], MORE[:, 0], lambda w:
                  losses.attention_transfer(MAPS[:, 0].flatten(1), MORE[:, 0].flatten(1), False, w)),
    "heads": (field(ed.HeadAttention), None, PROBS, OTHERS, lambda w: losses.head_attention(PROBS, OTHERS, weights=w)),
    "averaged heads": (field(ed.HeadAttention, divergence="mse"), None, PROBS, OTHERS.mean(1),
                       lambda w: losses.head_attention(PROBS, OTHERS, "mse", weights=w)),
    "nst": (field(ed.NeuronSelectivity), None, MAPS, MORE[:, :2], lambda w: losses.nst(MAPS, MORE[:, :2], weights=w)),
    "vid": (field(ed.VariationalInformation), GAUSSIAN, MAPS, MORE, lambda w: losses.vid(*GAUSSIAN(MAPS), MORE, w)),
    "crd": (field(ed.Contrastive, temperature=0.3), PROJECTIONS, VECTORS, WIDE, lambda w: losses.crd(
        *PROJECTIONS(VECTORS, WIDE), OWN, REST, temperature=0.3, weights=w)),
    "rkd": (field(ed.Relational, distance=2, angle=3), None, VECTORS, WIDE,
            lambda w: 2 * losses.rkd_distance(VECTORS, WIDE) + 3 * losses.rkd_angle(VECTORS, WIDE)),
    "rkd distance": (field(ed.Relational, angle=0), None, VECTORS, WIDE, lambda w: losses.rkd_distance(VECTORS, WIDE)),
    "sp": (field(ed.SimilarityPreserving), None, MAPS, WIDE,
           lambda w: losses.similarity_preserving(MAPS.flatten(1), WIDE)),
    "cc": (field(ed.CorrelationCongruence, gamma=0.7, order=3), None, VECTORS, WIDE,
           lambda w: losses.correlation_congruence(VECTORS, WIDE, 0.7, 3)),
    "pkt": (field(ed.ProbabilisticTransfer), None, VECTORS, WIDE, lambda w: losses.pkt(VECTORS, WIDE)),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_FEATURES)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weighted"])
def test_a_term_of_features_is_its_loss(name: str, weights: Tensor | None) -> None:
    term, learned, student, cached, loss = OF_FEATURES[name]
    torch.testing.assert_close(of_features(term, learned, student, cached, weights), loss(weights))


def test_every_term_is_in_the_tables_and_has_a_name_at_the_top() -> None:
    kinds = set(terms.Term.__args__[0].__args__)  # type: ignore[attr-defined]
    tested = {type(term) for term, _ in OF_LOGITS} | {type(pair[0]) for pair in OF_FEATURES.values()}
    assert kinds == tested
    assert all(getattr(ed, kind.__name__) is kind for kind in kinds)


def test_what_a_distance_of_ones_own_gives_is_checked() -> None:
    for value, found in ((torch.zeros(3), r"shape \[3\]"), (0.5, "float")):
        term = field(ed.FeatureMatch, distance=lambda s, t, w, value=value: value)
        with pytest.raises(UsageError, match=f"gave {found}, expected a scalar"):
            of_features(term, None, VECTORS, VECTORS, None)


def test_terms_learn_what_their_losses_need() -> None:
    vid, crd = field(ed.VariationalInformation, initial=3.0), field(ed.Contrastive, size=4)
    for shapes, positions in ((([3, 5, 5], [7, 5, 5]), True), (([3], [7]), False)):
        made = learn("objective.x", vid, *shapes)
        assert isinstance(made, Gaussian) and isinstance(made.mean, torch.nn.Conv2d) == positions
        _, variance = made(torch.zeros(1, *shapes[0]))
        torch.testing.assert_close(variance.detach(), torch.full((7,), 3.0))
    made = learn("objective.x", crd, [3, 2], [7])
    assert isinstance(made, Projections)
    student, teacher = made(torch.ones(2, 6), torch.ones(2, 7))
    assert student.shape == teacher.shape == (2, 4)
    assert learn("objective.x", field(ed.Relational), [3], [7]) is None
    with pytest.raises(UsageError, match=r"objective.x: .*\[3, 5, 5\].*\[7, 4, 4\]"):
        learn("objective.x", vid, [3, 5, 5], [7, 4, 4])


# Schedules and rows ---------------------------------------------------------------------------------


def test_schedules_are_numbers_at_a_point_of_the_training() -> None:
    ramp, cosine = ed.Ramp(start=8, end=2), ed.Ramp(start=8, end=2, shape="cosine")
    assert [at(ramp, x) for x in (0, 0.25, 1)] == [8, 6.5, 2] and [at(cosine, x) for x in (0, 0.5, 1)] == [8, 5, 2]
    assert [at(ed.WarmUp(value=4, until=0.5), x) for x in (0, 0.25, 0.5, 1)] == [0, 2, 4, 4]
    assert [at(ed.SwitchOff(value=3, after=0.5), x) for x in (0, 0.49, 0.5, 1)] == [3, 3, 0, 0]
    assert at(0.3, 0.9) == 0.3
    assert [ends(x) for x in (0.3, ramp, ed.WarmUp(value=4), ed.SwitchOff(value=3))] == [
        (0.3, 0.3), (2, 8), (0, 4), (0, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ed.SoftTargets(weight=-1), "weight of 0 or more"),
        (lambda: ed.SoftTargets(temperature=0), "temperature above 0"),
        (lambda: ed.SoftTargets(temperature=ed.Ramp(start=4, end=0)), "temperature above 0"),
        (lambda: ed.SoftTargets(weight="heavy"), "expected a number, or a schedule of kind ramp"),
        (lambda: ed.SoftTargets(weight={"kind": "stairs"}), "'stairs' found using|expected a number, or a schedule"),
        (lambda: ed.SoftTargets(weight=ed.WarmUp(value=1, until=2)), "less than or equal to 1"),
        (lambda: field(ed.Relational, rows=lambda t: t), "a pair belongs to two rows"),
        (lambda: ed.JensenShannon(beta=1), "less than 1"),
        (lambda: field(ed.AttentionTransfer, p=0.5), "greater than or equal to 1"),
    ],
)
def test_a_term_is_checked_when_it_is_written(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()


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


def test_a_run_goes_on_only_from_the_weights_that_it_began_with(tapped: Cli) -> None:
    train = ("train", "tapped.py", "--cache", "hdf5", "--set", "epochs=1")
    tapped(*train, "--out", "first")
    tapped(*train, "--out", "second", "--set", "start=first")
    tapped(*train, "--out", "other", "--set", "seed=1")
    last = tapped.folder / "first" / "last.safetensors"
    last.write_bytes((tapped.folder / "other" / "last.safetensors").read_bytes())
    error = tapped(*train, "--out", "second", "--set", "start=first", code=3).stderr
    assert "holds another run: its start" in error


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
