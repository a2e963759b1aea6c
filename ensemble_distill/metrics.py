"""What a predictor is worth: accuracy, NLL, ECE; and how predictors differ. Inputs are log-probabilities.

``Tally`` holds sufficient statistics that add up over units, so that a resumed capture reports the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 15


@dataclass
class Tally:
    """Sums over rows for several predictors (members first, the ensemble last).

    correct, nll: [P]. bins: [P, BINS, 3], by confidence: rows, sum of confidence, correct.
    disagree: [P, P], rows on which two predictors name different classes. labelled: rows with labels.
    """

    names: tuple[str, ...]
    rows: int
    labelled: int
    correct: Tensor
    nll: Tensor
    bins: Tensor
    disagree: Tensor

    @classmethod
    def empty(cls, names: Sequence[str]) -> Tally:
        p = len(names)
        zeros = [torch.zeros(s, dtype=torch.float64) for s in ((p,), (p,), (p, BINS, 3), (p, p))]
        return cls(tuple(names), 0, 0, *zeros)

    def add(self, logprobs_PBC: Sequence[Tensor], labels_B: Tensor | None) -> None:
        """Count a batch: log-probabilities [B, C] of each predictor, labels int64 [B] or None."""
        stacked = torch.stack(list(logprobs_PBC))  # [P, B, C]
        guesses = stacked.argmax(2)
        self.rows += guesses.shape[1]
        self.disagree += (guesses[:, None] != guesses[None]).sum(2).double().cpu()
        if labels_B is None:
            return
        labels_B = labels_B.to(stacked.device)
        right = guesses == labels_B
        self.labelled += len(labels_B)
        self.correct += right.sum(1).double().cpu()
        index = labels_B.expand(len(stacked), -1)[:, :, None]
        # A label of probability zero counts as float16's lowest log-probability, not as infinity.
        self.nll -= stacked.gather(2, index).double().clamp(min=-65504).sum((1, 2)).cpu()
        self.bins += torch.stack([_bins(p, r) for p, r in zip(stacked, right, strict=True)]).cpu()

    def report(self) -> dict[str, Any]:
        """accuracy, nll (nats), ece, agreement with the ensemble by predictor; disagreement over pairs of members."""
        members = len(self.names) - 1
        pairs = max(1, members * (members - 1))
        inner = float(self.disagree[:members, :members].sum())
        result: dict[str, Any] = {"rows": self.rows, "disagreement": inner / pairs / max(1, self.rows)}
        if self.labelled:
            result["predictors"] = {
                name: {
                    "accuracy": float(self.correct[i]) / self.labelled,
                    "nll": float(self.nll[i]) / self.labelled,
                    "ece": float(_ece(self.bins[i])),
                    "agreement": 1 - float(self.disagree[i, -1]) / max(1, self.rows),
                }
                for i, name in enumerate(self.names)
            }
        return result

    def merge(self, state: Mapping[str, Any]) -> None:
        """Add what the ``state`` of another tally says. A million of them make a manifest: no tensor for each."""
        self.rows += state["rows"]
        self.labelled += state["labelled"]
        for name in ("correct", "nll", "bins", "disagree"):
            sums = getattr(self, name).numpy()
            sums += state[name]

    def state(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name).tolist() for name in ("correct", "nll", "bins", "disagree")}
        return {"names": list(self.names), "rows": self.rows, "labelled": self.labelled, **tensors}


def accuracy(logits_BC: Tensor, labels_B: Tensor) -> float:
    return float((logits_BC.argmax(1) == labels_B).double().mean())


def nll(logprobs_BC: Tensor, labels_B: Tensor) -> float:
    """Mean negative log-likelihood of the labels, nats."""
    return -float(logprobs_BC.gather(1, labels_B[:, None]).double().mean())


def ece(logprobs_BC: Tensor, labels_B: Tensor) -> float:
    """Expected calibration error of the top class over 15 equal-width bins (Guo et al. 2017, eq. 3)."""
    return float(_ece(_bins(logprobs_BC, logprobs_BC.argmax(1) == labels_B)))


def agreement(logits_BC: Tensor, target_BC: Tensor) -> float:
    """Share of rows on which two predictors name the same class."""
    return float((logits_BC.argmax(1) == target_BC.argmax(1)).double().mean())


def kl(target_logprobs_BC: Tensor, logprobs_BC: Tensor) -> float:
    """Mean KL(target ‖ prediction), nats; classes of probability zero add nothing."""
    p, q = target_logprobs_BC.double(), logprobs_BC.double()
    return float(torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(1).mean())


def _bins(logprobs: Tensor, right: Tensor) -> Tensor:
    confidence = logprobs.max(1).values.exp().double()
    index = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)  # bins are (low, high]
    values = torch.stack([torch.ones_like(confidence), confidence, right.double()], dim=1)
    return torch.zeros(BINS, 3, dtype=torch.float64, device=logprobs.device).index_add_(0, index, values)


def _ece(bins: Tensor) -> Tensor:
    return (bins[:, 1] - bins[:, 2]).abs().sum() / bins[:, 0].sum()
