"""How members become one distribution. All in log space, float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["mean_probs", "mean_logits"]


@dataclass(frozen=True)
class Mixture:
    """Which members, with which shares (any positive sum), and how they are combined.

    ``temperature`` is applied after averaging, ``tempered`` (by member, one where it is not named) before: both to the
    log-probabilities as they were captured.
    """

    shares: tuple[tuple[str, float], ...]
    combine: Rule
    temperature: float = 1.0
    tempered: tuple[tuple[str, float], ...] = ()

    @property
    def linear(self) -> bool:
        """Whether it is a plain weighted mean of probabilities, which needs no more of them than those asked for."""
        return self.combine == "mean_probs" and self.temperature == 1 and not self.tempered


def combine(logits_MBC: Sequence[Tensor], shares: Sequence[float], rule: str) -> Tensor:
    """Log-probabilities [B, C] of the ensemble from the members' logits [B, C] and shares (any positive sum).

    mean_probs: log Σ_m w_m softmax(z_m), the mixture. mean_logits: log_softmax(Σ_m w_m z_m), the normalised
    geometric mean. M copies of one member give that member.
    """
    total = sum(shares)
    weights = [share / total for share in shares]
    if rule == "mean_logits":
        logprobs = [torch.log_softmax(z, dim=1) for z in logits_MBC]  # a shift per member drops out
        mean = torch.stack([w * p for w, p in zip(weights, logprobs, strict=True)]).sum(0)
        return torch.log_softmax(mean, dim=1)
    terms = [torch.log_softmax(z, dim=1) + torch.tensor(w).log() for z, w in zip(logits_MBC, weights, strict=True)]
    return torch.log_softmax(torch.logsumexp(torch.stack(terms), dim=0), dim=1)
