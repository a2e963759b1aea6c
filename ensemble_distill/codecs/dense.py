"""``dense``: one float16 log-probability for each class. The reference that other codecs are held to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from ensemble_distill.config import Config

if TYPE_CHECKING:  # a plan names codecs, and a cache can be checked without torch
    from torch import Tensor


class Dense(Config):
    """float16 log-probabilities, C values a row, 2C bytes.

    A stored value is off by at most 2^-11 of its size or 3e-8 (a log-probability of −8 by .004 nats); the decoded
    row sums to one exactly, since it is normalised again. Logs and not probabilities: float16
    probabilities underflow to 0 below 6e-8, which makes a KL infinite.
    """

    name: Literal["dense"] = "dense"
    classes: int

    def encode(self, logprobs_BC: Tensor) -> Tensor:
        """float32 log-probabilities [B, C] (−inf allowed) to float16 [B, C]."""
        return logprobs_BC.clamp(min=-65504).masked_fill(logprobs_BC.isneginf(), -math.inf).half()

    def decode(self, stored_BC: Tensor) -> Tensor:
        """float16 [B, C] to float32 log-probabilities [B, C] whose exp sums to one."""
        return stored_BC.float().log_softmax(dim=1)
