"""Are labels those that were captured with their samples? By the plan's digest of all, or by what was said of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ensemble_distill.cache.join import as_scalars
from ensemble_distill.targets import Targets

LABEL_NATS, LABEL_SHARE = 0.25, 0.02


@dataclass(frozen=True)
class Rearranged:
    """labels: by captured row, [N]. sure: no two equal samples have different labels, which might be either's."""

    labels: np.ndarray
    sure: bool


def in_captured_order(labels: np.ndarray, keys: np.ndarray, captured: np.ndarray) -> Rearranged | None:
    """The labels [N] of samples with these keys (uint8 [N, 16]), by the row of each among the captured keys.

    Equal samples keep their order among themselves. None where these are not the captured samples, each as often.
    """
    here, there = (as_scalars(some) for some in (keys, captured))
    order, rows = (np.argsort(some, kind="stable") for some in (here, there))
    if not np.array_equal(here[order], there[rows]):
        return None
    back, by_key = np.empty_like(labels), labels[order]
    back[rows] = by_key
    twins = here[order][1:] == here[order][:-1]
    return Rearranged(back, not (twins & (by_key[1:] != by_key[:-1])).any())


def other_label(targets: Targets) -> np.ndarray:
    """Whether the ensemble gave a row's label another probability than to the captured one, bool [B].

    Beyond what any codec rounds; what is not known compares as no difference: of a label that was unknown (NaN), of a
    sample of classes, of another ensemble than the captured one.
    """
    labels, captured = targets.labels, targets.label_logprob
    if labels is None or captured is None or targets.kind == "unbiased":
        return np.zeros(len(targets), bool)
    slack = LABEL_NATS + LABEL_SHARE * captured.abs()
    if targets.ids is None or targets.residual is None:
        now = targets.logprobs.gather(1, labels[:, None])[:, 0]
        return ((now - captured).abs() > slack).numpy()
    kept = targets.ids == labels[:, None]
    now = targets.logprobs.masked_fill(~kept, -torch.inf).amax(1)
    # Classes that were not kept are no likelier than any that was, and than all of their kind together.
    most = torch.minimum(targets.logprobs.amin(1), targets.residual.log())
    return torch.where(kept.any(1), (now - captured).abs() > slack, captured - most > slack).numpy()
