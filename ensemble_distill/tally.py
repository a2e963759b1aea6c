"""Sums over rows that say what predictors are worth and how they differ; they add up over units. No torch.

So a capture that was resumed, or shared by many workers, reports the same, and a cache can be sealed without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 15


@dataclass
class Tally:
    """Sums over rows for several predictors (members first, the ensemble last), all float64.

    correct, nll: [P]. bins: [P, BINS, 3], by confidence: rows, sum of confidence, correct.
    disagree: [P, P], rows on which two predictors name different classes. labelled: rows with labels.
    """

    names: tuple[str, ...]
    rows: int
    labelled: int
    correct: np.ndarray
    nll: np.ndarray
    bins: np.ndarray
    disagree: np.ndarray

    SUMS = ("correct", "nll", "bins", "disagree")

    @classmethod
    def empty(cls, names: Sequence[str]) -> Tally:
        p = len(names)
        return cls(tuple(names), 0, 0, *(np.zeros(shape) for shape in ((p,), (p,), (p, BINS, 3), (p, p))))

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
                    "ece": calibration_error(self.bins[i]),
                    "agreement": 1 - float(self.disagree[i, -1]) / max(1, self.rows),
                }
                for i, name in enumerate(self.names)
            }
        return result

    def merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Add what the ``state`` of other tallies says; many at once, for there may be a million.

        ValueError where they are of other predictors.
        """
        names = list(self.names)
        if any(state["names"] != names for state in states):
            raise ValueError(f"expected predictors {names}")
        self.rows += sum(state["rows"] for state in states)
        self.labelled += sum(state["labelled"] for state in states)
        for name in self.SUMS:
            sums = getattr(self, name)
            sums += np.array([state[name] for state in states]).sum(0)

    def state(self) -> dict[str, Any]:
        sums = {name: getattr(self, name).tolist() for name in self.SUMS}
        return {"names": list(self.names), "rows": self.rows, "labelled": self.labelled, **sums}


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error of bins [BINS, 3] (Guo et al. 2017, eq. 3)."""
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum())
