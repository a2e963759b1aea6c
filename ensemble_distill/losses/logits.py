"""Losses on a student's logits. ``weights`` [B] weight the rows of any of them: Σ w·loss / Σ w."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ensemble_distill.errors import UsageError
from ensemble_distill.losses.bucketed import bucketed_log_probs
from ensemble_distill.targets import Targets


def soft_targets(
    student_logits_BC: Tensor, targets: Targets, temperature: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    """T² KL(p_T ‖ q_T), p the ensemble at temperature T, q = softmax(logits / T).

    Logits [B, C] of any float dtype; computed in float32. Returns a scalar: nats, mean over rows. T² keeps
    the gradient's size when T changes (Hinton, Vinyals, Dean 2015, section 2). Zero where q equals p;
    classes of probability zero add nothing.

    Of kept classes (``ghost``) all others are one more class: Σ_K p log(p/q) + r log(r / (1 − Σ_K q)). Of a sample
    (``unbiased``) it is the cross-entropy −Σ w log q less the stored entropy, whose expectation is the KL, as that of
    its gradient is the gradient; a single row's may be negative, and T must be 1.
    """
    return mean(temperature**2 * forward_kl(student_logits_BC, targets, temperature), weights)


def forward_kl(student_logits_BC: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """KL(p_T ‖ q_T) of each row, [B], in nats; without the T² of ``soft_targets``."""
    p, q = _pair(student_logits_BC, targets, temperature)
    if targets.kind == "unbiased":
        own = targets.entropy if targets.entropy is not None else torch.zeros_like(q[:, 0])
        return -expected(p, q) - own
    return expected(p, p) - expected(p, q)


def reverse_kl(
    student_logits_BC: Tensor, targets: Targets, temperature: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    """T² KL(q_T ‖ p_T): scalar, nats, mean over rows (Gu et al. 2024, MiniLLM, eq. 1, at the level of one row).

    Classes that the ensemble calls impossible count as of probability e^−30. Of kept classes (``ghost``) all others
    are one more class. UsageError for a sample of classes: its zeros are no probabilities.
    """
    p, q = _pair(student_logits_BC, targets, temperature)
    refuse_sample(targets, "the reverse KL")
    return mean(temperature**2 * (expected(q, q) - expected(q, p.clamp(min=-30))), weights)


def jensen_shannon(
    student_logits_BC: Tensor,
    targets: Targets,
    beta: float = 0.5,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """T² [β KL(p ‖ m) + (1 − β) KL(q ‖ m)], m = β p + (1 − β) q: scalar, nats, mean over rows.

    Agarwal et al. 2024, eq. 1, with 0 < β < 1. Of kept classes (``ghost``) all others are one more class. UsageError
    for a sample of classes.
    """
    if not 0 < beta < 1:
        raise UsageError(f"beta={beta}: expected a number between 0 and 1")
    p, q = _pair(student_logits_BC, targets, temperature)
    refuse_sample(targets, "the Jensen-Shannon divergence")
    m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
    rows = beta * (expected(p, p) - expected(p, m)) + (1 - beta) * (expected(q, q) - expected(q, m))
    return mean(temperature**2 * rows, weights)


def hard_labels(
    student_logits_BC: Tensor, labels_B: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy with the labels int64 [B]: nats, mean over rows, computed in float32.

    With smoothing ε the target is (1 − ε) on the label plus ε/C on every class (Szegedy et al. 2016).
    """
    rows = F.cross_entropy(student_logits_BC.float(), labels_B, label_smoothing=label_smoothing, reduction="none")
    return mean(rows, weights)


def mean(rows_B: Tensor, weights_B: Tensor | None) -> Tensor:
    """The mean over rows, or Σ w·rows / Σ w (0 where all weights are 0)."""
    if weights_B is None:
        return rows_B.mean()
    return (rows_B * weights_B).sum() / weights_B.sum().clamp(min=1e-12)


def _pair(student_logits_BC: Tensor, targets: Targets, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ensemble and student over the same classes [B, C], or [B, K + 1] with the others' last."""
    held = targets.at(temperature)
    if held.ids is None:
        return held.logprobs, torch.log_softmax(student_logits_BC.float() / temperature, dim=1)
    if held.kind == "unbiased":
        return held.logprobs, bucketed_log_probs(student_logits_BC, held.ids, temperature, rest=False)[0]
    assert held.residual is not None
    kept, others = bucketed_log_probs(student_logits_BC, held.ids, temperature)
    p = torch.cat([held.logprobs, held.residual.log()[:, None]], dim=1)
    return p, torch.cat([kept, others[:, None]], dim=1)


def expected(p: Tensor, values: Tensor) -> Tensor:
    """Σ exp(p) · values of each row; where p is 0 the product is 0, and so is its gradient."""
    nothing = p.isneginf()
    return (p.masked_fill(nothing, 0.0).exp() * values.masked_fill(nothing, 0.0)).sum(dim=1)


def refuse_sample(targets: Targets, what: str) -> None:
    if targets.kind == "unbiased":
        raise UsageError(
            f"{what} needs probabilities, and a sample of classes has unbiased weights only",
            hint="use soft_targets, or capture with the codec topk or dense",
        )
