"""Soft targets of standardised logits: the student need not match the ensemble's scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ensemble_distill.losses.dist import all_classes
from ensemble_distill.losses.geometry import centred, unit
from ensemble_distill.losses.logits import expected
from ensemble_distill.losses.rows import Reduction, precise, reduced, same_shape
from ensemble_distill.targets import Targets


def standardised(
    student_logits_BC: Tensor,
    targets: Targets,
    temperature: float = 2.0,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """T² KL(softmax(Z(v)/T) ‖ softmax(Z(z)/T)), nats, mean over rows: Sun et al. 2024 (algorithms 1 and 2).

    v the ensemble's logits, z the student's, Z(x) = (x − mean) / σ over the classes, σ² = Σ (x − mean)² / C. The stored
    log-probabilities are logits up to a shift, which Z removes; classes of probability zero count as of e^−30. Float32
    (float64 as it is). Blind to scale and shift of either's logits; equal logits stay zeros, with gradient zero.
    UsageError for targets that lack classes.
    """
    teacher = all_classes("standardised", targets)
    same_shape("standardised", student_logits_BC, teacher)
    p = torch.log_softmax(z_score(teacher.clamp(min=-30)) / temperature, dim=1)
    q = torch.log_softmax(z_score(precise(student_logits_BC)) / temperature, dim=1)
    return reduced(temperature**2 * (expected(p, p) - expected(p, q)), weights, reduction)


def z_score(logits_BC: Tensor) -> Tensor:
    """(x − mean) / σ of each row, σ over all C classes (not C − 1); zeros where all are equal."""
    return math.sqrt(logits_BC.shape[1]) * unit(centred(logits_BC, 1))
