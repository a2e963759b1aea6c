"""Losses against float64 NumPy oracles written from the papers' formulas, in value and gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensemble_distill.losses import feature_cosine, feature_l2, hard_labels, soft_targets
from ensemble_distill.targets import Targets


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def random_case(b: int, c: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, (b, c)), np.log(softmax(rng.normal(0, 3, (b, c))))


def value_and_gradient(loss, logits: np.ndarray) -> tuple[float, np.ndarray]:
    x = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    value = loss(x)
    value.backward()
    return float(value.detach()), x.grad.numpy()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("b", "c"), [(1, 2), (5, 10), (64, 1000)])
def test_soft_targets_equal_hinton(b: int, c: int, temperature: float) -> None:
    logits, logprobs = random_case(b, c)
    p = softmax(logprobs / temperature)
    q = softmax(logits / temperature)
    expected = temperature**2 * np.mean(np.sum(p * (np.log(p) - np.log(q)), axis=1))
    gradient = temperature * (q - p) / b  # d/dz of T² KL(p ‖ softmax(z / T)), mean over rows
    targets = Targets(torch.tensor(logprobs, dtype=torch.float32))
    value, found = value_and_gradient(lambda x: soft_targets(x, targets, temperature), logits)
    assert value == pytest.approx(expected, rel=2e-5)
    np.testing.assert_allclose(found, gradient, atol=2e-6)


def test_soft_targets_are_zero_only_at_the_teacher() -> None:
    _, logprobs = random_case(8, 10)
    targets = Targets(torch.log_softmax(torch.tensor(logprobs, dtype=torch.float32), 1))
    for temperature in (1.0, 3.0):
        assert abs(float(soft_targets(targets.logprobs + 5.0, targets, temperature))) < 1e-5  # a shift is nothing
        assert float(soft_targets(targets.logprobs.flip(1), targets, temperature)) > 0.1
    # KL is not symmetric: against uniform logits it is log C minus the teacher's entropy.
    entropy = -(targets.logprobs.exp() * targets.logprobs).sum(1).mean()
    assert float(soft_targets(torch.zeros(8, 10), targets)) == pytest.approx(np.log(10) - float(entropy), rel=1e-5)


def test_classes_of_probability_zero_add_nothing_and_no_nan() -> None:
    targets = Targets(torch.tensor([[0.0, -torch.inf, -torch.inf]]))
    for temperature in (1.0, 4.0):
        x = torch.tensor([[2.0, 1.0, -1.0]], requires_grad=True)
        loss = soft_targets(x, targets, temperature)
        loss.backward()
        expected = -(temperature**2) * float(torch.log_softmax(x.detach() / temperature, 1)[0, 0])
        assert float(loss) == pytest.approx(expected, rel=1e-6)
        assert torch.isfinite(x.grad).all()


def test_soft_targets_do_not_grow_with_the_batch_or_half_precision() -> None:
    logits, logprobs = random_case(16, 10)
    targets = Targets(torch.tensor(logprobs, dtype=torch.float32))
    x = torch.tensor(logits, dtype=torch.float32)
    once = float(soft_targets(x, targets, 2.0))
    twice = float(soft_targets(x.repeat(2, 1), Targets(targets.logprobs.repeat(2, 1)), 2.0))
    assert once == pytest.approx(twice, rel=1e-6)
    assert float(soft_targets(x.bfloat16(), targets, 2.0)) == pytest.approx(once, rel=2e-2)
    extreme = torch.tensor([[3e4, -3e4, 0.0]])
    assert torch.isfinite(soft_targets(extreme, Targets(torch.log_softmax(torch.zeros(1, 3), 1))))


def test_soft_targets_compile_without_graph_breaks() -> None:
    _, logprobs = random_case(3, 4)
    targets = Targets(torch.log_softmax(torch.tensor(logprobs, dtype=torch.float32), 1))
    explained = torch._dynamo.explain(lambda x: soft_targets(x, targets, 2.0))(torch.randn(3, 4))
    assert explained.graph_break_count == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_labels_are_a_cross_entropy(smoothing: float) -> None:
    logits, _ = random_case(6, 10)
    labels = np.array([0, 9, 3, 3, 5, 1])
    target = np.full((6, 10), smoothing / 10)
    target[np.arange(6), labels] += 1 - smoothing
    q = softmax(logits)
    value, gradient = value_and_gradient(lambda x: hard_labels(x, torch.tensor(labels), smoothing), logits)
    assert value == pytest.approx(-np.mean(np.sum(target * np.log(q), axis=1)), rel=1e-5)
    np.testing.assert_allclose(gradient, (q - target) / 6, atol=1e-6)


def test_feature_losses_equal_their_formulas() -> None:
    rng = np.random.default_rng(1)
    u, v = rng.normal(size=(7, 12)), rng.normal(size=(7, 12))
    teacher = torch.tensor(u, dtype=torch.float32)
    norms = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
    value, _ = value_and_gradient(lambda x: feature_cosine(x, teacher), v)
    assert value == pytest.approx(np.mean(1 - (u * v).sum(1) / norms), rel=1e-5)
    value, gradient = value_and_gradient(lambda x: feature_l2(x, teacher), v)
    assert value == pytest.approx(np.mean(0.5 * ((u - v) ** 2).sum(1)), rel=1e-5)
    np.testing.assert_allclose(gradient, (v - u) / 7, atol=1e-6)
    assert abs(float(feature_cosine(3 * teacher, teacher))) < 1e-6  # blind to scale
    assert float(feature_l2(3 * teacher, teacher)) > 1 and float(feature_l2(teacher, teacher)) == 0
