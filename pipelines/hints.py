"""Hints (Romero et al. 2015): a middle layer of the student learns, through a 1×1 convolution, what a teacher's gives.

    ensemble-distill cache pipelines/hints.py --out caches/all --limit 20000
    ensemble-distill train pipelines/hints.py --cache caches/all --out runs/hints --limit 20000

or in two stages, as the paper has it: the hint alone up to that layer, then soft targets from these weights.

    ensemble-distill train pipelines/hints.py:first --cache caches/all --out runs/first --limit 20000
    ensemble-distill train pipelines/hints.py:second --cache caches/all --out runs/second --limit 20000 \\
        --set start=runs/first
"""

import ensemble_distill as ed
from parts.one_cache import SOFT, cache, data, taught

__all__ = ["cache", "data", "first", "int8", "second", "train"]

HINT = ed.FeatureMatch(tap="tap/a.stage3_map", module="stage2", distance="l2", weight=0.01)


def train() -> ed.TrainConfig:
    """Soft targets, labels and the hint, all at once."""
    return taught(SOFT | {"hint": HINT})


def int8() -> ed.TrainConfig:
    """The same from features of half the bytes."""
    return taught(SOFT | {"hint": HINT.model_copy(update={"tap": "tap/a.stage3_map_int8"})})


def first() -> ed.TrainConfig:
    """The hint alone: what comes after stage2 learns nothing yet."""
    return taught({"hint": HINT}).model_copy(update={"epochs": 3})


def second() -> ed.TrainConfig:
    """Soft targets and labels; say ``--set start=RUN`` with a run of ``first``."""
    return taught(SOFT).model_copy(update={"epochs": 9})
