"""What single losses of the literature promise beyond the table of test_objectives.py."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ensemble_distill import losses, schedules
from ensemble_distill.errors import UsageError
from ensemble_distill.losses import relations
from ensemble_distill.losses.geometry import centred, distances, unit
from ensemble_distill.losses.standardised import z_score
from ensemble_distill.losses.tokens import over_tokens
from ensemble_distill.targets import Targets


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


# Directions ------------------------------------------------------------------------------------------


def test_a_direction_is_exact_at_any_size_and_zero_with_gradient_zero_at_zero() -> None:
    for size in (1e-30, 1.0, 1e30):
        torch.testing.assert_close(unit(torch.tensor([[3.0, -4.0]]) * size), torch.tensor([[0.6, -0.8]]))
    x = torch.zeros(2, 3, requires_grad=True)
    unit(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3)) and torch.equal(unit(x), torch.zeros(2, 3))
    axis = drawn(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: unit(x, dim=0), axis)
    assert torch.autograd.gradcheck(lambda x: unit(x, dim=0), torch.eye(3).double().requires_grad_())


def test_what_is_constant_but_for_rounding_has_no_deviation() -> None:
    assert torch.equal(centred(torch.full((2, 7), 0.1) + 3e-9, 1), torch.zeros(2, 7))
    x = drawn(3, 5)
    torch.testing.assert_close(centred(x, 1), x - x.mean(1, keepdim=True))
    torch.testing.assert_close(centred(x, 0), x - x.mean(0, keepdim=True))
    assert torch.autograd.gradcheck(lambda x: centred(x, 1), x.requires_grad_())
    assert float(centred(torch.tensor([[1.0, 1.00001]]), 1).abs().min()) > 0


def test_distances_of_nearly_equal_rows_are_exact() -> None:
    x = torch.full((2, 64), 100.0)
    x[1, 0] += 2**-10
    assert float(distances(x)[0, 1]) == 2**-10


# Features and attention -------------------------------------------------------------------------------


def test_a_feature_of_zeros_has_no_direction() -> None:
    zero = torch.zeros(2, 3, requires_grad=True)
    loss = losses.feature_cosine(zero, torch.ones(2, 3))
    loss.backward()
    assert float(loss.detach()) == 1 and float(zero.grad.abs().max()) == 0


def test_a_regressor_makes_the_widths_equal() -> None:
    student, teacher = torch.ones(2, 3), torch.ones(2, 5)
    assert losses.regressor(3, 5)(student).shape == teacher.shape
    assert losses.regressor(3, 5, positions=True)(torch.ones(2, 3, 4, 4)).shape == (2, 5, 4, 4)
    with pytest.raises(UsageError, match=r"student \[2, 3\] and teacher \[2, 5\] differ in shape"):
        losses.feature_l2(student, teacher)


def test_an_attention_map_is_a_direction_over_positions() -> None:
    features = drawn(2, 3, 4, 5)
    for p in (1.0, 2.0, 4.0):
        found = losses.attention_map(features, p)
        assert found.shape == (2, 20)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(2).double())
        assert torch.isfinite(losses.attention_map(features.float() * 1e15, p)).all()
    raw = features.square().sum(1).flatten(1)  # a cached map need not be divided by its norm
    mine = losses.attention_map(drawn(2, 6, 4, 5, seed=1))
    both = [losses.attention_transfer(mine, cached) for cached in (raw, losses.attention_map(features))]
    torch.testing.assert_close(*both)
    with pytest.raises(UsageError, match=r"p=0\.5: expected 1 or more"):
        losses.attention_map(features, 0.5)
    with pytest.raises(UsageError, match=r"expected \[B, C, ...\], found \[2, 3\]"):
        losses.attention_map(torch.ones(2, 3))


def test_padding_is_not_looked_at_where_a_transformer_looks() -> None:
    p, q = (torch.softmax(drawn(2, 2, 4, 4, seed=s), 3) for s in (0, 1))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    rows = losses.head_attention(q, p, mask_BT=mask, reduction="none")
    assert float(rows[0]) == pytest.approx(float(losses.head_attention(q[:1, :, :3], p[:1, :, :3])))
    assert float(rows[1]) == pytest.approx(float(losses.head_attention(q[1:], p[1:])))
    sure = torch.eye(4).double().expand(1, 1, 4, 4)
    assert float(losses.head_attention(sure.flip(3), sure)) == pytest.approx(30), "never seen: as of e^-30"
    with pytest.raises(UsageError, match="expected 'kl' or 'mse'"):
        losses.head_attention(q, p, "l1")
    with pytest.raises(UsageError, match=r"mask: expected \[2, 4\] \(rows, tokens\), found \[2, 3\]"):
        losses.head_attention(q, p, mask_BT=mask[:, :3])


def test_layers_of_other_positions_have_no_flow() -> None:
    assert losses.flow_matrix(drawn(2, 3, 4, 4), drawn(2, 5, 4, 4)).shape == (2, 3, 5)
    with pytest.raises(UsageError, match=r"flow_matrix: expected \[B, C, H, W\] of one B, H, W, found"):
        losses.flow_matrix(drawn(2, 3, 4, 4), drawn(2, 5, 2, 8))


# Relations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [losses.rkd_distance, losses.rkd_angle, losses.pkt, losses.similarity_preserving])
def test_equal_rows_among_others_leave_no_nan_and_no_large_gradient(loss) -> None:
    student, teacher = drawn(6, 3).float(), drawn(6, 4, seed=1).float()
    student[1] = student[0]
    student[4] = 0
    teacher[3] = teacher[2]
    student.requires_grad_()
    loss(student, teacher).backward()
    assert torch.isfinite(student.grad).all() and float(student.grad.abs().max()) < 100


def test_an_angle_at_two_equal_rows_is_zero() -> None:
    student, teacher = drawn(4, 3).numpy(), drawn(4, 3, seed=1).numpy()
    student[1] = student[0]
    value = losses.rkd_angle(torch.tensor(student), torch.tensor(teacher))
    assert float(value) == pytest.approx(oracles.rkd_angle(student, teacher), rel=1e-10)


def test_wide_features_are_turned_and_not_changed() -> None:
    """Which saves time where a teacher is wider than the batch; of what learns, gradients go the plain way."""
    x = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 100
    x[1] = x[0]
    turned = relations.narrowed(x)
    assert turned.shape == (5, 5)
    torch.testing.assert_close(distances(turned), distances(x))
    assert relations.narrowed(x[:, :4]) is not None and relations.narrowed(x[:, :4]).shape == (5, 4)
    learns = x.clone().requires_grad_()
    assert relations.narrowed(learns) is learns
    student = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(losses.rkd_angle(student, x), losses.rkd_angle(student, learns))
    losses.rkd_angle(student, learns).backward()
    assert learns.grad.abs().sum() > 0


def test_errors_beyond_one_count_linearly() -> None:
    far = np.zeros((5, 2))
    far[0] = 100  # its distances are 2.5 times the mean: with eq. 7 that is 1.5 − ½ ...
    near = np.random.default_rng(0).normal(size=(5, 2))
    near[0] = near[1:].mean(0)
    value = losses.rkd_distance(torch.tensor(far), torch.tensor(near))
    assert float(value) == pytest.approx(oracles.rkd_distance(far, near), rel=1e-10)
    line = np.array([[0.0, 0], [1, 0], [2, 0], [3, 0]])
    bent = np.array([[0.0, 0], [1, 0], [0, 0.1], [3, 3]])
    value = losses.rkd_angle(torch.tensor(line), torch.tensor(bent))
    assert float(value) == pytest.approx(oracles.rkd_angle(line, bent), rel=1e-10)


def test_angles_take_memory_by_the_chunk_and_not_by_the_cube(monkeypatch: pytest.MonkeyPatch) -> None:
    b, d, chunk, largest, kept = 24, 5, 3, [], []
    real = relations._cosines

    def watched(x: Tensor, first: int, chunk: int) -> Tensor:
        found = real(x, first, chunk)
        largest.append(found.numel())
        return found

    monkeypatch.setattr(relations, "_cosines", watched)
    student, teacher = drawn(b, d).requires_grad_(), drawn(b, d, seed=1)

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = losses.rkd_angle(student, teacher, chunk)
    value.backward()
    assert max(largest) == chunk * b * b and len(largest) == 2 * 2 * b // chunk, "each chunk twice, once to go back"
    assert sum(kept) <= 4 * b * d * (b // chunk), "inputs alone are kept between the passes"
    whole = drawn(b, d).requires_grad_()
    losses.rkd_angle(whole, teacher, chunk=b).backward()
    torch.testing.assert_close(student.grad, whole.grad)
    with pytest.raises(UsageError, match="chunk=0: expected 1 or more"):
        losses.rkd_angle(student, teacher, 0)


def test_a_series_of_many_terms_is_the_kernel() -> None:
    student, teacher = drawn(6, 3), drawn(6, 4, seed=1)
    exact = losses.correlation_congruence(student, teacher, order=None)
    torch.testing.assert_close(losses.correlation_congruence(student, teacher, order=20), exact)
    assert abs(float(losses.correlation_congruence(student, teacher, order=1)) - float(exact)) > 1e-3
    with pytest.raises(UsageError, match="order=0: expected 1 or more, or None"):
        losses.correlation_congruence(student, teacher, order=0)


def test_opposite_rows_leave_pkt_finite() -> None:
    student, teacher = torch.tensor([[1.0, 0], [-1, 0], [-1, 0]]), torch.tensor([[1.0, 0], [-1, 0], [0, 1]])
    student.requires_grad_()
    loss = losses.pkt(student, teacher)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all() and 0 < float(loss.detach()) < 20


# Logits -----------------------------------------------------------------------------------------------


def kept(logprobs: Tensor, k: int, temperature: float, label_logprob: Tensor | None) -> tuple[Targets, Tensor]:
    """The ``k`` likeliest classes as a cache holds them for this temperature, and their ids."""
    values, ids = logprobs.topk(k, dim=1)
    log_z = torch.logsumexp(logprobs / temperature, dim=1, keepdim=True)
    said = Targets(
        values, kind="ghost", ids=ids, residual=1 - values.exp().sum(1), log_z=log_z, temperatures=(temperature,),
        classes=logprobs.shape[1], label_logprob=label_logprob,
    )  # fmt: skip
    return said, ids


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_decoupled_losses_of_kept_classes_know_a_label_that_was_not_kept(temperature: float) -> None:
    z, logprobs = drawn(6, 9), torch.log_softmax(2 * drawn(6, 9, seed=1), 1)
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    own = logprobs.gather(1, labels[:, None])[:, 0]
    targets, ids = kept(logprobs, 3, temperature, own)
    inside = (ids == labels[:, None]).any(1)
    assert 0 < int(inside.sum()) < 6, "some labels are kept and some are not"

    def merged(x: np.ndarray, row: int) -> tuple[np.ndarray, int]:
        """Logs of the kept classes, of the label, and of all others together, and the label's place."""
        p = oracles.softmax(x / temperature)
        named = [*ids[row].tolist(), *([] if inside[row] else [int(labels[row])])]
        p = np.array([*p[named], 1 - p[named].sum()])
        return temperature * np.log(p), named.index(int(labels[row]))

    expected = []
    for row in range(6):
        (q, y), (p, _) = merged(z[row].numpy(), row), merged(logprobs[row].numpy(), row)
        expected += oracles.decoupled_rows(q[None], p[None], np.array([y]), 0.7, 3.0, temperature)
    rows = losses.decoupled(z, targets, labels, 0.7, 3.0, temperature, reduction="none")
    np.testing.assert_allclose(rows.numpy(), expected, rtol=1e-5, atol=1e-6)
    unknown = kept(logprobs, 3, temperature, own.masked_fill(inside, math.nan))[0]  # where it is kept nobody asks
    torch.testing.assert_close(losses.decoupled(z, unknown, labels, 0.7, 3.0, temperature, reduction="none"), rows)
    student = z.float().requires_grad_()
    losses.decoupled(student, targets, labels, 0.7, 3.0, temperature).backward()
    assert torch.isfinite(student.grad).all()
    zero = losses.decoupled(logprobs, targets, labels, 0.7, 3.0, temperature)
    assert abs(float(zero)) < 1e-5


def test_decoupled_losses_refuse_what_has_no_probability_of_the_label() -> None:
    z, logprobs, labels = drawn(4, 9), torch.log_softmax(drawn(4, 9, seed=1), 1), torch.zeros(4, dtype=torch.long)
    for unknown in (None, torch.full((4,), math.nan).double()):
        with pytest.raises(UsageError, match="needs the probability of each label"):
            losses.decoupled(z, kept(logprobs, 2, 2.0, unknown)[0], labels)
    likeliest = logprobs.argmax(1)
    assert torch.isfinite(losses.decoupled(z, kept(logprobs, 2, 2.0, None)[0], likeliest)), "each label is kept"
    sample = Targets(torch.zeros(4, 1), kind="unbiased", ids=labels[:, None], classes=9)
    with pytest.raises(UsageError, match="decoupled distillation needs probabilities, and a sample"):
        losses.decoupled(z, sample, labels)


def test_the_parts_of_decoupled_losses_add_up_to_the_kl() -> None:
    z, logprobs, labels = drawn(5, 4), torch.log_softmax(drawn(5, 4, seed=1), 1), torch.tensor([0, 1, 2, 3, 0])
    targets = Targets(logprobs)
    target, others = (losses.decoupled(z, targets, labels, a, b, reduction="none") for a, b in ((1, 0), (0, 1)))
    torch.testing.assert_close(losses.decoupled(z, targets, labels), (target + 8 * others).mean())
    rest = 1 - logprobs.exp().gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(target + rest * others, losses.forward_kl(z, targets).double(), rtol=1e-5, atol=1e-6)


def test_an_ensemble_that_is_certain_leaves_decoupled_losses_finite() -> None:
    targets = Targets(torch.tensor([[0.0, -math.inf, -math.inf], [-math.inf, 0.0, -math.inf]]))
    for z in (torch.tensor([[1.0, 2, 3]] * 2), torch.tensor([[3e4, -3e4, 0.0]] * 2)):
        z.requires_grad_()
        loss = losses.decoupled(z, targets, torch.tensor([0, 0]), temperature=2.0)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


def test_losses_of_all_classes_refuse_what_lacks_some() -> None:
    z, logprobs = drawn(4, 9), torch.log_softmax(drawn(4, 9, seed=1), 1)
    for loss, name in ((losses.dist, "dist"), (losses.standardised, "standardised")):
        with pytest.raises(UsageError, match=f"{name} needs the probabilities of all classes, and these .* ghost"):
            loss(z, kept(logprobs, 3, 1.0, None)[0])


def test_standardised_logits_have_mean_zero_and_variance_one() -> None:
    score = z_score(5 * drawn(3, 8) + 2)
    torch.testing.assert_close(score.mean(1), torch.zeros(3).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(score.var(1, correction=0), torch.ones(3).double())
    said = [Targets(torch.tensor([[0.0, -1.0, least]])) for least in (-math.inf, -30.0, -20.0)]
    impossible, at_30, at_20 = (float(losses.standardised(torch.tensor([[1.0, 2.0, 0.0]]), x)) for x in said)
    assert impossible == at_30 != pytest.approx(at_20, rel=1e-4) and impossible < 10


# Learned parts ----------------------------------------------------------------------------------------


def test_contrastive_losses_are_lowest_where_the_critic_is_right() -> None:
    embedded = torch.eye(4).double()
    positives, negatives = torch.arange(4), torch.tensor([[1, 2], [2, 3], [3, 0], [0, 1]])
    right = losses.crd(embedded, embedded, positives, negatives, temperature=0.01)
    wrong = losses.crd(embedded.roll(-1, 0), embedded, positives, negatives, temperature=0.01)
    assert float(right) == pytest.approx(2 * math.log(3)), "with N/M = ½ a negative of similarity 0 costs log 3"
    assert float(wrong) > 90
    default = losses.crd(embedded, embedded, positives, negatives)
    assert float(default) == float(losses.crd(embedded, embedded, positives, negatives, samples=4, temperature=0.1))
    assert float(default) != float(losses.crd(embedded, embedded, positives, negatives, samples=100))
    for far in (1e4, -1e4):
        assert torch.isfinite(losses.crd(far * embedded, 1e4 * embedded, positives, negatives))
    bank = drawn(4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.crd(embedded, x, positives, negatives), bank), "g_T learns too"


def test_projections_learn_and_are_unit_vectors() -> None:
    student, teacher = losses.Projection(3, 8), losses.Projection(5, 8)
    bank, features = teacher(drawn(6, 5).float()), student(drawn(2, 3).float())
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(6))
    losses.crd(features, bank, torch.tensor([0, 1]), torch.tensor([[2, 3], [4, 5]])).backward()
    assert all(float(p.grad.abs().max()) > 0 for p in (student.linear.weight, teacher.linear.weight))
    half = losses.Projection(3).to(torch.bfloat16)(torch.ones(1, 3, dtype=torch.bfloat16))
    assert half.dtype == torch.float32 and half.shape == (1, 128)


def test_contrastive_losses_refuse_other_shapes() -> None:
    one = torch.zeros(2, dtype=torch.long)
    with pytest.raises(UsageError, match=r"student \[2, 3\] and bank \[4, 5\] differ in width"):
        losses.crd(torch.ones(2, 3), torch.ones(4, 5), one, one[:, None])
    for positives, negatives in ((one[:1], one[:, None]), (one, one), (one, one[:1, None]), (one, one[:, None][:, :0])):
        with pytest.raises(UsageError, match=r"expected positives \[2\] and negatives \[2, 1 or more\]"):
            losses.crd(torch.ones(2, 3), torch.ones(4, 3), positives, negatives)


def test_a_variational_loss_is_lowest_where_the_variance_is_the_squared_error() -> None:
    mean, teacher = drawn(200, 2), drawn(200, 2, seed=1)
    best = (mean - teacher).square().mean(0)
    lowest = float(losses.vid(mean, best, teacher))
    for factor in (0.95, 1.05):
        assert lowest < float(losses.vid(mean, factor * best, teacher))
    assert float(losses.vid(mean, torch.ones(2), mean)) == 0
    assert float(losses.vid(mean, torch.tensor([0.25, 1.0]), mean)) == pytest.approx(math.log(0.5))
    with pytest.raises(UsageError, match=r"expected a variance of each channel, found \[3\] for \[200, 2\]"):
        losses.vid(mean, torch.ones(3), teacher)
    with pytest.raises(UsageError, match="differ in shape"):
        losses.vid(mean, best, teacher[:1])


@pytest.mark.parametrize("positions", [False, True])
def test_a_gaussian_starts_at_its_variance_and_learns_mean_and_variance(positions: bool) -> None:
    torch.manual_seed(0)
    head = losses.Gaussian(3, 4, positions, initial=2.0)
    shape = (2, 2) if positions else ()
    mean, variance = head(torch.ones(2, 3, *shape))
    assert mean.shape == (2, 4, *shape)
    torch.testing.assert_close(variance, torch.full((4,), 2.0))
    losses.vid(mean, variance, torch.zeros(2, 4, *shape)).backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in head.parameters())
    nn.init.constant_(head.alpha, -100.0)
    assert float(head(torch.ones(2, 3, *shape))[1].detach().min()) == pytest.approx(1e-5)


# Transformers -----------------------------------------------------------------------------------------


def test_rows_without_real_tokens_are_zero_and_finite() -> None:
    empty = torch.tensor([[0, 0, 0], [1, 1, 0]])
    x, y = drawn(2, 3, 4).requires_grad_(), drawn(2, 3, 4, seed=1)
    scores = drawn(2, 2, 3, 3).requires_grad_()
    found = [
        losses.tinybert_hidden(x, y, empty, reduction="none"),
        losses.tinybert_attention(scores, drawn(2, 2, 3, 3, seed=1), empty, reduction="none"),
        losses.minilm_relation((x, x), (y, y), 2, empty, reduction="none"),
    ]
    for rows in found:
        assert float(rows[0].detach()) == 0 and float(rows[1].detach()) > 0
        rows.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(scores.grad).all()
    assert float(over_tokens(torch.tensor([[1.0, 5.0, 9.0]]), None)) == 5


def test_what_pairs_that_do_not_see_each_other_hold_is_not_looked_at() -> None:
    student, teacher = drawn(1, 2, 4, 4), drawn(1, 2, 4, 4, seed=1)
    seen = losses.tinybert_attention(student, teacher, torch.tensor([[1, 1, 1, 0]]), causal=True)
    for x in (student, teacher):
        x[:, :, torch.ones(4, 4).triu(1).bool()] = -math.inf
        x[:, :, 3] = math.inf
        x[:, :, :, 3] = math.nan
    student.requires_grad_()
    hidden = losses.tinybert_attention(student, teacher, torch.tensor([[1, 1, 1, 0]]), causal=True)
    hidden.backward()
    assert float(hidden.detach()) == float(seen) and torch.isfinite(student.grad).all()


def test_padding_and_later_tokens_change_no_relation() -> None:
    s, t = drawn(3, 1, 4, 4), drawn(3, 1, 4, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 0]])
    for loss in (losses.minilm, losses.minilm_v2):
        short = loss(tuple(s[:, :, :3]), tuple(t[:, :, :3]), 2)
        torch.testing.assert_close(loss(tuple(s), tuple(t), 2, mask_BT=mask), short)
    rows = losses.minilm_relation((s[0], s[1]), (t[0], t[1]), 2, causal=True)
    first_token = losses.minilm_relation((s[0][:, :1], s[1][:, :1]), (t[0][:, :1], t[1][:, :1]), 2, causal=True)
    assert float(first_token) == 0 and float(rows) > 0, "a token that sees itself alone relates to nothing"


def test_relations_refuse_heads_that_do_not_divide_and_other_tokens() -> None:
    x = drawn(2, 3, 4)
    with pytest.raises(UsageError, match=r"with D a multiple of 3 heads, found \[2, 3, 4\] and \[2, 3, 4\]"):
        losses.minilm_relation((x, x), (x, x), 3)
    with pytest.raises(UsageError, match=r"minilm: expected \[B, heads, T, T\] of one B, T"):
        losses.minilm_relation((x, x), (x[:, :2], x[:, :2]), 2)
    with pytest.raises(UsageError, match="expected two"):
        losses.minilm_relation((x, x[:, :2]), (x, x), 2)
    with pytest.raises(UsageError, match="expected 'mean' or 'none'"):
        losses.minilm((x, x, x), (x, x, x), 2, reduction="sum")


def test_layers_are_evenly_spaced() -> None:
    assert losses.uniform_layers(4, 12) == [3, 6, 9, 12] and losses.uniform_layers(6, 6) == [1, 2, 3, 4, 5, 6]
    for student, teacher in ((5, 12), (0, 12), (12, 6)):
        with pytest.raises(UsageError, match="are no multiple of"):
            losses.uniform_layers(student, teacher)


# Schedules --------------------------------------------------------------------------------------------

numbers = st.floats(-100, 100)


@settings(deadline=None, max_examples=50)
@given(progress=st.floats(0, 1), start=numbers, end=numbers)
def test_schedules_run_from_start_to_end_and_stay_between(progress: float, start: float, end: float) -> None:
    low, high = sorted((start, end))
    for schedule in (schedules.linear, schedules.cosine):
        assert schedule(0, start, end) == pytest.approx(start, abs=1e-9)
        assert schedule(1, start, end) == pytest.approx(end, abs=1e-9)
        assert schedule(0.5, start, end) == pytest.approx((start + end) / 2, abs=1e-9)
        assert low - 1e-9 <= schedule(progress, start, end) <= high + 1e-9
    assert schedules.linear(progress, start, end) == pytest.approx((1 - progress) * start + progress * end, abs=1e-9)
    assert schedules.constant(progress, start) == start


def test_schedules_at_known_points() -> None:
    assert schedules.cosine(0.25, 1, 0) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert [schedules.warm_up(x, 4, 0.5) for x in (0, 0.25, 0.5, 1)] == [0, 2, 4, 4]
    assert schedules.warm_up(0, 4, 0) == 4, "no warm-up"
    assert [schedules.switch_off(x, 3, 0.5) for x in (0, 0.49, 0.5, 1)] == [3, 3, 0, 0]
    for schedule in (schedules.linear, schedules.cosine, schedules.warm_up, schedules.switch_off):
        for progress in (-0.01, 1.01, math.nan):
            with pytest.raises(UsageError, match="expected a number from 0 to 1"):
                schedule(progress, 1, 1)
    with pytest.raises(UsageError, match="progress=2"):
        schedules.constant(2, 1)


# Documents --------------------------------------------------------------------------------------------

DOCUMENT = Path(__file__).parents[1] / "docs" / "objectives.md"


def test_every_loss_is_in_the_document_and_the_one_of_your_own_runs() -> None:
    text = DOCUMENT.read_text()
    for name in losses.__all__:
        assert f"`{name}`" in text or name == "forward_kl", name
    scope: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], scope)
    s, t = drawn(3, 4), drawn(3, 4, seed=1)
    assert scope["feature_huber"](s, t, reduction="none").shape == (3,) and float(scope["feature_huber"](t, t)) == 0
