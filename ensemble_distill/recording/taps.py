"""From a tap and the shape that it was seen to have to the codec of a plan."""

from __future__ import annotations

from pydantic import ValidationError

from ensemble_distill.codec import Features
from ensemble_distill.config import Tap
from ensemble_distill.errors import UsageError
from ensemble_distill.explain import explain
from ensemble_distill.reduction import channel_axis


def feature_codec(tap: Tap, shape: tuple[int, ...]) -> Features:
    """The codec of a tap's features [B, *shape]; UsageError for one that is too large for a unit, or has no values."""
    axis = 0 if tap.project else channel_axis(tap.reduction, len(shape))
    hint = "reduce it, as with pool, or project it: project=Random(dim=256)"
    try:
        return Features.of(shape, tap.values, axis, take=tap.recipe, project=tap.project, mask=tap.mask)
    except ValidationError as error:
        raise UsageError(f"{tap.field} of shape {list(shape)}: {explain(error, Features)}", hint=hint) from error
