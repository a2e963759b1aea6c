"""Directions, products and deviations that stay exact and finite at zero, at large values and under autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor, dim: int = 1) -> Tensor:
    """x / ‖x‖₂ along an axis; zero, with gradient zero, where x is zero.

    Divided by its largest value first, so that no square is beyond the range of floats; the direction does not depend
    on it, and neither does the gradient. NaN stays NaN.
    """
    x = by_largest(x, dim)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return torch.where(norm == 0, 0, x / norm.clamp(min=1))


def by_largest(x: Tensor, *dims: int) -> Tensor:
    """x divided by its largest absolute value along the axes, which is taken as a constant; zero stays zero."""
    largest = x.detach().abs().amax(dim=dims, keepdim=True)
    return x / torch.where(largest > 0, largest, 1)


def centred(x: Tensor, dim: int) -> Tensor:
    """x less its mean along an axis; exactly zero where x is constant but for rounding."""
    deviation = x - x.mean(dim=dim, keepdim=True)
    rounding = 8 * torch.finfo(x.dtype).eps * x.detach().abs().amax(dim=dim, keepdim=True)
    constant = deviation.detach().abs().amax(dim=dim, keepdim=True) <= rounding
    return deviation.masked_fill(constant, 0)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the precision of a and b, also where autocast would have half of it."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def distances(x_BD: Tensor) -> Tensor:
    """‖xᵢ − xⱼ‖₂ of all pairs of rows [B, B], from differences: rows that are nearly equal lose nothing."""
    return torch.cdist(x_BD, x_BD, compute_mode="donot_use_mm_for_euclid_dist")
