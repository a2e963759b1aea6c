"""Weights and temperatures that change during training: pure functions of progress, 0 at the start and 1 at the end."""

from __future__ import annotations

import math

from ensemble_distill.errors import UsageError


def constant(progress: float, value: float) -> float:
    """The same throughout."""
    _checked(progress)
    return value


def linear(progress: float, start: float, end: float) -> float:
    """From ``start`` to ``end`` in a straight line."""
    return start + (end - start) * _checked(progress)


def cosine(progress: float, start: float, end: float) -> float:
    """From ``start`` to ``end`` along half a cosine: level at both ends (Loshchilov & Hutter 2017, eq. 5)."""
    return end + (start - end) * (1 + math.cos(math.pi * _checked(progress))) / 2


def warm_up(progress: float, value: float, until: float) -> float:
    """From 0 in a straight line to ``value``, which it has from ``until`` on."""
    return value * min(1.0, _checked(progress) / until) if until > 0 else constant(progress, value)


def switch_off(progress: float, value: float, after: float) -> float:
    """``value`` before the point ``after``, 0 from there on (teach first, then leave the student to the labels)."""
    return value if _checked(progress) < after else 0.0


def _checked(progress: float) -> float:
    if not 0 <= progress <= 1:
        raise UsageError(f"progress={progress}: expected a number from 0 to 1")
    return progress
