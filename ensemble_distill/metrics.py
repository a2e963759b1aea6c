"""What a predictor is worth, and how predictors differ. Inputs are log-probabilities. Formulas: docs/statistics.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ensemble_distill.mixture import Mixture, combine
from ensemble_distill.tally import BINS, ENTROPY_BINS, Tally, calibration_error

LOWEST = -65504.0  # a label of probability zero counts as float16's lowest log-probability, not as infinity


def count(
    tally: Tally, logprobs_PBC: Sequence[Tensor], labels_B: Tensor | None, mixture: Mixture | None = None
) -> None:
    """Add a batch to a tally: log-probabilities [B, C] of each predictor, labels int64 [B] or None.

    mixture: how the members (all predictors but the last) make the ensemble; equal shares of mean_probs, if None.
    """
    stacked = torch.stack(list(logprobs_PBC))  # [P, B, C]
    probs = stacked.exp()
    top, guesses = stacked.max(2)
    mixture = mixture or Mixture(tuple((name, 1.0) for name in tally.names[:-1]), "mean_probs")
    tally.add("rows", stacked.shape[1])
    _count_guesses(tally, guesses, stacked.shape[2])
    _count_entropies(tally, stacked, probs, mixture)
    if labels_B is not None:
        labels_B = labels_B.to(stacked.device)
        right = guesses == labels_B
        tally.add("correct", right.sum(1).cpu())
        tally.add("oracle", right[:-1].any(0).sum().cpu())
        bins = _bins(top, right).cpu()
        for column, name in enumerate(("bin_rows", "bin_confidence", "bin_correct")):
            tally.add(name, bins[:, :, column])
        _count_labels(tally, stacked, probs, right, labels_B)
        _count_left_out(tally, stacked[:-1], labels_B, mixture)


def _count_guesses(tally: Tally, guesses_PB: Tensor, classes: int) -> None:
    """How often predictors name different classes."""
    rows, members = guesses_PB.shape[1], len(guesses_PB) - 1
    tally.add("differs", (guesses_PB != guesses_PB[-1]).sum(1).cpu())
    if tally.holds("pairs"):
        first, second = torch.triu_indices(members + 1, members + 1, 1, device=guesses_PB.device)
        pairs = (guesses_PB[first] != guesses_PB[second]).sum(1)
        tally.add("pairs", pairs.cpu())
        tally.add("apart", int(pairs[second < members].sum()))
    else:  # of many members by their votes, which takes no pairs
        votes = guesses_PB.new_zeros(rows, classes)
        votes.scatter_add_(1, guesses_PB[:-1].T, guesses_PB.new_ones(rows, members))
        tally.add("apart", (members**2 * rows - int(votes.square().sum())) // 2)


def _count_entropies(tally: Tally, stacked_PBC: Tensor, probs_PBC: Tensor, mixture: Mixture) -> None:
    entropies = -torch.linalg.vecdot(probs_PBC, stacked_PBC.clamp(min=LOWEST)).double()  # [P, B]; 0 · LOWEST is 0
    shares = [share for _, share in mixture.shares]
    weights = torch.tensor(shares, dtype=torch.float64, device=entropies.device) / sum(shares)
    mixed = entropies[-1]
    if (mixture.combine, mixture.temperature) != ("mean_probs", 1):  # the ensemble is not the mixture
        mixed = torch.special.entr(torch.einsum("m,mbc->bc", weights.float(), probs_PBC[:-1])).sum(1).double()
    tally.add("entropy", entropies.sum(1).cpu())
    tally.add("mutual_information", (mixed - weights @ entropies[:-1]).sum().cpu())
    highest = math.log(max(2, stacked_PBC.shape[2]))
    index = (entropies[-1] / highest * ENTROPY_BINS).long().clamp(0, ENTROPY_BINS - 1)
    tally.add("entropy_histogram", torch.bincount(index, minlength=ENTROPY_BINS).cpu())


def _count_labels(tally: Tally, stacked_PBC: Tensor, probs_PBC: Tensor, right_PB: Tensor, labels_B: Tensor) -> None:
    index = labels_B.expand(len(stacked_PBC), -1)[:, :, None]
    at_label = stacked_PBC.gather(2, index)[:, :, 0].double()
    nll = -at_label.clamp(min=LOWEST)
    squares = torch.linalg.vecdot(probs_PBC, probs_PBC).double()
    tally.add("labelled", len(labels_B))
    tally.add("nll", nll.sum(1).cpu())
    tally.add("brier", (squares - 2 * at_label.exp() + 1).sum(1).cpu())
    if tally.holds("class_rows"):
        tally.add("class_rows", torch.bincount(labels_B, minlength=tally.classes).cpu())
        tally.add("class_correct", _by_class(right_PB.double(), labels_B, tally.classes).cpu())
        tally.add("class_nll", _by_class(nll, labels_B, tally.classes).cpu())


def _by_class(values_PB: Tensor, labels_B: Tensor, classes: int) -> Tensor:
    """The sums of values over the rows of each class, [P, classes]."""
    return values_PB.new_zeros(len(values_PB), classes).index_add_(1, labels_B, values_PB)


def _count_left_out(tally: Tally, members_MBC: Tensor, labels_B: Tensor, mixture: Mixture) -> None:
    if not tally.holds("leave_one_out"):
        return
    if mixture.combine == "mean_probs" and mixture.temperature == 1:
        # The mixture at the label needs no other class, which is most of the work where there are many.
        members_MBC = members_MBC.gather(2, labels_B.expand(len(members_MBC), -1)[:, :, None])
        at = torch.zeros_like(labels_B)
    else:
        at = labels_B
    nll = [-_without(m, members_MBC, at, mixture).clamp(min=LOWEST).sum().cpu() for m in range(len(members_MBC))]
    tally.add("leave_one_out", torch.stack(nll))


def _without(m: int, members_MBC: Tensor, at_B: Tensor, mixture: Mixture) -> Tensor:
    """Log-probability float64 [B] of classes under the ensemble without one member, shares renormalised."""
    others = [p for i, p in enumerate(members_MBC) if i != m]
    shares = [share for i, (_, share) in enumerate(mixture.shares) if i != m]
    if members_MBC.shape[2] == 1:
        weights = torch.tensor(shares, dtype=torch.float64, device=at_B.device).log() - math.log(sum(shares))
        return torch.logsumexp(torch.stack(others).double()[:, :, 0] + weights[:, None], dim=0)
    logprobs = combine(others, shares, mixture.combine)
    if mixture.temperature != 1:
        logprobs = torch.log_softmax(logprobs / mixture.temperature, dim=1)
    return logprobs.gather(1, at_B[:, None])[:, 0].double()


def entropy(logprobs_BC: Tensor) -> Tensor:
    """−Σ p log p in nats, [B]; classes of probability zero add nothing."""
    return -(logprobs_BC.exp() * logprobs_BC.masked_fill(logprobs_BC.isneginf(), 0.0)).sum(dim=1)


def accuracy(logits_BC: Tensor, labels_B: Tensor) -> float:
    return float((logits_BC.argmax(1) == labels_B).double().mean())


def nll(logprobs_BC: Tensor, labels_B: Tensor) -> float:
    """Mean negative log-likelihood of the labels, nats."""
    return -float(logprobs_BC.gather(1, labels_B[:, None]).double().mean())


def ece(logprobs_BC: Tensor, labels_B: Tensor) -> float:
    """Expected calibration error of the top class over 15 equal-width bins (Guo et al. 2017, eq. 3)."""
    top, guesses = logprobs_BC.max(1, keepdim=True)
    return calibration_error(_bins(top.T, (guesses[:, 0] == labels_B)[None])[0].cpu().numpy())


def _bins(top_PB: Tensor, right_PB: Tensor) -> Tensor:
    """Rows, sums of confidence and right ones by bin of the top class's log-probability, float64 [P, BINS, 3]."""
    confidence = top_PB.exp().double()
    index = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)  # bins are (low, high]
    index += BINS * torch.arange(len(index), device=index.device)[:, None]
    values = torch.stack([torch.ones_like(confidence), confidence, right_PB.double()], dim=2)
    flat = torch.zeros(len(index) * BINS, 3, dtype=torch.float64, device=index.device)
    return flat.index_add_(0, index.reshape(-1), values.reshape(-1, 3)).reshape(len(index), BINS, 3)
