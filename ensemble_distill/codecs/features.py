"""``features``: a tap's activations in float16, bfloat16, or 8 bits a value with scales."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ensemble_distill.codec import Features
from ensemble_distill.codecs.domain import check_features, require
from ensemble_distill.codecs.packing import pack_ids, unpack_ids
from ensemble_distill.errors import InvalidOutput

LEVELS = 127
_BEYOND = {
    "fp16": "float16 (beyond ±65504, or NaN)",
    "bf16": "bfloat16 (or NaN)",
    "int8": "int8 (beyond 127 · 65504, or NaN)",
}


def encode(
    codec: Features, features_B: Tensor, tap: str = "a feature", mask_BT: Tensor | None = None
) -> dict[str, Tensor]:
    """float32 [B, *dims] to the arrays of the codec; InvalidOutput, naming the tap, for what it would make infinite.

    ``mask``: of a ragged feature, bool [B, T]. Its arrays are padded: the tokens are where they were, the others zero,
    and what stood there is not looked at.
    """
    if codec.mask is None:
        return _whole(codec, features_B, tap)
    assert mask_BT is not None
    return {"mask": pack_ids(mask_BT.long(), 2), **_whole(codec, features_B.masked_fill(~mask_BT[:, :, None], 0), tap)}


def _whole(codec: Features, features_B: Tensor, tap: str) -> dict[str, Tensor]:
    if codec.values == "int8":
        arrays = _quantised(codec, features_B)
        finite = arrays["scale"].isfinite().all()
    else:
        stored = features_B.half() if codec.values == "fp16" else features_B.bfloat16()
        finite = stored.isfinite().all()
        arrays = {"": stored if codec.values == "fp16" else stored.contiguous().view(torch.uint16)}
    if not finite:
        raise InvalidOutput(
            f"{tap} is not finite in {_BEYOND[codec.values]}",
            hint='keep it with values="bf16"' if codec.values == "fp16" else "",
        )
    return arrays


def decode(codec: Features, arrays: Mapping[str, Tensor]) -> Tensor:
    """The (padded) arrays of a codec to float32 [B, *dims]; BadRow where one is not finite."""
    if codec.values == "fp16":
        features = arrays[""].float()
    elif codec.values == "bf16":
        features = arrays[""].view(torch.bfloat16).float()
    else:
        require(arrays["scale"] >= 0, "a scale below zero")
        features = arrays["codes"].float() * spread(codec, arrays["scale"].float())
    check_features(features)
    return features


def mask_of(codec: Features, arrays: Mapping[str, Tensor]) -> Tensor:
    """The mask of a ragged feature, bool [B, T]."""
    return unpack_ids(arrays["mask"], codec.dims[0], 2).bool()


def _quantised(codec: Features, features_B: Tensor) -> dict[str, Tensor]:
    """Codes int8 [B, *dims] and scales float16 [B], or [B, channels] for several axes."""
    features_B = features_B.float()
    others = [i + 1 for i in range(len(codec.dims)) if not codec.shape or i != codec.axis]
    scale = rounded_up(features_B.abs().amax(others) / LEVELS)
    # A row of zeros has the scale 0, and any code of it is 0.
    steps = spread(codec, scale.float()).clamp(min=2**-24)
    return {"codes": (features_B / steps).round().to(torch.int8), "scale": scale}


def rounded_up(values: Tensor) -> Tensor:
    """float32 from 0 on to the next float16 that is not below, so that no code has to be cut off."""
    half = values.half()
    return torch.where(half.float() < values, (half.view(torch.int16) + 1).view(torch.float16), half)


def spread(codec: Features, scale_B: Tensor) -> Tensor:
    """Scales [B] or [B, channels] in the shape that multiplies [B, *dims]."""
    shape = [1] * len(codec.dims)
    if codec.shape:
        shape[codec.axis] = -1
    return scale_B.reshape(len(scale_B), *shape) if codec.shape else scale_B.reshape(-1, *shape)
