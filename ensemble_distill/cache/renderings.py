"""Renderings of a few samples as a plan keeps them, by which a changed transform is found. No torch.

They are in the capture section and not in the reading section: two machines may render the last bit differently, and
their captures are nevertheless equal. They are compared with a tolerance and never digested but as part of the plan.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from pydantic import FailFast, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ensemble_distill.frozen import Config, without_empty

AUDIT_VIEWS = 3  # of which the first is the sample as its source gives it
MAX_RENDERINGS = 64
MAX_CHANNELS = 64
MAX_SIDE = 8

_Side = Annotated[int, Field(ge=0, le=MAX_SIDE)]


class Rendering(Config):
    """A sample in a view, as levels of 0..255 of at most 8×8 cells a channel: ``shape`` [C, h, w], ``cells`` in hex.

    ``values``: the cells themselves, as little-endian float32 in hex, where levels lose some.
    """

    sample: int = Field(ge=0, lt=MAX_RENDERINGS)
    key: str = Field(pattern=r"^[0-9a-f]{32}$")
    view: int = Field(ge=0, lt=2**24)
    shape: tuple[Annotated[int, Field(ge=0, le=MAX_CHANNELS)], _Side, _Side]
    cells: str = Field(pattern=r"^[0-9a-f]*$", max_length=2 * MAX_CHANNELS * MAX_SIDE**2)
    values: str = Field("", pattern=r"^[0-9a-f]*$", max_length=8 * MAX_CHANNELS * MAX_SIDE**2)

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(handler(self), "values")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.cells) != 2 * math.prod(self.shape):
            raise ValueError(f"{len(self.cells)} digits are no cells of shape {list(self.shape)}")
        if self.values and len(self.values) != 8 * math.prod(self.shape):
            raise ValueError(f"{len(self.values)} digits are no values of shape {list(self.shape)}")
        return self


Renderings = Annotated[tuple[Rendering, ...], FailFast(), Field(max_length=MAX_RENDERINGS)]
