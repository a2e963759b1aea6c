"""Sums over rows that say what predictors are worth and how they differ; they add up over units. No torch.

So a capture that was resumed, or shared by many workers, reports the same, and a cache can be sealed without torch.
Formulas and units: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensemble_distill.fingerprint import canonical_json

BINS = 15
ENTROPY_BINS = 20
# Pairs, classes and bins by predictor are kept where they are no more numbers than this.
MAX_NUMBERS = 2000
# What one number of a unit takes in JSON at most, with its comma.
COUNT_BYTES, SUM_BYTES = 16, 25
MAX_STATE_BYTES = 1 << 19  # half of what a commit may take

# No sum of figures over rows comes near.
MAX_SUM = 1e18

FIDELITY_ROWS = ("rows", "kl_rows", "angle_rows", "means")
FIDELITY = ("rows", "kl_rows", "kl", "total_variation", "agreement", "angle_rows", "angle", "means", "mean_angle")

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Tally:
    """Sums over rows for several predictors (members first, the ensemble last), by name; see ``_counts``, ``_sums``.

    classes: of the predictions; 0 leaves out what is summed by class. sums: int64 and float64.
    """

    names: tuple[str, ...]
    classes: int
    sums: dict[str, np.ndarray]

    @classmethod
    def empty(cls, names: Sequence[str], classes: int = 0) -> Tally:
        counts, sums = _counts(len(names), classes), _sums(len(names), classes)
        zeros = {name: np.zeros(shape, np.int64) for name, shape in counts.items()}
        return cls(tuple(names), classes, zeros | {name: np.zeros(shape) for name, shape in sums.items()})

    def add(self, name: str, value: Any) -> None:
        """Add to one of the sums; ``value`` has its shape."""
        self.sums[name] += np.asarray(value, self.sums[name].dtype).reshape(self.sums[name].shape)

    def holds(self, name: str) -> bool:
        return self.sums[name].size > 0

    def merge(self, states: Sequence[Mapping[str, Any]], rows: Sequence[int] | None = None) -> None:
        """Add what the ``state`` of other tallies says; many at once, for there may be a million.

        rows: of which each of them has to be. ValueError where they are of other predictors or classes, or are no sums
        over rows; nothing was added then.
        """
        names, fields = list(self.names), {"names", *self.sums}
        for state in states:
            if state["names"] != names:
                raise ValueError(f"expected predictors {names}")
            if state.keys() != fields:
                raise ValueError(f"expected the sums {', '.join(sorted(fields - state.keys())) or 'and no others'}")
        found = {name: self._numbers(name, [state[name] for state in states]) for name in self.sums}
        if rows is not None and found["rows"][:, 0].tolist() != list(rows):
            raise ValueError("they are of other rows than the unit has")
        self._plausible(found)
        for name, held in self.sums.items():
            held += found[name].sum(0, held.dtype).reshape(held.shape)

    def _numbers(self, name: str, lists: Sequence[Any]) -> np.ndarray:
        """One of the sums of several states, [states, numbers]; ValueError for what is no list of such numbers."""
        held, found = self.sums[name], np.array(lists)
        if found.shape != (len(lists), held.size):
            raise ValueError(f"expected {held.size} numbers of {name}")
        if not held.size:
            return found
        if found.dtype.kind not in ("i" if held.dtype.kind == "i" else "if"):
            raise ValueError(f"{name} of the kind {found.dtype}")
        if not (np.abs(found) <= MAX_SUM).all():
            raise ValueError(f"{name} beyond what sums can be")
        return found

    def _plausible(self, found: Mapping[str, np.ndarray]) -> None:
        """ValueError unless what counts rows counts no more than there are, so that every mean is a number."""
        rows, labelled, predictors = found["rows"], found["labelled"], len(self.names)
        of_fidelity = found["fidelity"][:, [FIDELITY.index(name) for name in FIDELITY_ROWS]]
        counts = {name: found[name] for name in _counts(predictors, self.classes)} | {"fidelity": of_fidelity}
        pairs = max(1, predictors * (predictors - 1) // 2)
        for name, numbers in counts.items():
            if numbers.size and ((numbers < 0) | (numbers > pairs * rows) | (numbers % 1 != 0)).any():
                raise ValueError(f"{name} that no count of their rows can be")
        bins = found["bin_rows"].reshape(-1, predictors, BINS).sum(2)
        if (labelled > rows).any() or (bins != labelled).any():
            raise ValueError("labelled rows that are not those of the bins")

    def state(self) -> dict[str, Any]:
        return {"names": list(self.names), **{name: held.reshape(-1).tolist() for name, held in self.sums.items()}}

    def report(self) -> dict[str, Any]:
        """What the sums say, by name as docs/statistics.md has it; what needs labels is left out without them."""
        rows, members = max(1, int(self.sums["rows"][0])), len(self.names) - 1
        result: dict[str, Any] = {
            "rows": int(self.sums["rows"][0]),
            "names": list(self.names),
            "disagreement": float(self.sums["apart"][0]) / max(1, members * (members - 1) // 2) / rows,
            "mutual_information": max(0.0, float(self.sums["mutual_information"][0])) / rows,  # rounding
            "entropy_histogram": self.sums["entropy_histogram"].tolist(),
            "predictors": {name: self._predictor(i) for i, name in enumerate(self.names)},
        }
        if self.holds("pairs"):
            result["pairs"] = (_square(self.sums["pairs"], len(self.names)) / rows).tolist()
        if self.sums["fidelity"][0]:
            result["fidelity"] = _fidelity(self.sums["fidelity"])
        return result | (self._against_labels() if self.sums["labelled"][0] else {})

    def _predictor(self, i: int) -> dict[str, Any]:
        """The figures of one predictor."""
        sums, rows, labelled = self.sums, max(1, int(self.sums["rows"][0])), int(self.sums["labelled"][0])
        result: dict[str, Any] = {
            "agreement": 1 - float(sums["differs"][i]) / rows,
            "entropy": float(sums["entropy"][i]) / rows,
        }
        if labelled:
            bins = np.stack([sums["bin_rows"][i], sums["bin_confidence"][i], sums["bin_correct"][i]], axis=1)
            result |= {
                "accuracy": float(sums["correct"][i]) / labelled,
                "nll": float(sums["nll"][i]) / labelled,
                "brier": float(sums["brier"][i]) / labelled,
                "ece": calibration_error(bins),
            }
            if len(self.names) * BINS <= MAX_NUMBERS:
                result["reliability"] = _reliability(bins)
        return result

    def _against_labels(self) -> dict[str, Any]:
        sums, members, labelled = self.sums, self.names[:-1], int(self.sums["labelled"][0])
        result: dict[str, Any] = {"oracle": float(sums["oracle"][0]) / labelled}
        if self.holds("leave_one_out"):
            nll = sums["leave_one_out"] / labelled
            result["leave_one_out"] = dict(zip(members, nll.tolist(), strict=True))
        if self.holds("class_rows"):
            result["classes"] = {
                "rows": sums["class_rows"].tolist(),
                "correct": dict(zip(self.names, sums["class_correct"].tolist(), strict=True)),
                "nll": dict(zip(self.names, sums["class_nll"].tolist(), strict=True)),
            }
        return result


def _counts(predictors: int, classes: int) -> Shapes:
    """Numbers of rows. apart: of pairs of members that name different classes. differs: from the ensemble's class."""
    by_class = classes if predictors * classes <= MAX_NUMBERS else 0
    return {
        "rows": (1,),
        "labelled": (1,),
        "oracle": (1,),
        "apart": (1,),
        "differs": (predictors,),
        "pairs": (_pairs(predictors),),
        "entropy_histogram": (ENTROPY_BINS,),
        "correct": (predictors,),
        "bin_rows": (predictors, BINS),
        "bin_correct": (predictors, BINS),
        "class_rows": (by_class,),
        "class_correct": (predictors, by_class),
    }


def _sums(predictors: int, classes: int) -> Shapes:
    """Sums over rows of figures. bin_confidence: by confidence, of it. fidelity: see recording/fidelity.py."""
    by_class = classes if predictors * classes <= MAX_NUMBERS else 0
    return {
        "entropy": (predictors,),
        "mutual_information": (1,),
        "nll": (predictors,),
        "brier": (predictors,),
        "bin_confidence": (predictors, BINS),
        "leave_one_out": (predictors - 1 if predictors > 2 and _pairs(predictors) else 0,),
        "class_nll": (predictors, by_class),
        "fidelity": (len(FIDELITY),),
    }


def _pairs(predictors: int) -> int:
    pairs = predictors * (predictors - 1) // 2
    return pairs if pairs <= MAX_NUMBERS else 0


def state_bytes(names: Sequence[str], classes: int) -> int:
    """The most bytes that the ``state`` of a unit takes as JSON."""
    counts, sums = _counts(len(names), classes), _sums(len(names), classes)
    numbers = [sum(int(np.prod(shape)) for shape in shapes.values()) for shapes in (counts, sums)]
    labels = sum(len(name) + 3 for name in names) + sum(len(name) + 6 for name in (*counts, *sums))
    return numbers[0] * COUNT_BYTES + numbers[1] * SUM_BYTES + labels + 32


def report_bytes(names: Sequence[str], classes: int) -> int:
    """The most bytes that the ``report`` of a split takes as JSON."""
    full = Tally.empty(names, classes)
    for held in full.sums.values():
        held += 1  # so that nothing is left out of it
    report = full.report()
    return len(canonical_json(report)) + SUM_BYTES * _numbers_in(report)


def _numbers_in(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_numbers_in, value.values()))
    return sum(map(_numbers_in, value)) if isinstance(value, list) else 1


def calibration_error(bins: np.ndarray) -> float:
    """Expected calibration error of bins [BINS, 3]: rows, sum of confidence, correct (Guo et al. 2017, eq. 3)."""
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum())


def _reliability(bins: np.ndarray) -> dict[str, list[Any]]:
    """Rows, mean confidence and accuracy of each bin; null where a bin is empty."""
    rows, confidence, correct = bins.T.tolist()
    return {
        "rows": [int(n) for n in rows],
        "confidence": [x / n if n else None for n, x in zip(rows, confidence, strict=True)],
        "accuracy": [x / n if n else None for n, x in zip(rows, correct, strict=True)],
    }


def _square(pairs: np.ndarray, predictors: int) -> np.ndarray:
    """The symmetric matrix [P, P] of its part above the diagonal, row by row."""
    matrix = np.zeros((predictors, predictors))
    matrix[np.triu_indices(predictors, 1)] = pairs
    return matrix + matrix.T


def _fidelity(sums: np.ndarray) -> dict[str, Any]:
    held = dict(zip(FIDELITY, sums.tolist(), strict=True))

    def mean(name: str, over: str) -> float | None:
        return held[name] / held[over] if held[over] else None

    kl = mean("kl", "kl_rows")
    return {
        "rows": int(held["rows"]),
        "kl": kl if kl is None else max(0.0, kl),  # rounding
        "total_variation": mean("total_variation", "rows"),
        "top1_agreement": mean("agreement", "rows"),
        "angle": mean("angle", "angle_rows"),
        "mean_angle": mean("mean_angle", "means"),
    }
