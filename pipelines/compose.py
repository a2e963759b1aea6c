"""Objectives that are sums: soft targets with other losses of logits, and with features and relations.

    ensemble-distill cache pipelines/compose.py --out caches/all --limit 20000
    ensemble-distill train pipelines/compose.py --cache caches/all --out runs/composed --limit 20000
    ensemble-distill train pipelines/compose.py:soft --cache caches/all --out runs/soft --limit 20000

A term of weight zero is left out, so every sum can be had from the command line:

    ensemble-distill train pipelines/compose.py:soft --cache caches/all --out runs/alone --limit 20000 \\
        --set objective.soft.weight=0 --set objective.hard.weight=1
"""

import attention_transfer
import ensemble_distill as ed
import hints
import relational
from parts.one_cache import SOFT, cache, data, taught

__all__ = ["annealed", "cache", "careful", "data", "decoupled", "dist", "hinted", "soft", "train"]


def train() -> ed.TrainConfig:
    """Soft targets, labels, attention and relations."""
    attention, relations = attention_transfer.train().objective, relational.train().objective
    return taught(SOFT | attention | relations)


def hinted() -> ed.TrainConfig:
    """The same and a hint, which is switched off for the last fifth."""
    hint = hints.HINT.model_copy(update={"weight": ed.SwitchOff(value=hints.HINT.weight, after=0.8)})
    return taught(train().objective | {"hint": hint})


def soft() -> ed.TrainConfig:
    return taught(SOFT)


def decoupled() -> ed.TrainConfig:
    """DKD (Zhao et al. 2022)."""
    return taught(SOFT | {"decoupled": ed.Decoupled(alpha=1, beta=8, temperature=4, weight=0.2)})


def dist() -> ed.TrainConfig:
    """DIST (Huang et al. 2022)."""
    return taught(SOFT | {"dist": ed.Dist(beta=1, gamma=1, temperature=4, weight=1)})


def annealed() -> ed.TrainConfig:
    """Soft targets that sharpen: from temperature 8 to 1."""
    return taught(SOFT | {"soft": ed.SoftTargets(weight=0.7, temperature=ed.Ramp(start=8, end=1))})


def careful() -> ed.TrainConfig:
    """Soft targets only of samples that the ensemble gets right; labels of all."""

    def right(targets: ed.Targets) -> object:
        return (targets.top1() == targets.labels).float()

    return taught(SOFT | {"soft": ed.SoftTargets(weight=0.7, temperature=4, rows=right)})
