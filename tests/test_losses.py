"""Losses against float64 NumPy oracles written from the papers' formulas, in value and gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensemble_distill.errors import UsageError
from ensemble_distill.losses import (
    bucketed,
    feature_cosine,
    feature_l2,
    forward_kl,
    hard_labels,
    jensen_shannon,
    reverse_kl,
    soft_targets,
)
from ensemble_distill.losses.bucketed import bucketed_log_probs
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
    read = soft_targets(x.bfloat16(), targets, 2.0)
    assert float(read) == pytest.approx(float(soft_targets(x.bfloat16().float(), targets, 2.0)), rel=1e-5)
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


# Sparse targets -------------------------------------------------------------------------------------


def merged(q: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Probabilities [B, C] as those of the kept classes and of all others together, [B, K + 1]."""
    kept = np.take_along_axis(q, ids, 1)
    return np.concatenate([kept, 1 - kept.sum(1, keepdims=True)], axis=1)


def ghost(b: int, c: int, k: int, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, Targets]:
    """Logits, p merged at T, the ids, and the targets at T."""
    logits, logprobs = random_case(b, c, seed=3)
    ids = np.argsort(-logprobs, 1)[:, :k]
    p = merged(softmax(logprobs / temperature), ids)
    said = Targets(
        torch.tensor(np.log(p[:, :-1]), dtype=torch.float32), kind="ghost", ids=torch.tensor(ids),
        residual=torch.tensor(p[:, -1], dtype=torch.float32), classes=c,
    )  # fmt: skip
    return logits, p, ids, said


def numeric(loss, logits: np.ndarray) -> np.ndarray:
    """Central differences of a float64 function of the logits."""
    grad = np.zeros_like(logits)
    for at in np.ndindex(*logits.shape):
        up, down = logits.copy(), logits.copy()
        up[at] += 1e-5
        down[at] -= 1e-5
        grad[at] = (loss(up) - loss(down)) / 2e-5
    return grad


def kl_rows(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.mean(np.sum(p * (np.log(p) - np.log(q)), axis=1)))


ORACLES = {
    "forward": (soft_targets, kl_rows),
    "reverse": (reverse_kl, lambda p, q: kl_rows(q, p)),
    "jsd": (
        lambda x, t: jensen_shannon(x, t, beta=0.3),
        lambda p, q: 0.3 * kl_rows(p, 0.3 * p + 0.7 * q) + 0.7 * kl_rows(q, 0.3 * p + 0.7 * q),
    ),
}


@pytest.mark.parametrize("chunk", [3, 1 << 13])
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("kept", [1, 4, None])
def test_losses_equal_their_formulas_on_all_and_on_kept_classes(
    name: str, kept: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucketed, "CHUNK", chunk)
    loss, oracle = ORACLES[name]
    logits, p, ids, targets = ghost(5, 11, kept or 4, 1.0)
    if kept is None:
        dense = softmax(random_case(5, 11, seed=3)[1])
        p, targets = dense, Targets(torch.tensor(np.log(dense), dtype=torch.float32))

    def expected(x: np.ndarray) -> float:
        return oracle(p, merged(softmax(x), ids) if kept else softmax(x))

    value, gradient = value_and_gradient(lambda x: loss(x, targets), logits)
    assert value == pytest.approx(expected(logits), rel=1e-4)
    np.testing.assert_allclose(gradient, numeric(expected, logits), atol=2e-5)
    at_teacher = targets.logprobs if kept is None else torch.tensor(random_case(5, 11, seed=3)[1], dtype=torch.float32)
    assert abs(float(loss(at_teacher + 3.0, targets))) < 1e-5, "zero where the student says what the ensemble said"


@pytest.mark.parametrize("name", ORACLES)
def test_all_keep_the_square_of_the_temperature_in_front(name: str) -> None:
    logits, logprobs = random_case(5, 7)
    loss, oracle = ORACLES[name]
    more = {"beta": 0.3} if name == "jsd" else {}
    loss = jensen_shannon if name == "jsd" else loss
    targets = Targets(torch.tensor(logprobs, dtype=torch.float32))

    def expected(x: np.ndarray) -> float:
        return 9 * oracle(softmax(logprobs / 3), softmax(x / 3))

    value, gradient = value_and_gradient(lambda x: loss(x, targets, temperature=3.0, **more), logits)
    assert value == pytest.approx(expected(logits), rel=1e-4)
    np.testing.assert_allclose(gradient, numeric(expected, logits), atol=5e-5)


def test_the_reverse_kl_counts_impossible_classes_as_of_probability_e_to_the_minus_30() -> None:
    x = torch.zeros(1, 2, requires_grad=True)
    loss = reverse_kl(x, Targets(torch.tensor([[0.0, -torch.inf]])))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(15 - np.log(2), rel=1e-6) and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("temperature", [1.5, 4.0])
def test_kept_classes_at_a_temperature_keep_the_square_in_front(temperature: float) -> None:
    logits, p, ids, hot = ghost(4, 9, 3, temperature)
    _, logprobs = random_case(4, 9, seed=3)
    log_z = np.log(np.exp(logprobs / temperature).sum(1, keepdims=True))
    cold = Targets(
        torch.tensor(np.take_along_axis(logprobs, ids, 1), dtype=torch.float32), kind="ghost", ids=torch.tensor(ids),
        residual=torch.zeros(4), log_z=torch.tensor(log_z, dtype=torch.float32), temperatures=(temperature,), classes=9,
    )  # fmt: skip

    def expected(x: np.ndarray) -> float:
        return temperature**2 * kl_rows(p, merged(softmax(x / temperature), ids))

    value, gradient = value_and_gradient(lambda x: soft_targets(x, cold, temperature), logits)
    assert value == pytest.approx(expected(logits), rel=1e-4)
    np.testing.assert_allclose(gradient, numeric(expected, logits), atol=5e-5)
    torch.testing.assert_close(cold.at(temperature).residual, hot.residual, atol=1e-5, rtol=0)


def test_a_sample_gives_the_cross_entropy_less_the_entropy_and_counts_repeated_ids() -> None:
    logits, _ = random_case(3, 7)
    ids = torch.tensor([[0, 3, 3], [6, 5, 1], [2, 2, 2]])
    weights = torch.tensor([[0.5, 0.25, 0.25]] * 3)
    entropy = torch.tensor([0.3, 0.2, 0.1])
    targets = Targets(weights.log(), kind="unbiased", ids=ids, classes=7, entropy=entropy)

    def expected(x: np.ndarray) -> float:
        logq = np.log(softmax(x))
        return float(np.mean(-(weights.numpy() * np.take_along_axis(logq, ids.numpy(), 1)).sum(1) - entropy.numpy()))

    value, gradient = value_and_gradient(lambda x: soft_targets(x, targets), logits)
    assert value == pytest.approx(expected(logits), rel=1e-5)
    np.testing.assert_allclose(gradient, numeric(expected, logits), atol=1e-5)
    for refused in (reverse_kl, jensen_shannon):
        with pytest.raises(UsageError, match="sample of classes"):
            refused(torch.zeros(3, 7), targets)
    with pytest.raises(UsageError, match="beta=1"):
        jensen_shannon(torch.zeros(3, 7), targets, beta=1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("gap", [5.0, 30.0, 200.0])
def test_what_all_others_have_is_exact_where_they_have_next_to_nothing(gap: float, temperature: float) -> None:
    logits = torch.zeros(2, 50, dtype=torch.float64)
    logits[:, 7] = gap
    logits[:, 3] = 1  # not all others are equal
    x = (logits.float() * temperature).requires_grad_()
    others = bucketed_log_probs(x, torch.tensor([[7], [7]]), temperature)[1]
    exact = torch.logsumexp(torch.cat([logits[:, :7], logits[:, 8:]], 1), 1) - torch.logsumexp(logits, 1)
    torch.testing.assert_close(others.double(), exact, rtol=1e-5, atol=0)
    (3 * others.sum()).backward()
    shares = torch.softmax(logits.index_fill(1, torch.tensor([7]), -torch.inf), 1)
    expected = 3 / temperature * (shares - torch.softmax(logits, 1))
    torch.testing.assert_close(x.grad.double(), expected, atol=1e-5, rtol=1e-4)
    assert float(bucketed_log_probs(torch.zeros(1, 2), torch.tensor([[0, 1]]))[1]) == -np.inf


def test_rows_can_be_weighted_or_left_out() -> None:
    logits, logprobs = random_case(6, 5)
    x, targets = torch.tensor(logits), Targets(torch.tensor(logprobs, dtype=torch.float32))
    rows = forward_kl(x, targets)
    weights = torch.tensor([0.0, 1, 2, 0, 0.5, 0])
    assert float(soft_targets(x, targets, weights=weights)) == pytest.approx(float((rows * weights).sum() / 3.5))
    assert float(soft_targets(x, targets, weights=torch.zeros(6))) == 0
    labels = torch.arange(5).repeat(2)[:6]
    one = torch.zeros(6)
    one[4] = 1
    assert float(hard_labels(x, labels, weights=one)) == pytest.approx(float(hard_labels(x[4:5], labels[4:5])))


def test_sparse_losses_take_half_precision() -> None:
    logits, _, _, targets = ghost(8, 40, 5, 1.0)
    x = torch.tensor(logits, dtype=torch.float32)
    exact = float(soft_targets(x, targets))
    half = x.bfloat16().requires_grad_()
    loss = soft_targets(half, targets)
    loss.backward()
    assert float(loss) == pytest.approx(exact, rel=2e-2) and half.grad.dtype == torch.bfloat16
