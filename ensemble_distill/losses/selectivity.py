"""Neuron selectivity transfer: which patterns over positions the channels of a feature map respond to."""

from __future__ import annotations

from torch import Tensor

from ensemble_distill.losses.geometry import product, unit
from ensemble_distill.losses.rows import Reduction, precise, reduced, same_axes


def nst(
    student_BCHW: Tensor,
    teacher_BDHW: Tensor,
    degree: int = 2,
    offset: float = 0.0,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Squared MMD between the channels of two feature maps, mean over rows: Huang & Wang 2017.

    mean k(t, t') + mean k(s, s') − 2 mean k(t, s) over pairs of channels, each a vector over positions divided by its
    L2 norm, with the polynomial kernel k(x, y) = (x·y + offset)^degree; the paper takes degree 2, offset 0. Maps
    [B, C, H, W] of the same positions and any numbers of channels; float32 (float64 as it is). Blind to the channels'
    order and scale; zero wherever both have the same mix of patterns.
    """
    same_axes("nst", student_BCHW, teacher_BDHW, "B, C, H, W", 0, 2, 3)
    s, t = (unit(precise(x).flatten(2), dim=2) for x in (student_BCHW, teacher_BDHW))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (product(a, b.transpose(1, 2)) + offset).pow(degree).mean(dim=(1, 2))

    return reduced(kernel(t, t) + kernel(s, s) - 2 * kernel(t, s), weights, reduction)
