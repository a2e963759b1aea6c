"""Losses on a student's logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ensemble_distill.targets import Targets


def soft_targets(student_logits_BC: Tensor, targets: Targets, temperature: float = 1.0) -> Tensor:
    """T² KL(p_T ‖ q_T), p the ensemble at temperature T, q = softmax(logits / T).

    Logits [B, C] of any float dtype; computed in float32. Returns a scalar: nats, mean over rows. T² keeps
    the gradient's size when T changes (Hinton, Vinyals, Dean 2015, section 2). Zero where q equals p;
    classes of probability zero add nothing.
    """
    p = targets.at(temperature)
    q = torch.log_softmax(student_logits_BC.float() / temperature, dim=1)
    # Where p is 0 the product 0 · (−inf − q) would be NaN, and so would its gradient.
    finite = p.masked_fill(p.isneginf(), 0.0)
    kl_B = (p.exp() * (finite - q)).sum(dim=1)
    return temperature**2 * kl_B.mean()


def hard_labels(student_logits_BC: Tensor, labels_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels int64 [B]: nats, mean over rows, computed in float32.

    With smoothing ε the target is (1 − ε) on the label plus ε/C on every class (Szegedy et al. 2016).
    """
    return F.cross_entropy(student_logits_BC.float(), labels_B, label_smoothing=label_smoothing)
