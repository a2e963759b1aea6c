"""Variational information distillation: how well a Gaussian about the student's feature predicts the teacher's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ensemble_distill.errors import UsageError
from ensemble_distill.losses.features import regressor
from ensemble_distill.losses.rows import Reduction, precise, reduced, same_shape


class Gaussian(nn.Module):
    """q(t | s) of VID: μ(s) a learned linear map (at each position of a map), σ²_c = log(1 + e^α_c) + ε of a channel.

    ``initial`` is the variance at the start. Its parameters go to the optimiser with the student's.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        positions: bool = False,
        initial: float = 5.0,
        epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        self.mean = regressor(student_width, teacher_width, positions)
        self.alpha = nn.Parameter(torch.full((teacher_width,), math.log(math.expm1(initial - epsilon))))
        self.epsilon = epsilon

    def forward(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """μ [B, C, ...] and σ² [C]."""
        return self.mean(student), F.softplus(precise(self.alpha)) + self.epsilon


def vid(
    mean: Tensor, variance_C: Tensor, teacher: Tensor, weights: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Σ [log σ_c + (t − μ)² / 2σ²_c] over channels and positions, nats, mean over rows: Ahn et al. 2019.

    −log q(t | s) without its constant. ``mean`` μ(s) and ``teacher`` t [B, C, ...] of one shape, ``variance`` σ² > 0 of
    each channel [C]: both from ``Gaussian``. Float32 (float64 as it is). Zero at t = μ, σ = 1; below zero for σ < 1.
    """
    same_shape("vid", mean, teacher)
    if mean.ndim < 2 or variance_C.shape != mean.shape[1:2]:
        found = f"{list(variance_C.shape)} for {list(mean.shape)}"
        raise UsageError(f"vid: expected a variance of each channel, found {found}")
    variance = precise(variance_C)[:, None]
    error_BCN = (precise(teacher) - precise(mean)).square().reshape(*mean.shape[:2], -1)
    rows = (0.5 * variance.log() + error_BCN / (2 * variance)).sum(dim=(1, 2))
    return reduced(rows, weights, reduction)
