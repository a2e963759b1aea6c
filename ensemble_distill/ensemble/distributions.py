"""What a member may say about a batch, checked row by row, as one log-probability for each class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.config import Gives
from ensemble_distill.errors import InvalidOutput, UsageError

# Servers round what they give.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities of all classes, [B, C], nats. A row sums to one within 1e-3; it is then normalised."""

    logprobs: Tensor | np.ndarray


@dataclass(frozen=True)
class TopKLogProbs:
    """Log-probabilities of the likeliest classes only, as servers give them: nothing is said of any other class.

    ids: integers [B, K], a class once in a row. logprobs: [B, K], nats; a row's probabilities sum to 1 + 1e-3 at
    most. An entry of −inf is none, whatever its id: rows may list fewer than K. K may differ from batch to batch.
    """

    ids: Tensor | np.ndarray
    logprobs: Tensor | np.ndarray


@dataclass(frozen=True)
class Stated:
    """logits: float32 [B, C]. listed: bool [B, C], the classes that were told apart; None: all of them.

    Where some were not, the logits are log-probabilities that spread the rest of a row's mass evenly over those.
    """

    logits: Tensor
    listed: Tensor | None = None

    @property
    def gives(self) -> Gives:
        return "all" if self.listed is None else "topk"


class InvalidRow(InvalidOutput):
    """An output is no distribution; ``row`` is its place in the batch."""

    def __init__(self, member: str, row: int, what: str, *, hint: str = "") -> None:
        super().__init__(f"{member} gave {what}", hint=hint)
        self.member, self.row = member, row


def stated(member: str, output: object, rows: int, classes: int) -> Stated:
    """What ``member`` (as messages call it) said of a batch: logits, an object with ``.logits``, or one of the above.

    Raises UsageError for what is none of these, or of another shape; InvalidRow for log-probabilities that are none.
    """
    if isinstance(output, TopKLogProbs):
        return _of_topk(member, output, rows, classes)
    if isinstance(output, LogProbs):
        logprobs = _matrix(member, output.logprobs, rows, classes, "log-probabilities")
        total = logprobs.double().exp().sum(dim=1)
        _refuse(
            ~((total - 1).abs() <= TOLERANCE),
            member,
            lambda row: f"log-probabilities whose probabilities sum to {total[row]:.6g}, expected 1",
        )
        return Stated(logprobs)
    return Stated(_matrix(member, getattr(output, "logits", output), rows, classes, "logits"))


def refuse_probabilities(member: str, logits_BC: Tensor) -> None:
    """UsageError for logits whose rows are all distributions: a softmax of them is nearly even, and says nothing."""
    if bool((logits_BC >= 0).all() & ((logits_BC.double().sum(dim=1) - 1).abs() <= TOLERANCE).all()):
        raise UsageError(
            f"{member} gave rows of numbers ≥ 0 that sum to one, which are probabilities; expected logits",
            hint="leave its softmax out, or return LogProbs(p.log())",
        )


def _matrix(member: str, value: object, rows: int, classes: int, what: str) -> Tensor:
    value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[1] != classes:
        found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"{member} gave {found}, expected {what} [batch, {classes}]")
    if len(value) != rows:
        raise UsageError(f"{member} gave {what} of {len(value)} rows for a batch of {rows}")
    return value.float()


def _of_topk(member: str, output: TopKLogProbs, rows: int, classes: int) -> Stated:
    ids, logprobs = (torch.as_tensor(value) for value in (output.ids, output.logprobs))
    if ids.ndim != 2 or len(ids) != rows or ids.shape != logprobs.shape or ids.is_floating_point():
        raise UsageError(
            f"{member} gave ids {list(ids.shape)} of {ids.dtype} and log-probabilities {list(logprobs.shape)}, "
            f"expected integers and log-probabilities, both [{rows}, K]"
        )
    ids, logprobs = ids.long(), logprobs.double()
    used = ~logprobs.isneginf()
    places = torch.where(used, ids, classes)  # what is no entry goes to a column of its own
    total = logprobs.exp().sum(dim=1)
    _check_rows(member, used, ids, total, classes)
    wide = torch.zeros(rows, classes + 1, dtype=torch.bool, device=ids.device)
    listed = wide.scatter_(1, places, True)[:, :classes]
    others = classes - listed.sum(dim=1)
    rest = (1 - total).clamp(min=0)
    _refuse(
        (others == 0) & (rest > TOLERANCE),
        member,
        lambda row: f"all classes, with probabilities that sum to {total[row]:.6g}, expected 1",
    )
    each = (rest / others.clamp(min=1)).log()
    spread = each[:, None].float().repeat(1, classes + 1).scatter_(1, places, logprobs.float())[:, :classes]
    return Stated(torch.log_softmax(spread, dim=1), listed)


def _check_rows(member: str, used: Tensor, ids: Tensor, total: Tensor, classes: int) -> None:
    """InvalidRow for rows that list no class, one that does not exist, one twice, or more than all the mass."""
    _refuse(
        ~(total <= 1 + TOLERANCE), member, lambda row: f"probabilities that sum to {total[row]:.6g}, expected 1 at most"
    )
    _refuse(~used.any(dim=1), member, lambda row: "no class at all")
    beyond = used & ((ids < 0) | (ids >= classes))
    _refuse(
        beyond.any(dim=1), member, lambda row: f"class {int(ids[row][beyond[row]][0])}, expected 0 to {classes - 1}"
    )
    ordered = torch.where(used, ids, -1).sort(dim=1).values
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    _refuse(again.any(dim=1), member, lambda row: f"class {int(ordered[row, 1:][again[row]][0])} twice")


def _refuse(bad_B: Tensor, member: str, what: Callable[[int], str]) -> None:
    if bool(bad_B.any()):
        row = int(bad_B.nonzero()[0, 0])
        raise InvalidRow(member, row, what(row))
