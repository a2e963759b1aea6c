"""What a predictor is worth: accuracy, NLL, ECE; and how predictors differ. Inputs are log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ensemble_distill.tally import BINS, Tally, calibration_error


def count(tally: Tally, logprobs_PBC: Sequence[Tensor], labels_B: Tensor | None) -> None:
    """Add a batch to a tally: log-probabilities [B, C] of each predictor, labels int64 [B] or None."""
    stacked = torch.stack(list(logprobs_PBC))  # [P, B, C]
    guesses = stacked.argmax(2)
    tally.rows += guesses.shape[1]
    tally.disagree += (guesses[:, None] != guesses[None]).sum(2).cpu().numpy()
    if labels_B is None:
        return
    labels_B = labels_B.to(stacked.device)
    right = guesses == labels_B
    tally.labelled += len(labels_B)
    tally.correct += right.sum(1).cpu().numpy()
    index = labels_B.expand(len(stacked), -1)[:, :, None]
    # A label of probability zero counts as float16's lowest log-probability, not as infinity.
    tally.nll -= stacked.gather(2, index).double().clamp(min=-65504).sum((1, 2)).cpu().numpy()
    tally.bins += torch.stack([_bins(p, r) for p, r in zip(stacked, right, strict=True)]).cpu().numpy()


def accuracy(logits_BC: Tensor, labels_B: Tensor) -> float:
    return float((logits_BC.argmax(1) == labels_B).double().mean())


def nll(logprobs_BC: Tensor, labels_B: Tensor) -> float:
    """Mean negative log-likelihood of the labels, nats."""
    return -float(logprobs_BC.gather(1, labels_B[:, None]).double().mean())


def ece(logprobs_BC: Tensor, labels_B: Tensor) -> float:
    """Expected calibration error of the top class over 15 equal-width bins (Guo et al. 2017, eq. 3)."""
    return calibration_error(_bins(logprobs_BC, logprobs_BC.argmax(1) == labels_B).cpu().numpy())


def _bins(logprobs: Tensor, right: Tensor) -> Tensor:
    confidence = logprobs.max(1).values.exp().double()
    index = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)  # bins are (low, high]
    values = torch.stack([torch.ones_like(confidence), confidence, right.double()], dim=1)
    return torch.zeros(BINS, 3, dtype=torch.float64, device=logprobs.device).index_add_(0, index, values)
