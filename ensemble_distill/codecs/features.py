"""``features``: a tap's pooled activations in float16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ensemble_distill.config import Config
from ensemble_distill.errors import InvalidOutput

if TYPE_CHECKING:  # a plan names codecs, and a cache can be checked without torch
    from torch import Tensor


class Features(Config):
    """float16 features, D values a row, 2D bytes; off by at most 2^-11 of their size."""

    name: Literal["features"] = "features"
    width: int

    def encode(self, features_BD: Tensor) -> Tensor:
        """float32 [B, D] to float16 [B, D]; InvalidOutput beyond ±65504, which float16 would make infinite."""
        stored = features_BD.half()
        if not stored.isfinite().all():
            raise InvalidOutput("a feature is not finite in float16 (beyond ±65504, or NaN)")
        return stored

    def decode(self, stored_BD: Tensor) -> Tensor:
        """float16 [B, D] to float32 [B, D]."""
        return stored_BD.float()
