"""Contrastive distillation with cached teacher features: pairs of one sample against pairs of two."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ensemble_distill.errors import UsageError
from ensemble_distill.losses.geometry import product, unit
from ensemble_distill.losses.rows import Reduction, precise, reduced


class Projection(nn.Module):
    """g of CRD: a learned linear map [B, width] to [B, size], divided by its norm. One each for student and teacher."""

    def __init__(self, width: int, size: int = 128) -> None:
        super().__init__()
        self.linear = nn.Linear(width, size)

    def forward(self, features_BD: Tensor) -> Tensor:
        return unit(precise(self.linear(features_BD)))


def crd(
    student_BE: Tensor,
    bank_ME: Tensor,
    positives_B: Tensor,
    negatives_BN: Tensor,
    samples: int | None = None,
    temperature: float = 0.1,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """−log h(T⁺, S) − Σ_n log(1 − h(T⁻_n, S)), nats, mean over rows: Tian et al. 2020, section 3.1.

    h(T, S) = e^s / (e^s + N/M), s = g_T(T)·g_S(S)/τ (eq. 19), N the negatives of a row, M the samples of the data set.
    ``student`` is g_S of the student's features, ``bank`` g_T of cached teacher features, which here replace the
    teacher's pass; rows of it are named by the int64 indices ``positives`` [B] and ``negatives`` [B, N], which must not
    hold a row's own. The bank may hold just the rows that the batch names: then ``samples`` is M (else its length).
    Float32 (float64 as it is). With N negatives drawn uniformly Σ_n estimates N·E[log(1 − h)], as in the paper.
    """
    _check(student_BE, bank_ME, positives_B, negatives_BN)
    n, m = negatives_BN.shape[1], samples or len(bank_ME)
    student, bank = precise(student_BE) / temperature, precise(bank_ME)
    shift = math.log(n / m)
    same = (student * bank[positives_B]).sum(dim=1)
    other_BN = product(bank[negatives_BN], student[:, :, None])[:, :, 0]
    # −log h = log(1 + e^(shift − s)) and −log(1 − h) = log(1 + e^(s − shift)), at any size of s.
    rows = F.softplus(shift - same) + F.softplus(other_BN - shift).sum(dim=1)
    return reduced(rows, weights, reduction)


def _check(student: Tensor, bank: Tensor, positives: Tensor, negatives: Tensor) -> None:
    if student.ndim != 2 or bank.ndim != 2 or student.shape[1] != bank.shape[1]:
        raise UsageError(f"crd: student {list(student.shape)} and bank {list(bank.shape)} differ in width")
    b = len(student)
    if positives.shape != (b,) or negatives.ndim != 2 or len(negatives) != b or negatives.shape[1] < 1:
        found = f"{list(positives.shape)} and {list(negatives.shape)}"
        raise UsageError(f"crd: expected positives [{b}] and negatives [{b}, 1 or more], found {found}")
