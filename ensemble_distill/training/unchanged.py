"""Functions of a pipeline look at targets and features, and change none: other terms are given the same tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields

from torch import Tensor

from ensemble_distill.errors import UsageError
from ensemble_distill.targets import Targets


@contextlib.contextmanager
def unchanged(who: str, *seen: Tensor | None) -> Iterator[None]:
    """UsageError if one of these is written to inside, by the count of writes that torch keeps for each tensor."""
    tensors = [tensor for tensor in seen if tensor is not None]
    before = [tensor._version for tensor in tensors]
    yield
    if before != [tensor._version for tensor in tensors]:
        raise UsageError(
            f"{who} writes into a tensor that it was given, which other terms are given too",
            hint="clone() it first, or use operations whose names do not end in _",
        )


def tensors_of(targets: Targets) -> list[Tensor]:
    """All that a function is shown of a batch."""
    values = [getattr(targets, field.name) for field in fields(targets)]
    held = [*values, *targets.features.values(), *targets.masks.values()]
    return [value for value in held if isinstance(value, Tensor)]
