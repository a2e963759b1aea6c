"""A student's log-probabilities on kept classes, and of all others together, without a second [batch, vocabulary].

Every loss on sparse targets is written on top of this one function. Its backward pass writes the one gradient that
logits need anyway; nothing else of the vocabulary's size is kept between the passes.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 13


def bucketed_log_probs(
    logits_BV: Tensor, ids_BK: Tensor, temperature: float = 1.0, rest: bool = True
) -> tuple[Tensor, Tensor]:
    """log q of the classes ``ids`` [B, K], and log(1 − Σ q) of all others together [B]; q = softmax(logits / T).

    Logits of any float dtype; computed in float32. An id may stand twice in a row. ``rest=False`` leaves out the second
    one (zeros), which costs a pass. The others' log-probability is a log-sum-exp over them, since log1p of one minus a
    float32 sum is 1% off at −12 and −inf at −19. It is −inf where nothing is left.
    """
    kept, others = _Bucketed.apply(logits_BV, ids_BK, temperature, rest)  # type: ignore[no-untyped-call]
    return cast(Tensor, kept), cast(Tensor, others)


class _Bucketed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float, rest: bool) -> tuple[Tensor, Tensor]:
        top = logits.amax(dim=1, keepdim=True).float() / temperature
        total, others = (torch.zeros_like(top[:, 0], dtype=torch.float64) for _ in range(2))
        for first in range(0, logits.shape[1], CHUNK):
            e = _exp(logits, first, top, temperature)
            total += e.sum(dim=1)
            if rest:
                _zero(e, ids - first)
                others += e.sum(dim=1)
        log_total = total.log().float() + top[:, 0]
        log_others = others.log().float() + top[:, 0] if rest else torch.zeros_like(log_total)
        if rest and bool((few := others < 1e-30).any()):
            # All but nothing is left beside the kept: once more, about the largest of what is left.
            left = (logits[few].float() / temperature).scatter(1, ids[few], -math.inf)
            log_others[few] = torch.logsumexp(left, dim=1)
        ctx.save_for_backward(logits, ids, log_total, log_others)
        ctx.temperature, ctx.rest = temperature, rest
        return logits.gather(1, ids).float() / temperature - log_total[:, None], log_others - log_total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ids, log_total, log_others = ctx.saved_tensors
        kept, others = grads[0], grads[1] if ctx.rest else torch.zeros_like(log_total)
        both = (kept.sum(dim=1) + others)[:, None]  # what the normaliser gets
        grad = torch.empty_like(logits)
        # exp(z − others) is q · exp(total − others), unless that is beyond float32: then it is computed as it stands.
        apart = log_total - log_others
        usual = not ctx.rest or not bool((apart > 80).any())
        scale = others[:, None] * apart.exp()[:, None] - both if ctx.rest and usual else -both
        for first in range(0, logits.shape[1], CHUNK):
            part = _exp(logits, first, log_total[:, None], ctx.temperature).mul_(scale / ctx.temperature)
            if not usual:
                share = _exp(logits, first, log_others[:, None], ctx.temperature)
                part += share.mul_(others[:, None] / ctx.temperature)
            grad[:, first : first + CHUNK] = part
        q = (logits.gather(1, ids).float() / ctx.temperature - log_total[:, None]).exp()
        grad.scatter_(1, ids, (-both * q / ctx.temperature).to(grad.dtype))  # the kept are none of the others
        grad.scatter_add_(1, ids, (kept / ctx.temperature).to(grad.dtype))
        return grad, None, None, None


def _exp(logits: Tensor, first: int, shift: Tensor, temperature: float) -> Tensor:
    """exp(logits / T − shift) of a chunk of the vocabulary, float32, in memory of its own."""
    chunk = logits[:, first : first + CHUNK]
    return torch.sub(chunk.float() / temperature if temperature != 1 else chunk, shift).exp_()


def _zero(values: Tensor, ids: Tensor) -> Tensor:
    """Set the values at these places of a chunk to 0, in place; places beyond the chunk are left out."""
    width = values.shape[1]
    inside = (ids >= 0) & (ids < width)
    if bool(inside.any()):
        row, entry = inside.nonzero(as_tuple=True)
        values[row, ids[row, entry]] = 0
    return values
