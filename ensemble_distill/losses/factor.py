"""Factor transfer: the distance of two learned summaries of feature maps."""

from __future__ import annotations

from torch import Tensor

from ensemble_distill.losses.geometry import unit
from ensemble_distill.losses.rows import Reduction, precise, reduced, same_shape


def factor_transfer(
    student: Tensor, teacher: Tensor, weights: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """‖F_T/‖F_T‖₂ − F_S/‖F_S‖₂‖₁, mean over rows: Kim, Park, Kwak 2018 (their L_FT with p = 1).

    Factors [B, ...] of one shape: the teacher's from its paraphraser (trained beforehand, its output cached as a
    feature), the student's from a translator that learns with it. Float32 (float64 as it is). Blind to scale.
    """
    same_shape("factor_transfer", student, teacher)
    difference = unit(precise(teacher).flatten(1)) - unit(precise(student).flatten(1))
    return reduced(difference.abs().sum(dim=1), weights, reduction)
