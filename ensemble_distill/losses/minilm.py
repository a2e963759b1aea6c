"""MiniLM: how the tokens of a sequence relate in self-attention, from cached queries, keys and values.

Relations are T×T whatever the width, so the student may be narrower and, but for the first version's attention, have
other heads. They are computed from vectors of T·D values, which a cache holds instead of T×T maps for each head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ensemble_distill.errors import UsageError
from ensemble_distill.losses.geometry import product
from ensemble_distill.losses.rows import Reduction, precise, reduced, same_axes
from ensemble_distill.losses.tokens import over_tokens, pairs

UNSEEN = -1e9
Vectors = tuple[Tensor, Tensor, Tensor]  # queries, keys, values [B, T, D], all heads side by side


def minilm_relation(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    heads: int,
    mask_BT: Tensor | None = None,
    causal: bool = False,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(R_T ‖ R_S), nats: mean over heads and real tokens (1 / (A·|x|)), then rows.

    R = softmax(A Bᵀ / √(D/heads)) of each head, for the two vectors (A, B) [B, T, D] of student and teacher, cut into
    ``heads``. (Q, K): the attention distributions of MiniLM (Wang et al. 2020, L_AT). (V, V): its value relation
    (L_VR). (Q, Q), (K, K), (V, V) with any number of heads: MiniLMv2 (Wang et al. 2021). ``mask`` [B, T] is true on
    real tokens; ``causal``: no token sees later ones. Widths may differ. Float32 (float64 as it is). UsageError
    where a width is no multiple of ``heads``.
    """
    s, t = (_scores(*vectors, heads) for vectors in (student, teacher))
    same_axes("minilm", s, t, "B, heads, T, T", 0, 2)
    seen = pairs(s, mask_BT, causal)
    q, p = (torch.log_softmax(x.masked_fill(~seen, UNSEEN), dim=3) for x in (s, t))
    tokens = (p.exp() * (p - q)).masked_fill(~seen, 0).sum(dim=3).mean(dim=1)
    return reduced(over_tokens(tokens, mask_BT), weights, reduction)


def minilm(
    student: Vectors,
    teacher: Vectors,
    heads: int,
    mask_BT: Tensor | None = None,
    causal: bool = False,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """L_AT + L_VR of the last layer: Wang et al. 2020, eq. 1–4. ``heads`` is the number of both models."""
    relations = (((student[i], student[j]), (teacher[i], teacher[j])) for i, j in ((0, 1), (2, 2)))
    first, second = (minilm_relation(s, t, heads, mask_BT, causal, weights, reduction) for s, t in relations)
    return first + second


def minilm_v2(
    student: Vectors,
    teacher: Vectors,
    heads: int,
    shares: Sequence[float] = (1.0, 1.0, 1.0),
    mask_BT: Tensor | None = None,
    causal: bool = False,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Σ α KL of the Q-Q, K-K and V-V relations of one layer: Wang et al. 2021.

    ``heads`` relation heads: any number that divides both widths. ``shares`` are the α of the three.
    """
    parts = [
        share * minilm_relation((s, s), (t, t), heads, mask_BT, causal, weights, reduction)
        for share, s, t in zip(shares, student, teacher, strict=True)
    ]
    return parts[0] + parts[1] + parts[2]


def _scores(a_BTD: Tensor, b_BTD: Tensor, heads: int) -> Tensor:
    """A Bᵀ / √(D/heads) of each head, [B, heads, T, T]."""
    if a_BTD.ndim != 3 or a_BTD.shape != b_BTD.shape or a_BTD.shape[2] % heads:
        found = f"{list(a_BTD.shape)} and {list(b_BTD.shape)}"
        raise UsageError(f"minilm: expected two [B, T, D] with D a multiple of {heads} heads, found {found}")
    a, b = (precise(x).reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (a_BTD, b_BTD))
    return product(a, b.transpose(2, 3)) / math.sqrt(a.shape[3])
