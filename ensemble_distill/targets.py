"""What the ensemble said about a batch.

Legend of shape suffixes, here and in losses: B batch, C classes, D feature width, M members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Decoded targets of one head for a batch, and its features by tap.

    logprobs: float32 [B, C], log-probabilities in nats at temperature 1, each row's exp sums to 1.
    features: float32 [B, D] by tap, as ``tap/<member>.<module>``.
    kind: what the numbers are, so that a loss need not know codecs. ``dense``: one for each class.
    """

    logprobs: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    kind: Literal["dense"] = "dense"

    def __len__(self) -> int:
        return len(self.logprobs)

    def at(self, temperature: float) -> Tensor:
        """Log-probabilities at another temperature, float32 [B, C]: p_T ∝ p^(1/T).

        The ensemble was averaged before this: average, then temper.
        """
        if temperature == 1:
            return self.logprobs
        return torch.log_softmax(self.logprobs / temperature, dim=1)

    def to(self, device: torch.device | str) -> Targets:
        features = {name: f.to(device, non_blocking=True) for name, f in self.features.items()}
        return Targets(self.logprobs.to(device, non_blocking=True), features, self.kind)
