"""Means over the real tokens of each row, and which pairs of tokens see each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble_distill.errors import UsageError


def over_tokens(values_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The mean over the real tokens of each row, [B]; ``mask`` is true (or 1) on these. A row of none has 0."""
    if mask_BT is None:
        return values_BT.mean(dim=1)
    real = checked(mask_BT, values_BT.shape[0], values_BT.shape[1])
    return values_BT.masked_fill(~real, 0).sum(dim=1) / real.sum(dim=1).clamp(min=1)


def pairs(scores_BHTT: Tensor, mask_BT: Tensor | None, causal: bool) -> Tensor:
    """Which keys each query sees, bool [B, 1, T, T]: those of real tokens and, if ``causal``, not of later ones."""
    b, _, t, _ = scores_BHTT.shape
    seen = torch.ones(b, 1, t, t, dtype=torch.bool, device=scores_BHTT.device)
    if causal:
        seen = seen.tril()
    return seen if mask_BT is None else seen & checked(mask_BT, b, t)[:, None, None, :]


def checked(mask_BT: Tensor, rows: int, tokens: int) -> Tensor:
    """The mask as bool; UsageError where it is of another shape."""
    if mask_BT.shape != (rows, tokens):
        raise UsageError(f"mask: expected {[rows, tokens]} (rows, tokens), found {list(mask_BT.shape)}")
    return mask_BT.bool()
