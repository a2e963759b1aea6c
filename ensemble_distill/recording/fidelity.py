"""What a codec loses: its targets against the log-probabilities that it was given. All in float64, in sums of rows.

Shapes: B rows, C classes. Formulas and how to read them: docs/statistics.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ensemble_distill.tally import FIDELITY
from ensemble_distill.targets import Targets

LOWEST = -65504.0
# A gradient shorter than this has no direction that float32 would keep.
SHORTEST = 1e-6


def fidelity(targets: Targets, logprobs_BC: Tensor) -> list[float]:
    """The sums of FIDELITY over a few rows: decoded targets against log-probabilities float32 [B, C] in nats."""
    exact = torch.log_softmax(logprobs_BC.double(), dim=1)
    student = torch.softmax(exact.clamp(min=LOWEST) / 2, dim=1)
    true = student - exact.exp()
    found = _gradient(targets, student)
    angles, mean_angle = _angles(true, found), _angles(true.mean(0, keepdim=True), found.mean(0, keepdim=True))
    kl = _kl(targets, exact)
    sums = {
        "rows": len(targets),
        "kl_rows": 0 if kl is None else len(targets),
        "kl": 0.0 if kl is None else float(kl.sum()),
        "total_variation": float(_total_variation(targets, exact).sum()),
        "agreement": float((targets.top1() == logprobs_BC.argmax(dim=1)).sum()),
        "angle_rows": len(angles),
        "angle": float(angles.sum()),
        "means": len(mean_angle),
        "mean_angle": float(mean_angle.sum()),
    }
    return [sums[name] for name in FIDELITY]


def _kl(targets: Targets, exact_BC: Tensor) -> Tensor | None:
    """KL(exact ‖ decoded) of each row, [B], all classes not kept as one; None for a sample, whose zeros are no lie."""
    if targets.kind == "unbiased":
        return None
    p, q = exact_BC, targets.logprobs.double()
    if targets.ids is not None:
        assert targets.residual is not None
        p, q = _bucketed(exact_BC, targets.ids), torch.cat([q, targets.residual.double().log()[:, None]], dim=1)
    return (p.exp() * (p.clamp(min=LOWEST) - q.clamp(min=LOWEST))).sum(dim=1)


def _total_variation(targets: Targets, exact_BC: Tensor) -> Tensor:
    """½ Σ |exact − decoded| of each row, [B], all classes not kept as one."""
    if targets.kind == "ghost":
        assert targets.ids is not None and targets.residual is not None
        found = torch.cat([targets.logprobs.double().exp(), targets.residual.double()[:, None]], dim=1)
        return (_bucketed(exact_BC, targets.ids).exp() - found).abs().sum(dim=1) / 2
    return (exact_BC.exp() - scattered(targets)).abs().sum(dim=1) / 2


def _bucketed(exact_BC: Tensor, ids_BK: Tensor) -> Tensor:
    """Log-probabilities of the kept classes and of all others together, [B, K + 1]."""
    rest = torch.logsumexp(exact_BC.scatter(1, ids_BK, -math.inf), dim=1, keepdim=True)
    return torch.cat([exact_BC.gather(1, ids_BK), rest], dim=1)


def scattered(targets: Targets) -> Tensor:
    """The probabilities or weights that targets name, float64 [B, C]; 0 elsewhere."""
    values = targets.logprobs.double().exp()
    if targets.ids is None:
        return values
    return values.new_zeros(len(targets), targets.classes).scatter_add_(1, targets.ids, values)


def _gradient(targets: Targets, student_BC: Tensor) -> Tensor:
    """The gradient by the logits of the loss of each row at T = 1, [B, C], for a student with these probabilities.

    What is not kept pulls as one class, in proportion to the student's own probabilities (see losses/logits.py).
    """
    pull = scattered(targets)
    if targets.kind == "ghost":
        assert targets.ids is not None and targets.residual is not None
        others = student_BC.scatter(1, targets.ids, 0.0)
        total = others.sum(dim=1, keepdim=True)
        pull = pull + torch.where(total > 0, others / total, 0.0) * targets.residual.double()[:, None]
    return pull.sum(dim=1, keepdim=True) * student_BC - pull


def _angles(true_BC: Tensor, found_BC: Tensor) -> Tensor:
    """Degrees between gradients, of the rows whose true one has a direction; a vanished one is at 90°."""
    true, found = true_BC.norm(dim=1), found_BC.norm(dim=1)
    cosine = (true_BC * found_BC).sum(dim=1) / (true * found).clamp(min=1e-300)
    return torch.rad2deg(torch.arccos(cosine.clamp(-1, 1)))[true > SHORTEST]
