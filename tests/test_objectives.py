"""Every loss of the literature against its loop oracle, and what all of them promise: one table, one test a promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import oracles
import pytest
import torch
from oracles import Array
from torch import Tensor

from ensemble_distill import losses
from ensemble_distill.errors import UsageError
from ensemble_distill.losses.rows import precise
from ensemble_distill.targets import Targets

Make = Callable[[np.random.Generator, int], tuple[Array, Array]]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 1], [1, 0, 0, 0], [0, 1, 1, 1]]).bool()


@dataclass(frozen=True)
class Case:
    """``make(rng, size)`` gives what the student says and what is cached, both with ``rows`` in front but for ``axis``.

    ``oracle`` gives rows or, of a loss that compares rows, one value. ``same`` turns what is cached into what a student
    says at the zero. ``blind``: changes of the student's side that change nothing. ``least``: rows it needs.
    """

    make: Make
    loss: Callable[..., Tensor]
    oracle: Callable[[Array, Array], list[float] | float]
    sizes: tuple[int, ...] = (3, 5)
    same: Callable[[Array], Array] | None = lambda t: t
    blind: dict[str, Callable[[Array], Array]] = field(default_factory=dict)
    rows: bool = True
    least: int = 1
    axis: int = 0


def normal(*student: int, teacher: tuple[int, ...] | None = None) -> Make:
    """Features of these shapes after the rows."""

    def make(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
        return rng.normal(size=(size, *student)), rng.normal(size=(size, *(teacher or student)))

    return make


def logits(classes: int) -> Make:
    def make(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
        z, p = rng.normal(0, 2, (2, size, classes))
        return z, p - np.log(np.exp(p).sum(1, keepdims=True))

    return make


def attended(scores: Tensor) -> Tensor:
    return torch.softmax(precise(scores), dim=3)


def attended_oracle(s: Array, t: Array, divergence: str) -> list[float]:
    return oracles.head_attention_rows(*(np.apply_along_axis(oracles.softmax, 3, x) for x in (s, t)), divergence)


def said(logprobs: Tensor) -> Targets:
    return Targets(precise(logprobs))


def vectors(student: int, teacher: int) -> Make:
    """Queries, keys and values [3, B, T, D]."""

    def make(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
        return rng.normal(size=(3, size, 4, student)), rng.normal(size=(3, size, 4, teacher))

    return make


def mask(size: int) -> Tensor:
    return MASK[:size]


def labels(size: int) -> Tensor:
    return torch.arange(size) * 2 % 5


def bank(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    s, t = rng.normal(size=(size, 3)), rng.normal(size=(9, 3))
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))


def picks(size: int) -> tuple[Tensor, Tensor]:
    positives = torch.arange(size)
    return positives, (positives[:, None] + torch.tensor([1, 3, 4, 4])) % 9


def turned(x: Array) -> Array:
    """Rotated in its last axis."""
    q, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(x.shape[-1], x.shape[-1])))
    return x @ q


def times(x: Array) -> Array:
    return 3.5 * x


def moved(x: Array) -> Array:
    return x + 0.7


def shuffled(x: Array) -> Array:
    """Channels in another order."""
    return x[:, ::-1].copy()


def widened(t: Array) -> Array:
    """The same, turned in more dimensions: relations are all that counts."""
    return turned(np.concatenate([t, np.zeros_like(t)], axis=-1))


def variance(size: int) -> Tensor:
    return torch.linspace(0.3, 2.0, size, dtype=torch.float64)


def relation(s: Tensor, t: Tensor, **more: object) -> Tensor:
    pair = ((s[0], s[1]), (t[0], t[1]))
    return losses.minilm_relation(*pair, 2, mask(s.shape[1]), causal=True, **more)


def relation_oracle(s: Array, t: Array) -> list[float]:
    return oracles.relation_rows((s[0], s[1]), (t[0], t[1]), 2, mask(s.shape[1]).numpy(), True)


def several(s: Array, t: Array, pairs: list[tuple[int, int]], shares: list[float], heads: int) -> list[float]:
    parts = [
        share * np.array(oracles.relation_rows((s[i], s[j]), (t[i], t[j]), heads, mask(s.shape[1]).numpy(), False))
        for share, (i, j) in zip(shares, pairs, strict=True)
    ]
    return list(sum(parts))


RELATIONAL = {"scale": times, "rotation": turned}
CASES = {
    "feature_cosine": Case(
        normal(6), losses.feature_cosine, oracles.cosine_rows, sizes=(1, 5), blind={"scale": times}
    ),
    "feature_l2": Case(normal(3, 2, 2), losses.feature_l2, oracles.l2_rows, sizes=(1, 4)),
    "attention_transfer": Case(
        normal(3, 2, 4, teacher=(5, 2, 4)),
        lambda s, t, **k: losses.attention_transfer(losses.attention_map(s), losses.attention_map(t), **k),
        lambda s, t: oracles.attention_rows(s, t, 2, True), sizes=(1, 4), blind={"scale": times, "order": shuffled},
    ),
    "attention_transfer, norm": Case(
        normal(3, 2, 4),
        lambda s, t, **k: losses.attention_transfer(
            losses.attention_map(s, 3), losses.attention_map(t, 3), squared=False, **k
        ),
        lambda s, t: oracles.attention_rows(s, t, 3, False), sizes=(1, 4), blind={"scale": times, "order": shuffled},
    ),
    "head_attention, kl": Case(
        normal(2, 3, 4, teacher=(3, 3, 4)), lambda s, t, **k: losses.head_attention(attended(s), attended(t), **k),
        lambda s, t: attended_oracle(s, t, "kl"), sizes=(1, 3), blind={"order": shuffled, "shift": moved},
    ),
    "head_attention, mse": Case(
        normal(2, 3, 4, teacher=(3, 3, 4)),
        lambda s, t, **k: losses.head_attention(attended(s), attended(t), "mse", **k),
        lambda s, t: attended_oracle(s, t, "mse"), sizes=(1, 3), blind={"order": shuffled, "shift": moved},
    ),
    "rkd_distance": Case(
        normal(3, teacher=(4,)), losses.rkd_distance, oracles.rkd_distance, same=widened, sizes=(2, 3, 6),
        blind=RELATIONAL | {"shift": moved}, rows=False, least=2,
    ),
    "rkd_angle": Case(
        normal(3, teacher=(4,)), lambda s, t: losses.rkd_angle(s, t, chunk=2), oracles.rkd_angle, same=widened,
        sizes=(3, 4), blind=RELATIONAL | {"shift": moved}, rows=False, least=3,
    ),
    "similarity_preserving": Case(
        normal(3, teacher=(4,)), losses.similarity_preserving, oracles.similarity_preserving, same=widened,
        sizes=(2, 6), blind=RELATIONAL, rows=False, least=2,
    ),
    "correlation_congruence": Case(
        normal(3, teacher=(4,)), losses.correlation_congruence,
        lambda s, t: oracles.correlation_congruence(s, t, 0.4, 2), same=widened, sizes=(2, 6), blind=RELATIONAL,
        rows=False, least=2,
    ),
    "correlation_congruence, exact": Case(
        normal(3, teacher=(4,)), lambda s, t: losses.correlation_congruence(s, t, 0.7, None),
        lambda s, t: oracles.correlation_congruence(s, t, 0.7, None), same=widened, sizes=(2, 6), blind=RELATIONAL,
        rows=False, least=2,
    ),
    "pkt": Case(
        normal(3, teacher=(4,)), losses.pkt, oracles.pkt, same=widened, sizes=(3, 6), blind=RELATIONAL, rows=False,
        least=3,
    ),
    "decoupled": Case(
        logits(5),
        lambda s, t, **k: losses.decoupled(s, said(t), labels(len(s)), 0.7, 3.0, 2.0, **k),
        lambda s, t: oracles.decoupled_rows(s, t, labels(len(s)).numpy(), 0.7, 3.0, 2.0), sizes=(1, 5),
        blind={"shift": moved},
    ),
    "dist": Case(
        logits(4), lambda s, t: losses.dist(s, said(t), 0.6, 1.7, 3.0),
        lambda s, t: oracles.dist(s, t, 0.6, 1.7, 3.0), sizes=(3, 6), blind={"shift": moved}, rows=False, least=2,
    ),
    "standardised": Case(
        logits(5), lambda s, t, **k: losses.standardised(s, said(t), 3.0, **k),
        lambda s, t: oracles.standardised_rows(s, t, 3.0), sizes=(1, 6), blind={"scale": times, "shift": moved},
    ),
    "crd": Case(
        bank,
        lambda s, t, **k: losses.crd(s, t, *picks(len(s)), samples=50, temperature=0.4, **k),
        lambda s, t: oracles.crd_rows(s, t, *(x.numpy() for x in picks(len(s))), 50, 0.4), sizes=(1, 6), same=None,
    ),
    "vid": Case(
        normal(3, 2, 2), lambda s, t, **k: losses.vid(s, variance(3).to(precise(s).dtype), t, **k),
        lambda s, t: oracles.vid_rows(s, variance(3).numpy(), t), sizes=(1, 4), same=None,
    ),
    "nst": Case(
        normal(3, 2, 2, teacher=(2, 2, 2)), losses.nst, lambda s, t: oracles.nst_rows(s, t, 2, 0.0), sizes=(1, 4),
        same=lambda t: np.concatenate([2 * t, t], axis=1), blind={"scale": times, "order": shuffled},
    ),
    "nst, offset": Case(
        normal(3, 2, 2), lambda s, t, **k: losses.nst(s, t, 3, 0.5, **k),
        lambda s, t: oracles.nst_rows(s, t, 3, 0.5), sizes=(2,), blind={"scale": times},
    ),
    "fsp": Case(
        normal(5, 2, 2),
        lambda s, t, **k: losses.fsp(*(losses.flow_matrix(x[:, :2], x[:, 2:]) for x in (s, t)), **k),
        lambda s, t: [
            oracles.norm(oracles.flow(a[:2], a[2:]) - oracles.flow(b[:2], b[2:])) ** 2
            for a, b in zip(s, t, strict=True)
        ], sizes=(1, 3),
    ),
    "factor_transfer": Case(
        normal(2, 2, 2), losses.factor_transfer, oracles.factor_rows, sizes=(1, 4), blind={"scale": times}
    ),
    "tinybert_hidden": Case(
        normal(4, 3), lambda s, t, **k: losses.tinybert_hidden(s, t, mask(len(s)), **k),
        lambda s, t: oracles.hidden_rows(s, t, mask(len(s)).numpy()), sizes=(1, 6),
    ),
    "tinybert_attention": Case(
        normal(2, 4, 4), lambda s, t, **k: losses.tinybert_attention(s, t, mask(len(s)), causal=True, **k),
        lambda s, t: oracles.scores_rows(s, t, mask(len(s)).numpy(), True), sizes=(1, 6),
    ),
    "minilm_relation": Case(
        vectors(4, 6), relation, relation_oracle, sizes=(1, 4), axis=1,
        same=lambda t: np.stack([2 * t[0], t[1] / 2, t[2]]),
    ),
    "minilm": Case(
        vectors(4, 6), lambda s, t, **k: losses.minilm(tuple(s), tuple(t), 2, mask(s.shape[1]), **k),
        lambda s, t: several(s, t, [(0, 1), (2, 2)], [1, 1], 2), sizes=(2,), axis=1,
    ),
    "minilm_v2": Case(
        vectors(6, 3), lambda s, t, **k: losses.minilm_v2(tuple(s), tuple(t), 3, (1, 0.5, 2), mask(s.shape[1]), **k),
        lambda s, t: several(s, t, [(0, 0), (1, 1), (2, 2)], [1, 0.5, 2], 3), sizes=(2,), axis=1,
        same=lambda t: np.repeat(t, 2, axis=3) / 2**0.25,
    ),
}  # fmt: skip
every = pytest.mark.parametrize("name", CASES)


def made(name: str, size: int = 0) -> tuple[Case, Array, Array]:
    case = CASES[name]
    return case, *case.make(np.random.default_rng(len(name)), size or case.sizes[-1])


def tensors(*arrays: Array, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(a.copy(), dtype=dtype) for a in arrays]


def value_and_gradient(case: Case, s: Array, t: Array, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    student, teacher = tensors(s, t, dtype=dtype)
    value = case.loss(student.requires_grad_(), teacher)
    value.backward()
    assert student.grad is not None
    return value.detach(), student.grad


@every
def test_value_and_gradient_are_those_of_the_paper(name: str) -> None:
    for size in CASES[name].sizes:
        case, s, t = made(name, size)

        def oracle(x: Array, case: Case = case, t: Array = t) -> float:
            return float(np.mean(case.oracle(x, t)))

        value, gradient = value_and_gradient(case, s, t)
        assert value.shape == () and value.dtype == torch.float64
        assert float(value) == pytest.approx(oracle(s), rel=1e-10)
        numeric = np.zeros_like(s)
        for at in np.ndindex(*s.shape):
            up, down = s.copy(), s.copy()
            up[at] += 1e-6
            down[at] -= 1e-6
            numeric[at] = (oracle(up) - oracle(down)) / 2e-6
        np.testing.assert_allclose(gradient.numpy(), numeric, atol=1e-7, rtol=1e-5)
        value, gradient = value_and_gradient(case, s, t, torch.float32)
        assert value.dtype == torch.float32 and float(value) == pytest.approx(oracle(s), rel=1e-4, abs=1e-6)
        np.testing.assert_allclose(gradient.numpy(), numeric, atol=1e-5, rtol=1e-3)


@every
def test_it_is_zero_where_the_student_says_what_is_cached_and_its_lowest_value(name: str) -> None:
    case, s, t = made(name)
    if case.same is None:
        return  # crd and vid have a test each
    # Relations of float32 products: about 1e-7 of what they are made of.
    value, gradient = value_and_gradient(case, case.same(t), t)
    assert abs(float(value)) < 1e-7 and float(gradient.abs().max()) < 1e-6
    assert float(case.loss(*tensors(s, t))) > 1e-4


@every
def test_it_is_blind_to_what_it_should_be(name: str) -> None:
    case, s, t = made(name)
    expected = float(case.loss(*tensors(s, t)))
    order = np.random.default_rng(1).permutation(s.shape[case.axis])
    if name not in ("crd", "decoupled", "tinybert_hidden", "tinybert_attention") and "minilm" not in name:
        turned_around = [np.take(x, order, axis=case.axis) for x in (s, t)]  # the others hold labels, masks, indices
        assert float(case.loss(*tensors(*turned_around))) == pytest.approx(expected, rel=1e-9)
    for what, change in case.blind.items():
        assert float(case.loss(*tensors(change(s), t))) == pytest.approx(expected, rel=1e-9), what
    for what, change in {"scale": times, "shift": moved}.items():
        if what not in case.blind and case.blind:
            assert float(case.loss(*tensors(change(s), t))) != pytest.approx(expected, rel=1e-3), what


@every
def test_half_precision_is_read_and_the_loss_is_float32(name: str) -> None:
    case, s, t = made(name)
    for dtype, bound in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        student, teacher = tensors(s, t, dtype=dtype)
        exact = float(case.loss(student.double(), teacher.double()))  # of what half precision has left of the inputs
        value = case.loss(student.requires_grad_(), teacher)
        value.backward()
        assert value.dtype == torch.float32 and student.grad.dtype == dtype
        assert float(value.detach()) == pytest.approx(exact, rel=1e-4, abs=1e-6)
        assert exact == pytest.approx(float(case.loss(*tensors(s, t))), rel=40 * bound, abs=2 * bound)


@every
def test_autocast_does_not_lower_the_precision(name: str) -> None:
    case, s, t = made(name)
    student, teacher = tensors(s, t, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = float(case.loss(student, teacher))
    assert inside == pytest.approx(float(case.loss(student, teacher)), rel=1e-6)


@every
def test_it_compiles_without_graph_breaks(name: str) -> None:
    case, s, t = made(name)
    student, teacher = tensors(s, t, dtype=torch.float32)
    torch._dynamo.reset()
    student.requires_grad_()
    compiled = torch.compile(case.loss, fullgraph=True, backend="eager")(student, teacher)
    compiled.backward()
    torch.testing.assert_close(student.grad, value_and_gradient(case, s, t, torch.float32)[1])
    torch.testing.assert_close(compiled, case.loss(student, teacher))


@every
@pytest.mark.parametrize("extreme", ["zeros", "one row", "large", "tiny", "teacher zeros", "equal"])
def test_value_and_gradient_are_finite_at_extremes(name: str, extreme: str) -> None:
    case, s, t = made(name)
    if name == "crd" and extreme == "large":
        s, t = s / 1e3, t / 1e3  # unit vectors: at most e^(1/τ)
    first = np.take(s, [0], axis=case.axis)
    changed = {
        "zeros": (0 * s, t),
        "one row": (0 * s + first, 0 * t + np.take(t, [0], axis=case.axis) if t.shape == s.shape else t),
        "large": (s * 3e4, t * 1e3),
        "tiny": (s * 1e-30, t * 1e-30),
        "teacher zeros": (s, 0 * t),
        "equal": (s, s if t.shape == s.shape else t),
    }[extreme]
    value, gradient = value_and_gradient(case, *changed, torch.float32)
    assert torch.isfinite(value) and torch.isfinite(gradient).all()
    if extreme in ("zeros", "one row", "equal"):
        assert float(gradient.abs().max()) < 1e3


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_not_hidden(name: str, bad: float) -> None:
    case, s, t = made(name)
    s[(0,) * s.ndim] = bad
    assert not torch.isfinite(case.loss(*tensors(s, t, dtype=torch.float32)))


@every
def test_rows_have_values_and_weights_where_the_loss_is_their_mean(name: str) -> None:
    case, s, t = made(name)
    if not case.rows:
        return
    student, teacher = tensors(s, t)
    rows = case.loss(student, teacher, reduction="none")
    np.testing.assert_allclose(rows.numpy(), case.oracle(s, t), rtol=1e-9, atol=1e-12)
    weights = torch.linspace(0, 1, len(rows), dtype=torch.float64)
    weighted = case.loss(student, teacher, weights=weights)
    assert float(weighted) == pytest.approx(float((rows * weights).sum() / weights.sum()))
    assert float(case.loss(student, teacher, weights=0 * weights)) == 0
    with pytest.raises(UsageError, match="reduction='none' asks for none"):
        case.loss(student, teacher, weights=weights, reduction="none")
    with pytest.raises(UsageError, match="expected 'mean' or 'none'"):
        case.loss(student, teacher, reduction="sum")


@every
def test_too_few_rows_or_other_shapes_are_refused_in_one_sentence(name: str) -> None:
    case, s, t = made(name)
    if case.least > 1:
        few = tensors(*(x[: case.least - 1] for x in (s, t)))
        with pytest.raises(UsageError, match=f"too few rows to be compared, at least {case.least}"):
            case.loss(*few)
        enough = tensors(*(x[: case.least] for x in (s, t)))
        assert torch.isfinite(case.loss(*enough))
    if name in ("crd", "decoupled", "vid") or "minilm" in name:
        return  # have a test each
    with pytest.raises(UsageError, match=r"found|differ in shape") as refused:
        case.loss(*tensors(s, t[:-1]))
    assert "\n" not in str(refused.value)


def test_every_public_loss_is_in_the_table() -> None:
    helpers = {"Gaussian", "Projection", "attention_map", "flow_matrix", "regressor", "uniform_layers"}
    older = {"soft_targets", "forward_kl", "reverse_kl", "jensen_shannon", "hard_labels"}  # test_losses.py
    older |= {"mixed_labels"}  # test_mixing.py
    assert {name.split(",")[0] for name in CASES} == set(losses.__all__) - helpers - older
