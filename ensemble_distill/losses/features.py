"""Losses between a student's feature and a cached one of the same width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ensemble_distill.losses.logits import mean


def feature_cosine(student_BD: Tensor, teacher_BD: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 − cos(student, teacher): mean over rows, in [0, 2], zero where the directions are equal.

    Features [B, D], computed in float32. Blind to scale (as DistilBERT's, Sanh et al. 2019, section 2).
    """
    return mean(1 - F.cosine_similarity(student_BD.float(), teacher_BD.float(), dim=1), weights)


def feature_l2(student_BD: Tensor, teacher_BD: Tensor, weights: Tensor | None = None) -> Tensor:
    """½ ‖teacher − student‖²: sum over the feature, mean over rows (Romero et al. 2015, eq. 3)."""
    return mean(0.5 * (teacher_BD.float() - student_BD.float()).square().sum(dim=1), weights)
