"""What held-out labels say about an ensemble: temperatures, and shares. Both are convex problems, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A member that never errs on the held-out rows would be sharpened without end, one that knows nothing flattened.
COLDEST, HOTTEST = 0.05, 20.0
LOWEST = -65504.0  # what stands for a label of probability zero, as in all statistics


def fit_temperature(logprobs_BC: Tensor, labels_B: Tensor) -> float:
    """The T in [0.05, 20] whose softmax(log p / T) gives the labels the least NLL (Guo et al. 2017, section 4.2).

    In β = 1/T the NLL, logsumexp(β log p) − β log p(label), is convex: the root of its derivative is found by halving.
    """
    logs = logprobs_BC.double().clamp(min=LOWEST)
    label = logs.gather(1, labels_B[:, None]).mean()

    def slope(beta: float) -> float:
        return float((torch.softmax(beta * logs, dim=1) * logs).sum(dim=1).mean() - label)

    low, high = 1 / HOTTEST, 1 / COLDEST
    if slope(low) >= 0:
        return HOTTEST
    if slope(high) <= 0:
        return COLDEST
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


@dataclass(frozen=True)
class Shares:
    """Shares that sum to one, the mean NLL of the labels under their mixture, and how far from the best it may be."""

    shares: tuple[float, ...]
    nll: float
    gap: float


def fit_shares(label_logprobs_BM: Tensor, *, tolerance: float = 1e-7, rounds: int = 20_000) -> Shares:
    """The shares w of the mixture Σ w p whose NLL on the labels is least, from each member's log p(label) [B, M].

    The NLL −mean log Σ w p is convex in w. Each round of w ← w · mean(p / Σ w p) lowers it (expectation maximisation);
    at any w the best is at most log max mean(p / Σ w p) lower, which is the ``gap`` and ends the search.
    """
    logs = label_logprobs_BM.double().clamp(min=LOWEST)
    # A row's likelihoods only matter relative to each other.
    likelihood = (logs - logs.amax(dim=1, keepdim=True)).exp()
    shares = torch.full((logs.shape[1],), 1 / logs.shape[1], dtype=torch.float64)
    gap = math.inf
    for _ in range(rounds):
        gain = (likelihood / (likelihood @ shares)[:, None]).mean(dim=0)
        if (gap := math.log(float(gain.max()))) <= tolerance:
            break
        shares = shares * gain
        shares = shares / shares.sum()
    return Shares(tuple(shares.tolist()), mixture_nll(label_logprobs_BM, shares), max(gap, 0.0))


def mixture_nll(label_logprobs_BM: Tensor, shares_M: Tensor) -> float:
    """−mean log Σ w p(label), nats."""
    logs = label_logprobs_BM.double().clamp(min=LOWEST)
    return -float(torch.logsumexp(logs + shares_M.double().log(), dim=1).mean())
