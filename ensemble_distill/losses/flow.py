"""Flow of the solution procedure: how the features of one layer go with those of a later one."""

from __future__ import annotations

from torch import Tensor

from ensemble_distill.losses.geometry import product
from ensemble_distill.losses.rows import Reduction, precise, reduced, same_axes


def flow_matrix(first_BMHW: Tensor, second_BNHW: Tensor) -> Tensor:
    """G [B, M, N], G_ij = Σ_hw F1_i F2_j / (H·W): Yim et al. 2017, eq. 1.

    Both maps of the same positions (the paper pools the larger one), float32 (float64 as it is). A cache may hold
    these M·N values instead of the maps.
    """
    same_axes("flow_matrix", first_BMHW, second_BNHW, "B, C, H, W", 0, 2, 3)
    first, second = precise(first_BMHW).flatten(2), precise(second_BNHW).flatten(2)
    return product(first, second.transpose(1, 2)) / first.shape[2]


def fsp(
    student_BMN: Tensor, teacher_BMN: Tensor, weights: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """‖G_T − G_S‖²_F of two flow matrices, mean over rows: Yim et al. 2017, eq. 2 of one pair of layers, λ = 1.

    Matrices [B, M, N] of ``flow_matrix``, of one shape. Float32 (float64 as it is). Sum over pairs of layers.
    """
    same_axes("fsp", student_BMN, teacher_BMN, "B, M, N", 0, 1, 2)
    rows = (precise(teacher_BMN) - precise(student_BMN)).square().sum(dim=(1, 2))
    return reduced(rows, weights, reduction)
