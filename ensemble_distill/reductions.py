"""Reductions of features: free functions of tensors [B, ...] to float32. Their names stand in reduction.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble_distill.reduction import Attention, AttentionProbs, Reduction, title

# What rounding to bfloat16 may do to a row of probabilities.
TOLERANCE = 0.05


def reduce(reduction: Reduction, value_B: Tensor) -> Tensor:
    """A module's output or input [B, ...] as a feature float32 [B, ...], which shares no memory with it.

    Raises ValueError, in words, for a shape that the reduction does not take.
    """
    if isinstance(reduction, Attention):
        return spatial_attention(_of(reduction, value_B, "[B, C, H, W]", 4), reduction.p)
    if isinstance(reduction, AttentionProbs):
        return attention_probs(value_B, reduction.heads)
    match reduction:
        case "pool":
            return pool(_of(reduction, value_B, "[B, C, ...]"))
        case "gram":
            return gram(_of(reduction, value_B, "[B, C, ...] with positions", least=3))
        case "cls":
            return _copy(_of(reduction, value_B, "[B, T, D]", 3)[:, 0])
        case "tokens":
            return _copy(_of(reduction, value_B, "[B, T, D]", 3))
        case "token_mean":
            return _of(reduction, value_B, "[B, T, D]", 3).float().mean(1)
        case "flatten":
            return _copy(_of(reduction, value_B, "[B, ...]")).flatten(1)
        case "none":
            return _copy(_of(reduction, value_B, "[B, ...]"))
    raise ValueError(f"there is no reduction {reduction!r}")


def pool(features_BC: Tensor) -> Tensor:
    """[B, C, ...] to float32 [B, C]: the mean over all positions."""
    return features_BC.float().flatten(2).mean(2) if features_BC.ndim > 2 else _copy(features_BC)


def spatial_attention(map_BCHW: Tensor, p: float = 2) -> Tensor:
    """Σ_c |A_c|^p, float32 [B, H, W] (Zagoruyko & Komodakis 2017, section 3.1: F_sum^p), not normalised."""
    return _copy(map_BCHW).abs().pow(p).sum(1)


def gram(features_BC: Tensor) -> Tensor:
    """Products of the channels' positions, divided by their number: F Fᵀ / (C N), float32 [B, C, C].

    As in Johnson, Alahi & Fei-Fei 2016, eq. 3; symmetric and positive semidefinite.
    """
    with torch.autocast(features_BC.device.type, enabled=False):
        flat = _copy(features_BC).flatten(2)
        return torch.bmm(flat, flat.transpose(1, 2)) / (flat.shape[1] * flat.shape[2])


def attention_probs(probs: Tensor, heads: str = "mean") -> Tensor:
    """[B, heads, T, T] as it is, or its mean over the heads, float32 [B, T, T]; what is [B, T, T] is such a mean."""
    if probs.ndim == 3 and heads == "mean":
        return _copy(_floating(probs))
    found = _of(AttentionProbs(), probs, "[B, heads, T, T]", 4)
    return found.float().mean(1) if heads == "mean" else _copy(found)


def check_values(reduction: Reduction, feature_B: Tensor) -> None:
    """ValueError for attention probabilities that are none: below 0, or rows that do not sum to one."""
    if not isinstance(reduction, AttentionProbs):
        return
    off = float((feature_B.detach().sum(-1) - 1).abs().max())
    if not off <= TOLERANCE or float(feature_B.detach().min()) < 0:
        raise ValueError("attention_probs needs probabilities: values from 0 on whose last axis sums to one")


def _of(reduction: Reduction, value_B: Tensor, wanted: str, axes: int | None = None, least: int = 2) -> Tensor:
    if (axes is not None and value_B.ndim != axes) or value_B.ndim < least:
        raise ValueError(f"{title(reduction)} needs {wanted}, found {list(value_B.shape)}")
    return _floating(value_B)


def _floating(value_B: Tensor) -> Tensor:
    if not value_B.is_floating_point():
        raise ValueError(f"features are floating point numbers, found {str(value_B.dtype).removeprefix('torch.')}")
    return value_B


def _copy(value_B: Tensor) -> Tensor:
    """float32, in memory of its own: a later module may work in place, also on what a gradient would need."""
    return value_B.to(torch.float32, copy=True)
