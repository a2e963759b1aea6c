"""Relational distillation: distances and angles between the rows of a batch. Widths of the features may differ."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ensemble_distill.errors import UsageError
from ensemble_distill.losses.geometry import distances, product, unit
from ensemble_distill.losses.rows import precise, same_rows


def rkd_distance(student_BD: Tensor, teacher_BE: Tensor) -> Tensor:
    """Mean over pairs i ≠ j of Huber(ψ_D(t_i, t_j), ψ_D(s_i, s_j)): Park et al. 2019, eq. 4–7.

    ψ_D = ‖x_i − x_j‖₂ / μ, μ the mean distance over the same pairs (eq. 5), Huber with δ = 1 (eq. 7). The paper sums
    over pairs; a mean does not grow with the batch. Features [B, D] and [B, E]; float32 (float64 as it is). Blind to
    scale, shift and rotation of either feature. Rows that are equal have distance 0 and gradient 0. UsageError below
    two rows.
    """
    same_rows("rkd_distance", student_BD, teacher_BE, least=2)
    b = len(student_BD)
    errors = F.huber_loss(_relative(precise(student_BD)), _relative(precise(teacher_BE)), reduction="sum")
    return errors / (b * (b - 1))


def rkd_angle(student_BD: Tensor, teacher_BE: Tensor, chunk: int = 16) -> Tensor:
    """Mean over triplets i, j, k of distinct rows of Huber(ψ_A(t), ψ_A(s)): Park et al. 2019, eq. 7–9.

    ψ_A = cos ∠ x_i x_j x_k = ⟨e_ij, e_kj⟩, e_ij = (x_i − x_j)/‖x_i − x_j‖₂ (eq. 8); zero where x_i = x_j. Features
    [B, D] and [B, E]; float32 (float64 as it is). Blind to scale, shift and rotation. The vertices j go in chunks,
    which the backward pass computes again: memory is chunk·B·(B + D), not B³. UsageError below three rows or of a
    chunk below 1.
    """
    same_rows("rkd_angle", student_BD, teacher_BE, least=3)
    if chunk < 1:
        raise UsageError(f"chunk={chunk}: expected 1 or more")
    b = len(student_BD)
    student, teacher = narrowed(precise(student_BD)), narrowed(precise(teacher_BE))
    total = student.new_zeros(())
    for first in range(0, b, chunk):
        part: Tensor = checkpoint(
            _angle_errors, student, teacher, first, chunk, use_reentrant=False, preserve_rng_state=False
        )
        total = total + part
    return total / (b * (b - 1) * (b - 2))


def narrowed(x_BD: Tensor) -> Tensor:
    """Rows [B, min(B, D)] with the same differences but for a rotation: R of x − mean = R Q, where D is above B.

    Of what needs no gradient; anything else is given back as it is. Rows that are equal stay equal to the bit: the
    direction from one to the other is zero, and not that of a rounding error.
    """
    if x_BD.shape[1] <= len(x_BD) or x_BD.requires_grad:
        return x_BD
    r: Tensor = torch.linalg.qr((x_BD - x_BD.mean(dim=0)).T, mode="r").R
    first_equal_B = (distances(x_BD) == 0).int().argmax(dim=1)
    return r.T[first_equal_B]


def _relative(x: Tensor) -> Tensor:
    """Distances [B, B] by their mean over pairs of different rows; zeros where all rows are equal."""
    d = distances(x)
    mean = d.sum() / (len(x) * (len(x) - 1))
    return d / torch.where(mean > 0, mean, 1)


def _angle_errors(student: Tensor, teacher: Tensor, first: int, chunk: int) -> Tensor:
    """The sum of errors over the triplets whose vertex is one of a chunk of rows."""
    errors = F.huber_loss(_cosines(student, first, chunk), _cosines(teacher, first, chunk), reduction="none")
    same = torch.eye(len(student), dtype=torch.bool, device=student.device)  # i = k; of i = j and k = j both are 0
    return errors.masked_fill(same, 0).sum()


def _cosines(x: Tensor, first: int, chunk: int) -> Tensor:
    """⟨e_ij, e_kj⟩ of the vertices j of a chunk, [chunk, B, B]."""
    e = unit(x[None, :] - x[first : first + chunk, None], dim=2)
    return product(e, e.transpose(1, 2))
