"""Losses between a student's feature and a cached one of the same width, and the map to that width."""

from __future__ import annotations

from torch import Tensor, nn

from ensemble_distill.losses.geometry import unit
from ensemble_distill.losses.rows import Reduction, precise, reduced, same_shape


def feature_cosine(
    student_BD: Tensor, teacher_BD: Tensor, weights: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """1 − cos(student, teacher): mean over rows, in [0, 2], zero where the directions are equal.

    Features [B, D], computed in float32 (float64 as it is). Blind to scale (as DistilBERT's, Sanh et al. 2019,
    section 2). A feature of all zeros has no direction: its row is 1, with gradient zero.
    """
    same_shape("feature_cosine", student_BD, teacher_BD)
    cosine = (unit(precise(student_BD)) * unit(precise(teacher_BD))).sum(dim=1)
    return reduced(1 - cosine, weights, reduction)


def feature_l2(
    student: Tensor, teacher: Tensor, weights: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """½ ‖teacher − student‖²: sum over the feature, mean over rows (FitNets' hint: Romero et al. 2015, eq. 3).

    Features [B, ...] of one shape, computed in float32 (float64 as it is). Where the student's is narrower, it is the
    output of a ``regressor``.
    """
    same_shape("feature_l2", student, teacher)
    rows = 0.5 * (precise(teacher) - precise(student)).square().flatten(1).sum(dim=1)
    return reduced(rows, weights, reduction)


def regressor(student_width: int, teacher_width: int, positions: bool = False) -> nn.Module:
    """The learned r of FitNets (eq. 3): [B, student_width] to [B, teacher_width], or at each position of [B, C, H, W].

    Its parameters go to the optimiser with the student's, and are not part of the student.
    """
    return nn.Conv2d(student_width, teacher_width, 1) if positions else nn.Linear(student_width, teacher_width)
