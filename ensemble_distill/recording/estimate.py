"""What a codec loses of a batch: what it gives back, held against what the members said."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ensemble_distill.codec import HeadCodec, Members
from ensemble_distill.codecs.heads import LOWEST, decode, encode
from ensemble_distill.losses.logits import soft_targets
from ensemble_distill.mixture import Mixture
from ensemble_distill.targets import Said, Targets

TINY = 1e-300


def errors(codec: HeadCodec, said: Said, mixture: Mixture | None = None) -> dict[str, float | None]:
    """The error of a codec (as a plan has it: with its classes) on a batch, computed in float64.

    kl: KL(said ‖ kept) in nats, mean over rows, on the codec's own classes: all of them, or the kept and all others as
    one. None for draws, which call impossible whatever they did not draw.
    total_variation: ½ Σ |said − kept| on the same classes, mean over rows; of draws, that of a single draw.
    top1_agreement: the share of rows whose likeliest class is the same.
    gradient_degrees: the angle between the gradients that ``soft_targets`` at T = 1 gives by what was kept and by all
    that was said, over the logits of the whole batch, for a student whose logits are half of the ensemble's
    log-probabilities. None where there is no gradient.

    mixture: how members are combined, where the codec keeps them; by default their mean at the shares of ``said``.
    """
    if mixture is None and isinstance(codec, Members):
        mixture = Mixture(tuple(zip(codec.members, said.shares, strict=True)), "mean_probs")
    kept = decode(codec, encode(codec, said), mixture)
    exact_BK, kept_BK = _on_own_classes(said.logprobs, kept)
    return {
        "kl": None if kept.kind == "unbiased" else float(_divergence(exact_BK, kept_BK).mean()),
        "total_variation": float((exact_BK - kept_BK).abs().sum(dim=1).mean() / 2),
        "top1_agreement": float((kept.top1() == said.logprobs.argmax(dim=1)).double().mean()),
        "gradient_degrees": _gradient_angle(said.logprobs, kept),
    }


def _on_own_classes(logprobs_BC: Tensor, kept: Targets) -> tuple[Tensor, Tensor]:
    """Probabilities as said and as kept, float64: [B, C], or [B, K + 1] with all others last."""
    exact = torch.softmax(logprobs_BC.double(), dim=1)
    values = kept.logprobs.double().exp()
    if kept.ids is None:
        return exact, values
    if kept.kind == "unbiased":
        return exact, torch.zeros_like(exact).scatter_add(1, kept.ids, values)
    assert kept.residual is not None
    others = exact.scatter(1, kept.ids, 0.0).sum(dim=1, keepdim=True)
    return (
        torch.cat([exact.gather(1, kept.ids), others], dim=1),
        torch.cat([values, kept.residual.double()[:, None]], dim=1),
    )


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p/q) − p + q of each row: the KL, and never negative where float32 sums are not quite one."""
    return (p * (p.clamp(min=TINY).log() - q.clamp(min=TINY).log()) - p + q).sum(dim=1)


def _gradient_angle(logprobs_BC: Tensor, kept: Targets) -> float | None:
    logits = logprobs_BC.clamp(min=LOWEST) / 2
    u, v = (_gradient(logits, targets) for targets in (Targets(logprobs_BC.clone()), kept))
    if not u.norm() or not v.norm():
        return None
    u, v = u / u.norm(), v / v.norm()
    # The arc cosine of a product near one would lose half of the digits.
    return math.degrees(2 * math.atan2(float((u - v).norm()), float((u + v).norm())))


def _gradient(logits_BC: Tensor, targets: Targets) -> Tensor:
    student = logits_BC.detach().requires_grad_()
    return torch.autograd.grad(soft_targets(student, targets), student)[0].double()
