"""What decoded rows can be: whatever a codec does not write is refused before anything is learnt from it.

Bounds leave room for float16 and for float32 sums over many classes; a row that passes is a distribution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ensemble_distill.errors import Corrupt

ROUNDING = 0.01
# Of the mass of a row. float16 moves a log-probability by 2⁻¹¹ of its size at most, and so the sum by 2⁻¹¹ of an
# entropy, which is below log 2²⁵: .0085. Eight bits move each by half of 1/254 of 20 nats besides, .0394, and raise
# what lies below the range to e⁻²⁰ of the largest: .0002 of 2¹⁶ classes.
MASS = {16: 0.01, 8: 0.05}
# Entropies and normalisers are sums over all classes.
SUMMED = 0.1
LARGEST = 65504.0  # of float16


class BadRow(Corrupt):
    """A row of a batch that no codec writes; ``problem`` says what is wrong with it."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(f"row {row} of a batch: {problem}")
        self.row, self.problem = row, problem


def require(right: Tensor, problem: str) -> None:
    """BadRow for the first row in which something (bool [B, …]) is not right."""
    if not right.all():
        raise BadRow(int((~right).reshape(len(right), -1).any(dim=1).int().argmax()), problem)


def check_logs(logs: Tensor, what: str) -> None:
    """Log-probabilities are at most 0, −inf included."""
    require(logs <= ROUNDING, f"{what} that are no log-probabilities")


def check_dense(logprobs_BC: Tensor) -> None:
    """After normalisation: a row of NaN, of infinities or without a possible class is NaN throughout."""
    require(logprobs_BC[:, 0] <= ROUNDING, "no distribution")


def check_range(ends_B2: Tensor) -> None:
    low, high = ends_B2[:, 0], ends_B2[:, 1]
    require((low > -math.inf) & (low <= high) & (high < math.inf), "a range of log-probabilities that is none")


def check_mass(mass_B: Tensor, bits: int) -> None:
    """What the kept classes and the rest have together, as they were stored; what is decoded is made to be one."""
    require((mass_B - 1).abs() <= MASS[bits], "kept classes and a rest that do not sum to one")


def check_rest(residual_B: Tensor, possible_B: Tensor) -> None:
    """Where there is no other class, nothing is left over: the student could not have it."""
    require((residual_B == 0) | possible_B, "a rest, and no class that has it")


def check_ids(ids_BK: Tensor, classes: int, distinct: bool) -> None:
    require(ids_BK < classes, f"an id beyond the {classes} classes")
    if distinct and ids_BK.shape[1] > 1:
        ordered = ids_BK.int().sort(dim=1).values
        require(ordered[:, 1:] > ordered[:, :-1], "a class that was kept twice")


def check_log_z(log_z_BG: Tensor, classes: int) -> None:
    """log Σ p^(1/T) of T > 1 is between 0 and log C."""
    require((log_z_BG >= -SUMMED) & (log_z_BG <= math.log(classes) + SUMMED), "a normaliser that is none")


def check_figures(figures: Mapping[str, Tensor], classes: int) -> None:
    """Of ``RowFigures``; NaN stands for what is not known."""
    for name, figure in figures.items():
        low, high = (-LARGEST, ROUNDING) if name == "label_logprob" else (-SUMMED, math.log(classes) + SUMMED)
        require((figure >= low) & (figure <= high) | figure.isnan(), f"{name} out of its range")


def check_features(features_BD: Tensor) -> None:
    require(features_BD.isfinite(), "a feature that is not finite")
