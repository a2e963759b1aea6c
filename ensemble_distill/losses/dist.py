"""DIST: correlations of probabilities instead of equality, between classes and within each."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble_distill.errors import UsageError
from ensemble_distill.losses.geometry import centred, unit
from ensemble_distill.losses.rows import precise, same_rows
from ensemble_distill.targets import Targets


def dist(
    student_logits_BC: Tensor, targets: Targets, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """T² (β L_inter + γ L_intra): Huang et al. 2022 (their L_tr without the classification loss).

    L_inter = mean over rows of 1 − ρ(row of q, row of p); L_intra = mean over classes of 1 − ρ(column of q, column of
    p); ρ is Pearson's correlation, p and q probabilities at temperature T. The T² is the authors' code's. Scalar, each
    part in [0, 2]; float32 (float64 as it is). Blind to scale and shift of the probabilities; of a constant row or
    column ρ is 0, with gradient zero. UsageError for targets that lack classes, and below two rows.
    """
    p, q = (torch.softmax(logits / temperature, dim=1) for logits in _all_classes("dist", student_logits_BC, targets))
    same_rows("dist", q, p, least=2)
    inter, intra = (1 - _pearson(q, p, dim) for dim in (1, 0))
    return temperature**2 * (beta * inter.mean() + gamma * intra.mean())


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return (unit(centred(a, dim), dim) * unit(centred(b, dim), dim)).sum(dim=dim)


def _all_classes(loss: str, student_logits_BC: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Logits of ensemble and student [B, C]; UsageError where the targets are not dense."""
    return all_classes(loss, targets), precise(student_logits_BC)


def all_classes(loss: str, targets: Targets) -> Tensor:
    """The ensemble's log-probabilities of all classes [B, C]; UsageError where the targets are not dense."""
    if targets.kind != "dense":
        raise UsageError(
            f"{loss} needs the probabilities of all classes, and these targets keep a part of them: {targets.kind}",
            hint="capture with the codec dense",
        )
    return targets.logprobs
