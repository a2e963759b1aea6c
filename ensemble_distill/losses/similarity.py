"""Matrices of similarities between the rows of a batch. Widths of the features may differ."""

from __future__ import annotations

import math

from torch import Tensor

from ensemble_distill.errors import UsageError
from ensemble_distill.losses.geometry import product, unit
from ensemble_distill.losses.rows import precise, same_rows

LEAST = 1e-7


def similarity_preserving(student_BD: Tensor, teacher_BE: Tensor) -> Tensor:
    """‖G_T − G_S‖²_F / B²: Tung & Mori 2019 (their L_SP for one pair of layers).

    G is Q Qᵀ with each row divided by its L2 norm, Q [B, width] (flatten a feature map first). Float32 (float64 as it
    is). Blind to scale and rotation. UsageError below two rows.
    """
    same_rows("similarity_preserving", student_BD, teacher_BE, least=2)
    student, teacher = precise(student_BD), precise(teacher_BE)
    return (unit(product(teacher, teacher.T)) - unit(product(student, student.T))).square().mean()


def correlation_congruence(student_BD: Tensor, teacher_BE: Tensor, gamma: float = 0.4, order: int | None = 2) -> Tensor:
    """‖K(T) − K(S)‖²_F / B²: Peng et al. 2019 (their L_CC).

    K_ij = exp(−γ ‖f_i − f_j‖²) of features divided by their norm, by its Taylor series about f_i·f_j = 0 up to
    ``order``: e^(−2γ) Σ_p (2γ)^p/p! (f_i·f_j)^p. The paper takes γ = 0.4 and order 2; ``order=None`` is the kernel
    itself. Float32 (float64 as it is). Blind to scale and rotation. UsageError below two rows or of an order below 1.
    """
    same_rows("correlation_congruence", student_BD, teacher_BE, least=2)
    if order is not None and order < 1:
        raise UsageError(f"order={order}: expected 1 or more, or None")
    student, teacher = _cosines(student_BD), _cosines(teacher_BE)
    return (_gaussian(teacher, gamma, order) - _gaussian(student, gamma, order)).square().mean()


def pkt(student_BD: Tensor, teacher_BE: Tensor) -> Tensor:
    """Mean over rows j of Σ_{i≠j} p_{i|j} log(p_{i|j} / q_{i|j}), nats: Passalis & Tefas 2018.

    p_{i|j} = K(t_i, t_j) / Σ_{k≠j} K(t_k, t_j) and q that of the student, with the cosine kernel K(a, b) = ½ (cos(a, b)
    + 1), at least 1e−7. The paper sums over j. Float32 (float64 as it is). Blind to scale and rotation. UsageError
    below three rows: of two, the one says nothing of the other.
    """
    same_rows("pkt", student_BD, teacher_BE, least=3)
    p, q = _conditional(teacher_BE), _conditional(student_BD)
    return (p * (p.clamp(min=LEAST**2).log() - q.clamp(min=LEAST**2).log())).sum(dim=0).mean()


def _cosines(x: Tensor) -> Tensor:
    directions = unit(precise(x))
    return product(directions, directions.T)


def _gaussian(cosines: Tensor, gamma: float, order: int | None) -> Tensor:
    if order is None:
        return (2 * gamma * (cosines - 1)).exp()
    terms = [(2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(order + 1)]
    return math.exp(-2 * gamma) * sum(terms[1:], terms[0])


def _conditional(x: Tensor) -> Tensor:
    """p_{i|j} at [i, j]: columns add up to 1, the diagonal is zero."""
    kernel = ((_cosines(x) + 1) / 2).clamp(min=LEAST)
    kernel = kernel - kernel.diag().diag()
    return kernel / kernel.sum(dim=0)
