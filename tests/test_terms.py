"""Terms: each is the loss that it names, with the numbers that it says. Needs no cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import ensemble_distill as ed
from ensemble_distill import losses, terms
from ensemble_distill.errors import UsageError
from ensemble_distill.losses import Gaussian
from ensemble_distill.schedules import at, ends
from ensemble_distill.training.adapters import Projections, learn
from ensemble_distill.training.terms import of_features, of_logits

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
    rows = torch.nn.functional.huber_loss(student, 2 * cached, reduction="none").sum(1)
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


def test_distances_without_angles_are_defined_for_two_rows() -> None:
    term = field(ed.Relational, angle=0)
    assert term.least_rows == 2 and field(ed.Relational).least_rows == 3
    assert of_features(term, None, VECTORS[:2], WIDE[:2], None) == losses.rkd_distance(VECTORS[:2], WIDE[:2])


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
