"""Attention transfer: where a convolutional network is active, where a transformer looks."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ensemble_distill.errors import UsageError
from ensemble_distill.losses.geometry import by_largest, unit
from ensemble_distill.losses.rows import Reduction, precise, reduced, same_axes, same_shape
from ensemble_distill.losses.tokens import over_tokens

FLOOR = math.exp(-30)


def attention_map(features_BCHW: Tensor, p: float = 2.0) -> Tensor:
    """Q/‖Q‖₂ [B, HW], Q = vec(Σ_c |A_c|^p): Zagoruyko & Komodakis 2017, section 3.1 (F_sum^p).

    Features [B, C, ...]; float32 (float64 as it is). Blind to scale and to the order of the channels; zero features
    have a map of zeros. A cache may hold these HW values instead of the features. UsageError unless p ≥ 1.
    """
    if p < 1:
        raise UsageError(f"p={p}: expected 1 or more")
    if features_BCHW.ndim < 3:
        raise UsageError(f"attention_map: expected [B, C, ...], found {list(features_BCHW.shape)}")
    scaled_BCN = by_largest(precise(features_BCHW).flatten(2), 1, 2)
    return unit(scaled_BCN.abs().pow(p).sum(dim=1))


def attention_transfer(
    student_map_BN: Tensor,
    teacher_map_BN: Tensor,
    squared: bool = True,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Distance of two attention maps [B, N], each divided by its norm: mean over rows.

    ``squared`` (the authors' code): the mean over positions of (Q_S/‖Q_S‖ − Q_T/‖Q_T‖)². Otherwise their L2 distance
    (Zagoruyko & Komodakis 2017, eq. 2, without β/2), whose gradient jumps where the maps are equal (there it is 0). A
    block each: sum over blocks, as the paper does.
    """
    same_axes("attention_transfer", student_map_BN, teacher_map_BN, "B, N", 0, 1)
    difference = unit(precise(student_map_BN)) - unit(precise(teacher_map_BN))
    rows = difference.square().mean(dim=1) if squared else torch.linalg.vector_norm(difference, dim=1)
    return reduced(rows, weights, reduction)


def head_attention(
    student_BHTT: Tensor,
    teacher_BHTT: Tensor,
    divergence: Literal["kl", "mse"] = "kl",
    mask_BT: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Distance of attention probabilities averaged over heads, of any number of heads each: mean over rows.

    Probabilities [B, heads, queries, keys], those of padding zero; ``mask_BT`` says which queries are real. ``kl``:
    KL(teacher ‖ student), nats, mean over queries: MobileBERT's attention transfer (Sun et al. 2020, section 3.4) on
    averaged heads. ``mse``: mean over queries and keys. Averaging before comparing is what TextBrewer does (Yang et al.
    2020, attention_mse and attention_ce of means). Probabilities below e^−30 count as e^−30 in the logs.
    """
    if divergence not in ("kl", "mse"):
        raise UsageError(f"divergence={divergence!r}: expected 'kl' or 'mse'")
    same_axes("head_attention", student_BHTT, teacher_BHTT, "B, heads, queries, keys", 0, 2, 3)
    q, p = (precise(x).mean(dim=1) for x in (student_BHTT, teacher_BHTT))
    same_shape("head_attention", q, p)
    if divergence == "mse":
        tokens_BT = (q - p).square().mean(dim=2)
    else:
        tokens_BT = (p * (p.clamp(min=FLOOR).log() - q.clamp(min=FLOOR).log())).sum(dim=2)
    return reduced(over_tokens(tokens_BT, mask_BT), weights, reduction)
