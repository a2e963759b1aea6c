"""Cross-entropy with the labels of mixed samples."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ensemble_distill.losses.logits import mean


def mixed_labels(
    student_logits_BC: Tensor,
    labels_B: Tensor,
    partner_labels_B: Tensor,
    lam_B: Tensor,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """λ CE(y) + (1 − λ) CE(y'): nats, mean over rows (Σ w·loss / Σ w with ``weights`` [B]), computed in float32.

    Labels of the samples and of their partners int64 [B]; λ [B], the samples' own shares, of any float dtype. Since
    a cross-entropy is linear in its target, it is that with λ y + (1 − λ) y' (Zhang et al. 2018; Yun et al. 2019).
    """
    logits, lam = student_logits_BC.float(), lam_B.float()
    own, other = (
        F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
        for labels in (labels_B, partner_labels_B)
    )
    return mean(lam * own + (1 - lam) * other, weights)
