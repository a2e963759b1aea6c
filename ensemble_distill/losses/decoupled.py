"""Decoupled distillation: how sure of the label, and what of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble_distill.errors import UsageError
from ensemble_distill.losses.bucketed import bucketed_log_probs
from ensemble_distill.losses.logits import expected, refuse_sample
from ensemble_distill.losses.rows import Reduction, precise, reduced
from ensemble_distill.targets import Targets

Split = tuple[Tensor, Tensor]  # log-probabilities of label and not label [B, 2]; of the others among themselves [B, N]


def decoupled(
    student_logits_BC: Tensor,
    targets: Targets,
    labels_B: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """T² (α TCKD + β NCKD), nats, mean over rows: Zhao et al. 2022, eq. 6–7.

    TCKD = KL of (p_y, 1 − p_y), NCKD = KL of the classes other than y, which are made to add up to 1; y the label, both
    at temperature T, teacher first. With β = 1 − p_y of each row it is the KL of ``soft_targets`` (eq. 6). The authors
    take α = 1, β = 8 on CIFAR-100 at T = 4, and the T².

    Of kept classes (``ghost``) all others are one more class, without the label; where the label is not among the kept,
    its probability is ``targets.label_logprob``. UsageError where that is missing, and for a sample of classes.
    """
    refuse_sample(targets, "decoupled distillation")
    if targets.ids is None:
        p = _split_all(targets.at(temperature).logprobs, labels_B)
        q = _split_all(precise(student_logits_BC) / temperature, labels_B)
    else:
        p = _split_kept(targets, labels_B, temperature)
        q = _split_student(student_logits_BC, targets.ids, labels_B, temperature)
    target, others = (expected(a, a) - expected(a, b) for a, b in zip(p, q, strict=True))
    return reduced(temperature**2 * (alpha * target + beta * others), weights, reduction)


def _split_all(logits_BC: Tensor, labels_B: Tensor) -> Split:
    own = logits_BC.gather(1, labels_B[:, None])[:, 0]
    is_label = torch.zeros_like(logits_BC, dtype=torch.bool).scatter(1, labels_B[:, None], True)
    return _split(own, logits_BC.masked_fill(is_label, -torch.inf))


def _split(own_B: Tensor, others_BN: Tensor) -> Split:
    """From logits of the label and of all others; where these have nothing they are all impossible."""
    total = torch.logsumexp(others_BN, dim=1)
    binary = torch.log_softmax(torch.stack([own_B, total], dim=1), dim=1)
    return binary, others_BN - total.masked_fill(total.isneginf(), 0)[:, None]


def _split_student(logits_BC: Tensor, ids_BK: Tensor, labels_B: Tensor, temperature: float) -> Split:
    logs, rest = bucketed_log_probs(logits_BC, torch.cat([ids_BK, labels_B[:, None]], dim=1), temperature)
    kept = logs[:, :-1].masked_fill(ids_BK == labels_B[:, None], -torch.inf)
    return _split(logs[:, -1], torch.cat([kept, rest[:, None]], dim=1))


def _split_kept(targets: Targets, labels_B: Tensor, temperature: float) -> Split:
    assert targets.ids is not None
    is_label = targets.ids == labels_B[:, None]
    found = is_label.any(dim=1)
    held = targets.at(temperature)
    assert held.residual is not None
    own = held.logprobs.masked_fill(~is_label, -torch.inf).amax(dim=1)
    rest = held.residual
    if not bool(found.all()):
        own = torch.where(found, own, _label_at(targets, found, temperature))
        rest = torch.where(found, rest, (rest - own.exp()).clamp(min=0))  # the label was among all others
    kept = held.logprobs.masked_fill(is_label, -torch.inf)
    return _split(own, torch.cat([kept, rest.log()[:, None]], dim=1))


def _label_at(targets: Targets, found_B: Tensor, temperature: float) -> Tensor:
    """log p(label) at a temperature; UsageError for a row whose label is neither kept nor known."""
    if targets.label_logprob is None or bool(targets.label_logprob[~found_B].isnan().any()):
        raise UsageError(
            "decoupled distillation needs the probability of each label, and one is neither kept nor stored apart",
            hint="capture from a source with labels, or with the codec dense",
        )
    if temperature == 1:
        return targets.label_logprob
    return targets.label_logprob / temperature - targets.log_z_at(temperature)
