"""What terms learn: maps from a student's feature to the shape of a cached one (Romero et al. 2015, section 2.2), and
the Gaussians and projections of two losses.

They train with the student, are saved apart from it, and no exported student needs them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ensemble_distill import terms
from ensemble_distill.errors import UsageError
from ensemble_distill.losses import Gaussian, Projection
from ensemble_distill.terms import Adapter

Shape = Sequence[int]


class LastAxis(nn.Linear):
    """A linear map of the last axis: float32 [B, ..., D] to [B, ..., D']."""


class Conv1x1(nn.Conv2d):
    """A linear map of the channels of a map, the same at all positions: [B, C, H, W] to [B, C', H, W]."""

    def __init__(self, channels: int, wanted: int) -> None:
        super().__init__(channels, wanted, kernel_size=1)


class Projections(nn.Module):
    """Both g of CRD: features [B, width] of student and teacher to unit vectors [B, size]."""

    def __init__(self, student: int, teacher: int, size: int) -> None:
        super().__init__()
        self.student, self.teacher = Projection(student, size), Projection(teacher, size)

    def forward(self, student_BD: Tensor, teacher_BE: Tensor) -> tuple[Tensor, Tensor]:
        return self.student(student_BD), self.teacher(teacher_BE)


def learn(who: str, term: terms.FeatureTerm, student: Shape, teacher: Shape) -> nn.Module | None:
    """The module that a term learns for features [B, *student] and [B, *teacher]; None where it learns nothing.

    UsageError, in the name of ``who``, where the shapes do not fit the term.
    """
    match term:
        case terms.Adapted():
            return make_adapter(who, term.adapter, student, teacher)
        case terms.VariationalInformation():
            return _gaussian(who, list(student), list(teacher), term.initial)
        case terms.Contrastive():
            return Projections(math.prod(student), math.prod(teacher), term.size)
    return None


def _gaussian(who: str, student: list[int], teacher: list[int], initial: float) -> Gaussian:
    if len(student) != len(teacher) or len(student) not in (1, 3) or student[1:] != teacher[1:]:
        raise UsageError(
            f"{who}: the student's feature has shape {student}, the cached one {teacher}; expected vectors [C], "
            "or maps [C, H, W] of equal height and width",
            hint="choose another module, or reduction=pool of both",
        )
    return Gaussian(student[0], teacher[0], positions=len(student) == 3, initial=initial)


def make_adapter(who: str, kind: Adapter, student: Shape, teacher: Shape) -> nn.Module | None:
    """The module that takes features [B, *student] to [B, *teacher]; None where there is nothing to do.

    UsageError, in the name of ``who``, where the shapes do not fit this kind; ``auto``: where they fit none.
    """
    student, teacher = list(student), list(teacher)
    chosen = _chosen(student, teacher) if kind == "auto" else kind
    if chosen == "identity" and student == teacher:
        return None
    if chosen == "linear" and student and student[:-1] == teacher[:-1]:
        return LastAxis(student[-1], teacher[-1])
    if chosen == "conv1x1" and len(student) == 3 and student[1:] == teacher[1:]:
        return Conv1x1(student[0], teacher[0])
    needs = {
        "identity": "equal shapes",
        "linear": "shapes that are equal up to the last axis",
        "conv1x1": "maps [C, H, W] of equal height and width",
        "auto": "shapes that differ in the last axis, or in the channels of maps [C, H, W]",
    }
    raise UsageError(
        f"{who}: the student's feature has shape {student}, the cached one {teacher}; "
        f"adapter={kind!r} needs {needs[kind]}",
        hint="choose another module, or a reduction of both that drops what differs, such as pool",
    )


def _chosen(student: list[int], teacher: list[int]) -> Adapter:
    """The kind that ``auto`` stands for; ``auto`` itself where there is none."""
    if student == teacher:
        return "identity"
    if len(student) == len(teacher) == 3 and student[1:] == teacher[1:]:
        return "conv1x1"
    return "linear" if student and student[:-1] == teacher[:-1] else "auto"


def together(features_B: Sequence[Tensor], combine: str, axis: int) -> Tensor:
    """Cached features of one batch as one: their mean, or side by side along ``axis`` (without the batch)."""
    if len(features_B) == 1:
        return features_B[0]
    return torch.stack(list(features_B)).mean(0) if combine == "mean" else torch.cat(list(features_B), dim=axis + 1)


def shape_together(who: str, shapes: Sequence[Shape], combine: str, axis: int) -> list[int]:
    """The shape of that; UsageError for shapes that do not fit together."""
    first, *others = [list(shape) for shape in shapes]
    same = [shape[:axis] + shape[axis + 1 :] if combine == "concat" else shape for shape in (first, *others)]
    if any(len(o) != len(first) for o in others) or any(shape != same[0] for shape in same):
        but = f", but for axis {axis}" if combine == "concat" else ""
        raise UsageError(f"{who}: taps of shapes {[first, *others]} cannot be combined: they must be equal{but}")
    return first if combine == "mean" else [*first[:axis], sum(s[axis] for s in (first, *others)), *first[axis + 1 :]]
