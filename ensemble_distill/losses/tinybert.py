"""TinyBERT: hidden states and attention scores, token by token, layer by layer."""

from __future__ import annotations

from torch import Tensor

from ensemble_distill.errors import UsageError
from ensemble_distill.losses.rows import Reduction, precise, reduced, same_axes
from ensemble_distill.losses.tokens import checked, over_tokens, pairs


def tinybert_hidden(
    student_BTD: Tensor,
    teacher_BTD: Tensor,
    mask_BT: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """MSE of hidden states (Jiao et al. 2020, eq. 8) or embeddings (eq. 9): mean over width and real tokens, then rows.

    [B, T, D] of one shape: a narrower student's after its learned W_h (``regressor``). ``mask`` [B, T] is true on real
    tokens. Float32 (float64 as it is).
    """
    same_axes("tinybert_hidden", student_BTD, teacher_BTD, "B, T, D", 0, 1, 2)
    tokens = (precise(student_BTD) - precise(teacher_BTD)).square().mean(dim=2)
    return reduced(over_tokens(tokens, mask_BT), weights, reduction)


def tinybert_attention(
    student_BHTT: Tensor,
    teacher_BHTT: Tensor,
    mask_BT: Tensor | None = None,
    causal: bool = False,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """MSE of attention scores before the softmax: Jiao et al. 2020, eq. 7.

    [B, heads, T, T] of one shape, mean over heads and the pairs of real tokens that see each other, then rows. What a
    pair that does not see each other holds (−inf, −10000) is not looked at. Float32 (float64 as it is).
    """
    same_axes("tinybert_attention", student_BHTT, teacher_BHTT, "B, heads, T, T", 0, 1, 2, 3)
    seen = pairs(student_BHTT, mask_BT, causal)
    if mask_BT is not None:
        seen = seen & checked(mask_BT, *seen.shape[::3])[:, None, :, None]
    student, teacher = (precise(x).masked_fill(~seen, 0) for x in (student_BHTT, teacher_BHTT))
    count = seen.sum(dim=(1, 2, 3)).clamp(min=1) * student.shape[1]
    return reduced((student - teacher).square().sum(dim=(1, 2, 3)) / count, weights, reduction)


def uniform_layers(student_layers: int, teacher_layers: int) -> list[int]:
    """g(m) of Jiao et al. 2020, section 4: the teacher's layer, from 1, for each of the student's, evenly spaced."""
    if not 1 <= student_layers <= teacher_layers or teacher_layers % student_layers:
        raise UsageError(f"{teacher_layers} layers of a teacher are no multiple of a student's {student_layers}")
    step = teacher_layers // student_layers
    return [step * m for m in range(1, student_layers + 1)]
