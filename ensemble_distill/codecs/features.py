"""``features``: a tap's pooled activations in float16."""

from __future__ import annotations

from torch import Tensor

from ensemble_distill.codecs.domain import check_features
from ensemble_distill.errors import InvalidOutput


def encode(features_BD: Tensor) -> Tensor:
    """float32 [B, D] to float16 [B, D]; InvalidOutput beyond ±65504, which float16 would make infinite."""
    stored = features_BD.half()
    if not stored.isfinite().all():
        raise InvalidOutput("a feature is not finite in float16 (beyond ±65504, or NaN)")
    return stored


def decode(stored_BD: Tensor) -> Tensor:
    """float16 [B, D] to float32 [B, D]; BadRow where one is not finite."""
    check_features(stored_BD)
    return stored_BD.float()
