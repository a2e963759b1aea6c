"""What all losses share: precision, the mean over rows, and the sentences that refuse a batch.

A loss is a mean over rows. ``weights`` [B] make it Σ w·loss / Σ w; ``reduction="none"`` gives the rows' own values [B].
Losses that compare rows with each other have neither: a pair belongs to two rows.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ensemble_distill.errors import UsageError
from ensemble_distill.losses.logits import mean

Reduction = Literal["mean", "none"]


def precise(x: Tensor) -> Tensor:
    """float64 as it is, any other dtype as float32."""
    return x if x.dtype == torch.float64 else x.float()


def reduced(rows_B: Tensor, weights_B: Tensor | None, reduction: Reduction) -> Tensor:
    """The mean over rows or, of ``"none"``, the rows. UsageError for weights without a mean, or another word."""
    if reduction not in ("mean", "none"):
        raise UsageError(f"reduction={reduction!r}: expected 'mean' or 'none'")
    if reduction == "mean":
        return mean(rows_B, weights_B)
    if weights_B is not None:
        raise UsageError("weights weight the mean over rows, and reduction='none' asks for none")
    return rows_B


def same_shape(loss: str, student: Tensor, teacher: Tensor) -> None:
    """UsageError unless both have one shape."""
    if student.shape != teacher.shape:
        raise UsageError(f"{loss}: student {_shape(student)} and teacher {_shape(teacher)} differ in shape")


def same_rows(loss: str, student: Tensor, teacher: Tensor, least: int = 1) -> None:
    """UsageError unless both are [B, width] of as many rows, and these are enough to be compared."""
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise UsageError(f"{loss}: expected [B, width] of as many rows, found {_shape(student)} and {_shape(teacher)}")
    if len(student) < least:
        raise UsageError(f"{loss}: a batch of {len(student)} has too few rows to be compared, at least {least}")


def same_axes(loss: str, student: Tensor, teacher: Tensor, names: str, *axes: int) -> None:
    """UsageError unless both have as many axes as ``names``, and are of one size along some of them."""
    fit = student.ndim == teacher.ndim == names.count(",") + 1
    if not fit or any(student.shape[i] != teacher.shape[i] for i in axes):
        sizes = ", ".join(names.split(", ")[i] for i in axes)
        found = f"{_shape(student)} and {_shape(teacher)}"
        raise UsageError(f"{loss}: expected [{names}] of one {sizes}, found {found}")


def _shape(x: Tensor) -> str:
    return str(list(x.shape))
